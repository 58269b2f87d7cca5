"""A stage is called right only where the output proves it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mxfp4ref.conformance import CaseResult, Search, diagnose
from mxfp4ref.conformance.bounds.call_bounds import bound
from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.findings.stage_fit import reconcile
from mxfp4ref.conformance.reports.report_text import case_lines
from mxfp4ref.defects import DEFECTS
from mxfp4ref.formats.mxfp4 import dequantize
from mxfp4ref.goldens import open_goldens
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward

_GOLDENS = open_goldens()
ORDINARY, ALIKE, ONE_SLOT = "gemm/ordinary", "finalize/slot_order", "gemm/experts_of_one_k_tile"
BOUNDED = Search("quick", mode="bounded")


def first_tokens(name: str, count: int) -> MoeCall:
    return _GOLDENS.load(name).call().select(slice(count))


def stage_of(call: MoeCall, output: Tensor) -> str:
    return reconcile(call, {"output": output}, differing(output, forward(call))).words


def weighted(call: MoeCall, *factors: float) -> Tensor:
    """The output with each slot's weight multiplied by a factor."""
    return forward(replace(call, token_final_scales=call.token_final_scales * torch.tensor(factors)))


def zeros(call: MoeCall) -> Tensor:
    return torch.zeros_like(forward(call))


def one_column(call: MoeCall) -> Tensor:
    result = forward(call).clone()
    result[:, 9] += 0.25
    return result


def other_weights_in_one_token(call: MoeCall) -> Tensor:
    """The second token refutes what the first one says."""
    result = one_column(call)
    result[0] = weighted(call, *([0.5] + [2.0] * (call.top_k - 1)))[0]
    return result


def test_other_weights_are_recognised() -> None:
    call = first_tokens(ORDINARY, 3)
    stage = stage_of(call, weighted(call, 0.0, 1.5))
    assert stage.startswith("finalize: token 0 is the sum of the right expert outputs with weights")
    assert (
        "and likewise tokens 1, 2 with other weights: GEMM1, activation and GEMM2 are right, up to" in stage
    )


@pytest.mark.parametrize("factor", [0.9, 2.0, -1.0])
def test_a_factor_of_all_slots_may_come_from_before(factor: float) -> None:
    call = first_tokens(ORDINARY, 2)
    stage = stage_of(call, weighted(call, factor, factor))
    assert stage.startswith(
        f"a factor, in finalize or before: tokens 0, 1 are the right output times {factor:g}, "
    )


@pytest.mark.parametrize("wrong", [zeros, one_column, other_weights_in_one_token])
@pytest.mark.parametrize("name", [ALIKE, ORDINARY])
def test_no_stage_is_called_right_by_chance(wrong: Callable[[MoeCall], Tensor], name: str) -> None:
    """The experts' outputs of `ALIKE` are so much alike that large weights of both signs fit anything."""
    call = first_tokens(name, 2)
    assert stage_of(call, wrong(call)).startswith(
        ("before ", "other than the sum's weights", "nothing was added up", "unknown")
    )


@pytest.mark.parametrize("name", ["scale_off_by_one_group", "gate_up_swapped", "weights_not_interleaved"])
def test_wrong_weights_and_scales_are_not_blamed_on_finalize(name: str) -> None:
    call = first_tokens(ORDINARY, 3)
    assert stage_of(call, DEFECTS[name].run(call)).startswith(("before ", "other than the sum's weights"))


def in_another_order(call: MoeCall, weights: Tensor) -> Tensor:
    """A correct evaluation, by another order and fewer roundings, but for its weights; of one slot a token."""
    experts, local = call.experts, call.token_selected_experts[:, 0]
    out = torch.zeros(call.num_tokens, experts.hidden_size)
    for expert in range(experts.num_experts):
        tokens = (local == expert).nonzero().flatten()
        fc1, fc2 = (
            dequantize(packed[expert], scales[expert], dtype=torch.float32)
            for packed, scales in (
                (experts.fc1_weights, experts.fc1_scales),
                (experts.fc2_weights, experts.fc2_scales),
            )
        )
        up, gate = (call.input[tokens].float() @ fc1.T).chunk(2, dim=1)
        out[tokens] = ((up * gate.sigmoid() * gate).bfloat16().float() @ fc2.T) * weights[tokens]
    return out.bfloat16()


@pytest.mark.slow
def test_other_weights_are_recognised_of_a_kernel_that_sums_in_another_order() -> None:
    """Rows 16 and 17 of an expert have the weights of rows 0 and 1."""
    case = _GOLDENS.load(ONE_SLOT)
    call = case.call()
    local, weights = call.token_selected_experts[:, 0], call.token_final_scales.clone()
    for expert in range(4):
        tokens = (local == expert).nonzero().flatten()
        weights[tokens] = weights[tokens[torch.arange(len(tokens)) % 16]]
    wrong = (weights != call.token_final_scales).flatten().nonzero().flatten().tolist()
    assert wrong == [26, 27, 37]
    output = in_another_order(call, weights)
    outside = ~bound(call).contains(output)
    assert outside.any(1).nonzero().flatten().tolist() == wrong
    stage = reconcile(call, {"output": output}, outside).words
    assert stage.startswith(
        "finalize, or a factor of each slot before it: token 26 is the sum of the right expert "
    )
    assert (
        "and likewise tokens 27, 37 with other weights, up to what correct evaluations may differ by" in stage
    )

    found = diagnose("moe", call, {"output": output}, {"output": forward(call)}, diagnosis=BOUNDED)
    assert found.patterns[0] == "outside bounds: only tokens 26, 27, 37 of 38 differ"
    assert found.attribution[0].by == "token, by 1"
    result = CaseResult(
        ONE_SLOT, "moe", case.why, "outside bounds", outside=int(outside.sum()), diagnosis=found
    )
    lines = case_lines(result)
    assert "pattern: outside bounds: only tokens 26, 27, 37 of 38 differ" in lines
    rows = "outside bounds by row of an expert, by 16: 16 to 31: 383 of 384; none of the tokens without a slot there"
    assert rows in lines

    next_scales = call.experts.fc2_scales.roll(-1, dims=0)
    mistaken = in_another_order(
        replace(call, experts=replace(call.experts, fc2_scales=next_scales)), call.token_final_scales
    )
    outside = ~bound(call).contains(mistaken)
    assert reconcile(call, {"output": mistaken}, outside).reach == "other than the sum's weights"
