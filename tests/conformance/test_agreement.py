"""The verdict on several failing cases: nothing that was found for most of them is thrown away."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mxfp4ref import forward
from mxfp4ref.conformance import CaseResult, Diagnosis, Kernel, Options, Report, diagnose, run
from mxfp4ref.conformance.comparison import FAR
from mxfp4ref.conformance.families import jury
from mxfp4ref.conformance.families.engine import Result, prepared
from mxfp4ref.conformance.families.hearing import Failure
from mxfp4ref.conformance.families.hypothesis import Hypothesis
from mxfp4ref.conformance.families.jury import judge
from mxfp4ref.conformance.families.search import Match
from mxfp4ref.conformance.findings.agreement import _several, agreed, unrefuted, with_one_case
from mxfp4ref.conformance.findings.finding import OTHER_EXPERTS, Evidence, Finding, added, in_words, listed
from mxfp4ref.conformance.findings.patterns import Pattern
from mxfp4ref.conformance.findings.stage_fit import Reach
from mxfp4ref.conformance.heartbeat import told_to
from mxfp4ref.conformance.kernels.adapters import whole_arguments
from mxfp4ref.conformance.reports.again import bounded_command, command
from mxfp4ref.goldens import open_goldens
from mxfp4ref.model.call import MoeCall
from tests.held_out_kernels.by_hand import with_experts

GOLDENS = open_goldens()
FACTOR = "a factor of 0.9 too many on the bf16 output"
TOLD_FROM = ". The same bits would come from: "


@pytest.fixture(scope="module")
def plain() -> Diagnosis:
    call = GOLDENS.load("finalize/slot_order").call().select(slice(1))
    return diagnose("moe", call, {"output": -forward(call)}, {"output": forward(call)}, diagnosis="quick")


def verdict(finding: Finding, plain: Diagnosis) -> str:
    failed = CaseResult("a", "moe", "", "differs", diagnosis=plain)
    return Report("it", "exact", (failed,), finding=finding).culprit


def test_a_quick_diagnosis_names_the_line_of_the_full_one(plain: Diagnosis) -> None:
    failed = CaseResult("a", "moe", "", "differs", diagnosis=plain)
    given = ("mine.py:f", "--diagnosis", "quick", "--no-repeat")
    quick = Report("it", "exact", (failed,), arguments=given, selection=("--case", "gemm"))
    line = "a full one tries more: mxfp4ref conform mine.py:f --no-repeat --case gemm"
    assert quick.verdict.endswith(f"What is wrong is unknown. This was a quick diagnosis; {line}")
    explained = replace(quick, finding=exact(FACTOR))
    assert (
        "A quick diagnosis of one case; a full one tells what else predicts its bits: mxfp4ref"
        in explained.verdict
    )
    assert command(quick, failed).startswith("mxfp4ref conform mine.py:f --no-repeat --case a ")
    assert bounded_command(quick) == "mxfp4ref conform mine.py:f --no-repeat --case gemm --mode bounded"
    session = replace(quick, line="pytest --mxfp4-kernel mine.py:f 'mxfp4::a b' --mxfp4-diagnosis quick -x")
    line = "pytest --mxfp4-kernel mine.py:f 'mxfp4::a b' -x --mxfp4-"
    assert session.verdict.endswith(f": {line}diagnosis=full")
    assert bounded_command(session) == f"{line}diagnosis=full --mxfp4-mode=bounded"
    assert "quick" not in replace(explained, results=(failed, failed)).verdict
    assert "quick" not in replace(quick, arguments=given[:1]).verdict


def said(plain: Diagnosis, *findings: Finding) -> str:
    cases = [replace(plain, finding=f, stage="", reach="", patterns=(), places=()) for f in findings]
    return verdict(agreed(cases), plain)


def exact(*hypotheses: str, stages: tuple[str, ...] = ("finalize",)) -> Finding:
    return Finding(stages, in_words(hypotheses), True, hypotheses=hypotheses)


def evidence(stages: tuple[str, ...], kind: str, details: str) -> Finding:
    return Evidence.of_kind(stages, kind, details, 3).finding()


def test_what_all_cases_say(plain: Diagnosis) -> None:
    assert said(plain, *[exact(FACTOR)] * 3) == f" Every wrong bit is predicted by this: {FACTOR}."


def test_alternatives_that_only_some_cases_leave_are_excluded_by_the_others(plain: Diagnosis) -> None:
    assert in_words("ABCDEFG") == f"A{TOLD_FROM}(1) B; (2) C; (3) D; (4) E; (5) F; and 1 more"
    assert listed(in_words("ABCDEFG")) == ("A", [*"BCDEF", "and 1 more"])
    assert listed(added(in_words("AB"), "; beside that, C") + ".") == ("A; beside that, C", ["B"])
    assert listed("A.") == ("A.", [])
    words = said(plain, exact(*"ABCDE"), exact(*"AC"), exact(*"CEA"))
    assert words == f" Every wrong bit is predicted by this: A{TOLD_FROM}C."


def test_alternatives_that_open_otherwise_are_told_before_more_of_the_same() -> None:
    limits = [f"the limit is {n}" for n in ("none", "too low", "too high", "another's")]
    assert (
        in_words(("A", *limits, "B", "C"))
        == f"A{TOLD_FROM}(1) {limits[0]}; (2) B; (3) C; (4) {limits[1]}; (5) {limits[2]}; and 1 more"
    )


def test_what_differs_in_a_number_is_told_as_one() -> None:
    words = [f"rows from {n} on of bf16, 2^-3 of them" for n in (8, 16, 32, 4, 2, 1, 64)]
    assert in_words(words) == "rows from 8 (or 16, 32, 4, 2, ...) on of bf16, 2^-3 of them"
    apart = ["token 3 is token 4", "token 5 is token 6"]
    assert in_words(apart) == TOLD_FROM.join(apart)
    assert in_words(["fc1 is x", "fc2 is x"]) == f"fc1 is x{TOLD_FROM}fc2 is x"


@pytest.mark.slow
def test_what_has_a_name_is_told_with_what_has_none_and_predicts_the_same(plain: Diagnosis) -> None:
    """Two experts with the same weights: the parameters of the first one, or its slots, as of ids read wrongly."""

    call = GOLDENS.load("activation/parameters_by_expert").call()
    ids = call.token_selected_experts
    read = ids.long().view(torch.int32).flatten()[: ids.numel()].view_as(ids)
    got = forward(replace(call, token_selected_experts=read, strict=False))
    failure = Failure("a", prepared(call), got, forward(call))
    found = judge([failure], lambda: (), seconds=40.0, known=("params_of_first_expert",))
    assert found.hypotheses[0].name == "params_of_first_expert"
    assert found.finding.stages == ("activation", "slots")
    assert "the expert ids are int64 in memory and read as int32" in found.finding.sentence
    failed = CaseResult("a", "moe", "", "differs", diagnosis=plain)
    report = Report("it", "exact", (failed,), ("params_of_first_expert",), finding=found.finding)
    first, others = report.verdict.split(TOLD_FROM)
    assert first.endswith(
        "is that of params_of_first_expert: the first expert's parameters used for all, as if they were scalars"
    )
    assert "the expert ids are int64 in memory and read as int32" in others
    assert "params_of_first_expert" not in others


def test_a_case_explained_by_itself_comes_before_what_is_read_off_another_one(plain: Diagnosis) -> None:
    alone = exact("halves are swapped, for expert 1", stages=("fc1",))
    causes = Finding(("activation", "fc1"), "another function: the formula, or the bias (b/other)")
    cases = {
        "a/few": replace(plain, finding=exact("few"), bins=plain.bins[:, :39]),
        "a/case": replace(plain, finding=alone),
    }
    assert int((plain.bins > 0).sum()) > 40
    words = f"a/case by itself shows in every bit: {alone.sentence}"
    assert with_one_case(causes, cases) == with_one_case(Finding(), cases) == Finding(("fc1",), words)
    assert with_one_case(causes, cases, lambda case: case == "a/case") == causes, "others refute it"
    elsewhere = replace(causes, stages=("finalize",))
    assert with_one_case(elsewhere, cases) == replace(elsewhere, sentence=f"{causes.sentence}; {words}")
    for finding in (causes, replace(causes, cases=(1, 2)), replace(causes, exact=True)):
        assert with_one_case(finding, {"a/few": cases["a/few"]}) == finding
    assert with_one_case(replace(causes, cases=(1, 2)), cases) == replace(causes, cases=(1, 2))
    special = {"a/special_values": cases["a/case"], "b/other": replace(plain, finding=causes)}
    assert with_one_case(causes, special) == causes, "much gives the numbers of special values"


@pytest.mark.slow
def test_half_of_the_experts_is_one_kind_whatever_their_number() -> None:
    """As of those in the second file of a checkpoint: two of four experts in one case, one of three in the other."""

    def half(tensor: Tensor) -> Tensor:
        up, gate = tensor[(len(tensor) + 1) // 2 :].chunk(2, 1)
        return torch.cat((tensor[: (len(tensor) + 1) // 2], torch.cat((gate, up), 1)))

    failures = []
    for name in ("gemm/uneven_experts", "parallel/expert_rank_2_of_4_with_three_each"):
        pipeline = prepared(GOLDENS.load(name).call())
        experts = pipeline.call.experts
        assert experts.fc1_scales is not None
        changed = {"fc1_weights": half(experts.fc1_weights), "fc1_scales": half(experts.fc1_scales)}
        got = forward(with_experts(pipeline.call, **changed))
        failures.append(Failure(name, pipeline, got, forward(pipeline.call)))
    finding = judge(failures, lambda: (), seconds=40.0).finding
    assert finding.exact
    assert "taken as [gate; up], for slots of the upper half of the experts only" in finding.sentence


def test_what_most_cases_say_comes_with_the_count(plain: Diagnosis) -> None:
    other = Finding(("fc2",), "something else")
    words = said(plain, other, exact(FACTOR), exact(FACTOR), Finding())
    assert (
        words
        == f" Every wrong bit in 2 of 4 failing cases is predicted by this: {FACTOR}; it lies in finalize."
    )
    assert "unknown" in said(plain, exact(FACTOR), other, Finding(), Finding()), "one case is no majority"


def test_cases_that_are_all_explained_by_different_sentences(plain: Diagnosis) -> None:
    words = said(plain, exact("A"), exact("B", stages=("fc2",)), exact("C"), exact("A"), exact("D"))
    assert (
        words == " Each is explained in every bit, by different sentences; 2 of 5 failing cases by this: A."
    )


def test_evidence_of_most_cases(plain: Diagnosis) -> None:
    words = said(plain, *[Finding(("fc2",), "some evidence")] * 2, Finding())
    assert words.endswith("best evidence: in 2 of 3 failing cases some evidence; it lies in fc2.")


def test_evidence_of_one_kind_with_numbers_of_its_own_in_each_case(plain: Diagnosis) -> None:
    weights = [
        evidence(("finalize",), "the routing weights used are others", f"token {t} is x") for t in range(6)
    ]
    words = said(plain, *weights, evidence(("slots", "finalize"), OTHER_EXPERTS, "token 0"))
    assert words == (
        " No single change that was tried predicts every bit of all that fails. The best evidence: "
        "in 6 of 7 failing cases the routing weights used are "
        "others; in the first of them: token 0 is x; it lies in finalize."
    )
    slots = [
        Finding(("slots",), f"{OTHER_EXPERTS} (expert {t} by 11): token 0", kind=OTHER_EXPERTS)
        for t in range(4)
    ]
    words = said(plain, *slots, Finding())
    assert (
        "in 4 of 5 failing cases slots are computed by other experts; in the first of them: (expert 0 by 11): token 0"
        in words
    )
    slots[1] = replace(
        exact("slots are computed by the previous expert", stages=("slots",)), kind=OTHER_EXPERTS
    )
    slots[3] = Finding(("slots",), "slots of the last place of a token: token 3: x", kind=OTHER_EXPERTS)
    assert said(plain, *slots, Finding()) == words
    assert said(plain, *weights[:4], *slots[:2]) != said(plain, *weights[:4], *slots), "half is not most"


def test_cases_of_which_each_says_its_own(plain: Diagnosis) -> None:
    group = "a group's score is its best expert's"
    twice = "all weights are {0}x the right ones: the routed scaling factor {0} is applied twice"
    routing = [
        f"{group}; {twice.format(2.5)}",
        f"ids are right; {twice.format(1.5)}",
        twice.format(2.5),
        group,
    ]
    words = said(plain, *[Finding(("routing",), words) for words in routing], Finding(("routing",)))
    assert words == (
        " No one sentence explains all: two or more mistakes, or one that shows in several ways: in 3 of 5 failing "
        f"cases {twice.format(2.5)} (with numbers of their own); in 2 of 5 {group}; it lies in routing."
    )
    few = [Finding(("routing",), words) for words in routing[2:]]
    words = said(plain, *few, *[Finding(("routing",))] * 2)
    assert words.startswith(
        f" No one sentence explains all: in 1 of 4 failing cases {twice.format(2.5)}; in 1 of"
    )


def test_without_a_sentence_the_stage_that_most_share(plain: Diagnosis) -> None:
    lines: dict[str, Reach] = {"12 elements": "before finalize", "x": "rounding", "3": "before finalize"}
    cases = [
        replace(plain, finding=Finding(), stage=line, reach=reach, patterns=(), places=())
        for line, reach in lines.items()
    ]
    assert verdict(agreed(cases), plain) == (
        " What is wrong is unknown; in 2 of 3 failing cases it lies before finalize."
    )


def test_without_a_stage_the_places_that_most_share(plain: Diagnosis) -> None:
    patterns = [
        Pattern.of("only tokens 2, 5, 8", 9, 3),
        Pattern.of("only tokens 2, 5, 8", 16, 3),
        Pattern.of("only token 1", 2, 1),
    ]
    assert [p.words for p in patterns] == [
        "only tokens 2, 5, 8 of 9 differ",
        "only tokens 2, 5, 8 of 16 differ",
        "only token 1 of 2 differs",
    ]
    cases = [
        replace(plain, finding=Finding(), stage="", reach="", patterns=(p.words,), places=(p.place,))
        for p in patterns
    ]
    assert verdict(agreed(cases), plain) == (
        " What is wrong is unknown; in 2 of 3 failing cases only tokens 2, 5, 8 differ."
    )


def test_which_of_the_failing_cases_are_meant(plain: Diagnosis) -> None:
    differ = [CaseResult(name, "moe", "", "differs", diagnosis=plain) for name in "abc"]
    raised = [CaseResult(name, "moe", "", "raised") for name in "de"]
    found = Finding(("finalize",), FACTOR, False, (1, 2))
    words = Report("it", "exact", (*differ, *raised), finding=found).verdict
    assert words == (
        "it does not conform: 5 of 5 cases fail (3 differ, 2 raised). Every wrong bit in 1 of 2 failing cases that "
        f"were searched is predicted by this: {FACTOR}; it lies in finalize."
    )
    assert "2 of 2 cases fail. " in Report("it", "exact", tuple(differ[:2]), finding=found).verdict, (
        "in one way"
    )


@pytest.mark.slow
def test_alternatives_of_what_predicts_some_cases_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three hypotheses predict the one case, and none the other, which is of another kind."""

    def negative(call: MoeCall) -> Tensor:
        return -forward(call)

    calls = [
        GOLDENS.load(name).call() for name in ("finalize/slot_order", "parallel/sentinels_on_rank_3_of_4")
    ]
    outputs = negative(calls[0]), forward(calls[1]).flip(1)
    failures = [
        Failure(name, prepared(call), got, forward(call))
        for name, call, got in zip("ab", calls, outputs, strict=True)
    ]
    matches = [
        Match(
            Hypothesis("sum of slots", ("finalize",), words, lambda p, f=change: replace(p, run_call=f)), True
        )
        for words, change in (("A", negative), ("B", negative), ("C", forward))
    ]
    result = Result(tuple(matches), (), Finding(), 3, True)
    monkeypatch.setattr(jury, "investigated", lambda *_, **__: result)
    said: list[str] = []
    with told_to(lambda words, seconds: said.append(words)):
        found = judge(failures, lambda: (), seconds=9.0)
    assert {"what was suspected", "a (1 of 2)", "b (2 of 2)"} <= set(said)
    assert found.by_case["a"].exact
    assert not found.by_case["b"].exact
    assert found.finding == Finding(("finalize",), f"A{TOLD_FROM}B", False, (1, 2), hypotheses=("A", "B"))


