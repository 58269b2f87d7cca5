"""What is known of some failing cases only, or nearly, and how long it took, is said as that."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from mxfp4ref.conformance import CaseResult, Options, Report, diagnose
from mxfp4ref.conformance.diagnosing import Found
from mxfp4ref.conformance.families import jury
from mxfp4ref.conformance.families.engine import Result, prepared
from mxfp4ref.conformance.families.hearing import Failure, Heard, hear
from mxfp4ref.conformance.families.hypotheses.activations import activation_hypotheses
from mxfp4ref.conformance.families.hypothesis import Hypothesis, roughly
from mxfp4ref.conformance.families.jury import _hear_all, _of_most, _of_some, _worth_hearing
from mxfp4ref.conformance.families.search import Match, Search
from mxfp4ref.conformance.families.soon import for_a_share
from mxfp4ref.conformance.families.telling import told
from mxfp4ref.conformance.findings.agreement import agreed
from mxfp4ref.conformance.findings.finding import UNKNOWN, Evidence, Finding
from mxfp4ref.conformance.findings.reduction import clock_of, thread_clock
from mxfp4ref.conformance.findings.suspects import Verdict
from mxfp4ref.conformance.suite import _State
from mxfp4ref.goldens import open_goldens

GOLDENS = open_goldens()
ONE, ALIKE, OTHER = (
    f"activation/{name}"
    for name in ("gpt_oss_at_rounding_boundaries", "gpt_oss_special_values", "beta_alone")
)


def pipeline(case: str) -> Any:
    return prepared(GOLDENS.load(case).call())


def match() -> Match:
    found = activation_hypotheses(pipeline(ONE).call)
    return Match(next(h for h in found if h.words.endswith("the sigmoid takes e^x as 2^x")), True)


def failure(case: str, got: Tensor | None = None) -> Failure:
    """As the hypothesis predicts it, by default."""
    right = pipeline(case)
    output = match().hypothesis.run(right) if got is None else got
    assert output is not None
    return Failure(case, right, output, right.run())


def of_another_kind() -> Failure:
    return failure(OTHER, -pipeline(OTHER).run())


def said(finding: Finding | None) -> str:
    assert finding is not None
    failed = CaseResult("a", "moe", "", "differs")
    return Report("it", "exact", (failed,), finding=finding).culprit


def test_what_predicts_one_case_of_three_is_said_first() -> None:
    failures = [failure(ONE), of_another_kind(), of_another_kind()]
    heard = hear(match(), failures)
    assert heard.cases == [ONE]
    best = Finding(("activation", "fc1"), "GEMM2 is right, and got another activation")
    found = _of_some(failures, tuple, [heard], [], best)
    assert found is not None
    assert [(case, one.exact) for case, one in found.by_case.items()] == [(ONE, True)]
    assert said(found.finding) == (
        f" Every wrong bit in 1 of 3 failing cases is predicted by this: {match().hypothesis.words}; in the others "
        "GEMM2 is right, and got another activation; it lies in activation or fc1."
    )
    alone = _of_some(failures, tuple, [heard], [], UNKNOWN)
    assert alone is not None
    assert "in the others" not in said(alone.finding)


def test_what_a_case_alike_refutes_is_not_said() -> None:
    otherwise = pipeline(ALIKE).run()
    otherwise[0] = 1
    for failures, passing in (
        ([failure(ONE), failure(ALIKE, otherwise), of_another_kind()], []),
        ([failure(ONE), of_another_kind(), of_another_kind()], [(pipeline(ALIKE), pipeline(ALIKE).run())]),
    ):
        assert _of_some(failures, lambda p=passing: p, [hear(match(), failures)], [], UNKNOWN) is None
    failures = [failure(ONE), of_another_kind(), of_another_kind()]
    elsewhere = Finding(("finalize",), "the routing weights used are others")
    assert _of_some(failures, tuple, [hear(match(), failures)], [], elsewhere) is None


def test_what_predicts_most_wrong_elements_is_the_best_evidence() -> None:
    near, words = failure(ONE).got.clone(), match().hypothesis.words
    near[0, 0] += 1
    failures = [failure(ONE, near), failure(ALIKE)]
    here = match().hypothesis
    result = Result((Match(roughly(here, "up to roundings", 0.5), False, here),), (), UNKNOWN, 1, True)
    heard = [hear(one, failures) for one in _worth_hearing(result)]
    evidence = Finding(("activation",), "the activation is another function")
    assert said(_of_most(failures, heard, [], evidence)) == (
        " No single change that was tried predicts every bit of all that fails. The best evidence: in 2 of 2 failing "
        f"cases {words}, or nearly so (99% of the wrong elements in every bit); it may lie in activation."
    )
    more = [*failures, of_another_kind()]
    assert _of_most(more, [hear(match(), more)], [], UNKNOWN) is None, "which another case refutes"
    elsewhere = Evidence(("finalize",), "the routing weights used are others", 3)
    assert _of_most(failures, heard, [elsewhere] * 2, UNKNOWN) is None, "as many prove something else"


def test_what_is_mostly_right_is_heard_to_the_end() -> None:
    """Many cases have a second mistake too, before one that shows the first alone."""
    near = failure(ONE).got.clone()
    near[0, 0] += 1
    two, one = failure(ONE, near), replace(failure(ONE), case="the last")
    heard = hear(match(), [*(replace(two, case=str(number)) for number in range(12)), one])
    assert heard.all_heard
    assert heard.cases == ["the last"]


def test_of_what_explains_a_case_the_simplest_is_heard_though_the_time_is_up() -> None:
    named = [replace(match().hypothesis, words=words) for words in ("A", "B")]
    result = Result(tuple(Match(one, True) for one in named), (), UNKNOWN, 2, True)
    for seconds, words in ((-1.0, ["A"]), (60.0, ["A", "B"])):
        seen: dict[str, Heard] = {}
        _hear_all(result, seen, [failure(ONE)], thread_clock() + seconds)
        assert [*seen] == words


def test_what_follows_from_a_prediction_of_most_bits_is_hedged() -> None:
    hypothesis = Hypothesis("rows", ("fc1",), "GEMM1's rows are others, or nearly so", lambda p: p)
    for finding in (told([Match(hypothesis, False)], (), ()), Finding(("fc1",), "most", hedged=True)):
        assert str(finding).endswith("[perhaps fc1]")
        assert said(finding).endswith("; it may lie in fc1.")
    sure = Finding(("fc1",), "GEMM1's rows are others, or nearly so")  # words alone say nothing
    assert said(sure).endswith("; it lies in fc1.")
    assert not told([Match(hypothesis, True)], (), ()).hedged
    assert agreed([]) == UNKNOWN


def test_the_parts_of_the_time_are_no_more_than_all_of_it() -> None:
    class Failing:
        """The diagnosis of a case, made at the end, counts for the case."""

        def verdict(self, results: list[CaseResult], *_: object, **__: object) -> Found:
            return Found(tuple(r.lasting(diagnosis=5) for r in results), (), UNKNOWN)

    state = _State(Options(), None, "", ())
    state.failing = Failing()  # type: ignore[assignment]
    state.results = [CaseResult("a", "moe", "", "differs")]
    report = state.report("it")
    assert report.results[0].diagnosis_seconds + report.verdict_seconds <= report.seconds


def test_of_a_call_of_real_size_all_threads_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its GEMMs run in threads for which the one that searches only waits."""
    call = pipeline(ONE).call
    monkeypatch.setattr(time, "thread_time", lambda: 1.0)
    monkeypatch.setattr(time, "process_time", lambda: 2.0)
    monkeypatch.setattr(
        "mxfp4ref.conformance.findings.reduction.seconds_loading", lambda: 0.25
    )  # which do not count
    for heavy, seconds in {False: 1.0, True: 2.0}.items():
        monkeypatch.setattr("mxfp4ref.conformance.findings.reduction.is_heavy", lambda _, heavy=heavy: heavy)
        assert clock_of(call)() == seconds - 0.25


