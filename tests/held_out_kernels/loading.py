"""What goes wrong before the first call: shards joined, layouts prepared, biases copied, experts placed on ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward
from mxfp4ref.formats.layout import deinterleave_weights_sm90, interleave_weights_sm90
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.fp32 import to_bf16
from tests.held_out_kernels.by_hand import Rows, layer, with_experts
from tests.held_out_kernels.definition import wrong

FC2 = "GEMM ?2|fc2|second GEMM|w2|down"
PREPARED = "interleav|permut|order|layout|prepar|shuffl"


def _inner(call: MoeCall) -> int | None:
    """I, or None where fc1 has no gate."""
    inner = 2 * call.experts.fc2_weights.shape[2]
    return inner if call.experts.fc1_weights.shape[1] == 2 * inner else None


@wrong(
    stage="fc1",
    says=(
        "scale",
        "gate|up|half|halves|quarter|row|block|shard",
        "swap|exchang|order|permut|interleav|another|other|joined|mixed|moved",
    ),
    story="fc1's scales are joined from two shards of [up; gate] as [up; gate; up; gate], its codes rightly",
)
def fc1_scale_shards_joined_whole(call: MoeCall) -> Tensor:
    inner, scales = _inner(call), call.experts.fc1_scales
    if inner is None or scales is None:
        return forward(call)
    first_up, second_up, first_gate, second_gate = scales.chunk(4, 1)
    return forward(
        with_experts(call, fc1_scales=torch.cat([first_up, first_gate, second_up, second_gate], 1))
    )


@wrong(
    stage="fc2",
    says=(FC2, PREPARED + "|twice"),
    story="fc2's codes are interleaved for the kernel by the loader and once more after the first weight update",
)
def fc2_interleaved_twice(call: MoeCall) -> Tensor:
    return forward(with_experts(call, fc2_weights=interleave_weights_sm90(call.experts.fc2_weights)))


@wrong(
    stage=("fc1", "fc2"),
    says=("expert", PREPARED),
    story="the load balancer put the last expert back as it is in the checkpoint: its codes are not interleaved",
)
def rebalanced_expert_not_interleaved(call: MoeCall) -> Tensor:
    def last_raw(weights: Tensor) -> Tensor:
        return torch.cat([weights[:-1], deinterleave_weights_sm90(weights[-1:])])

    experts = call.experts
    return forward(
        with_experts(
            call, fc1_weights=last_raw(experts.fc1_weights), fc2_weights=last_raw(experts.fc2_weights)
        )
    )


@wrong(
    stage=("fc1", "activation"),
    says=("bias", "pad|shift|offset|half|halves|gate|moved|position|earlier"),
    story="fc1's rows are padded half by half, its bias at the end: gate's bias begins where up's padding should",
)
def fc1_bias_padded_at_the_end(call: MoeCall) -> Tensor:
    inner, bias = _inner(call), call.experts.fc1_biases
    if inner is None or bias is None:
        return forward(call)
    used = int(
        call.experts.fc1_weights.reshape(-1, inner, call.experts.fc1_weights.shape[2])
        .ne(0)
        .any(2)
        .any(0)
        .sum()
    )
    moved = torch.zeros_like(bias)
    moved[:, :used] = bias[:, :used]
    moved[:, used : 2 * used] = bias[:, inner : inner + used]
    return forward(with_experts(call, fc1_biases=moved))


@wrong(
    stage=("finalize", "fc2"),
    says=(
        "bias",
        "float32|fp32|dtype|type|32.bit|width|stride|every (second|other)|spread|half|zero|read|position|shift",
    ),
    story="fc2's biases are float32 in memory and read as bf16: zero, the first, zero, the second, and so on",
)
def fc2_bias_of_float32_read_as_bf16(call: MoeCall) -> Tensor:
    bias = call.experts.fc2_biases
    if bias is None:
        return forward(call)
    memory = bias.float().contiguous().view(torch.bfloat16).flatten()
    return forward(with_experts(call, fc2_biases=memory[: bias.numel()].view_as(bias).clone()))


@wrong(
    stage=("finalize", "fc2"),
    says=("bias", "rank|\\btp|tensor.parallel|half|halv|divid|share|1/2|0\\.5"),
    story="every tensor-parallel rank adds fc2's bias divided by the number of ranks",
)
def fc2_bias_divided_among_the_ranks(call: MoeCall) -> Tensor:
    bias = call.experts.fc2_biases
    if bias is None or call.tp_size == 1:
        return forward(call)
    share = (bias.float() / call.tp_size).to(bias.dtype)
    return layer(call, finalize=lambda by_slot, local, weights, _: finalize(by_slot, local, weights, share))


@wrong(
    stage="slots",
    says=("expert|slot|\\bid", "rank|round.?robin|strid|modulo|placement|\\bown|local|map|ep_"),
    story="experts are placed on the ranks in turn, id modulo the number of ranks, but the weights are in blocks",
)
def experts_placed_round_robin(call: MoeCall) -> Tensor:
    ids = call.token_selected_experts.long()
    known = (ids >= 0) & (ids < call.experts.num_experts * call.ep_size)
    mine = known & (ids % call.ep_size == call.ep_rank)
    return layer(call, local=lambda _: torch.where(mine, ids // call.ep_size, -1))


@wrong(
    stage=("fc1", "activation"),
    says=(
        "gate|\\bup\\b|fc1|GEMM ?1|w1|w3",
        "interleav|even|odd|order|permut|every (second|other)|pair|altern",
    ),
    story="gate and up come in halves already, and a loader for interleaved rows takes them apart once more",
)
def gate_and_up_taken_apart_twice(call: MoeCall) -> Tensor:
    if _inner(call) is None:
        return forward(call)

    def apart(rows: Tensor | None) -> Tensor | None:
        return None if rows is None else torch.cat([rows[:, 1::2], rows[:, ::2]], 1)

    experts = call.experts
    return forward(
        with_experts(
            call,
            fc1_weights=apart(experts.fc1_weights),
            fc1_scales=apart(experts.fc1_scales),
            fc1_biases=apart(experts.fc1_biases),
        )
    )


@wrong(
    stage=("slots", "fc1", "fc2"),
    says=(
        "expert|row|slot",
        "\\bpad|block|\\b16\\b|offset|another|other expert|previous|earlier|lost|left out|missing|not computed",
    ),
    story="rows are sorted densely, but experts begin at multiples of 16: an expert takes the rows of later ones",
)
def expert_offsets_padded_but_rows_not(call: MoeCall) -> Tensor:
    def taken_by(rows: Rows) -> tuple[Tensor, Tensor]:
        expert, count = rows.expert.unique(return_counts=True)
        blocks = (count + 15) // 16 * 16
        first = blocks.cumsum(0) - blocks
        row = torch.arange(len(rows.expert))
        at = torch.searchsorted(first, row, right=True) - 1
        return expert[at], row < first[at] + count[at]

    def expert(rows: Rows) -> Tensor:
        return taken_by(rows)[0] if len(rows.expert) else rows.expert

    def fc2(rows: Rows, acc: Tensor) -> Tensor:
        if len(rows.expert):
            acc = acc.masked_fill(~taken_by(rows)[1][:, None], 0.0)
        return to_bf16(acc)

    return layer(call, expert1=expert, expert2=expert, fc2=fc2)