@pytest.mark.slow
def test_zeros_where_sums_cancel_are_given_no_name() -> None:
    """Another rounding of the weights gives the same zeros as weights of another size, which is what was wrong."""

    def summed_to_one(call: MoeCall) -> Tensor:
        weights = call.token_final_scales
        return forward(replace(call, token_final_scales=weights / weights.sum(1, keepdim=True)))

    kernel = Kernel("it", ("moe",), whole_arguments, lambda kind, call: summed_to_one(call))
    found = run(kernel, [GOLDENS.load("finalize/biases_cancel")], Options(repeat=False))
    assert not found.defects
    assert not found.finding.exact


@pytest.mark.slow
def test_a_quick_run_repeats_the_finding() -> None:
    def scaled(call: MoeCall) -> Tensor:
        return forward(replace(call, token_final_scales=call.token_final_scales * 2.5))

    kernel = Kernel("it", ("moe",), whole_arguments, lambda kind, call: scaled(call))
    report = run(
        kernel, map(GOLDENS.load, ("finalize/slot_order", "gemm/ordinary")), Options(diagnosis="quick")
    )
    assert "a factor of 2.5 too many on the routing weights" in report.verdict


@pytest.mark.parametrize(
    ("sentence", "left"),
    [
        ("it differs: GEMM1 is wrong; GEMM2 and the sum are right", "it differs: GEMM1 is wrong"),
        ("rows: token 1 has 2's; all else is right", "rows: token 1 has 2's"),
        ("columns: GEMM2 and the sum are right, it is in GEMM1", "columns: it is in GEMM1"),
    ],
)
def test_what_another_case_refutes_is_not_repeated(sentence: str, left: str) -> None:
    one = Finding(("fc1", "input"), sentence)
    other = Finding(("finalize",), "other weights: token 0 is 1 x expert 0", kind="other weights")
    said = unrefuted(one, [one, other])
    assert said.sentence == f"{left}; another case shows something else, in finalize: other weights"
    assert said.where == "it may lie in fc1 or input"
    assert unrefuted(one, [one, replace(other, stages=("fc1",))]) == one
    assert ", perhaps in finalize: " in unrefuted(one, [one, replace(other, hedged=True)]).sentence


