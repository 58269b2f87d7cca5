"""From the cases of a run that fail to its verdict: each is looked at as it comes, then all of them together."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from torch import Tensor

from mxfp4ref._default_device import on_cpu
from mxfp4ref.conformance.bounds.bounded import all_within
from mxfp4ref.conformance.diagnosis import Diagnosis, Finding, Located, Prediction
from mxfp4ref.conformance.families.engine import prepared
from mxfp4ref.conformance.families.hearing import Failure
from mxfp4ref.conformance.families.hypothesis import UNKNOWN, Hypothesis, Pipeline
from mxfp4ref.conformance.families.jury import judge
from mxfp4ref.conformance.families.verdict import Verdict, narrowed
from mxfp4ref.conformance.findings.agreement import agreed, name_defects, unrefuted, with_one_case
from mxfp4ref.conformance.findings.exposed import with_exposed
from mxfp4ref.conformance.findings.finding import added, counted, of_specials
from mxfp4ref.conformance.findings.guarded import listening
from mxfp4ref.conformance.findings.reduction import is_heavy, thread_clock
from mxfp4ref.conformance.isolation.plain import of_exception
from mxfp4ref.conformance.looking import REAL_SECONDS, Known, is_large
from mxfp4ref.conformance.results import CaseResult
from mxfp4ref.goldens import Goldens
from mxfp4ref.goldens.runs import Run, runs
from mxfp4ref.model.call import MoeCall

__all__ = ["Failed", "Failing", "Found", "diagnosed"]

_SECONDS = 32.0  # for the hypotheses of a run
# Of the processor, for all quick diagnoses: then suspects are tried, and evidence is read.
_QUICK_SECONDS = 8.0
_SUSPECTS_SECONDS = 0.1
_BOUNDS_SECONDS = 8.0  # for all that is asked in mode exact: whether a failing case lies within bounds


@dataclass(frozen=True)
class Failed:
    """What is to be diagnosed.

    Attributes:
        kind: of the case.
        run: the first that failed.
        outputs: what the kernel gave.
        outside: in mode bounded, where they are outside their bounds.
        further: the other runs that failed, with what the kernel gave.
    """

    kind: str
    run: Run
    outputs: Mapping[str, Tensor]
    outside: Tensor | None = None
    further: tuple[tuple[Run, Mapping[str, Tensor]], ...] = ()

    @property
    def together(self) -> bool:
        """Whether it is one of the calls that are diagnosed together: not of whole size, with MXFP4 weights."""
        return self._is_mxfp4_call and not is_heavy(self.run.inputs)

    @property
    def whole_size(self) -> bool:
        return self._is_mxfp4_call and is_heavy(self.run.inputs)

    @property
    def large(self) -> bool:
        """Whether what is said of it takes longer than of others."""
        return any(is_large(self.run.inputs, tensor) for tensor in self.outputs.values())

    @property
    def size(self) -> str:
        """ "1,024 elements"."""
        return f"{sum(tensor.numel() for tensor in self.run.expected.values()):,} elements"

    @property
    def _is_mxfp4_call(self) -> bool:
        call = self.run.inputs
        return isinstance(call, MoeCall) and call.experts.tactics_show

    def located(self) -> Located:
        return Located(self.kind, self.run.inputs, self.outputs, self.run.expected, self.outside)


@dataclass(frozen=True)
class Found:
    """What a run's failures come to: results with their diagnoses, the defects that predict all, the finding."""

    results: tuple[CaseResult, ...]
    defects: tuple[str, ...]
    finding: Finding


def diagnosed(result: CaseResult, failed: Failed, diagnosis: str) -> CaseResult:
    """The result with a diagnosis, "quick", "full" or "none"; if that fails, with the reason."""
    if diagnosis == "none":
        return result
    one = _Failure(failed)
    return one.looked_at(one.bounded(result), (), diagnosis)