def test_names_and_hypotheses_share_the_limit_of_a_call_of_real_size(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    clock = iter((0.0, 48.0))

    def investigate(*_: object, seconds: float, **__: object) -> Result:
        given.append(seconds)
        return Result((), (), UNKNOWN, 0, True)

    for name, value in (
        ("is_heavy", lambda _: True),
        ("clock_of", lambda _: clock.__next__),
        ("try_defects", lambda *_, **__: Verdict(())),
        ("investigated", investigate),
    ):
        monkeypatch.setattr(f"mxfp4ref.conformance.looking.{name}", value)
    one = of_another_kind()
    diagnose("moe", one.pipeline.call, {"output": one.got}, {"output": one.want})
    assert given == [12.0]


@pytest.mark.slow
def test_a_plain_case_is_searched_where_no_other_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jury, "_SEARCHED", 0)
    noise = [failure(case, torch.randn_like(failure(case).got)) for case in (ALIKE, OTHER)]
    verdict = jury.judge([*noise, failure(ONE)], lambda: [], seconds=0.0)
    assert verdict.by_case[ONE].exact
    assert verdict.by_case[ONE].sentence.startswith("in the activation the sigmoid takes e^x")


def test_of_evidence_that_agrees_the_strongest_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most cases prove no more than a stage, one of them shows which rows."""
    weak, strong = (
        Evidence(("fc1", "input"), "GEMM1 is wrong", 2),
        Evidence(("fc1", "activation"), "in rows 3", 3),
    )
    said_of = iter([[weak], [weak], [strong]])
    for name, value in (
        ("_SEARCHED", 0),
        ("plain_one", lambda _: None),
        ("gather", lambda *_: next(said_of)),
        ("look_closer", lambda *given: given[-1]),
    ):
        monkeypatch.setattr(jury, name, value)
    some = [replace(of_another_kind(), case=str(number)) for number in range(3)]
    finding = jury.judge(some, lambda: [], seconds=0.0).finding
    assert finding.sentence.startswith("in rows 3 (")
    assert finding.stages == ("fc1", "input")


def test_a_share_of_the_time_leaves_the_rest_for_later() -> None:
    search = cast(Search, SimpleNamespace(clock=iter(range(99)).__next__, until=20))
    every = iter([match().hypothesis] * 20)
    some = list(for_a_share(search, every, 0.25))
    assert len(some) == 4
    assert len(list(every)) == 20 - len(some)