def test_where_nothing_is_known_the_cases_that_tell_most_are_named(plain: Diagnosis) -> None:
    """Numbers that are known to be wrong before NaN and what another order may give, and one of each suite first."""
    unknown = replace(plain, finding=Finding())
    no_number = replace(unknown, ulps=(*unknown.ulps[:-1], (FAR, 3)))
    results = [
        CaseResult("a/raised", "moe", "", "raised"),
        CaseResult("a/nan", "moe", "", "differs", elements=9, differing=9, diagnosis=no_number),
        CaseResult("b/most", "moe", "", "differs", elements=9, differing=8, diagnosis=unknown),
        CaseResult("b/few", "moe", "", "differs", elements=9, differing=1, diagnosis=unknown),
        CaseResult("c/within", "moe", "", "differs", (), 9, 9, diagnosis=unknown, within_bounds=True),
    ]
    report = Report("it", "exact", tuple(results))
    assert report.verdict.endswith(
        "is unknown. Of those that fail these tell most: b/most, a/nan, c/within, b/few."
    )
    text = str(report)
    assert text.index("b/most") < text.index("a/nan") < text.index("c/within")
    assert "tell most" not in replace(report, results=tuple(results[:2])).verdict, (
        "one of which anything is known"
    )


def test_alternatives_are_no_findings_of_their_own() -> None:
    """Nor how many there are: they belong to what is said before them."""
    several = [
        Finding((), f"all is zero; among what gives this: {n} rows; or B; and {n} more that were tried")
        for n in (1, 2, 3)
    ]
    words = str(_several(several))
    assert "in 3 of 3 among what gives this: 1 rows (with numbers of their own)" in words
    assert "more that were tried" not in words
    assert " or B" not in words
