"""A third draw: what loaders, quantisers, routers, ranks and batches around a kernel get wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxfp4ref import MoeCall, dequantize, forward, quantize
from mxfp4ref._choices import ScaleRule
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.fp32 import to_bf16, widen
from tests.held_out_kernels.by_hand import layer, right_routing, with_experts
from tests.held_out_kernels.definition import wrong
from tests.held_out_kernels.routers import in_torch
from tests.held_out_kernels.serving import _encoded

FC1, FC2 = "GEMM ?1|fc1|first GEMM|w13|gate|\\bup\\b", "GEMM ?2|fc2|second GEMM|down|w2"
MOVED = "swap|exchang|permut|order|neighbou?r|another|other(?! weights)|instead of|from|wrong|mixed|shuffl|rearrang"


@wrong(
    stage=("slots", "finalize"),
    says=(
        "token|\\brow|slot",
        "\\bany\\b|-1|padd|missing|skip|dropp|empty|\\bzero|lost|ignored|left out|sentinel",
    ),
    story="a row counts as padding of the batch where any of its ids is -1, not all: tokens with a slot without an "
    "expert are skipped whole",
)
def third_one_missing_slot_makes_a_pad(call: MoeCall) -> Tensor:
    ids = call.token_selected_experts
    padded = (ids == -1).any(1, keepdim=True)
    return forward(replace(call, token_selected_experts=ids.masked_fill(padded, -1)))


@wrong(
    stage="fc1",
    says=(FC1, "scale", f"\\brow|{MOVED}|fold|transpos|layout|interleav|\\b4\\b|\\b16\\b|\\b64\\b"),
    story="each 64 rows of fc1's scales are folded as 16 x 4 where the kernel has them as 4 x 16: row 16a + b has "
    "the scales of row 4b + a",
)
def third_scales_folded_sixteen_by_four(call: MoeCall) -> Tensor:
    scales = call.experts.fc1_scales
    assert scales is not None
    row = torch.arange(scales.shape[1])
    return forward(
        with_experts(call, fc1_scales=scales[:, row // 64 * 64 + row % 16 * 4 + row % 64 // 16].contiguous())
    )


@wrong(
    kind="quantize",
    stage="quantize",
    says=(
        "scale|exponent|amax|maximum|largest",
        "\\brow|block|share|neighbou?r|larger|too (large|high)|higher|greater|above|32 ?(x|by) ?32|another|other"
        "|common|several",
    ),
    story="weights are quantised as for training, in blocks of 32 x 32 that can be transposed: 32 rows share the "
    "largest of their scales",
)
def third_rows_share_a_scale_as_in_training(*, values: Tensor, rule: ScaleRule) -> dict[str, Tensor]:
    largest = values.view(*values.shape[:-1], -1, 32).abs().amax(-1).flatten(0, -2)
    blocks = [block.amax(0, keepdim=True).expand_as(block) for block in torch.split(largest, 32)]
    seen = torch.cat(blocks).repeat_interleave(32, 1).view(values.shape)
    return _encoded(values, quantize(seen.contiguous(), rule=rule)[1])


@wrong(
    kind="dequantize",
    stage="dequantize",
    says=(
        "scale|exponent",
        "\\b64\\b|half|every (second|other)|two groups|twice|//|/ ?2|byte|another|other|wrong|group|neighbou?r",
    ),
    story="the group is counted in bytes, 32 of them, where 32 are elements: element k is scaled by the scale k // "
    "64 of its row",
)
def third_group_counted_in_bytes(
    *, packed: Tensor, scales: Tensor, convention: str, dtype: str
) -> dict[str, Tensor]:
    late = scales[..., torch.arange(scales.shape[-1]) // 2]
    given: Any = convention
    return {"values": dequantize(packed, late, convention=given, dtype=getattr(torch, dtype))}


@wrong(
    kind="routing",
    stage="routing",
    says=(
        "softplus|score|function|formula",
        "\\b20\\b|beta|relu|sharp|linear|steep|another|other|threshold|sigmoid|softmax|instead|wrong|exp",
    ),
    story="torch's softplus(x, 20) is called for a threshold of 20, and its second argument is beta: scores are "
    "sqrt(log(1 + exp(20 x)) / 20), next to a ReLU's root",
)
def third_softplus_with_a_beta_of_twenty(**inputs: Any) -> dict[str, Tensor]:
    if inputs["preset"] != "deepseek_v4":
        return right_routing(inputs)
    return in_torch(inputs, scores=lambda x: torch.nn.functional.softplus(x, 20).sqrt())


@wrong(
    kind="routing",
    stage="routing",
    says=("weight|scale", f"{MOVED}|sort|descend|largest first|decreas|by size|ranked"),
    story="hash layers take their ids from the table and their weights from a top-k of what was gathered: the "
    "weights descend, the ids stay in the table's order",
)
def third_hash_weights_in_order_of_score(**inputs: Any) -> dict[str, Tensor]:
    right = right_routing(inputs)
    if "tid2eid" not in inputs:
        return right
    return {"ids": right["ids"], "scales": right["scales"].sort(dim=1, descending=True).values}


@wrong(
    stage="fc2",
    says=(
        FC2,
        "code|weight|\\brow|column|\\bK\\b|shard",
        f"{MOVED}|shard|half|halves|reshap|view|stack|joined|rank",
    ),
    story="two tensor-parallel shards of w2's codes are joined along the rows and viewed in the full shape: row n is "
    "made of rows 2n and 2n + 1 of the first shard, from the middle on of the second; scales are joined along K",
)
def third_w2_shards_stacked_and_viewed(call: MoeCall) -> Tensor:
    weights = call.experts.fc2_weights
    stacked = torch.cat(weights.chunk(2, dim=2), 1).reshape(weights.shape)
    return forward(with_experts(call, fc2_weights=stacked))


@wrong(
    stage="activation",
    says=(
        "limit|clamp",
        "\\bmin|small|\\blow|strict|tight|all experts|every expert|same|another|other|\\bone\\b|first|least",
    ),
    story="the engine has room for one limit and takes the smallest of the experts', lest anything overflow",
)
def third_limit_of_the_strictest_expert(call: MoeCall) -> Tensor:
    limit = call.experts.swiglu_limit
    if limit is None:
        return forward(call)
    return forward(with_experts(call, swiglu_limit=torch.full_like(limit, limit.min().item())))


@wrong(
    stage=("fc1", "activation"),
    says=("bias", f"{MOVED}|shard|rank|quarter|half|halves|\\bup\\b|gate|joined|concat|interleav"),
    story="fc1's bias is joined from two tensor-parallel shards as they are, [up0; gate0; up1; gate1]; weights and "
    "scales are taken apart first",
)
def third_bias_shards_joined_whole(call: MoeCall) -> Tensor:
    bias = call.experts.fc1_biases
    if bias is None or not call.experts.gated:
        return forward(call)
    up0, up1, gate0, gate1 = bias.chunk(4, dim=1)
    return forward(with_experts(call, fc1_biases=torch.cat((up0, gate0, up1, gate1), 1)))


@wrong(
    stage="slots",
    says=(
        "expert|\\bids?\\b",
        "bf16|bfloat16|round|even|neighbou?r|another|wrong|\\b256\\b|beyond|from .*on|precision|bits|odd",
    ),
    story="ids travel to the other ranks in one bf16 buffer with the hidden states: above 256 odd ids are rounded to "
    "an even one",
)
def third_ids_carried_in_bf16(call: MoeCall) -> Tensor:
    ids = call.token_selected_experts
    return forward(replace(call, token_selected_experts=ids.bfloat16().to(ids.dtype), strict=False))


@wrong(
    stage=("fc2", "finalize"),
    says=(
        f"{FC2}|weight|scale|finali|sum|output",
        "factor|1\\.3|4 ?/ ?3|1\\.5|2 ?/ ?3|doubl|times|twice|exponent|multipl|divid|too (high|large|big)",
    ),
    story="the routed scaling factor of 1.5 is taken out of the routing weights and folded into w2's scales, which "
    "are powers of two: they are doubled",
)
def third_factor_folded_into_w2(call: MoeCall) -> Tensor:
    scales = call.experts.fc2_scales
    assert scales is not None
    doubled = with_experts(call, fc2_scales=scales.clamp(max=254) + 1)
    return forward(replace(doubled, token_final_scales=call.token_final_scales / 1.5, unscaled=False))


@wrong(
    stage="finalize",
    says=("token|\\brow", "twice|doubl|\\b2\\b|\\btwo\\b|added|factor|times|again|repeat"),
    story="tokens go in chunks of 16, the last one shifted back so as to be whole, and chunks are added to the "
    "output: tokens that the last two share count twice",
)
def third_last_chunk_overlaps_and_adds(call: MoeCall) -> Tensor:
    out = forward(call)
    tokens = len(out)
    if tokens > 16 and tokens % 16:
        shared = slice(tokens - 16, tokens // 16 * 16)
        out[shared] = to_bf16(fp32.add(widen(out[shared]), widen(out[shared])))
    return out


@wrong(
    stage=("input", "fc1"),
    says=(
        f"{FC1}|input|\\bx\\b|hidden|gather",
        "token|\\brow",
        f"{MOVED}|even|odd|dealt|alternat|next|previous",
    ),
    story="two sequence-parallel ranks hold every other token; ids are put back into the order of the batch, hidden "
    "states are gathered rank after rank: all even tokens, then all odd ones",
)
def third_hidden_states_gathered_rank_by_rank(call: MoeCall) -> Tensor:
    return forward(replace(call, input=torch.cat((call.input[::2], call.input[1::2]))))


@wrong(
    stage=("activation", "finalize"),
    says=(
        "alpha|sigmoid|silu|swish",
        "bias",
        "divid|half|quarter|small|top|times|factor|scaled|\\b0\\.\\d|mean|averag|1 ?/ ?(k|\\d)|part",
    ),
    story="the port knows plain SiLU, so alpha is 1; and it divides fc2's bias by top-k, since it is added in every "
    "slot",
)
def third_no_alpha_and_a_bias_shared_by_slots(call: MoeCall) -> Tensor:
    bias = call.experts.fc2_biases
    if bias is not None:
        bias = (bias.float() / call.top_k).bfloat16()
    return forward(with_experts(call, swiglu_alpha=None, fc2_biases=bias))


@wrong(
    stage="finalize",
    says=("weight", "slot|expert|order", f"{MOVED}|first|compact|local|rank|earlier|previous|shift"),
    story="a rank keeps a token's own slots close together and forgets to do so with the weights: its j-th slot of "
    "this rank takes the token's j-th weight",
)
def third_slots_of_the_rank_compacted_without_weights(call: MoeCall) -> Tensor:
    def compacted(local: Tensor, weights: Tensor) -> Tensor:
        return weights.gather(1, ((local >= 0).cumsum(1) - 1).clamp(min=0))

    return layer(call, weights=compacted)
