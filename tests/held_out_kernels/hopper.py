"""What goes wrong around Hopper's grouped GEMMs: copies by tensor maps, problem lists, swizzles, strides, counts."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward
from mxfp4ref.sm90.fp32 import to_bf16
from tests.held_out_kernels.by_hand import Rows, layer, local_experts, with_experts
from tests.held_out_kernels.definition import wrong

FC2 = "GEMM ?2|fc2|second GEMM"
OTHERS = "next|previous|before|after|another|other|shift|off by|neighbou?r"


@wrong(
    stage=("slots", "input", "fc1"),
    says=("row|token|slot", OTHERS + "|late|later"),
    story="tensor maps begin one row too late: each sorted row has the input of the row after",
)
def input_box_one_row_late(call: MoeCall) -> Tensor:
    return layer(call, x=lambda rows, x: torch.cat([x[1:], torch.zeros_like(x[:1])]))


@wrong(
    stage=("fc2", "slots"),
    says=("expert", "row|tile|slot|token|first", OTHERS + "|overwrit"),
    story="the last tile of eight rows of an expert is stored whole over the first rows of the expert after",
)
def fc2_tile_stored_over_the_next_expert(call: MoeCall) -> Tensor:
    def expert2(rows: Rows) -> Tensor:
        whose = rows.expert.clone()
        for first in (rows.position == 0).nonzero()[1:, 0].tolist():
            spare = -(int(rows.position[first - 1]) + 1) % 8
            whose[first : first + spare] = rows.expert[first - 1]
        return whose

    return layer(call, expert2=expert2)


@wrong(
    stage="fc2",
    says=("scale", FC2),
    story="GEMM2's problem list points to fc1's scales",
)
def fc2_scales_read_from_fc1(call: MoeCall) -> Tensor:
    fc1, fc2 = call.experts.fc1_scales, call.experts.fc2_scales
    assert fc1 is not None
    assert fc2 is not None
    return forward(with_experts(call, fc2_scales=fc1.flatten()[: fc2.numel()].view_as(fc2).contiguous()))


@wrong(
    stage="fc1",
    says=("scale", "expert"),
    story="an expert's offset into fc1's scales is kept in sixteen bits and wraps",
)
def fc1_scale_offsets_in_sixteen_bits(call: MoeCall) -> Tensor:
    scales = call.experts.fc1_scales
    assert scales is not None
    flat, size = scales.flatten(), scales[0].numel()
    first = torch.arange(len(scales)) * size % 2**16
    return forward(with_experts(call, fc1_scales=flat[first[:, None] + torch.arange(size)].view_as(scales)))


@wrong(
    stage=("activation", "fc2"),
    says=(
        FC2 + "|activation|GEMM1",
        "column|\\bK\\b|chunk|block|\\b8\\b|row",
        "swizzl|permut|moved|order|swap|exchang|mixed|another",
    ),
    story="the activation is stored with a swizzle of 128 bytes and read with one of 64",
)
def activation_read_with_another_swizzle(call: MoeCall) -> Tensor:
    def activation(rows: Rows, a: Tensor) -> Tensor:
        a = to_bf16(a)
        row, column = rows.position[:, None], torch.arange(a.shape[1])[None]
        return a.gather(1, column ^ (8 * (row % 8 ^ row // 2 % 4)))

    return layer(call, activation=activation)


@wrong(
    stage=("fc2", "finalize"),
    says=(
        FC2 + "|column|output",
        "stale|row|tile|slot|another|other|previous|before",
        "column|block|half|32",
    ),
    story="the epilogue does not wait: the second tile of eight rows stores the first one's columns 32 to 63",
)
def fc2_epilogue_stores_the_tile_before(call: MoeCall) -> Tensor:
    def fc2(rows: Rows, acc: Tensor) -> Tensor:
        out = to_bf16(acc)
        late = (rows.tile(8) == 1).nonzero()[:, 0]
        out[late, 32:64] = out[late - 8, 32:64]
        return out

    return layer(call, fc2=fc2)


@wrong(
    stage=("fc1", "activation"),
    says=("bias", "expert|stride|row|shift|half|halves|gate|up"),
    story="the fc1 bias is read with the stride of one half: an expert's begins in the middle of another's",
)
def fc1_bias_with_half_the_stride(call: MoeCall) -> Tensor:
    bias = call.experts.fc1_biases
    if bias is None:
        return forward(call)
    halves = bias.reshape(2 * len(bias), -1)
    first = torch.arange(len(bias))
    return forward(with_experts(call, fc1_biases=torch.cat([halves[first], halves[first + 1]], 1)))


@wrong(
    stage=("slots", "finalize", "fc1", "fc2", "activation"),
    says=(
        "row|slot|token",
        "256|beyond|first|last|count|full",
        "left out|missing|drop|zero|lost|not computed|lack",
    ),
    story="an expert's rows are counted in eight bits: of 300 the first 44 are computed",
)
def row_counts_in_eight_bits(call: MoeCall) -> Tensor:
    def fc2(rows: Rows, acc: Tensor) -> Tensor:
        return to_bf16(acc) * (rows.position < torch.bincount(rows.expert)[rows.expert] % 256)[:, None]

    return layer(call, fc2=fc2)


@wrong(
    stage="activation",
    says=("alpha", "beta", "swap|exchang|for each other|instead|wrong|place"),
    story="the pointers of alpha and beta are handed over in the wrong order",
)
def alpha_and_beta_exchanged(call: MoeCall) -> Tensor:
    experts = call.experts
    if experts.swiglu_alpha is None or experts.swiglu_beta is None:
        return forward(call)
    return forward(with_experts(call, swiglu_alpha=experts.swiglu_beta, swiglu_beta=experts.swiglu_alpha))


@wrong(
    stage="finalize",
    says=("weight", "slot|row|token|order|permut|sort"),
    story="the rows are sorted by expert, their routing weights are not: row r has the r-th weight",
)
def weights_not_sorted_with_the_rows(call: MoeCall) -> Tensor:
    local = local_experts(call)
    key = torch.where(local < 0, call.experts.num_experts, local).flatten()
    weights = torch.empty_like(call.token_final_scales)
    weights.view(-1)[torch.argsort(key, stable=True)] = call.token_final_scales.flatten()
    return forward(replace(call, token_final_scales=weights))


@wrong(
    stage=("fc1", "fc2"),
    says=("scale", "128|127|above|sign|large|zero|bit|beyond|from"),
    story="scale bytes are read as signed: those from 128 on, of 2 and above, are taken for tiny ones",
)
def scales_read_as_signed(call: MoeCall) -> Tensor:
    def signed(scales: Tensor | None) -> Tensor:
        assert scales is not None
        return torch.where(scales >= 128, 0, scales)

    experts = call.experts
    return forward(
        with_experts(call, fc1_scales=signed(experts.fc1_scales), fc2_scales=signed(experts.fc2_scales))
    )
