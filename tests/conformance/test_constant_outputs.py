"""Zeros, NaN or another constant wherever an output differs: many mistakes give them, and none is told as proved."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward
from mxfp4ref.conformance import differing
from mxfp4ref.conformance.families.blank import of_constant
from mxfp4ref.conformance.families.engine import investigate, prepared
from mxfp4ref.conformance.families.evidence import gather
from mxfp4ref.conformance.families.hearing import Failure
from mxfp4ref.conformance.families.hypotheses.orders_of_k import repeat_hypotheses
from mxfp4ref.conformance.families.hypotheses.regions import k_hypotheses
from mxfp4ref.conformance.families.hypothesis import Hypothesis
from mxfp4ref.conformance.families.jury import _of_full
from mxfp4ref.conformance.families.search import Match
from mxfp4ref.goldens import open_goldens
from tests.held_out_kernels.by_hand import layer, with_experts

GOLDENS = open_goldens()


def golden(name: str) -> MoeCall:
    return prepared(GOLDENS.load(name).call()).call


def matches(*stages: tuple[str, ...], named: str = "") -> list[Match]:
    every = enumerate(stages)
    return [
        Match(Hypothesis("", s, f"mistake {n}", lambda p: p, float(n), name=named), True) for n, s in every
    ]


def test_zeros_that_mistakes_of_several_stages_give_name_none() -> None:
    """GEMM1's output in float16, where what becomes zero shows alone."""
    call = golden("finalize/flush_boundary_of_products")
    got = layer(call, fc1=lambda rows, acc: acc.to(torch.float16).to(torch.bfloat16))
    want = forward(call)
    pipeline = prepared(call)
    result = investigate(pipeline, got, want, seconds=2.0, thorough=False)
    assert result.matches
    assert not any(match.exact for match in result.matches)
    assert result.finding.stages == ()
    assert not result.finding.exact
    (count,) = re.findall(
        r"differs is zero: any stage may leave that; so do (\d+) of", result.finding.sentence
    )
    assert int(count) == len(result.matches)


def test_a_verdict_on_zeros_is_none_on_a_mistake() -> None:
    call = golden("finalize/flush_boundary_of_products")
    want = forward(call)
    failures = [Failure(name, prepared(call), torch.zeros_like(want), want) for name in ("one", "two")]
    verdict = _of_full(matches(("fc1",), ("fc2", "fc1"), named="nibble_order"), failures, lambda: ())
    assert verdict is not None
    assert not verdict.finding.exact
    assert not verdict.finding.stages
    assert not verdict.hypotheses
    numbers = replace(failures[0], got=want + 1)
    verdict = _of_full(matches(("fc1",), ("fc2", "fc1")), [failures[0], numbers], lambda: ())
    assert verdict is not None
    assert verdict.finding.exact


@pytest.mark.parametrize("value", [0.0, float("nan"), 3.0])
def test_a_constant_that_fills_rows_and_columns_may_be_of_any_stage(value: float) -> None:
    call = golden("activation/alpha_alone")  # in which each column of the output is one of the activation
    want = forward(call)
    got = want.clone()
    got[4:, 32:48] = value
    found = of_constant(prepared(call), got, want, matches(("fc1", "input")))
    assert found is not None
    assert found.stages == ()
    what = "NaN" if value != value else f"{value:.4g}".replace("0", "zero")
    assert f"every element that differs is {what}, in columns 32 to 47, for tokens" in found.sentence
    assert "any stage may leave that; among what gives this: mistake 0" in found.sentence


def test_zeros_that_a_single_stage_gives_are_told_as_that() -> None:
    call = golden("gemm/ordinary")
    want = forward(call)
    got = torch.where(want.abs() < want.abs().float().median(), 0, want)
    assert of_constant(prepared(call), got, want, matches(("fc1",), ("fc2", "fc1"))) is None
    assert of_constant(prepared(call), got, want, matches(("fc1",), ("fc2",), ("finalize",))) is not None
    rows = matches(("fc1",), ("fc1", "activation", "fc2", "finalize"))
    assert of_constant(prepared(call), got, want, rows) is None, "which says no more than that rows are zero"
    assert of_constant(prepared(call), want * 2, want, matches(("fc1",), ("fc2",), ("finalize",))) is None


