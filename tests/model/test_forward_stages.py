"""The forward's stages: its trace is made of them, and each can be replaced."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from mxfp4ref.model.dense import dense_gemm
from mxfp4ref.model.forward import DENSE, KERNEL, Stages, forward, select_local, trace
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


def test_a_gemm_stage_gets_each_experts_rows_in_one_call() -> None:
    """As `Stages` says: in the order of the tokens, 512 tokens at a time, and positions that go on."""
    call = CALL.select(torch.arange(600) % CALL.num_tokens)
    local = select_local(call.token_selected_experts, call.experts.num_experts, call.ep_size, call.ep_rank)
    seen: list[tuple[int, list[int], torch.Tensor]] = []

    def gemm(x: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor, **named: Any) -> torch.Tensor:
        (which,) = [
            expert
            for expert in range(call.experts.num_experts)
            if torch.equal(weights, call.experts.weights("fc1", expert)[0])
        ]
        seen.append((which, named["positions"][0].tolist(), x[0]))
        return KERNEL.fc1_gemm(x, weights, scales, **named)

    first = call.select(slice(0, 512))
    bits.assert_same(forward(call, replace(KERNEL, fc1_gemm=gemm)), forward(call))
    before = {expert: int((local[:512] == expert).sum()) for expert in range(call.experts.num_experts)}
    seen.sort(key=lambda one: (one[0], one[1]))
    for expert in range(call.experts.num_experts):
        parts = [one[1:] for one in seen if one[0] == expert]
        tokens = (local == expert).any(1).nonzero().flatten()
        assert [position for positions, _ in parts for position in positions] == list(range(len(tokens)))
        if before[expert]:
            assert len(parts[0][0]) == before[expert]
            bits.assert_same(parts[0][1], first.input[tokens[tokens < 512]])
    assert len(seen) <= 2 * call.experts.num_experts

    nobody = replace(CALL, token_selected_experts=torch.full_like(CALL.token_selected_experts, -1))
    seen.clear()
    forward(nobody, replace(KERNEL, fc1_gemm=gemm))
    assert [(expert, positions) for expert, positions, _ in seen] == [(0, [])]
