"""Running a kernel over golden cases: equal, or what is wrong with it.

    report = run("mypackage.kernels:fused_moe", open_goldens())
    print(report.verdict)

In mode "exact" an output has to equal, in every bit, the expected output for one of the legitimate pairs of K
tiles. In mode "bounded", for kernels that sum in another order, it has to lie in the interval that `bounds`
computes for it; only cases of kind "moe" have such intervals, all others stay exact.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxfp4ref._validate import check_choice
from mxfp4ref.conformance.bounds import bound
from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.diagnosis import Diagnosis, diagnose, predict
from mxfp4ref.conformance.execution import Worker, execute, execute_within, to_device
from mxfp4ref.conformance.kernels import Kernel, load_kernel
from mxfp4ref.conformance.reproducer import write_reproducer
from mxfp4ref.defects import DEFECTS
from mxfp4ref.goldens.runs import Run, runs
from mxfp4ref.goldens.store import Case, Goldens
from mxfp4ref.model.forward import forward
from mxfp4ref.sm90.tactics import Tactic, each_kernel

__all__ = ["MODES", "PASSING", "CaseResult", "Report", "name_defects", "run", "run_case"]

MODES = ("exact", "bounded")
PASSING = ("equal", "within bounds", "skipped")


@dataclass(frozen=True)
class CaseResult:
    """What came of one case.

    Attributes:
        case, kind, why: of the golden case.
        status: "equal", "within bounds", "differs", "outside bounds", or one of `execution.PROBLEMS`.
        tiles: the K tiles ("128x256", for GEMM1 and GEMM2) whose expected output the kernel's equals; the tactics
            where all were run.
        elements, differing: output elements compared and how many differ; in mode "bounded", and where no pair
            of tiles agrees, from the closest expected output.
        outside: elements outside their bounds, in mode "bounded".
        message: the problem, in words.
        seconds: the kernel's time for its first run.
        diagnosis: of the first run that differs.
    """

    case: str
    kind: str
    why: str
    status: str
    tiles: tuple[str, ...] = ()
    elements: int = 0
    differing: int = 0
    outside: int = 0
    message: str = ""
    seconds: float = 0.0
    diagnosis: Diagnosis | None = None

    @property
    def ok(self) -> bool:
        return self.status in PASSING


@dataclass(frozen=True)
class Report:
    """The results of a run.

    Attributes:
        kernel: its specification.
        mode: "exact" or "bounded".
        results: one for each case.
        defects: the named defects each of which predicts all outputs that differ, in every bit.
        seconds: of the whole run.
        environment: versions and machine.
    """

    kernel: str
    mode: str
    results: tuple[CaseResult, ...]
    defects: tuple[str, ...] = ()
    seconds: float = 0.0
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every case passed and at least one ran."""
        return all(r.ok for r in self.results) and any(r.status != "skipped" for r in self.results)

    @property
    def verdict(self) -> str:
        """The result in a sentence or two."""
        ran = [r for r in self.results if r.status != "skipped"]
        failed = [r for r in ran if not r.ok]
        if not ran:
            return f"{self.kernel} ran on no case."
        if not failed:
            how = "equals the expected bits" if self.mode == "exact" else "stays within the bounds"
            return f"{self.kernel} conforms: it {how} in all {len(ran)} cases."
        words = f"{self.kernel} does not conform: {len(failed)} of {len(ran)} cases fail."
        if self.defects:
            which = " or ".join(self.defects)
            summary = DEFECTS[self.defects[0]].summary
            more = "" if len(self.defects) == 1 else " (these cases do not tell them apart)"
            words += f" Every wrong bit is that of {which}{more}: {summary}."
        elif (closest := self.closest) is not None:
            name, fraction = closest
            words += f" No named defect predicts all of it; closest is {name}, with {fraction:.0%} of the wrong bits."
        return words

    @property
    def closest(self) -> tuple[str, float] | None:
        """Without an exact one, the defect with the highest mean fraction over the cases that differ."""
        diagnoses = [r.diagnosis for r in self.results if r.diagnosis is not None]
        total: dict[str, float] = {}
        for diagnosis in diagnoses:
            for prediction in diagnosis.predictions:
                total[prediction.name] = total.get(prediction.name, 0.0) + prediction.fraction
        if not total:
            return None
        best = max(total, key=lambda name: total[name])
        return best, total[best] / len(diagnoses)