class _Failure:
    """A case that fails, and what is known of it."""

    def __init__(self, failed: Failed) -> None:
        self.failed = failed
        self.located: Located | None = None

    @property
    def special(self) -> bool:
        """Whether special values alone are wrong, as far as it was looked at."""
        return self.located is not None and self.located.special

    @property
    def nan_bits(self) -> bool:
        """Whether the bits of NaN alone are, as far as it was looked at."""
        return self.located is not None and self.located.nan_bits

    def bounded(self, result: CaseResult) -> CaseResult:
        """The result, with whether it lies within bounds; it may not where that was not asked, or takes long."""
        runs, self.failed = (
            [(self.failed.run, self.failed.outputs), *self.failed.further],
            replace(self.failed, further=()),
        )
        quick = self.failed.kind == "routing" or (self.failed.together and not self.failed.large)
        if result.status != "differs" or not quick:
            return result
        start = time.perf_counter()
        result = replace(result, within_bounds=all_within(self.failed.kind, runs))
        return result.lasting(comparison=time.perf_counter() - start)

    def looked_at(
        self,
        result: CaseResult,
        suspects: tuple[str | Hypothesis, ...],
        diagnosis: str,
        seconds: float | None = None,
    ) -> CaseResult:
        """The result with its diagnosis; if that fails, with the reason. With `seconds` it is a brief one."""
        start = time.perf_counter()
        try:
            self.located = self.located or self.failed.located()
            known = self.located.search(suspects, diagnosis, seconds=seconds)
            brief = seconds is not None or (diagnosis == "quick" and self.located.large)
            if result.within_bounds and not known[1].exact:  # evidence for what need not be wrong
                known, brief = ((), UNKNOWN, ()), False
            if self.special:
                known = (known[0], of_specials([result.case], known[1]), known[2])
            result = replace(result, diagnosis=self.located.told(known, brief=brief))
        except Exception as error:  # of outputs that nobody has thought of; the result is not lost
            words = f"no diagnosis: {of_exception(error)}"
            result = replace(result, message="; ".join(filter(None, (result.message, words))))
        return result.lasting(diagnosis=time.perf_counter() - start)

    def told(self, result: CaseResult, known: Known) -> CaseResult:
        """The result, with what else is known of it, if it could be looked at."""
        return result if self.located is None else replace(result, diagnosis=self.located.told(known))


class Failing:
    """The failures of a run, as they come.

    Args:
        diagnosis: as in `Options`.
        note: told, in words, before a large case is looked at.
    """

    def __init__(self, diagnosis: str, note: Callable[[str], None] | None = None) -> None:
        self._diagnosis, self._note = diagnosis, note or (lambda words: None)
        self._failures: dict[str, _Failure] = {}
        self._suspects: dict[str, None] = {}
        self._left = _QUICK_SECONDS
        self._left_for_bounds = _BOUNDS_SECONDS

    def take(self, result: CaseResult, failed: Failed | None) -> CaseResult:
        """The result with a quick diagnosis, if it is wanted."""
        if failed is None or self._diagnosis == "none":
            return result
        self._failures[result.case] = one = _Failure(failed)
        if failed.large:
            self._note(f"{result.case}: {failed.size}: a quick diagnosis")
        seconds = None
        if self._left <= 0:
            seconds = _SUSPECTS_SECONDS if self._suspects else 0.0
        start = thread_clock()
        if self._left_for_bounds > 0:
            result = one.bounded(result)
            self._left_for_bounds -= thread_clock() - start
        start = thread_clock()
        result = one.looked_at(result, tuple(self._suspects), "quick", seconds)
        self._left -= thread_clock() - start
        self._suspect(result, one)
        return result

    def add(self, result: CaseResult, failed: Failed) -> None:
        """A result that has its diagnosis, for the verdict."""
        self._failures[result.case] = one = _Failure(failed)
        with suppress(Exception):  # of outputs that nobody has thought of, which the result says
            one.located = failed.located()
        self._suspect(result, one)

    def _suspect(self, result: CaseResult, one: _Failure) -> None:
        if result.diagnosis is not None and one.located is not None and not one.located.blank:
            self._suspects |= dict.fromkeys(result.diagnosis.exact)

    def verdict(self, results: list[CaseResult], goldens: Goldens | None, *, search: bool = True) -> Found:
        """All results with their diagnoses, and what they say together; `search` for what else they may say."""
        full = search and self._diagnosis == "full"
        # Neither says anything of the numbers, which is what all others are asked of.
        special = [case for case, one in self._failures.items() if one.special]
        aside = {*special, *(case for case, one in self._failures.items() if one.nan_bits)}
        together = {
            case: one for case, one in self._failures.items() if one.failed.together and case not in aside
        }
        found = Verdict(Finding(), (), {})
        names: tuple[str, ...] = ()
        if together and full:
            found = self._judged(together, results, goldens)
            names = tuple(h.name for h in found.hypotheses if h.name)
        if full:
            results = self._in_full(results, found)
        elif self._suspects:
            results = [self._again(result) for result in results]
        # What a correct evaluation may give says nothing of what is wrong elsewhere.
        outside = {r.case: r.diagnosis for r in results if r.diagnosis is not None and not r.within_bounds}
        all_aside = outside.keys() <= aside
        telling = [one for case, one in outside.items() if case not in aside or all_aside]
        telling = telling or [r.diagnosis for r in results if r.diagnosis is not None]
        exact = [one.exact for one in telling]
        defects = name_defects([names, *exact] if together and full else exact)
        if special and len(special) == len(outside):
            return Found(tuple(results), defects, of_specials(special, agreed(telling)))
        finding = unrefuted(_strongest(found.finding, telling), [one.finding for one in telling])
        finding = with_one_case(finding, outside, found.refuted)
        calls = (self._failures[case].failed for case in outside if case in self._failures)
        finding = with_exposed(finding, ((f.run.inputs, f.outputs) for f in calls if f.kind == "moe"))
        if not all_aside and (others := len(aside - set(special))) and finding.sentence:
            besides = f"; beside that, in {counted(others, 'case')} NaN alone has other bits"
            finding = replace(finding, sentence=added(finding.sentence, besides), exact=False)
        return Found(tuple(results), defects, finding)

    def _again(self, result: CaseResult) -> CaseResult:
        """The result; of zeros, which by themselves name nothing, with what other cases name, if that gives them."""
        one = self._failures.get(result.case)
        if one is None or one.located is None or not one.located.zeros or result.diagnosis is None:
            return result
        again = one.looked_at(result, tuple(self._suspects), "quick", _SUSPECTS_SECONDS)
        return again if again.diagnosis is not None and again.diagnosis.exact else result

    def _judged(
        self, together: Mapping[str, _Failure], results: list[CaseResult], goldens: Goldens | None
    ) -> Verdict:
        """What they come to; where some lie within bounds and some do not, what the latter come to."""
        within = {r.case for r in results if r.within_bounds}
        outside = {case: one for case, one in together.items() if case not in within}
        failed: dict[str, None] = {}
        with listening(failed):
            found = _judged(outside or together, results, goldens, self._suspects)
        for line in failed:
            self._note(line)
        if not outside:  # evidence says what is wrong, which none of them need be
            by_case = {case: one if one.exact else UNKNOWN for case, one in found.by_case.items()}
            finding = found.finding if found.finding.exact or found.finding.cases else UNKNOWN
            return replace(found, finding=finding, by_case=by_case)
        suspects = tuple(h.name or h for h in found.hypotheses)
        for i, result in enumerate(results):
            if suspects and result.case in within:
                again = self._failures[result.case].looked_at(result, suspects, "quick", _SUSPECTS_SECONDS)
                results[i] = again if _predicting(again) else result
        predicted = [_predicting(r) for r in results if r.case in within]
        found = narrowed(found, predicted, [one.failed.run.inputs for one in together.values()])
        if all(words.intersection(found.finding.hypotheses) for words in predicted):
            return found
        return replace(found, hypotheses=(), finding=_of_some(found.finding, len(outside)))

    def _in_full(self, results: list[CaseResult], found: Verdict) -> list[CaseResult]:
        """The results, with what was found for all together, and by a search of its own on a layer of whole size."""
        suspects = tuple(h.name or h for h in found.hypotheses)
        exact = tuple(Prediction(h.name, 1.0, True) for h in found.hypotheses if h.name)
        # Their searches take minutes: one is enough, and none is needed where smaller cases fail too.
        searched = any(one.failed.together for one in self._failures.values())
        told = []
        for result in results:
            one = self._failures.get(result.case)
            if one is not None and result.case in found.by_case:
                result = one.told(result, (exact, found.by_case[result.case], ()))
            elif one is not None and one.failed.whole_size and (suspects or not searched):
                effort = "quick" if searched else "full"
                limit = f"up to {REAL_SECONDS[effort]:.0f} s of the processor"
                self._note(f"{result.case}: {one.failed.size}: diagnosis, {limit}")
                result = one.looked_at(result, suspects, effort)
                searched = True
            told.append(result)
        return told


