"""Kernels that sum in another order than the SM90 kernel: what is told of them in either mode."""

from __future__ import annotations

import io
import time
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import Tensor

from mxfp4ref import forward
from mxfp4ref.conformance import (
    CaseResult,
    Diagnosis,
    Kernel,
    NothingDiffers,
    Options,
    Report,
    Search,
    diagnose,
    run,
    run_case,
)
from mxfp4ref.conformance.bounds.call_bounds import bound
from mxfp4ref.conformance.diagnosing import Failing, _Failure
from mxfp4ref.conformance.families.another_order import unless_in_another_order
from mxfp4ref.conformance.families.engine import Result
from mxfp4ref.conformance.families.slot_kinds import position_in_expert
from mxfp4ref.conformance.findings.attribution import attribution
from mxfp4ref.conformance.findings.finding import UNKNOWN, Evidence, Finding
from mxfp4ref.conformance.findings.reduction import local_experts
from mxfp4ref.conformance.kernels.adapters import whole_arguments
from mxfp4ref.conformance.kernels.loading import load_kernel
from mxfp4ref.conformance.reports import report_text
from mxfp4ref.conformance.reports.report_text import case_lines, headline
from mxfp4ref.conformance.results import now
from mxfp4ref.conformance.running import compare_case
from mxfp4ref.conformance.shown_progress import shown_progress
from mxfp4ref.conformance.suite import Interrupted
from mxfp4ref.goldens import open_goldens
from mxfp4ref.model.call import MoeCall

GOLDENS = open_goldens()
CASE = "activation/plain_special_values"
RIGHT = GOLDENS.load(CASE).outputs[128, 128]
LARGE = sorted(RIGHT[3].abs().topk(2).indices.tolist())  # columns of token 3


def near() -> tuple[int, int, int]:
    """An element that may be the next larger number by its bounds, of token 0."""
    free = (bound(GOLDENS.load(CASE).call()).upper[0] > RIGHT[0].float()) & (RIGHT[0] > 0)
    return 0, int(free.nonzero()[0]), 1


def with_bits(*places: tuple[int, int, int]) -> Tensor:
    """The expected output, but for elements (token, column) whose bits have so much added; 128 doubles one."""
    bits = RIGHT.clone().view(torch.int16)
    for token, column, by in places:
        bits[token, column] += by
    return bits.view(torch.bfloat16)


def off(*places: tuple[int, int, int]) -> Kernel:

    return Kernel("off", ("moe",), whole_arguments, lambda kind, call: with_bits(*places))


@pytest.mark.slow
def test_what_is_told_of_one_element_is_of_one_outside_its_bounds() -> None:
    """Not of one that another order of summation may give, though it comes first."""
    kernel = off(near(), (3, LARGE[0], 128), (3, LARGE[1], 128))
    result = run_case(kernel, GOLDENS.load(CASE), Options(mode="bounded", repeat=False, diagnosis="quick"))
    assert (result.status, result.differing, result.outside) == ("outside bounds", 3, 2)
    assert result.diagnosis is not None
    assert result.diagnosis.first.index == (3, LARGE[0])
    assert "token 0" not in result.diagnosis.stage


def test_what_the_other_slot_of_a_token_brings_about_is_no_place() -> None:
    """Rows 16 and more of an expert are wrong: rows of the tokens' other slots are none that differ."""
    call = GOLDENS.load("gemm/uneven_experts").call()
    position, _ = position_in_expert(local_experts(call))
    mask = (position >= 16).any(1)[:, None].expand(-1, call.experts.hidden_size).contiguous()
    rows = [row for row in attribution(call, mask) if row.by == "row of an expert, by 4"]
    assert any(row.differing for row in rows)
    assert all(row.differing == (row.elements if int(row.place.split()[0]) >= 16 else 0) for row in rows)


