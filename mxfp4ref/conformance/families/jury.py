"""One verdict on all cases of a run: a hypothesis has to predict every case that fails and leave the others alone."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.families.engine import Result, investigate, told
from mxfp4ref.conformance.families.evidence import Evidence, gather, look_closer
from mxfp4ref.conformance.families.hypothesis import Finding, Hypothesis, Pipeline
from mxfp4ref.conformance.families.search import Match, one_thread

__all__ = ["Failure", "Verdict", "judge"]

_SEARCHED = 4  # cases that are searched by themselves
_READ = 12  # whose evidence is read
_Cases = frozenset[str]


@dataclass(frozen=True)
class Failure:
    """A case that fails.

    Attributes:
        case: its id.
        pipeline: the right one, as `engine.prepared` makes it.
        got, want: `[M, H] bf16`.
    """

    case: str
    pipeline: Pipeline
    got: Tensor
    want: Tensor


@dataclass(frozen=True)
class Verdict:
    """What all failures say together.

    Attributes:
        finding: of the kernel.
        hypotheses: those that predict every bit of every case, the simplest first.
        by_case: what was found for cases by themselves.
    """

    finding: Finding
    hypotheses: tuple[Hypothesis, ...]
    by_case: dict[str, Finding]


def judge(
    failures: list[Failure],
    passing: Callable[[], Iterable[tuple[Pipeline, Tensor]]],
    *,
    seconds: float,
) -> Verdict:
    """The verdict.

    Args:
        failures: the kernel calls that fail.
        passing: gives pipelines and outputs of the cases that pass, when they are needed.
        seconds: that may be taken, roughly.
    """
    until = time.thread_time() + seconds
    failures = sorted(failures, key=_telling, reverse=True)
    by_case: dict[str, Finding] = {}
    seen: dict[str, tuple[_Cases, Match]] = {}
    results: list[Result] = []
    for number, failure in enumerate(_different(failures)):
        left = until - time.thread_time()
        if number >= _SEARCHED or left < 1:
            break
        share = left * 0.6
        result = investigate(failure.pipeline, failure.got, failure.want, seconds=share, thorough=number < 2)
        results.append(result)
        by_case[failure.case] = result.finding
        for match in result.matches:
            if match.hypothesis.words not in seen:
                seen[match.hypothesis.words] = (_explained(match.hypothesis, failures), match)
        full = [m for cases, m in seen.values() if len(cases) == len(failures)]
        if full and (kept := _spared(full, passing)):
            finding = told(kept, (), [f.pipeline.call for f in failures])
            exact = Finding(finding.stages, finding.sentence, True)
            return Verdict(exact, tuple(m.hypothesis for m in kept), {f.case: exact for f in failures})
    return _undecided(failures, seen, results, by_case, until)


def _explained(hypothesis: Hypothesis, failures: list[Failure]) -> _Cases:
    """In which cases a hypothesis predicts every bit."""
    cases = set()
    with one_thread():
        for index, failure in enumerate(failures):
            output = hypothesis.run(failure.pipeline)
            if (
                output is not None
                and output.shape == failure.got.shape
                and not bool(differing(output, failure.got).any())
            ):
                cases.add(failure.case)
            if hypothesis.slow and len(cases) <= index - 4:
                break
    return frozenset(cases)


def _spared(matches: list[Match], passing: Callable[[], Iterable[tuple[Pipeline, Tensor]]]) -> list[Match]:
    """Those that leave the passing cases as they are, the simplest first."""
    kept = sorted(matches, key=lambda m: m.hypothesis.cost)
    with one_thread():
        for pipeline, want in passing():
            outputs = [(m, m.hypothesis.run(pipeline)) for m in kept]
            kept = [m for m, out in outputs if out is None or not bool(differing(out, want).any())]
            if not kept:
                break
    return kept


def _telling(failure: Failure) -> tuple[float, ...]:
    """How much a case tells: many wrong numbers, several experts, and equations that can be solved."""
    call = failure.pipeline.call
    wrong = differing(failure.got, failure.want)
    finite = failure.got.isfinite() & failure.want.isfinite()
    amount = float((wrong & finite).sum().clamp(max=512)) / 512
    several = min(call.experts.num_experts, 4) / 4
    solvable = call.experts.hidden_size >= 2 * call.experts.intermediate_size
    return (amount + several + 0.3 * solvable + 0.2 * (call.top_k > 1) - 0.5 * float((~finite).any()),)


def _different(failures: list[Failure]) -> Iterator[Failure]:
    """The most telling of each kind first: with and without parameters, biases, ranks."""
    kinds: set[tuple[object, ...]] = set()
    later = []
    for failure in failures:
        call, experts = failure.pipeline.call, failure.pipeline.call.experts
        kind = (
            experts.swiglu_limit is None,
            experts.fc1_biases is None,
            call.ep_size,
            call.experts.num_experts > 1,
        )
        if kind in kinds:
            later.append(failure)
        else:
            kinds.add(kind)
            yield failure
    yield from later


def _undecided(
    failures: list[Failure],
    seen: dict[str, tuple[_Cases, Match]],
    results: list[Result],
    by_case: dict[str, Finding],
    until: float,
) -> Verdict:
    """No hypothesis predicts all: the one that predicts most by far, or the stage that the evidence agrees on."""
    proofs: list[Evidence] = []
    with one_thread():
        for number, failure in enumerate(_different(failures)):
            if number >= _READ or (number and time.thread_time() > until + 5):
                break
            if number < len(results) and results[number].evidence:
                evidence: list[Evidence] = list(results[number].evidence)
            else:
                wrong = differing(failure.got, failure.want)
                evidence = gather(failure.pipeline, failure.got, failure.want, wrong)
                evidence = look_closer(failure.pipeline, failure.got, wrong, evidence)
            strongest = [e for e in evidence if e.stages]
            if strongest:
                first = strongest[0]
                proofs.append(first)
                by_case.setdefault(failure.case, first.finding())
    counted = sorted(seen.values(), key=lambda pair: (-len(pair[0]), pair[1].hypothesis.cost))
    if counted and 2 * len(counted[0][0]) >= len(failures):
        cases = counted[0][0]
        alike = [match for others, match in counted if others == cases]
        found = told(alike, (), [f.pipeline.call for f in failures if f.case in cases])
        most = Finding(found.stages, found.sentence, False, (len(cases), len(failures)))
        return Verdict(most, (), by_case)
    proofs = [one for one in proofs if not _refuted(one, proofs)]
    if proofs:
        votes = Counter[tuple[str, ...]]()
        for one in proofs:
            votes[one.stages] += one.strength
        stages = max(votes, key=lambda s: votes[s])
        best = max((one for one in proofs if one.stages == stages), key=lambda one: one.strength)
        return Verdict(best.finding(), (), by_case)
    return Verdict(Finding(), (), by_case)


def _refuted(one: Evidence, proofs: list[Evidence]) -> bool:
    """Whether as many cases prove that it lies in other stages as say what this one says, or more."""
    shared = sum(bool(set(one.stages) & set(other.stages)) for other in proofs)
    return (
        0 < shared <= sum(other.strength >= 2 and not set(one.stages) & set(other.stages) for other in proofs)
    )
