"""Operands that a GEMM took for others, K group by K group."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mxfp4ref import Experts, MoeCall, forward, quantize
from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.families.engine import prepared
from mxfp4ref.conformance.families.hypothesis import local_of
from mxfp4ref.conformance.families.sampled import samples
from mxfp4ref.conformance.families.solved.column_maps import column_map
from mxfp4ref.conformance.families.solved.operands import other_operands
from mxfp4ref.conformance.findings.finding import Evidence
from mxfp4ref.formats.mxfp4 import pack_codes, unpack_codes
from mxfp4ref.model.forward import KERNEL
from tests.helpers import usual


@pytest.fixture(scope="module")
def call() -> MoeCall:
    random = torch.Generator().manual_seed(6)
    experts = [
        quantize(torch.randn(4, *s, generator=random) * s[1] ** -0.5) for s in ((256, 128), (128, 128))
    ]
    ids = torch.stack([torch.randperm(4, generator=random)[:2] for _ in range(24)]).int()
    x = torch.randn(24, 128, generator=random).bfloat16()
    return MoeCall(x, ids, torch.rand(24, 2, generator=random) + 0.2, Experts(*experts[0], *experts[1]))


def with_experts(call: MoeCall, **tensors: Tensor) -> MoeCall:
    return replace(call, experts=replace(call.experts, **tensors))


def said(call: MoeCall, got: Tensor) -> Evidence | None:
    pipeline, wrong = prepared(call), differing(got, forward(call))
    return other_operands(pipeline, samples(pipeline, got, wrong, local_of(pipeline)), wrong.any(1))


def another_experts_gate(call: MoeCall) -> Tensor:
    codes, scales = call.experts.fc1_weights.clone(), call.experts.fc1_scales.clone()
    codes[:-1, 128:, :16], scales[:-1, 128:, :1] = codes[1:, 128:, :16], scales[1:, 128:, :1]
    return forward(with_experts(call, fc1_weights=codes, fc1_scales=scales))


def a_stale_stage(call: MoeCall) -> Tensor:
    codes, scales = call.experts.fc1_weights.clone(), call.experts.fc1_scales.clone()
    codes[..., 32:48], scales[..., 2:3] = codes[..., :16], scales[..., :1]
    x = call.input.clone()
    x[:, 64:96] = x[:, :32]
    return forward(replace(with_experts(call, fc1_weights=codes, fc1_scales=scales), input=x))


def the_next_tokens_input(call: MoeCall) -> Tensor:
    x = call.input.clone()
    x[:-1, 32:64] = x[1:, 32:64]
    return forward(replace(call, input=x))


def scales_of_another_row(call: MoeCall) -> Tensor:
    scales = call.experts.fc2_scales.clone()
    scales[:, :-8, 2:] = call.experts.fc2_scales[:, 8:, 2:]
    return forward(with_experts(call, fc2_scales=scales))


def a_rest_of_k(call: MoeCall) -> Tensor:
    x = call.input.clone()
    x[:, 96:] = 0
    return forward(replace(call, input=x))


def a_block_of_rows(call: MoeCall) -> Tensor:
    codes, scales = call.experts.fc1_weights.clone(), call.experts.fc1_scales.clone()
    codes[:, 64:128, 16:32], scales[:, 64:128, 1:2] = codes[:, 64:128, :16], scales[:, 64:128, :1]
    return forward(with_experts(call, fc1_weights=codes, fc1_scales=scales))


def a_row_too_early(call: MoeCall) -> Tensor:
    codes, scales = call.experts.fc1_weights.clone(), call.experts.fc1_scales.clone()
    codes[:, 128:], scales[:, 128:] = call.experts.fc1_weights[:, 127:-1], call.experts.fc1_scales[:, 127:-1]
    return forward(with_experts(call, fc1_weights=codes, fc1_scales=scales))


def of_one_expert(call: MoeCall) -> Tensor:
    codes, scales = call.experts.fc2_weights.clone(), call.experts.fc2_scales.clone()
    codes[2, :, :16], scales[2, :, :1] = codes[0, :, :16], scales[0, :, :1]
    return forward(with_experts(call, fc2_weights=codes, fc2_scales=scales))


@pytest.mark.parametrize(
    ("kernel", "stages", "words"),
    usual.first(
        1,
        [
            (
                another_experts_gate,
                ("fc1",),
                "in GEMM1 .*: K 0 to 31 of gate has the weights of the expert after",
            ),
            (a_stale_stage, ("input", "fc1"), "in GEMM1 .*: K 64 to 95 has both operands of K 0 to 31"),
            (the_next_tokens_input, ("input", "fc1"), "K 32 to 63 has the input of the token after"),
            (
                scales_of_another_row,
                ("fc2",),
                "in GEMM2 .*: K 64 to 127 has the scales of the row 8 further on",
            ),
            (a_rest_of_k, ("input", "fc1"), "in GEMM1 .*: K 96 to 127 is left out"),
            (a_block_of_rows, ("fc1",), "rows 64 to 127: K 32 to 63 has the weights of K 0 to 31"),
            (a_row_too_early, ("fc1",), "all of K of gate has the weights of the row before"),
            (of_one_expert, ("fc2",), "for slots of expert 2: K 0 to 31 has the weights of expert 0"),
        ],
    ),
)
def test_named(
    call: MoeCall, kernel: Callable[[MoeCall], Tensor], stages: tuple[str, ...], words: str
) -> None:
    found = said(call, kernel(call))
    assert found is not None
    assert found.stages == stages
    assert re.search(words, found.sentence), found.sentence


def noise(call: MoeCall) -> Tensor:
    random = torch.Generator().manual_seed(1)
    right = forward(call).float()
    return (right + right.std() * torch.randn(right.shape, generator=random)).bfloat16()


def another_formula(call: MoeCall) -> Tensor:
    return forward(with_experts(call, swiglu_limit=torch.full((4,), 0.5)))


def half_of_a_group(call: MoeCall) -> Tensor:
    x = call.input.clone()
    x[:, 32:48] = 0
    return forward(replace(call, input=x))


@pytest.mark.parametrize("kernel", usual.first(1, [noise, another_formula, half_of_a_group]))
def test_nothing_is_said_of_what_is_no_such_change(
    call: MoeCall, kernel: Callable[[MoeCall], Tensor]
) -> None:
    assert said(call, kernel(call)) is None


def columns(order: Callable[[Tensor], Tensor]) -> Callable[[MoeCall], Tensor]:
    def kernel(call: MoeCall) -> Tensor:
        def stored(values: Tensor) -> Tensor:
            right = KERNEL.round_activation(values)
            return right[:, order(torch.arange(right.shape[1]))]

        return forward(call, replace(KERNEL, round_activation=stored))

    return kernel


def other_codes(call: MoeCall) -> Tensor:
    """The order in which some tools pack the eight codes of a word."""
    codes = unpack_codes(call.experts.fc2_weights).view(4, 128, -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]
    return forward(with_experts(call, fc2_weights=pack_codes(codes.flatten(2).contiguous())))


def map_of(call: MoeCall, got: Tensor) -> Evidence | None:
    pipeline, wrong = prepared(call), differing(got, forward(call))
    return column_map(call, samples(pipeline, got, wrong, local_of(pipeline)))


@pytest.mark.parametrize(
    ("kernel", "words"),
    usual.first(
        1,
        [
            (
                columns(lambda n: n ^ 8),
                "in another order: neighbouring blocks of 1 are exchanged: block of 8 n is",
            ),
            (
                columns(lambda n: torch.where(n // 32 == 3, n - 32, n)),
                "some of them twice: columns 96 to 127 are those of 64 to 95",
            ),
            (columns(lambda n: (n + 100) % 128), "block of 4 n is block of 4 n -7, around the end"),
            (other_codes, "in each 8 columns 1 are those of 4, 2 are those of 1, 3 are those of 5"),
        ],
    ),
)
def test_columns_of_the_activation_at_other_places(
    call: MoeCall, kernel: Callable[[MoeCall], Tensor], words: str
) -> None:
    found = map_of(call, kernel(call))
    assert found is not None
    assert found.stages == ("fc1", "fc2")
    assert words in found.sentence


@pytest.mark.parametrize("kernel", usual.first(1, [noise, another_formula, half_of_a_group, a_stale_stage]))
def test_no_order_of_columns(call: MoeCall, kernel: Callable[[MoeCall], Tensor]) -> None:
    assert map_of(call, kernel(call)) is None