@pytest.mark.slow
def test_slots_that_are_not_told_apart_are_of_all_tokens_with_a_slot_there() -> None:
    """The one wrong token has two experts, each of which has one right token more: it counts for both."""
    call = GOLDENS.load("finalize/slot_order").call().select(slice(4))
    ids = torch.tensor([[0, 1], [0, 2], [1, 2], [2, 3]], dtype=torch.int32)
    call = replace(call, token_selected_experts=ids, token_final_scales=torch.ones(4, 2))
    want = forward(call)
    got = want.clone()
    got[0] = -got[0]
    lines = case_lines(CaseResult("a", "moe", "", "differs", diagnosis=told_quickly(call, got, want)))
    whole = call.experts.hidden_size
    each = f"{whole} of {2 * whole}"
    assert f"by expert, of all tokens with a slot there: 0: {each}; 1: {each}; none of the others" in lines

    call = replace(
        call, token_selected_experts=torch.tensor([[0, 1], [0, 2], [1, 2], [1, 3]], dtype=torch.int32)
    )
    lines = case_lines(CaseResult("a", "moe", "", "differs", diagnosis=told_quickly(call, got, want)))
    assert f"by expert: 0: {each}; none of the tokens without a slot there" in lines


def told_quickly(call: MoeCall, got: Tensor, want: Tensor) -> Diagnosis:
    return diagnose("moe", call, {"output": got}, {"output": want}, diagnosis="quick")


def exactly(kernel: Kernel) -> CaseResult:
    return run_case(kernel, GOLDENS.load(CASE), Options(repeat=False, diagnosis="quick"))


@pytest.mark.slow
def test_in_mode_exact_a_case_within_its_bounds_is_told_so() -> None:
    result = exactly(off(near()))
    assert (result.status, result.within_bounds) == ("differs", True)
    assert headline(result).endswith("; within the bounds of a correct evaluation in another order")
    assert result.diagnosis is not None
    assert (result.diagnosis.finding.sentence, result.diagnosis.stage[:8]) == ("", "rounding")
    wrong = exactly(off((3, LARGE[0], 128)))
    assert (wrong.status, wrong.within_bounds) == ("differs", False)
    assert "bounds" not in headline(wrong)
    named = exactly(load_kernel("defect:gate_up_swapped"))
    assert named.diagnosis is not None
    assert named.diagnosis.finding.exact
    assert headline(replace(named, within_bounds=True)) == headline(named), "which says what is wrong"


def test_special_values_alone_are_no_order() -> None:
    """Whether these lie within bounds is not said: another order handles them as it likes."""
    case = GOLDENS.load("ungated/relu_non_finite")
    right = case.call()
    finite = torch.where(forward(right).isfinite(), forward(right), 0)
    kernel = Kernel("it", ("moe",), whole_arguments, lambda kind, call: finite)
    result = run_case(kernel, case, Options(repeat=False, diagnosis="quick"))
    assert (result.status, result.within_bounds) == ("differs", None)


def test_cases_outside_their_bounds_come_first() -> None:
    """In full, while those within are told once for all, with the line that judges such a kernel."""
    within = [
        CaseResult(f"a/{n}", "moe", "", "differs", elements=9, differing=1, within_bounds=True)
        for n in range(9)
    ]
    wrong = CaseResult("a/wrong", "moe", "the mistake", "differs", elements=9, differing=9)
    known = replace(wrong, within_bounds=False)
    common = {"arguments": ("f.py:f",), "date": now(), "finding": Finding(("fc1",), "this is so")}
    text = str(Report("f.py:f", "exact", (*within, wrong), **common))
    assert text.index("a/wrong") < text.index("a/0")
    assert text.count("--mode bounded") == 1
    line = "bounds: 9 of 10 failing cases lie within the bounds of a correct evaluation in another order; "
    assert f"{line}what judges a kernel that sums so: mxfp4ref conform f.py:f --mode bounded\n" in text
    assert "10 of 10 cases fail.\n9 of these lie within the bounds of" in text
    assert (
        "what follows is of the others. No single change that was tried predicts every bit of all that fails. "
        in text
    )
    assert "The best evidence: this is so" in text
    outside = str(Report("f.py:f", "exact", (*within, known), **common))
    assert "--mode bounded" not in outside, "no order explains what is wrong"
    assert (
        "9 of these lie within the bounds of a correct evaluation in another order, 1 outside those of any order;"
        in outside
    )
    explained = Report(
        "f.py:f", "exact", tuple(within), **{**common, "finding": replace(common["finding"], exact=True)}
    )
    assert "bounded" not in explained.verdict + "\n".join(report_text.tested(explained, full=True))
    alone = Report("f.py:f", "exact", tuple(within), **{**common, "finding": UNKNOWN})
    assert "mode bounded goes on to what tells, of the 5 not run yet" in replace(alone, left=5).verdict
    assert "accepts" not in replace(alone, left=5).verdict
    assert alone.verdict.endswith(
        " All that differs lies within the bounds of a correct evaluation in another order; mode bounded accepts it: "
        "mxfp4ref conform f.py:f --mode bounded."
    )


