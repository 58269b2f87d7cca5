"""Routing weights, fc2 biases and the sum over slots."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.fp32 import to_bf16
from tests.held_out_kernels.by_hand import Rows, layer, local_experts, with_experts
from tests.held_out_kernels.definition import wrong

Maybe = Tensor | None
WEIGHT = "weight"


def _weighted(call: MoeCall, weights: Tensor) -> Tensor:
    return forward(replace(call, token_final_scales=weights))


def _of_rows(call: MoeCall, rows: Rows) -> Tensor:
    return call.token_final_scales[rows.token, rows.slot][:, None]


def _ones(local: Tensor, weights: Tensor) -> Tensor:
    return torch.ones_like(weights)


@wrong(
    stage="finalize",
    says=(WEIGHT, "twice|square|two times|\\^ ?2"),
    story="the routing weight is applied twice",
)
def weight_applied_twice(call: MoeCall) -> Tensor:
    return _weighted(call, call.token_final_scales**2)


@wrong(
    stage="finalize",
    says=(WEIGHT, "omit|missing|ignored|left out|not applied|without|all 1|\\bones?\\b|dropped|instead"),
    story="the routing weights are not applied",
)
def weight_left_out(call: MoeCall) -> Tensor:
    return _weighted(call, torch.ones_like(call.token_final_scales))


@wrong(
    stage=("input", "fc1"),
    says=(WEIGHT, "input|before GEMM ?1|before fc1|before the first"),
    story="the routing weight is applied to the input, as Llama 4 wants it",
)
def weight_on_the_input(call: MoeCall) -> Tensor:
    return layer(call, x=lambda rows, x: to_bf16(x.float() * _of_rows(call, rows)), weights=_ones)


@wrong(
    stage=("activation", "fc2"),
    says=(WEIGHT, "before GEMM ?2|activation|before fc2|before the second|input of GEMM ?2"),
    story="the routing weight is applied to the activation, before GEMM2",
)
def weight_before_the_second_gemm(call: MoeCall) -> Tensor:
    return layer(call, activation=lambda rows, a: to_bf16(a * _of_rows(call, rows)), weights=_ones)


@wrong(
    stage="finalize",
    says=(WEIGHT, "normali|sum|divided"),
    story="the weights are normalised once more over the slots of this rank",
)
def weights_normalised_over_the_rank(call: MoeCall) -> Tensor:
    held = call.token_final_scales.masked_fill(local_experts(call) < 0, 0.0)
    total = held.sum(1, keepdim=True)
    return _weighted(call, torch.where(total > 0, held / total, held))


@wrong(
    stage="finalize",
    says=(WEIGHT, "slot", "next|another|shift|other|rotat|permut|neighbou?r|previous|order"),
    story="each slot takes the weight of the slot after",
)
def weight_of_the_next_slot(call: MoeCall) -> Tensor:
    return _weighted(call, call.token_final_scales.roll(-1, 1))


@wrong(
    stage="finalize",
    says=(WEIGHT, "token|row", "next|another|shift|other|previous|neighbou?r|before"),
    story="each token takes the weights of the token before",
)
def weights_of_the_token_before(call: MoeCall) -> Tensor:
    return _weighted(call, call.token_final_scales.roll(1, 0))


@wrong(
    stage="finalize",
    says=(WEIGHT, "fp16|float16|half"),
    story="the routing weights are stored as fp16",
)
def weights_in_fp16(call: MoeCall) -> Tensor:
    return _weighted(call, call.token_final_scales.half().float())


@wrong(
    stage="finalize",
    says=(WEIGHT, "sort|descend|order|permut|slot"),
    story="the weights are sorted by size, the ids are not",
)
def weights_sorted_without_their_ids(call: MoeCall) -> Tensor:
    return _weighted(call, call.token_final_scales.sort(1, descending=True).values)


@wrong(
    stage="finalize",
    says=("bias", "weight", "after|outside|without|unweighted|not multiplied|times 1"),
    story="the fc2 bias is added after the weight",
)
def fc2_bias_after_the_weight(call: MoeCall) -> Tensor:
    def unweighted(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Maybe) -> Tensor:
        out = finalize(by_slot, local, weights, None)
        return out if bias is None else out + (bias[local].float() * (local >= 0)[..., None]).sum(1)

    return layer(call, finalize=unweighted)


@wrong(
    stage=("finalize", "fc2"),
    says=("bias", "twice|double|2x|\\b2\\b|two"),
    story="the fc2 bias is added in the epilogue and in the sum",
)
def fc2_bias_added_twice(call: MoeCall) -> Tensor:
    bias = call.experts.fc2_biases
    return forward(with_experts(call, fc2_biases=None if bias is None else 2 * bias))


@wrong(
    stage=("finalize", "fc2"),
    says=("bias", "rank|tensor|tp"),
    story="every tensor-parallel rank adds the fc2 bias",
)
def fc2_bias_on_every_rank(call: MoeCall) -> Tensor:
    return forward(replace(call, tp_size=1, tp_rank=0))


@wrong(
    stage=("finalize", "fc2"),
    says=("bias", "slot 0|first slot|first expert|expert"),
    story="all slots add the fc2 bias of the first slot's expert",
)
def fc2_bias_of_the_first_slot(call: MoeCall) -> Tensor:
    def first(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Maybe) -> Tensor:
        if bias is None:
            return finalize(by_slot, local, weights, None)
        added = torch.where((local[:, 0] >= 0)[:, None], bias[local[:, 0].clamp_min(0)].float(), 0.0)
        return finalize(by_slot.float() + added[:, None], local, weights, None)

    return layer(call, finalize=first)


@wrong(
    stage=("finalize", "fc2"),
    says=("bias", "permut|order|swap|block|column|exchang|revers|shift"),
    story="the fc2 bias is permuted as the weights' rows are in memory: halves of 16 trade places",
)
def fc2_bias_permuted(call: MoeCall) -> Tensor:
    bias = call.experts.fc2_biases
    moved = None if bias is None else bias.unflatten(1, (-1, 2, 8)).flip(2).flatten(1)
    return forward(with_experts(call, fc2_biases=moved))


@wrong(
    stage="finalize",
    says=("factor|times|scale|constant|uniform", "1\\.5"),
    story="the output carries the routed scaling factor, 1.5, once more",
)
def output_times_one_and_a_half(call: MoeCall) -> Tensor:
    return layer(call, output=lambda sums: to_bf16(sums * 1.5))


@wrong(
    stage=("finalize", "fc2"),
    says=("factor|times|scale|constant|uniform|double", "\\b2(\\.0)?\\b|2x|twice|double|two"),
    story="two ranks hold the same experts and both are added",
)
def output_times_two(call: MoeCall) -> Tensor:
    return layer(call, output=lambda sums: to_bf16(sums * 2))


@wrong(
    stage=("finalize", "fc2"),
    says=("sign|negat|-1\\b|minus",),
    story="the sum is subtracted from the residual instead of being added",
)
def output_negated(call: MoeCall) -> Tensor:
    return -forward(call)


@wrong(
    stage="finalize",
    says=("slot|sum|order|finalize", "revers|descend|last|order|backward|right to left"),
    story="the slots are added from the last to the first",
)
def slots_added_backwards(call: MoeCall) -> Tensor:
    def backwards(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Maybe) -> Tensor:
        return finalize(by_slot.flip(1), local.flip(1), weights.flip(1), bias)

    return layer(call, finalize=backwards)


@wrong(
    stage=("finalize", "fc2"),
    says=("mean|average|divided|number of|top.?k|1/k|factor", "slot|expert|k\\b|weight|\\d"),
    story="the mean over the slots instead of the sum",
)
def mean_over_slots(call: MoeCall) -> Tensor:
    return layer(call, output=lambda sums: to_bf16(sums / call.top_k))
