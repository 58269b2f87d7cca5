"""From the cases of a run that fail to its verdict: kernel calls are diagnosed together, all else one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from mxfp4ref.conformance.diagnosis import Diagnosis, Finding, Known, Prediction, diagnose
from mxfp4ref.conformance.families.engine import prepared
from mxfp4ref.conformance.families.hypothesis import Hypothesis, Pipeline
from mxfp4ref.conformance.families.jury import Failure, Verdict, judge
from mxfp4ref.conformance.plain import of_exception
from mxfp4ref.conformance.reduction import is_heavy
from mxfp4ref.conformance.results import CaseResult, name_defects
from mxfp4ref.goldens import Goldens
from mxfp4ref.goldens.runs import Run, runs
from mxfp4ref.model.call import MoeCall

__all__ = ["Failed", "Failing", "Found", "diagnosed"]

_SECONDS = 40.0  # for the hypotheses of a run
_MOST_TOLD = 3  # different sentences of a verdict


@dataclass(frozen=True)
class Failed:
    """What is to be diagnosed: a case's kind, its run, and what the kernel gave."""

    kind: str
    run: Run
    outputs: Mapping[str, Tensor]

    @property
    def together(self) -> bool:
        """Whether it is one of the calls that are diagnosed together: not of whole size, with MXFP4 weights."""
        call = self.run.inputs
        return isinstance(call, MoeCall) and call.experts.tactics_show and not is_heavy(call)


@dataclass(frozen=True)
class Found:
    """What a run's failures come to: results with their diagnoses, the defects that predict all, the finding."""

    results: tuple[CaseResult, ...]
    defects: tuple[str, ...]
    finding: Finding


def diagnosed(
    result: CaseResult,
    failed: Failed,
    *,
    suspects: tuple[str | Hypothesis, ...] = (),
    effort: str = "full",
    known: Known | None = None,
) -> CaseResult:
    """The result with its diagnosis; if that fails, with the reason."""
    try:
        found = diagnose(
            failed.kind,
            failed.run.inputs,
            failed.outputs,
            failed.run.expected,
            suspects=suspects,
            effort=effort,
            known=known,
        )
    except Exception as error:  # of outputs that nobody has thought of; the result is not lost
        words = f"no diagnosis: {of_exception(error)}"
        return replace(result, message="; ".join(filter(None, (result.message, words))))
    return replace(result, diagnosis=found)


class Failing:
    """The failures of a run, as they come."""

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self._later: dict[str, Failed] = {}

    def take(self, result: CaseResult, failed: Failed | None) -> CaseResult:
        """The result, diagnosed if that is not done at the end."""
        if failed is None or not self._wanted:
            return result
        if failed.together:
            self._later[result.case] = failed
            return result
        suspects: tuple[str | Hypothesis, ...] = ()
        if isinstance(failed.run.inputs, MoeCall) and self._later:
            suspects = self._judged(()).hypotheses
            suspects = tuple(h.name or h for h in suspects)
        return diagnosed(result, failed, suspects=suspects)

    def verdict(self, results: list[CaseResult], goldens: Goldens | None) -> Found:
        """All results with their diagnoses, and what they say together."""
        if self._later:
            found = self._judged(tuple(results), goldens)
            names = tuple(h.name for h in found.hypotheses if h.name)
            results = [self._with_diagnosis(r, found) for r in results]
        else:
            found, names = Verdict(Finding(), (), {}), ()
        exact = [r.diagnosis.exact for r in results if r.diagnosis is not None]
        defects = name_defects([names, *exact] if self._later else exact)
        finding = found.finding
        if not finding.sentence and not finding.stages:
            finding = _agreed([r.diagnosis for r in results if r.diagnosis is not None])
        return Found(tuple(results), defects, finding)

    def _judged(self, results: tuple[CaseResult, ...], goldens: Goldens | None = None) -> Verdict:
        failures = []
        for case, failed in self._later.items():
            pipeline = prepared(failed.run.inputs)
            got, want = failed.outputs["output"].cpu(), failed.run.expected["output"].cpu()
            failures.append(Failure(case, pipeline, got, want))
        right = [r.case for r in results if r.status == "equal" and r.kind == "moe"]

        def passing() -> Iterator[tuple[Pipeline, Tensor]]:
            for name in right:
                if goldens is None:
                    break
                case = goldens.load(name)
                if not case.derived:
                    one = runs(case)[0]
                    yield prepared(one.inputs), one.expected["output"]

        return judge(failures, passing, seconds=_SECONDS)

    def _with_diagnosis(self, result: CaseResult, found: Verdict) -> CaseResult:
        failed = self._later.get(result.case)
        if failed is None:
            return result
        finding = found.by_case.get(result.case, Finding())
        exact = tuple(Prediction(h.name, 1.0, True) for h in found.hypotheses if h.name)
        return diagnosed(result, failed, known=(exact, finding, ()))


def _agreed(diagnoses: list[Diagnosis]) -> Finding:
    """What all cases say alike, or else up to three things that they say, with how many say each."""
    findings = [d.finding for d in diagnoses]
    if not findings:
        return Finding()
    counts = Counter(f.sentence for f in findings)
    stages = tuple(s for s in findings[0].stages if all(s in f.stages for f in findings))
    if len(counts) == 1:
        return replace(findings[0], stages=stages)
    told = [(words, count) for words, count in counts.most_common() if words]
    if not stages or not told or len(told) > _MOST_TOLD:
        return Finding(stages)
    sentence = "; ".join(f"in {count} of {len(findings)} cases {words}" for words, count in told)
    return Finding(stages, sentence, all(f.exact for f in findings))