def run(
    kernel: str | Callable[..., Any] | Kernel,
    cases: Goldens | Iterable[Case],
    *,
    mode: str = "exact",
    storage: str = "wider",
    confidence: float | None = None,
    device: str | None = None,
    timeout: float | None = None,
    isolate: bool = False,
    repeat: bool = True,
    all_tactics: bool = False,
    diagnosed: bool = True,
    dump: Path | None = None,
    progress: Callable[[CaseResult], None] | None = None,
) -> Report:
    """Run a kernel over cases and compare.

    Args:
        kernel: a specification as in `kernels`, or a callable with flashinfer's signature.
        cases: goldens, or any cases; loaded one at a time.
        mode: "exact" or "bounded".
        storage, confidence: which bounds, as in `bounds.bound`.
        device: where the kernel's tensors go.
        timeout: seconds a run may take; None for no limit. What becomes of a run that takes longer is said in
            `execution`.
        isolate: run the kernel, given by its specification, in a process of its own.
        repeat: run each case a second time and compare the bits (not the stand-ins on whole-size layers).
        all_tactics: run each case by every tile and cluster of either GEMM, the other one's being the default.
        diagnosed: look for what is wrong where bits differ.
        dump: a folder for reproducers of the cases that fail.
        progress: called with each result.

    Raises:
        KernelError: the kernel cannot be loaded.
        GoldenError: a case is damaged.
        ValueError: an unknown mode, a callable to be isolated, or all tactics of a kernel that is isolated or
            whose tactics cannot be chosen.
    """
    check_choice("mode", mode, MODES)
    loaded = kernel if isinstance(kernel, Kernel) else load_kernel(kernel, device)
    if isolate and not isinstance(kernel, str):
        raise ValueError(
            f"isolate: expected a kernel given by its specification, got {type(kernel).__name__}"
        )
    if all_tactics and (isolate or loaded.force is None):
        reason = (
            "one that runs in this process" if isolate else "one whose tactics can be chosen (flashinfer)"
        )
        raise ValueError(f"all_tactics: expected a kernel that is {reason}, got {loaded.name}")
    start = time.perf_counter()
    results: list[CaseResult] = []
    suspects: tuple[str, ...] | None = None
    with ExitStack() as stack:
        worker = stack.enter_context(Worker(loaded.name, device)) if isolate else None
        for case in _each(cases):
            result = run_case(
                loaded,
                case,
                mode=mode,
                storage=storage,
                confidence=confidence,
                timeout=timeout,
                worker=worker,
                repeat=repeat,
                all_tactics=all_tactics,
                diagnosed=diagnosed,
                suspects=suspects,
                dump=dump,
            )
            if result.diagnosis is not None:
                suspects = name_defects([suspects, result.diagnosis.exact]) or suspects
            results.append(result)
            if progress is not None:
                progress(result)
    named = name_defects([r.diagnosis.exact for r in results if r.diagnosis is not None])
    if len(named) > 1:
        named = _separate(named, results, cases)
    return Report(
        loaded.name, mode, tuple(results), named, time.perf_counter() - start, _environment(loaded.device)
    )


def run_case(
    kernel: Kernel,
    case: Case,
    *,
    mode: str = "exact",
    storage: str = "wider",
    confidence: float | None = None,
    timeout: float | None = None,
    worker: Worker | None = None,
    repeat: bool = True,
    all_tactics: bool = False,
    diagnosed: bool = True,
    suspects: tuple[str, ...] | None = None,
    dump: Path | None = None,
) -> CaseResult:
    """Run a kernel on one case; arguments as in `run`, `suspects` as in `diagnosis.diagnose`."""
    about: dict[str, Any] = {"case": case.id, "kind": case.kind, "why": case.why}
    if case.kind not in kernel.kinds:
        return CaseResult(
            **about, status="skipped", message=f"{kernel.name} does not run cases of kind {case.kind}"
        )
    all_runs = runs(case)
    matched: list[str] = []
    elements = differing_elements = outside = 0
    seconds = 0.0
    diagnosis = None
    needed = _by_tactic(kernel, case) if all_tactics else _needed(kernel, case, all_runs)
    for index, (variant, one) in enumerate(needed):
        again = repeat and (index == 0 or all_tactics) and not _takes_long(kernel, case)
        if worker is not None:
            outcome = worker.execute(timeout, case, all_runs.index(one), repeat=again)
        else:
            outcome = execute_within(
                timeout, partial(execute, variant, case.kind, one.inputs, one.expected, repeat=again)
            )
        if outcome.problem:
            tiles = f" (K tiles {one.tiles})" if len(all_runs) > 1 and kernel.forces_tile_k else ""
            if all_tactics:
                tiles = f" (tactics {one.tiles})"
            if dump is not None and outcome.problem != "skipped":
                write_reproducer(dump, case, one, kernel.name, {})
            return CaseResult(
                **about, status=outcome.problem, message=outcome.message + tiles, seconds=outcome.seconds
            )
        seconds = seconds or outcome.seconds
        candidates = [one] if kernel.forces_tile_k else all_runs
        counts = [_count(outcome.outputs, candidate.expected) for candidate in candidates]
        elements += sum(t.numel() for t in one.expected.values())
        if 0 in counts:
            matched += [
                c.tiles for c, count in zip(candidates, counts, strict=True) if count == 0 and c.tiles
            ]
            continue
        differing_elements += min(counts)
        closest = candidates[counts.index(min(counts))]
        if mode == "bounded" and case.kind == "moe":
            bounds = bound(closest.inputs, storage=storage, confidence=confidence)
            escaped = ~bounds.contains(outcome.outputs["output"])
            outside += int(escaped.sum())
            if not bool(escaped.any()):
                continue
        if dump is not None and diagnosis is None:
            write_reproducer(dump, case, closest, kernel.name, outcome.outputs)
        if diagnosed and diagnosis is None:
            diagnosis = diagnose(
                case.kind, closest.inputs, outcome.outputs, closest.expected, suspects=suspects
            )
    status = "equal" if differing_elements == 0 else "differs"
    if differing_elements and mode == "bounded" and case.kind == "moe":
        status = "outside bounds" if outside else "within bounds"
    return CaseResult(
        **about,
        status=status,
        tiles=tuple(dict.fromkeys(matched)),
        elements=elements,
        differing=differing_elements,
        outside=outside,
        seconds=seconds,
        diagnosis=diagnosis,
    )


