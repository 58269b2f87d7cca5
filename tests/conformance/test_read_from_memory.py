"""Tensors that are read from memory in another way, rows that went elsewhere, and rows that were never there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mxfp4ref import Experts, MoeCall, forward, quantize
from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.families.engine import prepared
from mxfp4ref.conformance.families.hypotheses.memory_readings import (
    matrix_readings,
    route_readings,
    vector_readings,
)
from mxfp4ref.conformance.families.hypotheses.slots import slot_hypotheses
from mxfp4ref.conformance.families.hypothesis import Hypothesis
from mxfp4ref.conformance.families.slot_kinds import position_in_expert
from mxfp4ref.conformance.families.solved.expert_sums import other_sums
from mxfp4ref.conformance.families.solved.output_rows import another_stride, rows_of_others


@pytest.fixture(scope="module")
def call() -> MoeCall:
    random = torch.Generator().manual_seed(8)
    experts = [
        quantize(torch.randn(4, *s, generator=random) * s[1] ** -0.5) for s in ((256, 256), (256, 128))
    ]
    ids = torch.stack([torch.randperm(4, generator=random)[:2] for _ in range(24)]).int()
    x = torch.randn(24, 256, generator=random).bfloat16()
    held = Experts(*experts[0], *experts[1])
    held = replace(
        held,
        fc1_biases=torch.randn(4, 256, generator=random).bfloat16(),
        swiglu_alpha=1 + torch.rand(4, generator=random),
    )
    return MoeCall(x, ids, torch.rand(24, 2, generator=random) + 0.2, held)


def exact(
    call: MoeCall, got: Tensor, all_of: Callable[[MoeCall], Iterator[Hypothesis]], words: str
) -> Hypothesis | None:
    """The first of those with these words that predicts every bit."""
    pipeline = prepared(call)
    outputs = ((h, h.run(pipeline)) for h in all_of(call) if words in h.words)
    return next((h for h, out in outputs if out is not None and not bool(differing(out, got).any())), None)


def with_experts(call: MoeCall, **tensors: Tensor) -> Tensor:
    return forward(replace(call, experts=replace(call.experts, **tensors)))


@pytest.mark.parametrize(
    ("name", "read", "words"),
    [
        ("fc1_scales", lambda t: t.transpose(0, 1).contiguous().view(t.shape), "lie as [rows, experts, K]"),
        (
            "fc2_scales",
            lambda t: t.view(len(t), t.shape[2], -1).mT.contiguous(),
            "read as [experts, K, rows]",
        ),
        ("fc2_weights", lambda t: t.mT.contiguous().view(t.shape), "lie as [experts, K, rows]"),
        (
            "swiglu_alpha",
            lambda t: t.view(torch.bfloat16)[:4].float(),
            "are float32 in memory and read as bf16",
        ),
        ("fc1_biases", lambda t: t.view(torch.float16).bfloat16(), "are bf16 in memory and read as float16"),
    ],
)
def test_read_otherwise(call: MoeCall, name: str, read: Callable[[Tensor], Tensor], words: str) -> None:
    tensor = getattr(call.experts, name)
    got = with_experts(call, **{name: read(tensor)})
    readings = matrix_readings if tensor.dim() == 3 else vector_readings
    assert exact(call, got, readings, words)


@pytest.mark.parametrize(
    ("name", "read", "words"),
    [
        (
            "token_final_scales",
            lambda t: t.view(torch.bfloat16).flatten()[:48].float(),
            "the routing weights are float32 in memory and read as bf16",
        ),
        (
            "token_selected_experts",
            lambda t: t.long().view(torch.int32).flatten()[:48],
            "the expert ids are int64 in memory and read as int32",
        ),
    ],
)
def test_routes_of_another_type(
    call: MoeCall, name: str, read: Callable[[Tensor], Tensor], words: str
) -> None:
    tensor = getattr(call, name)
    got = forward(replace(call, strict=False, **{name: read(tensor).view(tensor.shape).contiguous()}))
    wrong = differing(got, forward(call)).any(1)
    assert exact(call, got, lambda c: route_readings(c, wrong), words)


def test_absurd_weights_are_no_other_experts(call: MoeCall) -> None:
    """One term that outweighs all others is no sum of other experts: its weight is none that was asked for."""
    weights = call.token_final_scales.clone()
    weights[:, 0] = torch.linspace(1, 24, 24) * 2.0**60
    local, want = call.token_selected_experts.long(), forward(call)
    got = forward(replace(call, token_final_scales=weights))
    tokens = [3, 8, 13, 20]
    [found] = other_sums(prepared(call), got, differing(got, want), local, tokens)
    assert found.stages == ("finalize", "slots")
    assert found.kind == "the routing weights used are others"


def test_a_stride_that_is_rounded_up(call: MoeCall) -> None:
    scales = call.experts.fc1_scales
    assert scales is not None
    memory = torch.cat((scales.flatten(), scales.new_zeros(scales.numel())))
    row = torch.arange(4)[:, None] * scales.stride(0) + torch.arange(256) * 16
    got = with_experts(call, fc1_scales=memory[row[..., None] + torch.arange(8)])
    words = "a stride between rows of 16 instead of 8 (rounded up to a multiple of 16)"
    found = exact(call, got, matrix_readings, words)
    assert found is not None
    assert found.stages == ("fc1",)


def test_rows_that_may_be_zero_before_the_sum(call: MoeCall) -> None:
    """Without an fc2 bias nothing tells a row that is left out from one that a GEMM does not compute."""
    ids = call.token_selected_experts
    position, _ = position_in_expert(ids.long())
    got = forward(replace(call, token_selected_experts=torch.where(position >= 8, -1, ids)))
    words = "rows beyond the first 8 of their expert are left out of the sum, or their rows are zero"
    found = exact(call, got, slot_hypotheses, words)
    assert found is not None
    assert found.stages == ("slots", "fc1", "activation", "fc2")


def test_routes_of_another_chunk(call: MoeCall) -> None:
    at = torch.arange(24) % 16
    routes = {n: getattr(call, n)[at] for n in ("token_selected_experts", "token_final_scales")}
    words = "each chunk of 16 tokens has the first one's"
    found = exact(call, forward(replace(call, **routes)), slot_hypotheses, words)
    assert found is not None
    assert found.stages == ("slots",)


def test_rows_of_the_output_by_a_rule() -> None:
    random = torch.Generator().manual_seed(2)
    want = torch.randn(12, 16, generator=random).bfloat16()
    want[[3, 7]] = 0
    got = want.roll(-4, 0)
    found = rows_of_others(got, want, differing(got, want).any(1))
    assert found is not None
    assert "token n is token n + 4, around the end" in found.sentence
    damaged = got.clone()
    damaged[2, 5] += 1
    assert rows_of_others(damaged, want, differing(damaged, want).any(1)) is None
    kept = want.clone()
    kept[[3, 7]] = want[[2, 6]]
    found = rows_of_others(kept, want, differing(kept, want).any(1))
    assert found is not None
    assert "the tokens whose rows should be zeros: not cleared" in found.sentence


def test_an_output_read_with_another_stride() -> None:
    want = torch.randn(6, 128, generator=torch.Generator().manual_seed(3)).bfloat16()
    memory = torch.full((6, 160), 7.0).bfloat16()
    memory[:, :128] = want
    further = another_stride(memory.flatten()[: want.numel()].view(6, 128), want)
    assert further is not None
    assert "lie 32 elements further apart in memory than they are long" in further.sentence
    dense = another_stride(
        torch.cat([want.flatten(), want.new_zeros(240)]).as_strided((6, 128), (168, 1)), want
    )
    assert dense is not None
    assert "read as if 40 elements further apart" in dense.sentence
    assert another_stride(want.roll(1, 0), want) is None