def _strongest(judged: Finding, telling: list[Diagnosis]) -> Finding:
    """What was found for all cases together, unless by themselves they say more."""
    if judged.exact:
        return judged
    own = agreed(telling)
    if judged.cases:
        return own if own.cases and own.cases[0] > judged.cases[0] else judged
    return judged if (judged.sentence or judged.stages) and not (own.exact or own.cases) else own


def _judged(
    failures: Mapping[str, _Failure],
    results: list[CaseResult],
    goldens: Goldens | None,
    known: Collection[str],
) -> Verdict:
    """What the calls that are diagnosed together come to."""
    wrong = []
    for case, one in failures.items():
        failed, found = one.failed, () if one.located is None else tuple(one.located.found)
        got, want = failed.outputs["output"].cpu(), failed.run.expected["output"].cpu()
        outside = None if (some := failed.outside) is None or not bool(some.any()) else some.cpu()
        wrong.append(Failure(case, prepared(failed.run.inputs), got, want, outside, found))
    right = [r.case for r in results if r.status == "equal" and r.kind == "moe"]

    def passing() -> Iterator[tuple[Pipeline, Tensor]]:
        for name in right:
            if goldens is None:
                break
            case = goldens.load(name)
            if not case.is_whole_layer:
                one = runs(case)[0]
                yield prepared(one.inputs), one.expected["output"]

    with on_cpu():
        return judge(wrong, passing, seconds=_SECONDS, known=known)


def _of_some(finding: Finding, cases: int) -> Finding:
    """What was found for so many cases, as what it is of all: where it predicts them, not every bit of every case."""
    return (
        replace(finding, exact=False, cases=(cases, cases))
        if finding.exact and not finding.cases
        else finding
    )


def _predicting(result: CaseResult) -> set[str]:
    """In words, what predicts every bit of a case."""
    found = Finding() if result.diagnosis is None else result.diagnosis.finding
    return set(found.hypotheses or (found.sentence,)) if found.exact else set()
