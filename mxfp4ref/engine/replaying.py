"""Recorded calls of a running server, computed again: equal, or what is wrong.

report = replay("flashinfer_dumps")
print(report.verdict)
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxfp4ref._choices import DIAGNOSES, Diagnosing
from mxfp4ref._shown import Shown
from mxfp4ref._validate import check_choice, check_int
from mxfp4ref.conformance.agreement import agreed
from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.diagnosis import Located
from mxfp4ref.conformance.families.hypothesis import Hypothesis
from mxfp4ref.conformance.finding import counted
from mxfp4ref.conformance.kernels import environment
from mxfp4ref.conformance.plain import of_exception
from mxfp4ref.conformance.results import RECORDING, CaseResult, Report, name_defects, now
from mxfp4ref.engine.arguments import generation_in_record
from mxfp4ref.engine.autotune import AutotuneCache, Prediction, read_autotune_cache
from mxfp4ref.engine.calls import Layers, arguments_of, read_call, release_of
from mxfp4ref.engine.describing import LOOKED_AT, Calls, described, reaches_limit, zeros_words
from mxfp4ref.engine.estimating import Estimate, estimate
from mxfp4ref.engine.fitting import closest_kernel, fitting_kernels
from mxfp4ref.engine.graph_buffers import GraphBuffers
from mxfp4ref.engine.recordings import Incomplete, Recording, Unreadable, find_recordings
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward

__all__ = ["ReplayOptions", "ReplayReport", "ReplayResult", "replay"]

_STATUS_OF_MANY = {"differs": "differ"}


@dataclass(frozen=True, repr=False)
class ReplayOptions(Shown):
    """How recorded calls are compared.

    Attributes:
        autotune_cache: flashinfer's autotune cache, file or folder, whose tactics are held against the bits.
        any_tile: stop at the first pair of K tiles that fits, instead of trying all.
        diagnosis: where bits differ, look for what is wrong: "quick", about a second for each call; "full", up to a
            minute; "none", only compare.
        max_calls: replay no more calls, the first ones; None for all.
    """

    autotune_cache: Path | None = None
    any_tile: bool = False
    diagnosis: Diagnosing = "full"
    max_calls: int | None = None

    def __post_init__(self) -> None:
        check_choice("diagnosis", self.diagnosis, DIAGNOSES)
        if self.max_calls is not None:
            check_int("max_calls", self.max_calls, minimum=1)


@dataclass(frozen=True, repr=False)
class ReplayResult(CaseResult):
    """What came of one recorded call.

    `status` is "equal"; "differs"; "wrong tactic", if the bits are right for other tiles than were predicted;
    "unclear", if a CUDA graph may have overwritten what was recorded; "skipped", if the call is not modelled, lacks
    its output, or was overwritten by a CUDA graph; "refused", if such arguments are; "wrong output"; "unreadable".

    Attributes:
        layer: the number of the experts, by their weights; 0 if they were not read.
        other: the activation's parameters (`swiglu_limit`, ...) that are not those of the layer's first call.
        tokens: M.
        predicted: the tactics that the call or the autotune cache names.
        limit_reached: of a call that is equal, as of `describing.reaches_limit`; None once an earlier one reached it.
        all_zero: whether no output element is other than zero, so that the call alone proves nothing.
    """

    layer: int = 0
    tokens: int = 0
    predicted: str = ""
    all_zero: bool = False
    other: tuple[str, ...] = ()
    limit_reached: bool | None = None


@dataclass(frozen=True, repr=False)
class ReplayReport(Report):
    """The results of a replay; `kernel` is the folder."""

    @property
    def verdict(self) -> str:
        counts = Counter(result.status for result in self.results)
        layers = len({r.layer for r in self.results if isinstance(r, ReplayResult)} - {0})
        words = f"{counted(len(self.results), 'recorded call')} of {counted(layers, 'layer')}: "
        words += (
            ", ".join(
                f"{count} {_STATUS_OF_MANY.get(status, status) if count > 1 else status}"
                for status, count in counts.items()
            )
            + "."
        )
        replayed = [r for r in self.results if isinstance(r, ReplayResult)]
        if predicted := [r for r in replayed if r.predicted and r.status in ("equal", "wrong tactic")]:
            held = sum(r.ok for r in predicted)
            words += f" {held} of {counted(len(predicted), 'prediction')} of tactics held."
        if zeros := sum(r.all_zero for r in replayed):
            words += f" {zeros} gave zeros only, which proves nothing."
        limits = [r.limit_reached for r in replayed if r.limit_reached is not None]
        if limits and not any(limits):
            words += f" No up or gate value of the first {LOOKED_AT} tokens of a call reaches swiglu_limit:"
            words += " such calls do not show whether the kernel applies it."
        for parameters, count in Counter(r.other for r in replayed if r.other).items():
            words += f" {counted(count, 'call')} {'has' if count == 1 else 'have'} another "
            words += f"{' and '.join(parameters)} than the first of the layer."
        words += f" {self.left} more were not replayed." if self.left else ""
        return words + self.culprit + self.further


def replay(
    folder: str | Path,
    options: ReplayOptions | None = None,
    *,
    begin: Callable[[Estimate], None] | None = None,
    progress: Callable[[CaseResult, int], None] | None = None,
) -> ReplayReport:
    """Compute every recorded call below a folder again and compare each bit.

    One call is in memory at a time. Damaged folders become results, not exceptions.

    Args:
        folder: what flashinfer's recorder or `mxfp4ref record` wrote, at any depth.
        options: how to compare.
        begin: called before the first call, with how long all will take.
        progress: called with each result and the number of calls.

    Raises:
        FileNotFoundError: there is no such folder, no recorded call in it, or no autotune cache where one is named.
        ValueError: the autotune cache is none.
    """
    options = options or ReplayOptions()
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"expected a folder of recorded calls, got {root}")
    recordings = find_recordings(root)
    if not recordings:
        raise FileNotFoundError(
            f"{root}: no recorded call of cutlass_fused_moe in it; flashinfer records with FLASHINFER_LOGLEVEL=10 "
            "FLASHINFER_DUMP_INCLUDE='*cutlass_fused_moe*' FLASHINFER_DUMP_SAFETENSORS=1"
        )
    date, start = now(), time.perf_counter()
    cache = None if options.autotune_cache is None else read_autotune_cache(options.autotune_cache)
    chosen = recordings[: options.max_calls]
    if begin is not None:
        begin(estimate(chosen, options.diagnosis))
    run = _Run(options, cache, GraphBuffers(recordings))
    results: list[ReplayResult] = []
    for recording in chosen:
        result = run.replay(recording)
        results.append(result)
        if progress is not None:
            progress(result, len(chosen))
    found = {**environment("cpu"), **run.calls.environment}
    if cache is not None and cache.problems:
        found["not read of the autotune cache"] = "; ".join(cache.problems)
    return ReplayReport(
        kernel=str(root),
        mode="exact",
        results=tuple(results),
        defects=name_defects([r.diagnosis.exact for r in results if r.diagnosis is not None]),
        seconds=time.perf_counter() - start,
        environment=found,
        finding=agreed([r.diagnosis for r in results if r.diagnosis is not None]),
        left=len(recordings) - len(chosen),
        date=date,
        command="replay",
        arguments=_arguments(root, options),
        selection=() if options.max_calls is None else ("--max-calls", str(options.max_calls)),
    )


def _arguments(root: Path, options: ReplayOptions) -> tuple[str, ...]:
    """Those of `mxfp4ref replay`, without the limit."""
    given = [str(root)]
    given += [] if options.autotune_cache is None else ["--autotune-cache", str(options.autotune_cache)]
    given += ["--any-tile"] * options.any_tile
    given += [] if options.diagnosis == "full" else ["--diagnosis", options.diagnosis]
    return tuple(given)


class _Run:
    """What the calls of one replay share."""

    def __init__(self, options: ReplayOptions, cache: AutotuneCache | None, buffers: GraphBuffers) -> None:
        self._options, self._cache, self._buffers = options, cache, buffers
        self._layers = Layers()
        self._suspects: dict[str | Hypothesis, None] = {}
        self._limit_reached = False
        self.calls = Calls()

    def replay(self, recording: Recording) -> ReplayResult:
        self.calls.add_release(recording)
        about: dict[str, Any] = {"case": recording.name, "kind": RECORDING, "why": str(recording.path)}
        try:
            arguments = arguments_of(recording)
            layer, call = read_call(recording, arguments, self._layers)
            about |= {
                "layer": layer,
                "tokens": call.num_tokens,
                "other": self._layers.other_parameters(layer, call.experts),
                "why": f"{recording.path}: {described(call)}",
            }
            self.calls.add(call)
            output = recording.output()
        except (Incomplete, NotImplementedError) as error:
            return ReplayResult(**about, status="skipped", message=str(error))
        except Unreadable as error:
            return ReplayResult(**about, status="unreadable", message=str(error))
        except (TypeError, ValueError) as error:
            return ReplayResult(**about, status="refused", message=str(error))
        if (output.dtype, output.shape) != (call.input.dtype, call.input.shape):
            wanted = f"{str(call.input.dtype).removeprefix('torch.')} {list(call.input.shape)}"
            message = f"expected a {wanted} output, got {output.dtype} {list(output.shape)}"
            return ReplayResult(**about, status="wrong output", message=message)
        start = time.perf_counter()
        about |= self._compare(recording, call, call.written_over(output), arguments)
        other = (
            f"another {' and '.join(about['other'])} than in the layer's first call" if about["other"] else ""
        )
        about["message"] = "; ".join(filter(None, (about.get("message"), other)))
        seconds = time.perf_counter() - start - about.get("diagnosis_seconds", 0.0)
        return ReplayResult(**about).lasting(comparison=seconds)

    def _compare(
        self, recording: Recording, call: MoeCall, output: Tensor, arguments: Mapping[str, Any]
    ) -> dict[str, Any]:
        prediction, note = self._predict(recording, call, arguments)
        fits = fitting_kernels(call, output, first=self._options.any_tile and prediction is None)
        written = output[call.written]
        found: dict[str, Any] = {
            "elements": written.numel(),
            "all_zero": bool(written.numel() or not call.num_tokens) and not bool((written != 0).any()),
            "predicted": str(prediction.kernel) if prediction else "",
        }
        if not fits:
            return found | self._differing(recording, call, output)
        if not self._limit_reached:
            found["limit_reached"] = reaches_limit(call)
            self._limit_reached = bool(found["limit_reached"])
        found |= {"status": "equal", "tiles": tuple(map(str, fits)) if call.experts.tactics_show else ()}
        if prediction is not None and not any(fit.has(prediction.kernel) for fit in fits):
            found |= {"status": "wrong tactic", "elements": 0}  # no element is wrong
            note = (
                f"expected {prediction.kernel} by {prediction.source}; the bits are those of K tiles "
                f"{', '.join(map(str, fits))}"
            )
        zeros = zeros_words(call) if found["all_zero"] else "" if found["elements"] else _NOT_WRITTEN
        notes = [note, zeros, self._unknown_release(recording, call)]
        return found | {"message": "; ".join(filter(None, notes))}

    def _unknown_release(self, recording: Recording, call: MoeCall) -> str:
        release = release_of(recording.metadata())
        if release is None or generation_in_record(release) or not call.experts.quantized:
            return ""
        return (
            f"flashinfer {release} is in no record: by its scales, the {call.kernel.generation.name} kernel"
        )

    def _predict(
        self, recording: Recording, call: MoeCall, arguments: Mapping[str, Any]
    ) -> tuple[Prediction | None, str]:
        """The tactics that the call should have run, or a note why none are predicted."""
        if not call.experts.tactics_show:
            return None, ""
        if arguments["profile_ids"] is not None and call.kernel.generation.forces_tactics:
            return Prediction(call.kernel, "profile_ids"), ""
        if arguments["kernel"] is not None:
            return Prediction(call.kernel, "kernel"), ""
        if self._cache is None:
            return None, ""
        try:
            prediction = self._cache.predict(call, arguments, release_of(recording.metadata()))
        except ValueError as error:
            return None, f"no prediction: {error}"
        return (
            prediction,
            "" if prediction else "no prediction: the autotune cache has nothing for this layer",
        )

    def _differing(self, recording: Recording, call: MoeCall, output: Tensor) -> dict[str, Any]:
        call = replace(call, kernel=closest_kernel(call, output))
        expected = forward(call)
        wrong = differing(output, expected)
        found: dict[str, Any] = {"status": "differs", "differing": int(wrong.sum())}
        in_graph = recording.in_graph()
        if in_graph and (reason := self._buffers.overwritten(recording, output)):
            return found | {"status": "skipped", "message": reason}
        effort = self._options.diagnosis
        if effort != "none":
            start = time.perf_counter()
            outputs, right = {"output": output}, {"output": expected}
            located = Located("moe", call, outputs, right)
            try:
                diagnosis = located.told(located.search(tuple(self._suspects), effort))
                # The next call that differs may do so for the same reason.
                self._suspects = dict.fromkeys([*diagnosis.exact, *located.found, *self._suspects])
                found["diagnosis"] = diagnosis
            except Exception as error:  # of outputs that nobody has thought of; the other calls are not lost
                found["message"] = f"no diagnosis: {of_exception(error)}"
            found["diagnosis_seconds"] = time.perf_counter() - start
        exact = bool(found["diagnosis"].exact) if "diagnosis" in found else False
        if in_graph and not exact and _whole_tokens(wrong):
            found |= {"status": "unclear", "message": _UNCLEAR, "diagnosis": None}
        elif not _owned_once(call):
            found["message"] = "; ".join(filter(None, (found.get("message"), _REPEATED)))
        return found


_NOT_WRITTEN = "no token has an expert of this rank: with enable_alltoall the kernel writes nothing"
_UNCLEAR = (
    "whole tokens differ, and a CUDA graph made the call: flashinfer's recorder reads inputs and output after the "
    "whole graph has run, when a later kernel may have written into either (an all-reduce or a residual in place, a "
    "buffer of all layers). Record the same call without graphs to know whether the kernel is wrong"
)
_REPEATED = (
    "a token names an expert twice: the kernel adds what its workspace held before in the second slot, which no "
    "reference can know"
)


def _whole_tokens(wrong: Tensor) -> bool:
    """Whether the tokens that differ do so in most of their elements, as they do if a buffer was overwritten."""
    tokens = wrong[wrong.any(1)]
    return bool((tokens.to(torch.float32).mean(1) > 0.5).all())


def _owned_once(call: MoeCall) -> bool:
    """Whether no token names an expert of this rank twice."""
    ids = call.token_selected_experts.sort(dim=1).values
    first = call.ep_rank * call.experts.num_experts
    here = (ids >= first) & (ids < first + call.experts.num_experts)
    return not bool(((ids[:, 1:] == ids[:, :-1]) & here[:, 1:]).any())
