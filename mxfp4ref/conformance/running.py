"""Running a kernel on one golden case: by which tactics, and how near its outputs come to those expected."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mxfp4ref._validate import check_instance
from mxfp4ref.conformance.bounds.bounded import outside_bounds
from mxfp4ref.conformance.case_result import STATE
from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.diagnosing import Failed
from mxfp4ref.conformance.families.distances import angle_between
from mxfp4ref.conformance.findings.finding import counted
from mxfp4ref.conformance.findings.reduction import reduce_call
from mxfp4ref.conformance.isolation.execution import Outcome, execute_within
from mxfp4ref.conformance.isolation.handing import to_device
from mxfp4ref.conformance.isolation.plain import like, raw_bytes, tensor_of
from mxfp4ref.conformance.isolation.standard_streams import FOR_GOOD
from mxfp4ref.conformance.isolation.worker import Worker
from mxfp4ref.conformance.kernels.adapters import Kernel, rows_left
from mxfp4ref.conformance.kernels.loading import is_stand_in
from mxfp4ref.conformance.memory import KILLED, killed, says_so, supply
from mxfp4ref.conformance.options import Options
from mxfp4ref.conformance.reports.reproducer import write_reproducer
from mxfp4ref.conformance.results import CaseResult
from mxfp4ref.formats.generations import NEWEST
from mxfp4ref.goldens.case import Case
from mxfp4ref.goldens.runs import Run, runs
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward
from mxfp4ref.sm90.tactics import Sm90Kernel, each_kernel

__all__ = ["NOT_DUMPED", "compare_case", "told_alone"]

NOT_DUMPED = "its reproducer was not written"  # in the message of a result
_LARGEST = 1 << 30  # bytes of the weights of a reproducer
_ALONE = ("raised", "layout differs", "wrong output", "not written", "unstable")  # by an earlier call, maybe
_NOT_RUN_AGAIN = ("timed out", "unstable", "interfered")  # to see whether a part of the call fails likewise


def compare_case(
    kernel: Kernel, case: Case, options: Options, worker: Worker | None = None
) -> tuple[CaseResult, Failed | None]:
    """The result without a diagnosis and without `told_alone`, and what is to be diagnosed."""
    check_instance("case", case, Case)
    start, running = time.perf_counter(), 0.0
    about: dict[str, Any] = {"case": case.id, "kind": case.kind, "why": case.why}
    if reason := kernel.unable(case.kind, case.parameters):
        return CaseResult(**about, status="skipped", message=reason), None
    all_runs = _runs(kernel, case)
    # As bytes, before the kernel runs: nothing that it does in this process changes them.
    bits = {one: _bits(one) for one in all_runs}
    needed = _by_tactic(kernel, case) if options.all_tactics else _needed(kernel, case, all_runs)
    found: list[_Comparison] = []
    left, unsaid = "", ""
    failure: Failed | None = None
    for index, one in enumerate(needed):
        repeat = options.repeat and (index == 0 or options.all_tactics) and not _takes_long(kernel, case)
        candidates = {one: bits.get(one) or _bits(one)} if kernel.forces_tile_k else bits
        before = time.perf_counter()
        if worker is not None:
            before_it = supply()
            outcome = worker.execute(options.timeout, case, one, repeat=repeat)
            if outcome.problem == "crashed" and KILLED in outcome.message:
                outcome = replace(outcome, message=killed(outcome.message, case, before_it))
        else:
            inputs = case.kind, one.inputs, one.expected
            outcome = execute_within(options.timeout, kernel, inputs, repeat=repeat)
        running += time.perf_counter() - before
        left = left or outcome.left
        if outcome.problem:
            if outcome.problem == "raised" and is_stand_in(kernel.name) and says_so(outcome.message):
                raise MemoryError(outcome.message)  # of this machine nobody's kernel is to blame
            if outcome.problem != "skipped":
                unsaid = _dump(options, kernel, case, (one, outcome), candidates, worker)
            told = options.all_tactics or (kernel.forces_tile_k and len(all_runs) > 1)
            which = f" ({'tactics' if options.all_tactics else 'K tiles'} {one.tiles})" if told else ""
            if outcome.problem in _ALONE:
                _run_alone(worker, case, one, candidates, options)
            message = _joined(outcome.message + which, _put_back(left), unsaid)
            result = CaseResult(**about, status=outcome.problem, message=message)
            return result.lasting(kernel=running, comparison=time.perf_counter() - start - running), None
        compared = _compare(case.kind, outcome, candidates, options)
        if outcome.message and not compared.wrong:
            message = _joined(outcome.message, _put_back(left))
            result = CaseResult(**about, status="wrong output", message=message)
            return result.lasting(kernel=running, comparison=time.perf_counter() - start - running), None
        if compared.wrong and failure is not None:
            failure = replace(failure, further=(*failure.further, (compared.closest, outcome.outputs)))
        elif compared.wrong and not any(earlier.wrong for earlier in found):
            _run_alone(worker, case, one, candidates, options)
            unsaid = _dump(options, kernel, case, (compared.closest, outcome), candidates, worker)
            if options.diagnosis != "none":
                failure = Failed(case.kind, compared.closest, outcome.outputs, compared.where)
        found.append(compared)
    result = CaseResult(
        **about,
        status=_status(found),
        tiles=tuple(dict.fromkeys(tiles for compared in found for tiles in compared.tiles)),
        elements=sum(compared.elements for compared in found),
        differing=sum(compared.differing for compared in found),
        outside=sum(compared.outside or 0 for compared in found),
        message=_joined(_put_back(left), unsaid),
        runs=len(found),
        diagnosed_run=failure.run.tiles if failure is not None and len(found) > 1 else "",
    )
    return result.lasting(kernel=running, comparison=time.perf_counter() - start - running), failure


def _run_alone(
    worker: Worker | None,
    case: Case,
    one: Run,
    candidates: Mapping[Run, Mapping[str, bytes]],
    options: Options,
) -> None:
    """Have a run that failed after others run once more, in a new process: `told_alone` says if it is right there."""
    if worker is None or (before := worker.runs - 1) < 1 or case.is_whole_layer:
        return
    process = worker

    def right() -> str:
        with process.another() as fresh:
            outcome = fresh.execute(options.timeout, case, one)
        if outcome.problem or _compare(case.kind, outcome, candidates, options).wrong:
            return ""
        others = counted(before, "other run")
        return f"right when run alone, twice in a new process, and not after {others} in one: {STATE}"

    worker.alone.add(case.id, right)


def told_alone(result: CaseResult, worker: Worker | None) -> CaseResult:
    """The result, with what came of it when it was run alone, if it was to be; that takes seconds."""
    words = "" if worker is None or result.ok else worker.alone.words(result.case)
    return replace(result, message=_joined(result.message, words)) if words else result


def _bits(one: Run) -> dict[str, bytes]:
    return {name: raw_bytes(tensor) for name, tensor in one.expected.items()}


def _put_back(left: str) -> str:
    if FOR_GOOD in left:
        return f"the kernel changed {left}"
    return f"the kernel changed {left}, which was put back" if left else ""


def _joined(*words: str) -> str:
    return "; ".join(filter(None, words))


def _dump(
    options: Options,
    kernel: Kernel,
    case: Case,
    failed: tuple[Run, Outcome],
    candidates: Iterable[Run],
    worker: Worker | None,
) -> str:
    """Write a reproducer, if one is wanted; why it could not be written, which is no reason to stop."""
    if options.dump is None:
        return ""
    try:
        bounds = (options.storage, options.confidence) if options.mode == "bounded" else None
        one, outputs = _smallest(options, kernel, failed, candidates, worker)
        write_reproducer(options.dump, case, one, kernel.name, outputs, kernel.device, bounds)
    except (OSError, ValueError) as error:
        return f"{NOT_DUMPED}: {error}"
    return ""


def _smallest(
    options: Options,
    kernel: Kernel,
    failed: tuple[Run, Outcome],
    candidates: Iterable[Run],
    worker: Worker | None,
) -> tuple[Run, Mapping[str, Tensor]]:
    """The smallest part of a call that gives the bits that all of it gave, and the kernel's outputs; else all of it.

    Tried are the first token that differs, and it with all before it. Of a call too large, any wrong part serves.

    Raises:
        ValueError: no part does, and all of it is too large to write.
    """
    one, outcome = failed
    if not isinstance(one.inputs, MoeCall):
        return one, outcome.outputs
    smaller: tuple[Run, Mapping[str, Tensor]] | None = None
    call, want = to_device(one.inputs, "cpu"), one.expected["output"].cpu()
    token = 0 if outcome.problem else int(differing(outcome.outputs["output"], want).any(1).nonzero()[0])
    for first in () if outcome.problem in _NOT_RUN_AGAIN else dict.fromkeys((token, 0)):
        part = reduce_call(call, torch.arange(first, token + 1))
        rows = want[first : token + 1]
        if part.num_tokens == call.num_tokens or bool(differing(forward(part), rows).any()):
            continue
        small = Run(one.tiles, part, {"output": rows}, first)
        if worker is not None:
            again = worker.execute_call(options.timeout, part, repeat=bool(outcome.problem))
        else:
            given = "moe", part, small.expected
            again = execute_within(options.timeout, kernel, given, repeat=bool(outcome.problem))
        if again.problem or outcome.problem:
            before, now = (f"{ran.problem}: {ran.message}".split(": ")[:2] for ran in (outcome, again))
            if before == now:  # the class of what was raised, too
                return small, {}
            continue
        # A kernel that chooses its K tiles may choose others for fewer tokens.
        by_tiles = [(other.tiles, replace(part, kernel=other.inputs.kernel)) for other in candidates]
        parts = [Run(tiles, own, {"output": forward(own)}, first) for tiles, own in by_tiles]
        compared = _compare("moe", again, {run: _bits(run) for run in parts}, options)
        if compared.wrong:
            smaller = compared.closest, again.outputs
            alone, among = (ran.outputs["output"].cpu() for ran in (again, outcome))
            if not bool(differing(alone, among[first : token + 1]).any()):
                return smaller
    size = sum(tensor.nbytes for tensor in vars(call.experts).values() if isinstance(tensor, Tensor))
    if size <= _LARGEST:
        return one, outcome.outputs
    if smaller is None:
        raise ValueError(
            f"no part of the call was seen to fail as it did, and all of it is {size / 2**30:.1f} GiB"
        )
    return smaller


@dataclass(frozen=True)
class _Comparison:
    """The outputs of one run against each expectation that they may meet.

    Attributes:
        closest: the run whose expected outputs differ in the fewest elements, or, where most differ, lie nearest.
        tiles: of the runs whose expected outputs are equal.
        elements, differing: compared with the closest.
        outside: of those that differ, how many lie outside their bounds; None where no bounds apply.
        where: which these are, of a call.
    """

    closest: Run
    tiles: tuple[str, ...]
    elements: int
    differing: int
    outside: int | None
    where: Tensor | None

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
    candidates, count = list(expected), min(counts)
    closest = candidates[counts.index(count)]
    tiles = tuple(one.tiles for one, wrong in zip(candidates, counts, strict=True) if not wrong and one.tiles)
    outside, where = None, None
    if count and options.mode == "bounded":
        how = options.storage, options.confidence
        outside, where = outside_bounds(kind, closest, outcome.outputs, *how)
    left = rows_left(kind, closest.inputs)  # which no kernel writes, and nobody looks at
    elements = sum(want[slice(None) if left is None else ~left].numel() for want in closest.expected.values())
    if kind == "moe" and len(candidates) > 1 and 2 * count > elements:
        closest = _nearest(candidates, closest, outcome.outputs["output"])
        count = counts[candidates.index(closest)]
    return _Comparison(closest, tiles, elements, count, outside, where)


def _nearest(candidates: Sequence[Run], fewest: Run, output: Tensor) -> Run:
    """That whose output by far points the same way, if any: where most bits differ, a few equal ones are chance."""
    angles = [angle_between(run.expected["output"], output.cpu()) for run in candidates]
    best = angles.index(min(angles))
    return candidates[best] if 2 * angles[best] < angles[candidates.index(fewest)] else fewest


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
    for forced in each_kernel(call.experts.gemm_shapes, kernel.generation):
        inputs = replace(call, kernel=forced)
        tiles = forced.tile_k, forced.tile_n
        if tiles not in expected:
            stored = case.outputs.get(forced.tile_k) if forced.tile_n == call.kernel.tile_n else None
            expected[tiles] = forward(inputs).cpu() if stored is None else stored
        yield Run(str(forced), inputs, {"output": expected[tiles]})


def _takes_long(kernel: Kernel, case: Case) -> bool:
    """Whether a stand-in would take seconds for each run: a layer of whole size on a CPU."""
    return case.is_whole_layer and kernel.forces_tile_k and kernel.device == "cpu"
