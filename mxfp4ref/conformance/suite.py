"""Running a kernel over golden cases: equal, or what is wrong with it.

    report = run("mypackage.kernels:fused_moe", open_goldens())
    print(report.verdict)

In mode "exact" an output has to equal, in every bit, the expected output for one of the legitimate pairs of K
tiles. In mode "bounded", for kernels that sum in another order, it has to lie in the interval that `bounds`
computes for it, and a router's ids and weights in those of `router_bounds`; all other kinds stay exact.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mxfp4ref._validate import check_below, check_choice, check_instance, check_int, shown
from mxfp4ref.conformance.adapters import Kernel
from mxfp4ref.conformance.bounded import outside_bounds
from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.diagnosing import Failed, Failing, diagnosed
from mxfp4ref.conformance.execution import Outcome, execute_within
from mxfp4ref.conformance.handing import to_device
from mxfp4ref.conformance.kernels import check_device, environment, is_stand_in, load_kernel
from mxfp4ref.conformance.plain import like, raw_bytes, tensor_of
from mxfp4ref.conformance.reproducer import write_reproducer
from mxfp4ref.conformance.results import MODES, CaseResult, Report
from mxfp4ref.conformance.worker import Worker
from mxfp4ref.formats.generations import NEWEST
from mxfp4ref.goldens import Goldens
from mxfp4ref.goldens.case import Case
from mxfp4ref.goldens.runs import Run, runs
from mxfp4ref.model.forward import forward
from mxfp4ref.sm90.tactics import Sm90Kernel, each_kernel

__all__ = ["Options", "run", "run_case"]


@dataclass(frozen=True)
class Options:
    """How a kernel is compared with the goldens.

    Attributes:
        mode: "exact" or "bounded".
        storage, confidence: which bounds, as in `bounds.bound`.
        timeout: seconds a run may take; None for no limit. `execution` says what becomes of one that takes longer.
        repeat: run each case a second time and compare the bits (not the stand-ins on whole-size layers).
        all_tactics: run each case by every tile and cluster of either GEMM, the other one's being the default.
        diagnosed: look for what is wrong where bits differ.
        dump: a folder for reproducers of the cases that fail.
        max_failures: how many cases may fail before the rest is left out; None for no limit.
    """

    mode: str = "exact"
    storage: str = "wider"
    confidence: float | None = None
    timeout: float | None = None
    repeat: bool = True
    all_tactics: bool = False
    diagnosed: bool = True
    dump: Path | None = None
    max_failures: int | None = None

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, MODES)
        check_below("confidence", self.confidence, 1, "a probability between 0 and 1")
        check_below("timeout", self.timeout, 1e9, "seconds, above 0 and below 10^9")  # as threads take them
        if self.max_failures is not None:
            check_int("max_failures", self.max_failures, minimum=1)


_DEFAULTS = Options()


def run(
    kernel: str | Callable[..., Any] | Kernel,
    cases: Goldens | Iterable[Case],
    options: Options = _DEFAULTS,
    *,
    device: str | None = None,
    isolate: bool | None = None,
    progress: Callable[[CaseResult], None] | None = None,
) -> Report:
    """Run a kernel over cases and compare.

    Args:
        kernel: a name as in `kernels`, or a callable with flashinfer's signature.
        cases: goldens, or any cases; loaded one at a time.
        options: how to compare.
        device: where the kernel's tensors go.
        isolate: run the kernel in a process of its own, which never sees the expected outputs. By default that is
            done with every kernel that is given by its name and is not one of this package's own. A kernel that is
            not isolated may end this process, and a verdict on one that means harm is worth nothing.
        progress: called with each result.

    Raises:
        KernelError: the kernel cannot be loaded, or its device is not here.
        GoldenError: a case is damaged.
        TypeError: an argument is something else, or something else than a case is among the cases.
        ValueError: a callable to be isolated, or all tactics of a kernel whose tactics cannot be chosen.
    """
    check_instance("options", options, Options)
    if isinstance(cases, str) or not isinstance(cases, Goldens | Iterable):
        raise TypeError(f"cases: expected Goldens or Case objects, got {type(cases).__name__} {shown(cases)}")
    if isolate and not isinstance(kernel, str):
        raise ValueError(f"isolate: expected a kernel given by its name, got {type(kernel).__name__}")
    start = time.perf_counter()
    results: list[CaseResult] = []
    failing = Failing(options.diagnosed)
    with ExitStack() as stack:
        worker = None
        if isinstance(kernel, str) and (not is_stand_in(kernel) if isolate is None else isolate):
            worker = stack.enter_context(Worker(kernel, device, options.timeout))
            loaded, where = worker.kernel, worker.environment
        else:
            loaded = kernel if isinstance(kernel, Kernel) else load_kernel(kernel, device)
            check_device(loaded.device)
            where = environment(loaded.device)
        if options.all_tactics and not loaded.forces_tactics:
            raise ValueError(
                f"all_tactics: expected a kernel whose tactics can be chosen (flashinfer), got {loaded.name}"
            )
        remaining = _each(cases)
        for case in remaining:
            result, failure = _run_case(loaded, case, options, worker)
            result = failing.take(result, failure)
            results.append(result)
            if progress is not None:
                progress(result)
            if sum(not r.ok for r in results) == options.max_failures:
                break
        left = sum(1 for _ in (cases.names()[len(results) :] if isinstance(cases, Goldens) else remaining))
    found = failing.verdict(results, cases if isinstance(cases, Goldens) else None)
    seconds = time.perf_counter() - start
    return Report(
        loaded.name, options.mode, found.results, found.defects, seconds, where, found.finding, left
    )


def run_case(
    kernel: Kernel,
    case: Case,
    options: Options = _DEFAULTS,
    *,
    worker: Worker | None = None,
    effort: str = "full",
) -> CaseResult:
    """Run a kernel on one case; arguments as in `run`, `effort` as in `diagnosis.diagnose`."""
    result, failure = _run_case(kernel, case, options, worker)
    return result if failure is None else diagnosed(result, failure, effort=effort)


def _run_case(
    kernel: Kernel, case: Case, options: Options, worker: Worker | None
) -> tuple[CaseResult, Failed | None]:
    """The result without a diagnosis, and what is to be diagnosed."""
    check_instance("case", case, Case)
    about: dict[str, Any] = {"case": case.id, "kind": case.kind, "why": case.why}
    if reason := kernel.unable(case):
        return CaseResult(**about, status="skipped", message=reason), None
    all_runs = _runs(kernel, case)
    # As bytes, before the kernel runs: nothing that it does in this process changes them.
    bits = {one: _bits(one) for one in all_runs}
    needed = _by_tactic(kernel, case) if options.all_tactics else _needed(kernel, case, all_runs)
    found: list[_Comparison] = []
    seconds, left, unsaid = 0.0, "", ""
    failure: Failed | None = None
    for index, one in enumerate(needed):
        repeat = options.repeat and (index == 0 or options.all_tactics) and not _takes_long(kernel, case)
        candidates = {one: bits.get(one) or _bits(one)} if kernel.forces_tile_k else bits
        if worker is not None:
            outcome = worker.execute(options.timeout, case, one, repeat=repeat)
        else:
            inputs = case.kind, one.inputs, one.expected
            outcome = execute_within(options.timeout, kernel, inputs, repeat=repeat)
        seconds, left = seconds or outcome.seconds, left or outcome.left
        if outcome.problem:
            if outcome.problem != "skipped":
                unsaid = _dump(options, kernel, case, one, {})
            told = options.all_tactics or (kernel.forces_tile_k and len(all_runs) > 1)
            which = f" ({'tactics' if options.all_tactics else 'K tiles'} {one.tiles})" if told else ""
            message = _joined(outcome.message + which, _put_back(left), unsaid)
            return CaseResult(**about, status=outcome.problem, message=message, seconds=outcome.seconds), None
        compared = _compare(case.kind, outcome, candidates, options)
        if compared.wrong and not any(earlier.wrong for earlier in found):
            unsaid = _dump(options, kernel, case, compared.closest, outcome.outputs)
            if options.diagnosed:
                failure = Failed(case.kind, compared.closest, outcome.outputs)
        found.append(compared)
    result = CaseResult(
        **about,
        status=_status(found),
        tiles=tuple(dict.fromkeys(tiles for compared in found for tiles in compared.tiles)),
        elements=sum(compared.elements for compared in found),
        differing=sum(compared.differing for compared in found),
        outside=sum(compared.outside or 0 for compared in found),
        message=_joined(_put_back(left), unsaid),
        seconds=seconds,
    )
    return result, failure


def _bits(one: Run) -> dict[str, bytes]:
    return {name: raw_bytes(tensor) for name, tensor in one.expected.items()}


def _put_back(left: str) -> str:
    return f"the kernel changed {left}, which was put back" if left else ""


def _joined(*words: str) -> str:
    return "; ".join(filter(None, words))


def _dump(options: Options, kernel: Kernel, case: Case, one: Run, outputs: Mapping[str, Tensor]) -> str:
    """Write a reproducer, if one is wanted; why it could not be written, which is no reason to stop."""
    if options.dump is None:
        return ""
    try:
        write_reproducer(options.dump, case, one, kernel.name, outputs)
    except (OSError, ValueError) as error:
        return f"its reproducer was not written: {error}"
    return ""


@dataclass(frozen=True)
class _Comparison:
    """The outputs of one run against each expectation that they may meet.

    Attributes:
        closest: the run whose expected outputs differ in the fewest elements.
        tiles: of the runs whose expected outputs are equal.
        elements, differing: compared with the closest.
        outside: of those that differ, how many lie outside their bounds; None where no bounds apply.
    """

    closest: Run
    tiles: tuple[str, ...]
    elements: int
    differing: int
    outside: int | None

    @property
    def wrong(self) -> bool:
        return bool(self.differing if self.outside is None else self.outside)


def _compare(
    kind: str, outcome: Outcome, expected: Mapping[Run, Mapping[str, bytes]], options: Options
) -> _Comparison:
    counts = [
        sum(_count_differing(outcome.outputs[name], raw) for name, raw in bits.items())
        for bits in expected.values()
    ]
    candidates = list(expected)
    closest = candidates[counts.index(min(counts))]
    tiles = tuple(one.tiles for one, count in zip(candidates, counts, strict=True) if not count and one.tiles)
    outside = None
    if min(counts) and options.mode == "bounded":
        how = options.storage, options.confidence
        outside = outside_bounds(kind, closest, outcome.outputs, *how)
    elements = sum(want.numel() for want in closest.expected.values())
    return _Comparison(closest, tiles, elements, min(counts), outside)


def _count_differing(got: Tensor, expected: bytes) -> int:
    """The elements in which they differ: none if and only if the bytes are equal."""
    if raw_bytes(got) == expected:
        return 0
    return max(int(differing(got, tensor_of(expected, like(got))).sum()), 1)


def _status(found: Sequence[_Comparison]) -> str:
    different = [compared for compared in found if compared.differing]
    if not different:
        return "equal"
    if any(compared.outside is None for compared in different):
        return "differs"
    return "outside bounds" if any(compared.wrong for compared in different) else "within bounds"


def _runs(kernel: Kernel, case: Case) -> list[Run]:
    """The case's runs; for an older generation of the kernel, which goldens are not of, what the model says."""
    if case.kind != "moe" or kernel.generation is NEWEST:
        return runs(case)
    call = case.call(Sm90Kernel(generation=kernel.generation))
    return [Run("128x128", call, {"output": forward(call)})]


