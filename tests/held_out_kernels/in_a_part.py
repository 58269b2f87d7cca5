"""Mistakes that hold for some tokens, slots or experts only: which ones is a rule that every call has its part of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref import MoeCall, Stages, forward
from mxfp4ref.sm90.fp32 import to_bf16
from tests.held_out_kernels.by_hand import Rows, layer, with_experts
from tests.held_out_kernels.definition import wrong


def _some_tokens(call: MoeCall, tokens: Tensor, other: Tensor) -> Tensor:
    return torch.where(tokens[:, None], other, forward(call))


def _number(call: MoeCall) -> Tensor:
    return torch.arange(len(call.input))


def _with_scales(call: MoeCall, fc: str, some: slice, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The output where the scales of some experts are changed."""
    scales = getattr(call.experts, f"{fc}_scales").clone()
    scales[some] = change(scales)[some]
    return forward(with_experts(call, **{f"{fc}_scales": scales}))


def _reshaped(scales: Tensor) -> Tensor:
    """Each expert's scales read as if they lay transposed."""
    return scales.transpose(1, 2).contiguous().view(scales.shape)


@wrong(
    stage="finalize",
    says=(r"2\b|twice|factor|doubled", r"first 8|below 8|0 to 7"),
    story="the first block of eight tokens is scaled twice",
)
def first_eight_tokens_twice(call: MoeCall) -> Tensor:
    doubled = forward(replace(call, token_final_scales=call.token_final_scales * 2))
    return _some_tokens(call, _number(call) < 8, doubled)


@wrong(
    stage=("fc1", "fc2", "finalize", "activation"),
    says=(r"bias", r"from 16 on|first 16"),
    story="the bias of fc2 is lost beyond the first tile of 16 tokens",
)
def fc2_bias_in_the_first_tile_of_tokens(call: MoeCall) -> Tensor:
    return _some_tokens(call, _number(call) >= 16, forward(with_experts(call, fc2_biases=None)))


@wrong(
    stage="fc2",
    says=(r"scale", r"transpos|row|column|stride|pitch", r"expert"),
    story="the loader transposes fc2's scales of all experts but the first",
)
def fc2_scales_transposed_but_the_first(call: MoeCall) -> Tensor:
    return _with_scales(call, "fc2", slice(1, None), _reshaped)


@wrong(
    stage="fc1",
    says=(r"scale", r"transpos|row|column|stride|pitch", r"odd|expert"),
    story="fc1's scales are transposed for experts of one file of two",
)
def fc1_scales_transposed_for_odd_experts(call: MoeCall) -> Tensor:
    return _with_scales(call, "fc1", slice(1, None, 2), _reshaped)


@wrong(
    stage="fc1",
    says=(r"gate|up|halves|half", r"swap|exchang|instead|change places", r"expert"),
    story="w1 and w3 are swapped for the upper half of the experts, from the second file",
)
def halves_swapped_in_the_second_file(call: MoeCall) -> Tensor:
    experts = call.experts
    if not experts.gated:
        return forward(call)
    half = (experts.num_experts + 1) // 2
    weights = experts.fc1_weights.clone()
    weights[half:] = weights[half:].roll(weights.shape[1] // 2, 1)
    swapped = with_experts(call, fc1_weights=weights)
    return _with_scales(
        swapped, "fc1", slice(half, None), lambda scales: scales.roll(scales.shape[1] // 2, 1)
    )


@wrong(
    stage="fc2",
    says=(r"nibble|low|high|code", r"swap|exchang|order", r"expert"),
    story="the nibbles of fc2 are swapped in all experts but the last",
)
def fc2_nibbles_swapped_but_the_last(call: MoeCall) -> Tensor:
    codes = call.experts.fc2_weights.clone()
    codes[:-1] = (codes[:-1] << 4) | (codes[:-1] >> 4)
    return forward(with_experts(call, fc2_weights=codes))


@wrong(
    stage="finalize",
    says=(r"weight", r"second|place 1|slot 1|last place|odd"),
    story="the second slot of every token is summed with the first one's weight",
)
def second_weight_is_the_first(call: MoeCall) -> Tensor:
    scales = call.token_final_scales.clone()
    if call.top_k > 1:
        scales[:, 1] = scales[:, 0]
    return forward(replace(call, token_final_scales=scales))


@wrong(
    stage="activation",
    says=(r"limit|clamp", r"from 4 on|first 4|one tile|token"),
    story="the kernel for at most four tokens has no clamp",
)
def no_limit_in_the_first_four_tokens(call: MoeCall) -> Tensor:
    return _some_tokens(call, _number(call) < 4, forward(with_experts(call, swiglu_limit=None)))


@wrong(
    stage="finalize",
    says=(r"round|trunc|toward zero", r"odd|last|every|second"),
    story="odd tokens are truncated, not rounded, by the second store",
)
def odd_tokens_truncated(call: MoeCall) -> Tensor:
    cut = forward(
        call, Stages(round_output=lambda x: (x.view(torch.int32) & -65536).view(torch.float32).bfloat16())
    )
    return _some_tokens(call, _number(call) % 2 == 1, cut)


@wrong(
    stage=("fc2",),
    says=(r"scale|factor|twice|2\b", r"row", r"8|eight"),
    story="rows 8 and more of an expert are multiplied with two: a second tile of eight",
)
def rows_of_the_second_tile_twice(call: MoeCall) -> Tensor:
    def fc2(rows: Rows, acc: Tensor) -> Tensor:
        return to_bf16(torch.where(rows.position[:, None] >= 8, acc * 2, acc))

    return layer(call, fc2=fc2)


@wrong(
    stage=("slots",),
    says=(r"expert", r"next|\+ ?1", r"from 8 on|first 8"),
    story="tokens from 8 on are computed by the next expert",
)
def next_expert_from_token_eight_on(call: MoeCall) -> Tensor:
    count = call.num_global_experts
    ids = torch.where(call.token_selected_experts < 0, -1, (call.token_selected_experts + 1) % count).int()
    return _some_tokens(
        call, _number(call) >= 8, forward(replace(call, token_selected_experts=ids, strict=False))
    )


@wrong(
    stage=("fc2",),
    says=(r"scale", r"next row|row.*one|shift|n \+ ?1|off by one", r"expert"),
    story="fc2's scales are one row late in experts with an even number",
)
def fc2_scale_rows_late_in_even_experts(call: MoeCall) -> Tensor:
    return _with_scales(call, "fc2", slice(None, None, 2), lambda scales: scales.roll(-1, 1))
