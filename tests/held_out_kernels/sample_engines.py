"""A judge's sample of kinds that the issue does not name: what goes wrong round a Hopper mainloop and in engines."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref import MoeCall
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.fp32 import to_bf16
from mxfp4ref.sm90.tactics import Tactic
from tests.held_out_kernels.by_hand import Rows, layer, right_gemm, with_experts
from tests.held_out_kernels.definition import wrong


@wrong(
    stage="fc2",
    says=(
        r"row|column|tile|\bN\b|weight",
        r"repeat|duplicat|same as|cop(y|ies|ied)|other (row|column)|another|earlier|shift|lower 64|first half|"
        r"(those|that) of|64 (rows |columns )?(before|lower|back|less)|- ?64",
    ),
    story="wrong TMA multicast mask of W2: the upper 64 rows of each 128 get the lower 64's codes (not scales)",
)
def multicast_delivers_the_lower_half_twice(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        row = torch.arange(len(packed))
        return right_gemm(x, packed[row - 64 * (row // 64 % 2)], scales, tactic)

    return layer(call, gemm2=gemm)


@wrong(
    stage=("activation", "fc2"),
    says=(
        r"activation|input of gemm ?2|gemm ?2's input|column|\bK\b|inner|\bA\b|group|fc2",
        r"swizzl|permut|xor|\^|shuffl|chunk|swap|reorder|exchang|interchang",
    ),
    story="the activation is stored unswizzled and read with a 128-byte swizzle: chunk c is c ^ (row % 8)",
)
def activation_read_through_a_swizzle(call: MoeCall) -> Tensor:
    def activation(rows: Rows, activated: Tensor) -> Tensor:
        a = to_bf16(activated)
        column = torch.arange(a.shape[1]).expand(len(a), -1)
        return a.gather(1, column ^ (rows.position % 8 * 8)[:, None])

    return layer(call, activation=activation)


@wrong(
    stage=("input", "fc1"),
    says=(
        r"row|token|tile|input|\bx\b",
        r"stale|previous|earlier|other (row|token|tile)|another|race|16 rows|(row|tile).{0,12} before|repeat|"
        r"shift|\bold",
    ),
    story="a missing full-barrier wait: from an expert's second row tile of 16 on, K 0-63 still hold the tile before",
)
def full_barrier_not_awaited_on_the_first_step(call: MoeCall) -> Tensor:
    def x(rows: Rows, right: Tensor) -> Tensor:
        index = torch.arange(len(right))
        before = torch.where(rows.position >= 16, index - 16, index)
        return torch.cat([right[before, :64], right[:, 64:]], dim=1)

    return layer(call, x=x)


@wrong(
    stage=("fc2", "finalize"),
    says=(
        r"tile|expert|row|column|block|CTA",
        r"zero|missing|not (written|computed|stored|run)|drop|skip|lost|left out|unwritten|empty|never",
    ),
    story="the persistent scheduler runs one wave only: GEMM2's 64 x 64 tiles from number 132 on are never computed",
)
def persistent_grid_of_one_wave(call: MoeCall) -> Tensor:
    def fc2(rows: Rows, acc: Tensor) -> Tensor:
        out = to_bf16(acc).clone()
        columns = torch.arange(out.shape[1]) // 64
        across, first = -(-out.shape[1] // 64), 0
        for expert in rows.expert.unique().tolist():
            mine = (rows.expert == expert).nonzero()[:, 0]
            down = rows.position[mine] // 64
            late = first + down[:, None] * across + columns >= 132
            out[mine] = torch.where(late, torch.zeros_like(out[mine]), out[mine])
            first += (int(down.max()) + 1) * across
        return out

    return layer(call, fc2=fc2)


@wrong(
    stage=("slots", "fc1", "fc2"),
    says=(
        r"expert",
        r"empty|compact|without (rows|tokens)|earlier|shift|another|previous|other expert|lower|idle|unused|"
        r"expert below",
    ),
    story="the problem list leaves empty experts out, and both GEMMs take their weights by the place in that list",
)
def problem_list_without_the_empty_experts(call: MoeCall) -> Tensor:
    def whose(rows: Rows) -> Tensor:
        return torch.searchsorted(rows.expert.unique(), rows.expert)

    return layer(call, expert1=whose, expert2=whose)


@wrong(
    stage=("input", "fc1"),
    says=(
        r"row|token|input|position|\bx\b",
        r"wrap|overflow|mod(ulo)?\b|%|16.?bit|65,?536|another|earlier|other (row|token)|previous|512|repeat|period",
    ),
    story="a row's element offset in the expanded input is a uint16: it wraps after 65536 (512 rows of 128)",
)
def row_offset_in_sixteen_bits(call: MoeCall) -> Tensor:
    def x(rows: Rows, right: Tensor) -> Tensor:
        return right[torch.arange(len(right)) % max(1, 65536 // right.shape[1])]

    return layer(call, x=x)


@wrong(
    stage=("finalize", "fc2"),
    says=(
        r"bias",
        r"fc2|gemm ?2|second gemm|finali[sz]e|down|\bw2\b",
        r"fp16|float16|half|reinterpret|\bbits\b|type|wrong|other (number|value)|different|misread|not (the|"
        r"those|its)",
    ),
    story="fc2's bf16 biases are read through a half pointer: other numbers altogether",
)
def fc2_bias_read_as_half(call: MoeCall) -> Tensor:
    bias = call.experts.fc2_biases
    if bias is None:
        return layer(call)
    as_half = bias.contiguous().view(torch.float16).to(torch.bfloat16)
    return layer(with_experts(call, fc2_biases=as_half))


@wrong(
    stage="fc1",
    says=(
        r"gate|\bup\b|halves|rows",
        r"swap|exchang|interchang|revers|order|flip|\[gate",
    ),
    story="the second checkpoint shard has w1 and w3 exchanged: gate and up swapped for the upper experts",
)
def upper_experts_loaded_as_gate_up(call: MoeCall) -> Tensor:
    e = call.experts
    assert e.fc1_scales is not None
    assert e.fc2_scales is not None
    inner = e.fc2_scales.shape[-1] * 32
    if e.fc1_weights.shape[1] != 2 * inner:
        return layer(call)
    weights, scales, begin = e.fc1_weights.clone(), e.fc1_scales.clone(), (e.num_experts + 1) // 2
    weights[begin:] = weights[begin:].roll(inner, dims=1)
    scales[begin:] = scales[begin:].roll(inner, dims=1)
    return layer(with_experts(call, fc1_weights=weights, fc1_scales=scales))


@wrong(
    stage=("finalize", "fc2"),
    says=(
        r"bias",
        r"rank|twice|extra|should not|although|also|is (added|applied|present)|tensor.?parallel|\btp",
    ),
    story="fc2's bias is added on every tensor-parallel rank, so that the all-reduce counts it tp_size times",
)
def bias_of_fc2_on_each_tensor_rank(call: MoeCall) -> Tensor:
    def last(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        return finalize(by_slot, local, weights, call.experts.fc2_biases)

    return layer(call, finalize=last)


@wrong(
    stage="slots",
    says=(
        r"token|row|batch",
        r"256|chunk|stale|earlier|previous|another token|other token|mod(ulo)?\b|%|wrap|wrong token|repeat",
    ),
    story="chunked prefill: the router's buffer of 256 tokens is never refreshed: token t has t % 256's experts",
)
def later_chunks_with_the_first_chunks_routes(call: MoeCall) -> Tensor:
    of = torch.arange(len(call.token_selected_experts)) % 256
    stale = replace(
        call,
        token_selected_experts=call.token_selected_experts[of].contiguous(),
        token_final_scales=call.token_final_scales[of].contiguous(),
    )
    return layer(stale)


@wrong(
    stage="finalize",
    says=(
        r"nan|inf|finite",
        r"zero|\b0\b|replac|remov|flush|max|largest|lost|hid|saturat|nan_to_num|missing|instead|scrub|clear",
    ),
    story="the engine's guard calls nan_to_num on the layer's output: NaN is 0, and Inf the largest bf16",
)
def nan_to_num_on_the_output(call: MoeCall) -> Tensor:
    return layer(call, output=lambda sums: torch.nan_to_num(to_bf16(sums)))


@wrong(
    stage="none",
    says=("noise|chance|random|unknown|damag|scattered|without a pattern|rounding",),
    story="a race on the output's staging buffer: in one element of 25, at random, the lowest bits are another's",
)
def torn_stores_at_random(call: MoeCall) -> Tensor:
    def output(sums: Tensor) -> Tensor:
        right = to_bf16(sums).contiguous()
        generator = torch.Generator().manual_seed(right.numel())
        hit = torch.rand(right.shape, generator=generator) < 0.04
        noise = torch.randint(1, 16, right.shape, generator=generator).to(torch.int16)
        bits = right.view(torch.int16)
        return torch.where(hit, bits ^ noise, bits).view(torch.bfloat16)

    return layer(call, output=output)
