"""The forward's stages: its trace is made of them, and each can be replaced."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from mxfp4ref.model.dense import dense_gemm
from mxfp4ref.model.forward import DENSE, KERNEL, Stages, forward, trace
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.gemm.reference import group_scaled_gemm_reference
from mxfp4ref.sm90.swiglu import swiglu
from tests.helpers import bits
from tests.helpers.forward_calls import (
    CALL,
    CALLS,
    DENSE_CALL,
    EXPERTS,
    routed_slots,
)


@pytest.mark.parametrize("name", CALLS)
def test_trace_is_the_forward_stage_by_stage(name: str) -> None:
    call = CALLS[name]
    experts, got = call.experts, trace(call)
    bits.assert_same(got.output, forward(call))
    expected = sorted((expert, token, slot) for token, slot, expert, _ in routed_slots(call))
    assert list(zip(got.expert.tolist(), got.token.tolist(), got.slot.tolist(), strict=True)) == expected
    for index in ("token", "slot", "expert"):
        assert getattr(got, index).dtype == torch.int64

    gemm = group_scaled_gemm_reference if experts.quantized else dense_gemm
    own = experts.select(got.expert)  # one row each
    x = call.input[got.token][:, None]
    bits.assert_same(got.fc1_accumulators, gemm(x, own.fc1_weights, own.fc1_scales)[:, 0])
    bits.assert_same(got.fc1_output, fp32.to_bf16(got.fc1_accumulators))
    alpha, beta, limit = (
        p if p is None else p[:, None] for p in (own.swiglu_alpha, own.swiglu_beta, own.swiglu_limit)
    )
    activation = fp32.to_bf16(swiglu(got.fc1_output, own.fc1_biases, alpha, beta, limit))
    bits.assert_same(got.activation, activation)
    bits.assert_same(
        got.fc2_accumulators, gemm(got.activation[:, None], own.fc2_weights, own.fc2_scales)[:, 0]
    )
    bits.assert_same(got.fc2_output, fp32.to_bf16(got.fc2_accumulators))
    y = torch.zeros(*call.token_selected_experts.shape, experts.hidden_size, dtype=torch.bfloat16)
    y[got.token, got.slot] = got.fc2_output
    local = torch.full(call.token_selected_experts.shape, -1)
    local[got.token, got.slot] = got.expert
    output = fp32.to_bf16(finalize(y, local, call.token_final_scales, experts.fc2_biases))
    bits.assert_same(got.output, output)


STAGE_NAMES = [field.name for field in fields(Stages)]


@pytest.mark.parametrize("name", STAGE_NAMES)
def test_every_stage_can_be_replaced(name: str) -> None:
    """The replacement is what is called, with the arguments of the default, and its result is used."""
    seen = []

    def stage(*args: Any, **kwargs: Any) -> Any:
        result = getattr(KERNEL, name)(*args, **kwargs)
        seen.append(result)
        return torch.full_like(result, -1) if name == "select_local" else torch.zeros_like(result)

    stages = replace(KERNEL, **{name: stage})
    output = forward(replace(CALL, experts=replace(EXPERTS, fc2_biases=None)), stages)
    assert seen
    if name in ("fc1_gemm", "round_fc1"):  # the bias is still there
        assert not torch.equal(output, forward(CALL))
    else:
        assert not output.any()


def test_bf16_experts_take_the_dense_stages() -> None:
    bits.assert_same(forward(DENSE_CALL), forward(DENSE_CALL, DENSE))
    assert replace(KERNEL, fc1_gemm=dense_gemm, fc2_gemm=dense_gemm) == DENSE