def test_an_output_of_one_number_shows_nothing_of_what_was_computed() -> None:
    call = golden("activation/alpha_alone")
    want = forward(call)
    got = torch.ones_like(want)
    (found,) = gather(prepared(call), got, want, differing(got, want))
    assert found.stages == ()
    assert found.sentence == "every element of the output is 1: nothing that was computed shows in it"


def test_nan_in_all_rows_is_of_no_stage_where_all_on_the_way_are_numbers() -> None:
    call = golden("activation/alpha_alone")
    want = forward(call)
    nan = torch.full_like(want.view(torch.int16), 0x7FFF).view(want.dtype)
    result = investigate(prepared(call), nan, want, seconds=0.7, thorough=False)
    assert "came out NaN in every column" in result.finding.sentence
    assert result.finding.stages == ()


def input_scaled(call: MoeCall, by: float) -> Tensor:
    x = call.input.clone()
    x[:, 64:96] *= by
    return forward(replace(call, input=x))


def up_rows_doubled(call: MoeCall) -> Tensor:
    scales = call.experts.fc1_scales
    assert scales is not None
    scales = scales.clone()
    scales[:, 32:64] += 1
    return forward(with_experts(call, fc1_scales=scales))


def up_rows_zero(call: MoeCall) -> Tensor:
    codes = call.experts.fc1_weights.clone()
    codes[:, 32:64] = 0
    return forward(with_experts(call, fc1_weights=codes))


@pytest.mark.parametrize(
    ("kernel", "case", "words"),
    [
        (
            up_rows_doubled,
            "gemm/ordinary",
            "2 times; K of GEMM2, or columns of the activation, or GEMM1 gives so many",
        ),
        (
            up_rows_doubled,
            "ungated/silu_special_values",
            "2 times; K of GEMM2, or columns of the activation, or GEMM1",
        ),
        (
            up_rows_zero,
            "gemm/ordinary",
            "not at all; K of GEMM2, or columns of the activation, or GEMM1 gives zeros",
        ),
    ],
)
def test_gemm1_is_not_called_right_where_it_may_give_so_much(
    kernel: Callable[[MoeCall], Tensor], case: str, words: str
) -> None:
    call = golden(case)
    got, want = kernel(call), forward(call)
    found = gather(prepared(call), got, want, differing(got, want))
    (one,) = [e for e in found if "these K groups do not count once" in e.sentence]
    assert one.stages == ()
    assert f"1 (K 32 to 63) {words}" in one.sentence


def test_some_of_k_that_is_scaled_may_be_so_in_what_it_is_multiplied_with() -> None:
    call = golden("gemm/ordinary")
    for got, stages, words in (
        (input_scaled(call, 0), {"fc1", "input"}, "or the input is zero there"),
        (input_scaled(call, 2), {"fc1", "input"}, "or the input is scaled so there"),
        (up_rows_doubled(call), {"fc2", "fc1"}, "or what GEMM1 gives for them is scaled so"),
    ):
        for generator in (k_hypotheses, repeat_hypotheses):
            of = "GEMM1: K group 2 (" if "input" in stages else "GEMM2: K group 1 ("
            of = of if generator is k_hypotheses else of.replace(":", "")
            asked = [h for h in generator(call) if of in h.words and (words in h.words)]
            found = [h for h in asked if h.predicts(prepared(call), got)]
            assert found or (
                generator is repeat_hypotheses and not bool(differing(got, input_scaled(call, 0)).any())
            )
            assert all(set(h.stages) == stages for h in found)
    clamped = with_experts(call, swiglu_limit=torch.full((call.experts.num_experts,), 1.0))
    assert all(h.stages == ("fc2",) for h in repeat_hypotheses(clamped) if "in GEMM2 " in h.words)
