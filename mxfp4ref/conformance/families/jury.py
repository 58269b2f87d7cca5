"""One verdict on all cases of a run: a hypothesis has to predict every case that fails and leave the others alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from itertools import chain

from torch import Tensor

from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.families.batches import one_thread
from mxfp4ref.conformance.families.blank import constant_alone, of_constant, wherever_from
from mxfp4ref.conformance.families.engine import Result, nameless
from mxfp4ref.conformance.families.evidence import gather, look_closer
from mxfp4ref.conformance.families.hearing import Failure, Heard, Kind, hear, kind_of, refuted
from mxfp4ref.conformance.families.hypothesis import Finding, Pipeline, roughly
from mxfp4ref.conformance.families.named import named_hypotheses
from mxfp4ref.conformance.families.nan_bits import investigated
from mxfp4ref.conformance.families.order_of_cases import different, next_case, plain_one, says_much, telling
from mxfp4ref.conformance.families.search import Match
from mxfp4ref.conformance.families.solved.case_tables import tables_by_case
from mxfp4ref.conformance.families.telling import told
from mxfp4ref.conformance.families.twos import in_other_cases
from mxfp4ref.conformance.families.verdict import Verdict
from mxfp4ref.conformance.findings.finding import OTHERS, Evidence, added
from mxfp4ref.conformance.findings.reduction import thread_clock
from mxfp4ref.conformance.heartbeat import at_work

__all__ = ["judge"]

_SEARCHED = 4  # cases that are searched by themselves
_READ = 12  # whose evidence is read
_FOR_A_SECOND = 6.0  # seconds, to look for a change beside the one that predicts most cases
_BEYOND = 5.0  # seconds, to hear what was found, and to read evidence
_FOR_A_PLAIN_ONE = 10.0  # seconds, where none of those searched is explained
_HEARD, _ROUGHLY = 24, 4  # hypotheses of a case that others are asked of: that predict every bit, or fewer
_RARE = 8  # times as many cases are predicted as refute it
_Passing = Callable[[], Iterable[tuple[Pipeline, Tensor]]]


def judge(
    failures: list[Failure],
    passing: _Passing,
    *,
    seconds: float,
    known: Collection[str] = (),
) -> Verdict:
    """The verdict.

    Args:
        failures: the kernel calls that fail.
        passing: gives pipelines and outputs of the cases that pass, when they are needed.
        seconds: that may be taken, roughly.
        known: named defects that predict every bit of some case; where one predicts all, no more is tried than what
            has a name, and the first of what has none.
    """
    until = thread_clock() + seconds

    def left() -> float:
        return until + _BEYOND - thread_clock()

    failures = sorted(failures, key=telling, reverse=True)
    with at_work("what was suspected", left):
        if known and (verdict := _of_known(failures, passing, known, seconds)):
            return verdict
    by_case: dict[str, Finding] = {}
    seen: dict[str, Heard] = {}
    results: dict[str, Result] = {}

    def look_at(failure: Failure, seconds: float, work: str, *, thorough: bool = True) -> Result:
        how = {"seconds": seconds, "thorough": thorough, "outside": failure.outside}
        with at_work(work, left):
            result = investigated(failure.pipeline, failure.got, failure.want, **how)
        by_case[failure.case] = result.finding
        return result

    most = min(_SEARCHED, len(failures))
    for number in range(most):
        share = 0.6 * (until - thread_clock())
        if share < 0.6:
            break
        failure = next_case(failures, results, list(seen.values()))
        work = f"{failure.case} ({number + 1} of {most})"
        result = results[failure.case] = look_at(failure, share, work, thorough=number < 2)
        if len(results) == len(failures) and all(
            any(e.rounding for e in r.evidence) for r in results.values()
        ):
            return Verdict(result.finding, (), by_case)  # of zeros, which much gives where sums cancel
        _hear_all(result, seen, failures, until + _BEYOND)
        if verdict := _of_all(seen.values(), failures, passing):
            return verdict
    alone = None
    if not any(match.exact for result in results.values() for match in result.matches):
        alone = plain_one(f for f in failures if f.case not in by_case)
    if alone is not None:
        start = thread_clock()
        result = look_at(alone, _FOR_A_PLAIN_ONE, alone.case)
        until += thread_clock() - start
        _hear_all(result, seen, failures, until + _BEYOND)
        if verdict := _of_all(seen.values(), failures, passing):
            return verdict
    if seen:  # what most cases say may be true of all with other details
        best = max(seen.values(), key=lambda heard: len(heard.cases)).match.hypothesis
        if verdict := _of_all([hear(Match(h, True), failures) for h in best.variants], failures, passing):
            return verdict
    exact = {f.case: f.found for f in failures}
    exact |= {case: tuple(m.hypothesis for m in r.matches if m.exact) for case, r in results.items()}
    with at_work("what some of them show, and two mistakes at once", lambda: _FOR_A_SECOND + left()):
        undecided = _undecided(failures, passing, seen, results, by_case, until)
    return replace(undecided, refuted=lambda case: refuted(exact.get(case, ()), failures))


def _hear_all(result: Result, seen: dict[str, Heard], failures: list[Failure], until: float) -> None:
    """Adds what all failures say of what explains a case: of the simplest, and while there is time of others."""
    for number, match in enumerate(_worth_hearing(result)):
        if number and thread_clock() > until:
            break
        if match.hypothesis.words not in seen:
            seen[match.hypothesis.words] = hear(match, failures)


def _worth_hearing(result: Result) -> list[Match]:
    """The simplest of what explains a case."""
    exact = [match for match in result.matches if match.exact]
    return exact[:_HEARD] or [Match(m.plain or m.hypothesis, False) for m in result.matches[:_ROUGHLY]]


def _of_all(heard: Iterable[Heard], failures: list[Failure], passing: _Passing) -> Verdict | None:
    """That of what predicts every bit of every case and leaves the others alone."""
    return _of_full([one.match for one in heard if len(one.cases) == len(failures)], failures, passing)


def _of_full(full: list[Match], failures: list[Failure], passing: _Passing) -> Verdict | None:
    if not full or not (kept := _spared(full, passing)):
        return None
    if all(constant_alone(f.got, f.want) for f in failures):
        same = {f.case: one for f in failures if (one := of_constant(f.pipeline, f.got, f.want, kept))}
        if len(same) == len(failures):
            return Verdict(same[failures[0].case], (), same)
        kept = wherever_from(kept)
    finding = told(kept, (), [f.pipeline.call for f in failures])
    exact = replace(finding, exact=True, hedged=False)
    return Verdict(exact, tuple(m.hypothesis for m in kept), {f.case: exact for f in failures})


def _of_known(
    failures: list[Failure], passing: _Passing, known: Collection[str], seconds: float
) -> Verdict | None:
    """That of a defect that is known to predict some case, and of what is not told from it."""
    most, *others = failures
    named = [h for h in named_hypotheses(most.pipeline.call) if h.name in known or not h.slow]
    if not any(all(h.predicts(f.pipeline, f.got) for f in failures) for h in named if h.name in known):
        return None
    every = chain(named, nameless(most.pipeline.call, differing(most.got, most.want)))
    result = investigated(most.pipeline, most.got, most.want, seconds=seconds, first=every)
    full = [
        m for m in result.matches if m.exact and all(m.hypothesis.predicts(f.pipeline, f.got) for f in others)
    ]
    return _of_full(full, failures, passing)


def _spared(matches: list[Match], passing: _Passing, kinds: set[Kind] | None = None) -> list[Match]:
    """Those that leave the passing cases (of some kinds) as they are, the simplest first."""
    kept = sorted(matches, key=lambda m: m.hypothesis.cost)
    with one_thread():
        for pipeline, want in passing():
            if kinds is not None and kind_of(pipeline.call) not in kinds:
                continue
            outputs = [(m, m.hypothesis.run(pipeline)) for m in kept]
            kept = [m for m, out in outputs if out is None or not bool(differing(out, want).any())]
            if not kept:
                break
    return kept


def _undecided(
    failures: list[Failure],
    passing: _Passing,
    seen: dict[str, Heard],
    results: dict[str, Result],
    by_case: dict[str, Finding],
    until: float,
) -> Verdict:
    """No hypothesis predicts all: the one that predicts most by far, or the stage that the evidence agrees on."""
    proofs: list[Evidence] = []
    case_of: dict[int, str] = {}
    with one_thread():
        for number, failure in enumerate(different(failures)):
            if number >= _READ or (number and thread_clock() > until + _BEYOND):
                break
            if failure.case in results and results[failure.case].evidence:
                evidence: list[Evidence] = list(results[failure.case].evidence)
            else:
                wrong = differing(failure.got, failure.want)
                wrong = wrong if failure.outside is None else wrong & failure.outside.any(1, keepdim=True)
                evidence = gather(failure.pipeline, failure.got, failure.want, wrong, failure.outside)
                if thread_clock() <= until + _BEYOND:
                    evidence = look_closer(failure.pipeline, failure.got, wrong, evidence)
            if (first := next((e for e in evidence if e.stages), None)) is not None:
                proofs.append(first)
                case_of[id(first)] = failure.case
                by_case.setdefault(failure.case, first.finding())
    ranked = sorted(seen.values(), key=lambda heard: (-len(heard.cases), heard.match.hypothesis.cost))
    plain = [one for one in ranked if one.cases == ranked[0].cases]
    plain.sort(key=lambda one: bool(one.match.hypothesis.name))
    if plain:
        of_others = (one for one in proofs if case_of[id(one)] not in plain[0].cases)
        elsewhere = {stage for one in of_others for stage in one.stages}
        if (two := _two(failures, passing, plain[0], elsewhere, until)) is not None:
            return two
    if (tables := tables_by_case(failures, ranked, until + _FOR_A_SECOND)) is not None:
        return Verdict(tables, (), by_case)
    if (
        ranked
        and 2 * len(cases := ranked[0].cases) >= len(failures)
        and (not ranked[0].refuting & ranked[0].kinds or _RARE * len(ranked[0].against) <= len(cases))
        and says_much(failures, cases)
    ):
        alike = [heard.match for heard in ranked if heard.cases == cases]
        found = told(alike, (), [f.pipeline.call for f in failures if f.case in cases])
        others = [
            one for case, one in by_case.items() if case not in cases and one.sentence and not one.hedged
        ]
        words = added(found.sentence, OTHERS + others[0].sentence) if others else found.sentence
        some = replace(found, sentence=words, exact=False, cases=(len(cases), len(failures)))
        return Verdict(some, (), by_case | _explained(cases, found))
    proofs = [one for one in proofs if not _refuted(one, proofs)]
    if proofs:
        votes = Counter[tuple[str, ...]]()
        for one in proofs:
            votes[one.stages] += one.strength
        stages = max(votes, key=lambda s: votes[s])
        first = max(
            (one for one in proofs if set(one.stages) & set(stages)),
            key=lambda one: (one.strength, one.stages == stages),
        )
        best = replace(first.finding(), stages=stages)
        if len({one.sentence for one in proofs}) > 1:
            best = replace(best, sentence=f"{first.sentence} ({case_of[id(first)]})")
    else:
        best = Finding()
    if (some_cases := _of_some(failures, passing, ranked, proofs, best)) is not None:
        return replace(some_cases, by_case=by_case | some_cases.by_case)
    return Verdict(_of_most(failures, ranked, proofs, best) or best, (), by_case)


def _explained(cases: Iterable[str], found: Finding) -> dict[str, Finding]:
    """Of cases of which this predicts every bit: it is told in the place of evidence on them."""
    return dict.fromkeys(cases, replace(found, exact=True, hedged=False))


def _two(
    failures: list[Failure], passing: _Passing, heard: Heard, stages: set[str], until: float
) -> Verdict | None:
    """The change that predicts most cases, with a second one, likely in these stages, for the others."""
    others = [(f.pipeline, f.got, f.want) for f in failures if f.case not in heard.cases]
    first = heard.match.hypothesis
    if not heard.cases or not heard.all_heard or first.slow or first.family == "two":
        return None
    with one_thread():
        clock = thread_clock
        both = in_other_cases(first, others, stages, clock=clock, until=max(until, clock() + _FOR_A_SECOND))
        both = [
            h for h in both if all(h.predicts(f.pipeline, f.got) for f in failures if f.case in heard.cases)
        ]
    if not (kept := _spared([Match(h, True) for h in both], passing)):
        return None
    exact = replace(told(kept, (), [f.pipeline.call for f in failures]), exact=True, hedged=False)
    return Verdict(exact, tuple(m.hypothesis for m in kept), {f.case: exact for f in failures})


def _of_some(
    failures: list[Failure], passing: _Passing, ranked: list[Heard], proofs: list[Evidence], best: Finding
) -> Verdict | None:
    """What predicts every bit of fewer than half of the cases, where no case of their kinds says otherwise.

    Nor may as many cases prove that it lies elsewhere. `best` is said of the others.
    """
    for heard in ranked:
        stages = set(heard.match.hypothesis.stages)
        told_by = [f for f in failures if f.case in heard.cases]
        elsewhere = sum(one.strength >= 2 and not stages & set(one.stages) for one in proofs)
        if not heard.cases or not heard.all_heard or heard.refuting & heard.kinds:
            continue
        if elsewhere >= len(heard.cases) or (best.stages and not stages & set(best.stages)):
            continue
        if not says_much(failures, heard.cases):
            continue
        alike = [h.match for h in ranked if h.cases == heard.cases and not h.refuting & h.kinds]
        kept = _spared(alike, passing, heard.kinds)
        if not kept:
            continue
        found = told(kept, (), [f.pipeline.call for f in told_by])
        words = added(found.sentence, OTHERS + best.sentence) if best.sentence else found.sentence
        some = Finding(best.stages or found.stages, words, False, (len(heard.cases), len(failures)))
        return Verdict(some, (), _explained(heard.cases, found))
    return None


def _of_most(
    failures: list[Failure], ranked: list[Heard], proofs: list[Evidence], best: Finding
) -> Finding | None:
    """What predicts most wrong elements in every bit, of cases of which few or none say otherwise.

    Of fewer than half of the cases it says less than `best`, the evidence.
    """
    likely = []
    for heard in ranked:
        stages, count = set(heard.match.hypothesis.stages), len(heard.mostly)
        elsewhere = sum(one.strength >= 2 and not stages & set(one.stages) for one in proofs)
        if not count or _RARE * len(heard.against) > count or elsewhere >= count:
            continue
        if (2 * count >= len(failures) or not best.sentence) and says_much(failures, heard.mostly):
            likely.append(heard)
    if not likely:
        return None
    most = max(likely, key=lambda heard: heard.predicted)
    said = Match(roughly(most.match.hypothesis, "or nearly so", most.part), False)
    found = told([said], (), [f.pipeline.call for f in failures if f.case in most.mostly])
    of = f"in {len(most.mostly)} of {len(failures)} failing cases "
    return replace(found, sentence=of * (len(failures) > 1) + found.sentence, hypotheses=())


def _refuted(one: Evidence, proofs: list[Evidence]) -> bool:
    """Whether as many cases prove that it lies in other stages as say what this one says, or more."""
    shared = sum(bool(set(one.stages) & set(other.stages)) for other in proofs)
    return (
        0 < shared <= sum(other.strength >= 2 and not set(one.stages) & set(other.stages) for other in proofs)
    )