@pytest.mark.slow
def test_the_verdict_is_that_of_the_cases_outside_their_bounds() -> None:
    """And says so, where it does not hold for the others."""
    failing = Failing("full")
    results = []
    for kernel in (off(near()), load_kernel("defect:gate_up_swapped")):
        compared, failed = compare_case(kernel, GOLDENS.load(CASE), Options(repeat=False))
        result = replace(compared, case=f"{CASE}_{len(results)}")
        results.append(failing.take(result, failed))
    assert [r.within_bounds for r in results] == [True, False]
    found = failing.verdict(results, None)
    report = Report("it", "exact", found.results, found.defects, finding=found.finding)
    assert (
        " 1 of these lies within the bounds of a correct evaluation in another order, 1 outside those of any order; "
        "what follows is of the others. " in report.culprit
    )
    assert "Every wrong bit in 1 of 1 failing case is predicted by this: gate_up_swapped" in report.culprit


def test_a_large_case_is_told_before_it_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("mxfp4ref.conformance.diagnosing.is_large", lambda *_: True)
    monkeypatch.setattr(_Failure, "looked_at", lambda self, result, *_: said.append("looked at") or result)
    run(off(near()), [GOLDENS.load(CASE)], Options(repeat=False, diagnosis="quick"), note=said.append)
    assert said == [f"{CASE}: 4,096 elements: a quick diagnosis", "looked at"]


def test_a_call_is_diagnosed_in_mode_bounded_within_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    def investigate(*_: object, seconds: float, **__: object) -> Result:
        given.append(seconds)
        return Result((), (), UNKNOWN, 0, True)

    monkeypatch.setattr("mxfp4ref.conformance.looking.investigated", investigate)
    call, expected = GOLDENS.load(CASE).call(), {"output": RIGHT}
    one, far = near(), (3, LARGE[0], 128)
    bounded = Search(seconds=3, mode="bounded")
    words = "nothing is wrong in mode bounded: 1 of 4,096 elements differ, all within the bounds of a correct"
    with pytest.raises(NothingDiffers, match=words):
        diagnose("moe", call, {"output": with_bits(one)}, expected, diagnosis=bounded)
    found = diagnose("moe", call, {"output": with_bits(one, far)}, expected, diagnosis=bounded)
    assert (found.first.index, given) == ((3, LARGE[0]), [3])
    with pytest.raises(ValueError, match="effort: expected "):
        Search("none")  # type: ignore[arg-type]


def test_a_search_at_a_terminal_shows_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with shown_progress(None) as nothing:
        assert nothing is None
    monkeypatch.setattr("mxfp4ref.conformance.cli.terminal.animated", lambda: True)
    written = io.StringIO()
    terminal = Console(file=written, force_terminal=True)
    monkeypatch.setattr("mxfp4ref.conformance.cli.terminal.console", lambda: terminal)
    with shown_progress(None) as told, shown_progress(print) as given:
        assert given is print
        assert told is not None
        told("limit_ignored", 9)
    assert "diagnosis: limit_ignored" in written.getvalue()


def test_elements_of_several_runs_are_told_as_that() -> None:
    result = CaseResult("a/b", "moe", "", "differs", elements=8192, differing=9, runs=2)
    assert headline(result) == "a/b: differs in 9 of 8,192 elements of 2 runs"