def _needed(kernel: Kernel, case: Case, all_runs: list[Run]) -> list[tuple[Kernel, Run]]:
    """The runs to make: one where the kernel chooses its K tiles, else all.

    Of cases that take long those in which each tile of each GEMM occurs.
    """
    if not kernel.forces_tile_k:
        return [(kernel, all_runs[0])]
    if not _takes_long(kernel, case):
        return [(kernel, one) for one in all_runs]
    chosen: list[Run] = []
    seen: set[tuple[int, str]] = set()
    for one in sorted(
        all_runs, key=lambda one: len(set(one.tiles.split("x")))
    ):  # 128x128, 256x256, ... first
        tiles = set(enumerate(one.tiles.split("x")))
        if not tiles <= seen:
            chosen.append(one)
            seen |= tiles
    return [(kernel, one) for one in chosen]


def _by_tactic(kernel: Kernel, case: Case) -> Iterator[tuple[Kernel, Run]]:
    """Every tactic of each GEMM beside the other one's default, with the output that its tiles give.

    That is the stored one, but where an N tile shows (the specification, section 3): the model tells for each.
    """
    assert kernel.force is not None
    call = to_device(case.call(), kernel.device)
    expected: dict[Any, Tensor] = {}
    for forced in each_kernel(call.experts.hidden_size, call.experts.intermediate_size, kernel.generation):
        inputs = replace(call, kernel=forced)
        tiles = forced.tile_k, forced.tile_n
        if tiles not in expected:
            stored = case.outputs.get(forced.tile_k) if set(forced.tile_n) == {Tactic().tile_n} else None
            expected[tiles] = forward(inputs).cpu() if stored is None else stored
        yield kernel.force(forced), Run(str(forced), inputs, {"output": expected[tiles]})


def _takes_long(kernel: Kernel, case: Case) -> bool:
    """Whether a stand-in would take seconds for each run: a layer of whole size on a CPU."""
    return bool(case.derived) and kernel.forces_tile_k and kernel.device == "cpu"


def name_defects(exact: Iterable[Iterable[str] | None]) -> tuple[str, ...]:
    """The defects that are in every one of the given sets; None counts as all defects."""
    sets = [tuple(names) for names in exact if names is not None]
    return tuple(name for name in (sets[0] if sets else ()) if all(name in names for names in sets))


def _separate(
    names: tuple[str, ...], results: list[CaseResult], cases: Goldens | Iterable[Case]
) -> tuple[str, ...]:
    """Of defects that explain all failures alike, those that also leave the passing cases as they are."""
    if not isinstance(cases, Goldens):
        return names
    passed = [r for r in results if r.status == "equal" and r.kind == DEFECTS[names[0]].target]
    for result in passed:
        case = cases.load(result.case)
        if case.derived or len(names) == 1:
            continue
        one = runs(case)[0]
        found = {name: predict(one.inputs, one.expected, one.expected, name) for name in names}
        names = tuple(name for name in names if (p := found[name]) is None or p.exact) or names
    return names


def _count(outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> int:
    return sum(int(differing(outputs[name], want).sum()) for name, want in expected.items())


def _each(cases: Goldens | Iterable[Case]) -> Iterator[Case]:
    if isinstance(cases, Goldens):
        for name in cases.names():
            yield cases.load(name)
    else:
        yield from cases


def _environment(device: str) -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.platform()}
    if device.startswith("cuda") and torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)}
    return found
