"""A stage is called right only where the output proves it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.stage_fit import reconcile
from mxfp4ref.defects import DEFECTS
from mxfp4ref.goldens import open_goldens
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward

_GOLDENS = open_goldens()
ORDINARY, ALIKE = "gemm/ordinary", "finalize/slot_order"


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
    assert stage_of(call, wrong(call)).startswith(("before finalize", "nothing was added up", "unknown"))


@pytest.mark.parametrize("name", ["scale_off_by_one_group", "gate_up_swapped", "weights_not_interleaved"])
def test_wrong_weights_and_scales_are_not_blamed_on_finalize(name: str) -> None:
    call = first_tokens(ORDINARY, 3)
    assert stage_of(call, DEFECTS[name].run(call)).startswith("before finalize")