def _needed(kernel: Kernel, case: Case, all_runs: list[Run]) -> list[Run]:
    """The runs to make: one where the kernel chooses its K tiles, else all.

    Of cases that take long only those are made in which a tile of either GEMM occurs for the first time.
    """
    if not kernel.forces_tile_k:
        return all_runs[:1]
    if not _takes_long(kernel, case):
        return all_runs
    chosen: list[Run] = []
    seen: set[tuple[int, str]] = set()
    # Runs with the same tile in both GEMMs come first: each of them shows two new ones.
    for one in sorted(all_runs, key=lambda one: len(set(one.tiles.split("x")))):
        tiles = set(enumerate(one.tiles.split("x")))
        if not tiles <= seen:
            chosen.append(one)
            seen |= tiles
    return chosen


def _by_tactic(kernel: Kernel, case: Case) -> Iterator[Run]:
    """Every tactic of each GEMM beside the other one's default, with the output that its tiles give.

    That is the stored one, but where an N tile shows (docs/arithmetic.md, section 3): the model tells for each.
    """
    call = to_device(case.call(), kernel.device)
    expected: dict[Any, Tensor] = {}
    for forced in each_kernel(call.experts.hidden_size, call.experts.intermediate_size, kernel.generation):
        inputs = replace(call, kernel=forced)
        tiles = forced.tile_k, forced.tile_n
        if tiles not in expected:
            stored = case.outputs.get(forced.tile_k) if forced.tile_n == call.kernel.tile_n else None
            expected[tiles] = forward(inputs).cpu() if stored is None else stored
        yield Run(str(forced), inputs, {"output": expected[tiles]})


def _takes_long(kernel: Kernel, case: Case) -> bool:
    """Whether a stand-in would take seconds for each run: a layer of whole size on a CPU."""
    return bool(case.derived) and kernel.forces_tile_k and kernel.device == "cpu"


def _each(cases: Goldens | Iterable[Case]) -> Iterator[Case]:
    if isinstance(cases, Goldens):
        for name in cases.names():
            yield cases.load(name)
    else:
        for case in cases:
            check_instance("cases", case, Case)
            yield case
