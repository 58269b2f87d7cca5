"""Recorded calls of a running server, computed again: equal, or what is wrong.

report = replay("flashinfer_dumps")
print(report.verdict)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxfp4ref._validate import check_function, check_instance
from mxfp4ref._validate import shown as in_short
from mxfp4ref.conformance.bounds.bounded import where_outside
from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.diagnosis import Located
from mxfp4ref.conformance.families.hypothesis import Hypothesis
from mxfp4ref.conformance.findings.agreement import agreed, name_defects
from mxfp4ref.conformance.isolation.execution import Outcome
from mxfp4ref.conformance.isolation.plain import of_exception
from mxfp4ref.conformance.kernels.loading import environment
from mxfp4ref.conformance.looking import Known
from mxfp4ref.conformance.results import PASSING, RECORDING, CaseResult, now
from mxfp4ref.conformance.suite import Interrupted
from mxfp4ref.engine.answering import answering
from mxfp4ref.engine.arguments import generation_in_record
from mxfp4ref.engine.autotune import AutotuneCache, Prediction, read_autotune_cache
from mxfp4ref.engine.calls import Layers, arguments_of, read_call, release_of
from mxfp4ref.engine.describing import Calls, described, local_ids, zeros_words
from mxfp4ref.engine.estimating import Estimate, estimate
from mxfp4ref.engine.fitting import closest_kernel, fitting_kernels
from mxfp4ref.engine.graph_buffers import GraphBuffers
from mxfp4ref.engine.recordings import Incomplete, Recording, Unreadable, find_recordings
from mxfp4ref.engine.replay_report import ReplayOptions, ReplayReport, ReplayResult
from mxfp4ref.engine.unshown import shown
from mxfp4ref.goldens.runs import Run
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward

__all__ = ["ReplayOptions", "ReplayReport", "ReplayResult", "replay"]


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
        KernelError: the options' kernel cannot be loaded, or does not run whole calls.
        Interrupted: as KeyboardInterrupt, with a report of the calls that had been replayed.
    """
    options = ReplayOptions() if options is None else options
    if not isinstance(folder, str | Path):
        raise TypeError(f"folder: expected a path, got {type(folder).__name__}")
    check_instance("options", options, ReplayOptions)
    check_function("begin", begin)
    check_function("progress", progress)
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"folder: expected one of recorded calls, got {in_short(str(root))}")
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
    interrupted = False
    with answering(options) as run.answer:
        try:
            for recording in chosen:
                result = run.replay(recording)
                results.append(result)
                if progress is not None:
                    progress(result, len(chosen))
        except KeyboardInterrupt:
            interrupted = True
    found = {**environment("cpu"), **run.calls.environment}
    if cache is not None and cache.problems:
        found["not read of the autotune cache"] = "; ".join(cache.problems)
    report = ReplayReport(
        kernel=options.kernel or str(root),
        mode=options.mode,
        results=tuple(results),
        defects=name_defects([r.diagnosis.exact for r in results if r.diagnosis is not None]),
        seconds=time.perf_counter() - start,
        environment=found,
        finding=agreed([r.diagnosis for r in results if r.diagnosis is not None]),
        left=len(recordings) - len(results),
        interrupted=interrupted,
        date=date,
        command="replay",
        arguments=_arguments(root, options),
        selection=() if options.max_calls is None else ("--max-calls", str(options.max_calls)),
    )
    if interrupted:
        raise Interrupted(report)
    return report


def _arguments(root: Path, options: ReplayOptions) -> tuple[str, ...]:
    """Those of `mxfp4ref replay`, without the limit."""
    given = [str(root)]
    given += [] if options.autotune_cache is None else ["--autotune-cache", str(options.autotune_cache)]
    given += ["--any-tile"] * options.any_tile
    given += [] if options.diagnosis == "full" else ["--diagnosis", options.diagnosis]
    for name, usual in (("mode", "exact"), ("kernel", None), ("device", None), ("timeout", 600.0)):
        if (value := getattr(options, name)) != usual:
            given += [f"--{name}", f"{value:g}" if isinstance(value, float) else str(value)]
    return tuple(given)


class _Run:
    """What the calls of one replay share."""

    def __init__(self, options: ReplayOptions, cache: AutotuneCache | None, buffers: GraphBuffers) -> None:
        self._options, self._cache, self._buffers = options, cache, buffers
        self._layers = Layers()
        self._suspects: dict[str | Hypothesis, None] = {}
        self._shown: set[str] = set()
        self._unexplained = False  # whether nothing was found that predicts some call of real size
        self.calls = Calls()
        self.answer: Callable[[MoeCall], Outcome] | None = None

    def replay(self, recording: Recording) -> ReplayResult:
        self.calls.add_release(recording)
        about: dict[str, Any] = {"case": recording.name, "kind": RECORDING, "why": str(recording.path)}
        try:
            arguments = arguments_of(recording)
            layer, call = read_call(recording, arguments, self._layers)
            about |= {
                "layer": layer,
                "tokens": call.num_tokens,
                "local_ids": local_ids(call),
                "own": self.answer is None and recording.of_this_package(),
                "other": self._layers.other_parameters(layer, call.experts),
                "why": f"{recording.path}: {described(call)}",
            }
            self.calls.add(call)
            outcome = None
            if self.answer is not None:
                start = time.perf_counter()
                outcome = self.answer(call)
                about["kernel_seconds"] = time.perf_counter() - start
            if outcome is not None and outcome.problem:
                return ReplayResult(**about, status=outcome.problem, message=outcome.message)
            output = recording.output() if outcome is None else outcome.outputs["output"]
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
        if outcome is not None and outcome.message and about["status"] in PASSING:
            about |= {"status": "wrong output", "message": outcome.message}
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
        found["shown"] = shown(call, self._shown)
        self._shown |= {name for name, seen in found["shown"].items() if seen}
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

    def _as_before(self, located: Located) -> Known | None:
        """What earlier calls that differed came to, if that predicts every bit of this one too."""
        if not self._suspects:
            return None
        effort = "full" if located.large else "quick"
        limit = _FOR_NAMES * any(isinstance(one, str) for one in self._suspects)
        known = located.search(tuple(self._suspects), effort, seconds=_AS_BEFORE, limit=limit)
        return known if known[1].exact else None

    def _differing(self, recording: Recording, call: MoeCall, output: Tensor) -> dict[str, Any]:
        call = replace(call, kernel=closest_kernel(call, output))
        expected = forward(call)
        wrong = differing(output, expected)
        found: dict[str, Any] = {"status": "differs", "differing": int(wrong.sum())}
        outputs, right = {"output": output}, {"output": expected}
        outside = None
        if self._options.mode == "bounded":
            outside = where_outside(Run("", call, right), outputs)
        if outside is not None:
            found |= {"status": "outside bounds", "outside": int(outside.sum())}
            if not found["outside"]:
                return found | {"status": "within bounds"}
        in_graph = self.answer is None and recording.in_graph()
        if in_graph and (reason := self._buffers.overwritten(recording, output)):
            return found | {"status": "skipped", "message": reason}
        effort = self._options.diagnosis
        if effort != "none":
            start = time.perf_counter()
            located = Located("moe", call, outputs, right, outside)
            # Such a search takes a minute: as of cases, one that finds nothing is enough.
            if located.large and self._unexplained:
                effort = "quick"
            try:
                known = self._as_before(located) or located.search(tuple(self._suspects), effort)
                diagnosis = located.told(known)
                self._unexplained |= located.large and not known[1].exact
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


_AS_BEFORE, _FOR_NAMES = 0.1, 2.0  # seconds, of the second for named defects on a layer of real size
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
