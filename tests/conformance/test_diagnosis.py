"""What a failing run is said to be: the named defect, the places, the stage."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mxfp4ref import forward
from mxfp4ref.conformance import (
    CaseResult,
    Kernel,
    Options,
    Report,
    diagnose,
    load_kernel,
    run,
    run_case,
)
from mxfp4ref.conformance.findings.agreement import name_defects
from mxfp4ref.conformance.kernels.stand_ins import defect_outputs
from mxfp4ref.defects import DEFECTS
from mxfp4ref.goldens import Case, open_goldens
from tests.helpers import layers, usual

GOLDENS = open_goldens()
WHOLE_SIZE = GOLDENS.names("models")
SMALL = "finalize/slot_order"


@pytest.fixture(scope="module")
def case() -> Case:
    return first_tokens(SMALL, 3)


def first_tokens(name: str, count: int) -> Case:
    """A part of a case: where no defect is exact all of them are run, which takes long on many tokens."""
    case = GOLDENS.load(name)
    cut = {"input", "token_selected_experts", "token_final_scales", *case.output_tensors.values()}
    return replace(case, tensors={n: t[:count] if n in cut else t for n, t in case.tensors.items()})


def result_of(spec: str, case: Case) -> CaseResult:
    return run_case(load_kernel(spec), case, Options(diagnosis="quick"))


NAMED = [
    *("gate_up_swapped", "limit_ignored", "scale_off_by_one_group", "bf16_finalize"),
    *("ep_offset_dropped", "tie_highest_id", "weights_not_interleaved", "act_kept_fp32"),
]


@pytest.fixture(scope="module")
def small_cases() -> list[Case]:
    return [GOLDENS.load(name) for name in GOLDENS.names() if name not in WHOLE_SIZE]


@pytest.mark.parametrize("name", usual.first(1, NAMED))
@pytest.mark.usefixtures("patient")
def test_defects_are_named(name: str, small_cases: list[Case]) -> None:
    """On two of the cases that are there for it; `tools/tables/confusion_table.py` does all defects on all cases."""
    cases = [case for case in small_cases if name in case.catches][:2]
    options = Options(repeat=False, diagnosis="quick")
    report = run(f"defect:{name}", cases, options)
    assert not report.ok
    assert name in report.defects


@pytest.mark.slow
@pytest.mark.usefixtures("patient")
def test_a_defect_that_confuses_experts_is_named_although_few_are_kept() -> None:
    case = GOLDENS.load("gemm/uneven_experts")
    assert case.experts.num_experts > case.call().top_k
    assert run("defect:scales_of_next_expert", [case], Options(diagnosis="quick")).defects == (
        "scales_of_next_expert",
    )


@pytest.mark.slow
def test_a_defect_in_one_token_only_is_not_named(case: Case) -> None:
    """It predicts that token exactly, and others too that are right."""
    dropped = DEFECTS["last_slot_dropped"].run(case.call())

    def in_token_2(kind: str, call: Any) -> Tensor:
        output = case.outputs[128, 128].clone()
        output[2] = dropped[2]
        return output

    kernel = Kernel("in_token_2", ("moe",), lambda kind, call: ((kind, call), {}), in_token_2, True)
    diagnosis = run_case(kernel, case).diagnosis
    assert diagnosis is not None
    assert diagnosis.exact == ()
    assert diagnosis.predictions == ()
    told = diagnosis.finding.hypotheses
    assert all(words.startswith("last_slot_dropped: k - 1 experts summed, for ") for words in told)
    assert any(", for token 2, the last" in words for words in told)
    assert "only token 2 of 3 differs" in diagnosis.patterns


@pytest.fixture(scope="module")
def unnamed(copied_processes_of_module: None) -> Report:
    return run("tests.helpers.kernels_under_test:second_half_of_columns", [first_tokens(SMALL, 2)])


@pytest.mark.slow
def test_an_unnamed_mistake_gets_places_and_a_stage(unnamed: Report) -> None:
    (result,) = unnamed.results
    assert result.diagnosis is not None
    assert "exactly every second 16-row block of fc2 differs, from 1 on" in result.diagnosis.patterns
    assert result.diagnosis.exact == ()
    assert result.diagnosis.first.index == (0, 16)
    assert result.diagnosis.finding.exact
    assert "in every second block of 16 columns, from 16 on" in result.diagnosis.finding.sentence
    assert "fc2" in result.diagnosis.finding.stages
    assert result.diagnosis.attribution[0].by == "column, by 16"
    assert int(result.diagnosis.mask.sum()) == result.differing == sum(n for _, n in result.diagnosis.ulps)


@pytest.mark.usefixtures("patient")
def test_a_finding_on_few_elements_says_that_they_are(case: Case) -> None:
    found = result_of("defect:bf16_finalize", case).diagnosis
    assert found is not None
    assert found.proof == "every wrong bit"
    few = replace(found, bins=torch.zeros_like(found.bins))
    few.bins.view(-1)[:2] = 1
    assert "finding (every wrong bit, but 2 are few: another mistake may give the same)" in str(few)


def test_exposed_stages_are_compared() -> None:
    result = result_of("tests.helpers.kernels_under_test:with_trace", first_tokens(SMALL, 2))
    assert result.diagnosis is not None
    assert result.diagnosis.stage.startswith("activation is the first stage that differs, in 1 of")
    assert "got 0x447A (1000)" in result.diagnosis.stage


def test_name_defects_intersects() -> None:
    assert name_defects([("a", "b"), ("b", "c")]) == ("b",)
    assert name_defects([None, ("b", "c")]) == ("b", "c")
    assert name_defects([("a",), ()]) == ()
    assert name_defects([]) == ()


@pytest.mark.slow
def test_verdict_without_a_named_defect_gives_the_finding(unnamed: Report) -> None:
    assert unnamed.defects == ()
    assert "does not conform: 1 of 1 case fails. Every wrong bit is predicted by this: " in unnamed.verdict


@pytest.mark.parametrize(
    ("hidden", "inner", "num_experts", "ep_size", "tokens", "extras"),
    usual.first(
        2,
        [
            (128, 128, 1, 1, 1, False),
            (128, 256, 1, 2, 2, True),
            (256, 128, 3, 1, 0, False),
            (384, 128, 2, 4, 1, True),
        ],
    ),
)
def test_every_defect_is_defined_on_every_shape(
    hidden: int, inner: int, num_experts: int, ep_size: int, tokens: int, extras: bool
) -> None:
    """`predict` catches no exception: a defect gives an output of the right shape, or says that it cannot show."""
    parameters = layers.PARAMETERS if extras else ()
    experts = layers.random_experts(
        7, num_experts=num_experts, hidden=hidden, inner=inner, biases=extras, parameters=parameters
    )
    call = layers.random_call(7, experts, tokens=tokens, top_k=1, ep_size=ep_size, ep_rank=ep_size - 1)
    ran = 0
    for defect in DEFECTS.values():
        if defect.target == "moe" and (outputs := defect_outputs(defect, call)) is not None:
            assert outputs["output"].shape == call.input.shape, defect.name
            ran += 1
    assert ran > 50


def test_no_defect_is_named_for_experts_that_are_not_quantised() -> None:
    call = layers.random_call(3, experts=layers.random_experts(3, quantized=False))
    expected = forward(call)
    wrong = expected.clone()
    wrong[0, 0] += 1
    found = diagnose("moe", call, {"output": wrong}, {"output": expected})
    assert (found.predictions, found.stage) == ((), "")
    assert found.first.index == (0, 0)
