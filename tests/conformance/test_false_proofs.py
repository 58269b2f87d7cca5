"""Sentences that look proven and are false: near underflow, of a sum in few bits, of other K tiles, by chance."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mxfp4ref import forward
from mxfp4ref.conformance import CaseResult, Kernel, Options, differing, run_case
from mxfp4ref.conformance.families.engine import prepared
from mxfp4ref.conformance.families.evidence import Evidence, gather
from mxfp4ref.conformance.families.hypotheses.outputs import output_hypotheses
from mxfp4ref.conformance.families.hypothesis import local_of
from mxfp4ref.conformance.families.jury import _refuted
from mxfp4ref.conformance.families.named import named_hypotheses
from mxfp4ref.conformance.families.sampled import samples
from mxfp4ref.conformance.families.search import Search
from mxfp4ref.conformance.families.solved.formula import fitted
from mxfp4ref.conformance.families.solved.second_gemm import _permuted
from mxfp4ref.conformance.findings.stage_fit import reconcile
from mxfp4ref.conformance.kernels.adapters import whole_arguments
from mxfp4ref.formats.mxfp4 import dequantize
from mxfp4ref.goldens import open_goldens
from mxfp4ref.model.call import MoeCall
from tests.held_out_kernels.by_hand import layer, with_experts
from tests.held_out_kernels.calls import captured
from tests.held_out_kernels.definition import load_all
from tests.helpers.usual import first

GOLDENS = open_goldens()
KERNELS = load_all()


def quick(function: Callable[[MoeCall], Tensor], case: str) -> CaseResult:
    kernel = Kernel("it", ("moe",), whole_arguments, lambda kind, call: function(call))
    return run_case(kernel, GOLDENS.load(case), Options(diagnosis="quick", repeat=False))


def test_nothing_is_solved_for_near_underflow() -> None:
    call = GOLDENS.load("finalize/underflowing_products").call()
    right = forward(call)
    pipeline = prepared(call)
    assert pipeline.call.experts.fc2_scales is not None
    shifted = with_experts(pipeline.call, fc2_scales=pipeline.call.experts.fc2_scales.roll(1, 2))
    got = right.clone()
    got[2::3] = forward(shifted)[2::3]
    assert bool(differing(got, right).any())
    found = gather(pipeline, got, right, differing(got, right))
    assert not any("finalize" in one.stages or "are right" in one.sentence for one in found)
    stage = reconcile(pipeline.call, {"output": got}, differing(got, right)).words
    assert stage.startswith("unknown: ")
    assert "too near to underflow" in stage


def test_zeros_in_some_columns_are_told_as_zeros() -> None:
    call = prepared(GOLDENS.load("activation/gate_clamp_saturates").call()).call
    want = forward(call)
    got = want.clone()
    got[:, 112:128] = 0  # as of 16 columns of the activation: GEMM2 takes each to one column
    search = Search(prepared(call), got, want, time.thread_time() + 60)
    dropped = [h for h in named_hypotheses(call) if h.name == "last_slot_dropped"]
    (found,) = search.run([*dropped, *(h for h in output_hypotheses(call) if h.family == "output")])
    assert found.hypothesis.words == "in the output everything is zero, in columns 112 to 127"
    assert found.hypothesis.stages == ()
    assert not any("other columns" in e.sentence for e in gather(prepared(call), got, want, search.wrong))


def test_a_bf16_sum_in_gemm2_is_no_other_activation() -> None:
    def summed(x: Tensor, packed: Tensor, scales: Tensor, tactic: object) -> Tensor:
        weights = dequantize(packed, scales, convention="sm90", dtype=torch.float32)
        total = torch.zeros(len(x), len(weights), dtype=torch.bfloat16)
        for k in range(x.shape[1]):
            total = (total.float() + x[:, k, None].float() * weights[:, k]).to(torch.bfloat16)
        return total.float()

    call = prepared(GOLDENS.load("gemm/first_group_overflows").call()).call
    got = layer(call, gemm2=summed)
    stage = reconcile(call, {"output": got}, differing(got, forward(call))).words
    assert stage.startswith(("before ", "other than the sum's weights"))
    assert "activation" not in stage


@pytest.mark.slow
def test_a_factor_is_not_held_against_other_tiles() -> None:
    """What is expected depends so much on the K tiles that those of most equal elements are others, by chance."""

    def scaled(call: MoeCall) -> Tensor:
        return forward(replace(call, token_final_scales=call.token_final_scales * 2.5))

    found = quick(scaled, "gemm/mirrored_hidden_1536").diagnosis
    assert found is not None
    assert "2.5" in found.finding.sentence
    assert found.finding.stages[0] == "finalize"


def test_proofs_of_several_cases_refute_that_of_one() -> None:
    one, *others = (Evidence(stages, "", 3) for stages in (("finalize",), ("fc2",), ("fc2", "fc1")))
    assert _refuted(one, [one, *others])
    assert not any(_refuted(other, [one, *others]) for other in others)


def test_only_the_very_numbers_are_numbers_in_other_places() -> None:
    right = torch.randn(2, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    unsure = torch.full_like(right, 1e-3)
    assert _permuted(right, right.roll(32, 1), unsure)
    assert not _permuted(right, (right * 1.08).roll(32, 1), unsure), "of about the same distribution"
    assert not _permuted(right.sign(), right.sign().roll(1, 1), unsure), "too few are distinct"
    assert not _permuted(right, right.roll(32, 1), 100 * unsure), "not solved well enough"


@pytest.mark.parametrize(
    "case", first(1, ["step_and_situ/step_limit_by_expert", "step_and_situ/situ_linear_beta_alone"])
)
def test_outputs_without_weights_are_no_equations(case: str) -> None:
    """Half of the rows of GEMM2's weights are zeros there, and the others are as many as the activation's columns."""

    def noisy(call: MoeCall) -> Tensor:
        noise = torch.randn(
            call.num_tokens, call.experts.hidden_size, generator=torch.Generator().manual_seed(3)
        )
        return (forward(call).float() * (1 + 0.01 * noise)).bfloat16()

    found = quick(noisy, case).diagnosis
    assert found is not None
    assert found.finding.stages == ()
    assert "right" not in found.finding.sentence


def test_a_flipped_bit_is_no_row_of_gemm2() -> None:
    def flipped(call: MoeCall) -> Tensor:
        output = forward(call).clone()
        output.view(torch.int16)[0, 3] ^= 1 << 10
        return output

    found = quick(flipped, "gemm/ordinary").diagnosis
    assert found is not None
    assert found.finding.stages == ()
    assert found.finding.sentence.startswith("a single element differs, [0, 3]: damaged")


@pytest.mark.parametrize("kernel", ["fc2_column_scales", "permutation_instead_of_its_inverse"])
def test_rows_beside_a_bias_are_no_other_activation(kernel: str) -> None:
    """The bias is most of a row there, and what GEMM2 gives by itself is a sum of columns of its weights."""
    call = GOLDENS.load("options/alltoall_foreign_tokens").call()
    got, right = KERNELS[kernel].function(call), forward(call)
    some = samples(prepared(call), got, differing(got, right), local_of(prepared(call)))
    formula = fitted(some)
    assert formula is None or not formula.proved


def test_terms_that_underflow_in_gemm2_are_not_lost_by_the_sum() -> None:
    call = GOLDENS.load("sizes/rows_297_of_one_expert").call()
    got, right = KERNELS["fc2_accumulates_in_fp16"].function(call), forward(call)
    found = gather(prepared(call), got, right, differing(got, right))
    assert not any(one.stages or "missing" in one.sentence for one in found)


def test_roundings_of_terms_that_cancel_are_no_damage() -> None:
    call = GOLDENS.load("finalize/biases_cancel").call()
    got, right = KERNELS["fc2_accumulates_in_fp16"].function(call), forward(call)
    assert "far off" not in str(gather(prepared(call), got, right, differing(got, right)))


def test_a_formula_is_another_one_beyond_each_experts_own_limit() -> None:
    call = captured("gpt_oss")
    got = KERNELS["third_zero_beyond_the_limit"].function(call)
    pipeline, wrong = prepared(call), differing(got, forward(call))
    formula = fitted(samples(pipeline, got, wrong, local_of(pipeline)), call.experts.swiglu_limit)
    assert formula is not None
    assert formula.where == "up is beyond the limit or gate above it, and is about 0 there"
