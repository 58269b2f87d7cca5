"""Weight scales that are not there, too high, or another's."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward
from tests.held_out_kernels.by_hand import with_experts
from tests.held_out_kernels.definition import wrong


def _scales(call: MoeCall) -> tuple[Tensor, Tensor]:
    fc1, fc2 = call.experts.fc1_scales, call.experts.fc2_scales
    assert fc1 is not None
    assert fc2 is not None
    return fc1, fc2


def _raised(scales: Tensor, by: int) -> Tensor:
    return (scales.int() + by).clamp(0, 255).to(torch.uint8)


@wrong(
    stage="fc2",
    says=("scale", "127|\\b1\\b|not loaded|missing|ignored|constant|one\\b|all equal"),
    story="fc2's scales are not loaded: 127 everywhere, as a new buffer was filled",
)
def fc2_scales_not_loaded(call: MoeCall) -> Tensor:
    return forward(with_experts(call, fc2_scales=torch.full_like(_scales(call)[1], 127)))


@wrong(
    stage=("fc1", "fc2"),
    says=("scale", "127|\\b1\\b|not loaded|missing|ignored|constant|one\\b|all equal"),
    story="no scales are loaded at all",
)
def no_scales_loaded(call: MoeCall) -> Tensor:
    fc1, fc2 = _scales(call)
    return forward(
        with_experts(call, fc1_scales=torch.full_like(fc1, 127), fc2_scales=torch.full_like(fc2, 127))
    )


@wrong(
    stage=("fc1", "input"),
    says=("scale|factor|GEMM ?1|fc1", "2x|twice|\\b2\\b|two|double|one too (high|large)|\\+ ?1"),
    story="every exponent of fc1's scales is one too high",
)
def fc1_scales_one_too_high(call: MoeCall) -> Tensor:
    return forward(with_experts(call, fc1_scales=_raised(_scales(call)[0], 1)))


@wrong(
    stage=("fc1", "fc2"),
    says=("scale", "2x|twice|\\b2\\b|two|double|one too (high|large)|\\+ ?1"),
    story="every scale exponent of the layer is one too high",
)
def all_scales_one_too_high(call: MoeCall) -> Tensor:
    fc1, fc2 = _scales(call)
    return forward(with_experts(call, fc1_scales=_raised(fc1, 1), fc2_scales=_raised(fc2, 1)))


@wrong(
    stage=("fc2", "finalize"),
    says=("scale|factor|GEMM ?2|fc2", "1/4|0\\.25|quarter|two too low|- ?2|\\b4\\b|four"),
    story="fc2's scale bias is 129 instead of 127",
)
def fc2_scales_two_too_low(call: MoeCall) -> Tensor:
    return forward(with_experts(call, fc2_scales=_raised(_scales(call)[1], -2)))


@wrong(
    stage="fc1",
    says=("scale", "expert", "next|another|neighbou?r|shift|following|other|of expert|previous|off by"),
    story="fc1's scales are those of the expert after",
)
def fc1_scales_of_the_next_expert(call: MoeCall) -> Tensor:
    return forward(with_experts(call, fc1_scales=_scales(call)[0].roll(-1, 0)))


@wrong(
    stage="fc2",
    says=("scale", "expert", "first|expert 0|same|one\\b|all"),
    story="all experts take fc2's scales of the first: the stride between experts is 0",
)
def fc2_scales_of_the_first_expert(call: MoeCall) -> Tensor:
    fc2 = _scales(call)[1]
    return forward(with_experts(call, fc2_scales=fc2[:1].expand_as(fc2).contiguous()))


@wrong(
    stage="fc2",
    says=("scale", "row|column", "first|block|same|16|shared|broadcast"),
    story="16 rows of fc2 share the scales of the first of them",
)
def fc2_scales_shared_by_sixteen_rows(call: MoeCall) -> Tensor:
    fc2 = _scales(call)[1]
    return forward(with_experts(call, fc2_scales=fc2[:, torch.arange(fc2.shape[1]) // 16 * 16]))


@wrong(
    stage="fc2",
    says=("scale", "row|column", "next|shift|off by one|neighbou?r|previous|one too"),
    story="fc2's scales are those of the row before",
)
def fc2_scales_of_the_row_before(call: MoeCall) -> Tensor:
    return forward(with_experts(call, fc2_scales=_scales(call)[1].roll(1, 1)))


@wrong(
    stage="fc1",
    says=("scale", "gate|up|half", "up|gate|same|both|swap|other"),
    story="gate takes the scales of up: one half was loaded for both",
)
def gate_has_the_scales_of_up(call: MoeCall) -> Tensor:
    fc1 = _scales(call)[0]
    up = fc1[:, : fc1.shape[1] // 2]
    return forward(with_experts(call, fc1_scales=torch.cat([up, up], 1)))


@wrong(
    stage="fc1",
    says=("scale", "group|\\bK\\b|pair|64", "same|share|first|even|two|pair|64|repeat"),
    story="fc1 is taken as scaled by groups of 64: two groups share the first one's scale",
)
def fc1_scales_by_groups_of_64(call: MoeCall) -> Tensor:
    fc1 = _scales(call)[0]
    return forward(with_experts(call, fc1_scales=fc1[..., torch.arange(fc1.shape[2]) // 2 * 2]))


@wrong(
    stage="fc2",
    says=("scale", "last|tail|end", "group|\\bK\\b"),
    story="the scale of fc2's last K group is the one before it: a loop that prefetches stops too early",
)
def fc2_last_scale_repeated(call: MoeCall) -> Tensor:
    fc2 = _scales(call)[1].clone()
    fc2[..., -1] = fc2[..., -2]
    return forward(with_experts(call, fc2_scales=fc2))