def test_seconds_of_an_interrupted_diagnosis_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> CaseResult:
        time.sleep(0.02)
        raise KeyboardInterrupt

    monkeypatch.setattr(Failing, "take", interrupted)
    with pytest.raises(Interrupted) as raised:
        run(off(near()), [GOLDENS.load(CASE)], Options(repeat=False))
    assert raised.value.report.results[0].diagnosis_seconds >= 0.02
    text = str(Report("f.py:f", "exact", (), date=now(), seconds=5.0))
    assert "seconds: 5.0 in all; comparison 0.0, diagnosis 0.0, start and other 5.0" in text


OVERFLOWS = "gemm/first_group_overflows"


def test_nan_for_an_infinity_is_no_other_order_and_shows_no_layout() -> None:
    """Where a sum overflows an infinity may be right, and NaN is the kernel's only."""
    call, right = GOLDENS.load(OVERFLOWS).call(), GOLDENS.load(OVERFLOWS).outputs[128, 128]
    got = torch.where(right.isinf(), torch.nan, right)
    wrong = right.isinf()
    solved = [Evidence(("fc2",), "it is GEMM2", 2)]
    assert unless_in_another_order(call, got, wrong, solved) == solved

    alone = GOLDENS.load("step_and_situ/swiglu_bias_alone")
    want = next(iter(alone.outputs.values()))
    nan = torch.full_like(want.view(torch.int16), -1).view(torch.bfloat16)
    bounded = Search("quick", mode="bounded")
    found = diagnose("moe", alone.call(), {"output": nan}, {"output": want}, diagnosis=bounded)
    assert found.finding.sentence.startswith("special values alone are wrong, all else lies within bounds: ")
    assert (found.finding.stages, found.predictions) == ((), ())
    found = diagnose("moe", alone.call(), {"output": nan}, {"output": want}, diagnosis="quick")
    assert (found.finding.sentence, found.predictions) == ("", ())
    where = "unknown: 11 elements lie outside the interval of all correct evaluations, all "
    assert found.stage.startswith(where)
    assert "these have to be the SM90 kernel's" in found.stage
    assert "NaN where an infinity is expected in 11 elements" in " ".join(found.patterns)


@pytest.mark.slow
def test_what_lies_within_bounds_hides_no_pattern_of_columns() -> None:
    """Elements that another order of summation gives count as right where others are far off."""
    case = GOLDENS.load("gemm/ordinary")
    call, want = case.call(), next(iter(case.outputs.values()))
    got = bound(call).upper.to(torch.bfloat16)  # one element of each token as another order may give it
    got = torch.where(torch.arange(want.shape[1]) == torch.arange(len(want))[:, None], got, want)
    columns = torch.arange(want.shape[1]) % 64 >= 56
    got.view(torch.int16)[:, columns] ^= torch.arange(len(want), dtype=torch.int16)[:, None] * 131 | 1 << 7
    found = diagnose(
        "moe", call, {"output": got}, {"output": want}, diagnosis=Search("quick", mode="bounded")
    )
    assert found.finding.sentence.startswith(
        "the output differs in every eighth block of 8 columns, from 56 on only: "
    )


def test_what_is_left_out_of_a_table_of_places_is_counted() -> None:
    """Every other block of 16 of 1,024 columns is wrong, and all are listed; of tokens what there is room for."""
    call = GOLDENS.load("gemm/ordinary").call()
    wrong = (torch.arange(1024) // 16 % 2 == 1).expand(call.num_tokens, -1)
    rows = [row for row in attribution(call, wrong) if row.by == "column, by 16"]
    assert [(len(rows), row.places) for row in rows] == [(64, 64)] * 64
    assert [bool(row.differing) for row in rows] == [False, True] * 32
    wide = (torch.arange(2048) // 16 % 2 == 1).expand(call.num_tokens, -1)
    rows = [row for row in attribution(call, wide) if row.by == "column, by 16"]
    assert [(row.places, row.differing > 0) for row in rows] == [(128, True)] * 64
