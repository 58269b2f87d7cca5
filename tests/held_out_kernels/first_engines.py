"""Mistakes of loaders, dispatchers, schedulers and epilogues, as their authors made them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxfp4ref import MoeCall, quantize
from mxfp4ref.formats.mxfp4 import E2M1_VALUES, decode_ue8m0, dequantize, pack_codes, unpack_codes
from mxfp4ref.routing import ROUTERS, RoutedScaling
from mxfp4ref.sm90 import fp32, mufu
from mxfp4ref.sm90.activation import clamp
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.tactics import Tactic
from tests.held_out_kernels.by_hand import Rows, layer, local_experts, right_gemm, with_experts
from tests.held_out_kernels.definition import wrong

ANOTHER_EXPERT = r"(another|other|wrong|different) experts?\b"


# Index maps


@wrong(
    stage="fc2",
    says=(r"column|output feature", r"swap|exchang|trad|permut|each other|\^ ?64|halves|blocks? of 64"),
    story="GEMM2's two consumer warpgroups store to each other's 64 columns of the 128-wide output tile",
)
def warpgroups_store_to_each_others_columns(call: MoeCall) -> Tensor:
    columns = torch.arange(call.experts.hidden_size)
    paired = columns < len(columns) // 128 * 128
    source = torch.where(paired, columns ^ 64, columns)
    return layer(call, fc2=lambda rows, acc: fp32.to_bf16(acc[:, source]))


@wrong(
    stage="fc1",
    says=(
        r"scale",
        r"revers|endian|byte order|top byte|backward|descending|3 ?- ?g|permut|swap|(another|other|wrong) group",
    ),
    story="GEMM1 takes the four scales of a K tile out of their 32-bit word from the top byte down",
)
def scale_word_read_from_its_top_byte(call: MoeCall) -> Tensor:
    def gemm1(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        group = torch.arange(scales.shape[1])
        source = torch.where(group < len(group) // 4 * 4, group ^ 3, group)
        return right_gemm(x, packed, scales[:, source], tactic)

    return layer(call, gemm1=gemm1)


@wrong(
    stage=("finalize", "slots"),
    says=(
        r"weight|final scale",
        r"sort|ascending|permut|(another|other|wrong) (slot|expert)|mismatch|shuffl",
    ),
    story="the dispatcher sorts each token's expert ids and leaves the routing weights in the router's order",
)
def dispatcher_sorts_ids_without_their_weights(call: MoeCall) -> Tensor:
    return layer(replace(call, token_selected_experts=call.token_selected_experts.sort(1).values))


@wrong(
    stage="input",
    says=(
        r"\binput|hidden state|token|\bx\b",
        r"chunk|modulo|% ?32|wrap|repeat|32 (tokens|rows)? ?(earlier|before)|first 32|(another|other) token",
    ),
    story="tokens run in chunks of 32, and the pointer to the hidden states is not advanced with the chunk",
)
def every_chunk_reads_the_first_hidden_states(call: MoeCall) -> Tensor:
    return layer(call, x=lambda rows, x: call.input[rows.token % 32])


@wrong(
    stage="slots",
    says=(
        r"expert|\bids?\b",
        r"round[- ]robin|strid|interleav|modulo|% ?(ep|rank|num|world|\d)|every (n|\d|ep)|cyclic",
    ),
    story="experts are dealt out round-robin: the rank takes ids with id % ep_size == ep_rank, as id // ep_size",
)
def experts_dealt_to_ranks_round_robin(call: MoeCall) -> Tensor:
    ids, size, held = call.token_selected_experts, call.ep_size, call.experts.num_experts
    owned = (ids >= 0) & (ids < call.num_global_experts)
    linear = ids % size * held + ids // size
    dealt = replace(call, token_selected_experts=torch.where(owned, linear, ids).int())
    return layer(call, local=lambda local: local_experts(dealt))


# Drops, repeats and stale memory


@wrong(
    stage="fc2",
    says=(r"\bK\b|group|inner|reduction", r"twice|again|double|repeat|two times|2 ?x|once too often"),
    story="GEMM2's K loop, unrolled by two, clamps the tile's index: of an odd number of tiles the last counts twice",
)
def odd_last_k_tile_multiplied_twice(call: MoeCall) -> Tensor:
    def gemm2(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        tile = tactic.tile_k
        if x.shape[1] // tile % 2:
            x = torch.cat((x, x[:, -tile:]), 1)
            packed = torch.cat((packed, packed[:, -tile // 2 :]), 1)
            scales = torch.cat((scales, scales[:, -tile // 32 :]), 1)
        return right_gemm(x, packed, scales, tactic)

    return layer(call, gemm2=gemm2)


@wrong(
    stage="activation",
    says=(
        r"bias",
        r"previous|preceding|before it|expert before|neighbou?r|stale|\blate\b|\be ?- ?1|" + ANOTHER_EXPERT,
    ),
    story="the epilogue fetches fc1's bias a tile late: an expert's first 16 rows get that of the expert before",
)
def fc1_bias_fetched_one_tile_late(call: MoeCall) -> Tensor:
    def parameters(rows: Rows, given: list[Tensor | None]) -> list[Tensor | None]:
        biases = call.experts.fc1_biases
        if biases is None or not len(rows.expert):
            return given
        active, which = torch.unique(rows.expert, return_inverse=True)
        before = active[(which - 1).clamp_min(0)]
        return [biases[torch.where(rows.tile(16) == 0, before, rows.expert)], *given[1:]]

    return layer(call, parameters=parameters)


@wrong(
    stage=("finalize", "slots"),
    says=(
        r"skip|foreign|padd|-1|other ranks?|not (on )?this rank|not local|no expert",
        r"row 0|row zero|first (permuted |sorted |routed )?row|stale|\badd(s|ed)?\b|counted|contribut|not skipped",
    ),
    story="the map from slots to permuted rows is cleared to 0, not -1: finalize adds row 0 for every skipped slot",
)
def cleared_row_map_points_to_row_zero(call: MoeCall) -> Tensor:
    first: list[tuple[Tensor, Tensor]] = []

    def fc2(rows: Rows, acc: Tensor) -> Tensor:
        result = fp32.to_bf16(acc)
        first.extend(zip(result[:1], rows.expert[:1], strict=True))
        return result

    def weighted_sum(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        for row, expert in first:
            by_slot = torch.where((local < 0)[..., None], row, by_slot)
            local = torch.where(local < 0, expert, local)
        return finalize(by_slot, local, weights, bias)

    return layer(call, fc2=fc2, finalize=weighted_sum)


# Factors, roundings and orders


@wrong(
    stage="activation",
    says=(
        r"sigmoid|alpha|silu|\bexp(2|f|onential)?\b",
        r"factor|constant|log2|1\.44|1\.003|scaled|multipl|times|slope",
    ),
    story="the sigmoid's log2(e) is typed as 1.4472 where 1.4427 was meant",
)
def log2e_typed_with_two_digits_swapped(call: MoeCall) -> Tensor:
    def swiglu(
        fc1: Tensor, bias: Tensor | None, alpha: Tensor | None, beta: Tensor | None, limit: Tensor | None
    ) -> Tensor:
        value = fp32.widen(fc1)
        if bias is not None:
            value = fp32.add(value, fp32.widen(bias))
        up, gate = value.chunk(2, -1)
        if limit is not None:
            limit = limit.expand_as(up)
            up, gate = clamp(up, limit), fp32.minimum(gate, limit)
        z = gate if alpha is None else fp32.mul(gate, alpha)
        power = mufu.ex2(fp32.mul(-z, torch.tensor(1.4472)))
        silu = fp32.mul(gate, mufu.rcp(fp32.add(torch.ones_like(power), power)))
        return fp32.mul(silu, up if beta is None else fp32.add(up, beta))

    return layer(call, swiglu=swiglu)


@wrong(
    stage="finalize",
    says=(
        r"trunc|toward(s)? zero|\bRZ\b|chop|cut off|not rounded|mask",
        r"\bodd|every (second|other)|pairs?\b|(high|upper|second) (half|one|output|element)|half of the columns",
    ),
    story="two outputs are packed into a word: the low one by cvt.rn, the high one by masking off its lower 16 bits",
)
def high_output_of_a_packed_pair_masked(call: MoeCall) -> Tensor:
    def output(sums: Tensor) -> Tensor:
        masked = (sums.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
        odd = torch.arange(sums.shape[1]) % 2 == 1
        return torch.where(odd, masked, fp32.to_bf16(sums))

    return layer(call, output=output)


@wrong(
    stage="fc2",
    says=(r"split|partial|halves|two (parts|pieces)|half of K|slices|parts of K", r"bf16|bfloat16|round"),
    story="GEMM2 runs split-K by two and hands its partial sums over in a bf16 workspace",
)
def split_k_workspace_of_bf16(call: MoeCall) -> Tensor:
    def gemm2(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        tiles = x.shape[1] // tactic.tile_k
        if tiles < 2:
            return right_gemm(x, packed, scales, tactic)
        cut = (tiles + 1) // 2 * tactic.tile_k
        first = right_gemm(x[:, :cut], packed[:, : cut // 2], scales[:, : cut // 32], tactic)
        second = right_gemm(x[:, cut:], packed[:, cut // 2 :], scales[:, cut // 32 :], tactic)
        return fp32.add(*(fp32.widen(fp32.to_bf16(part)) for part in (first, second)))

    return layer(call, gemm2=gemm2)


# Loaders and engines


@wrong(
    stage="fc1",
    says=(
        r"fc1|GEMM ?1|first GEMM|\bgate\b|\bup\b",
        r"shard|quarter|tensor[- ]parallel|concat|middle|half of (the )?(gate|up)|permut|blocks of (its )?rows",
    ),
    story="a checkpoint of two tensor-parallel shards is merged by joining fc1 whole: rows [up0; gate0; up1; gate1]",
)
def fused_fc1_of_two_shards_joined_whole(call: MoeCall) -> Tensor:
    experts = call.experts
    if not call.activation.gated:
        return layer(call)

    def joined(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        halves = tensor.reshape(len(tensor), 2, 2, -1, *tensor.shape[2:])  # up or gate, shard
        return halves.transpose(1, 2).reshape(tensor.shape)

    names = ("fc1_weights", "fc1_scales", "fc1_biases")
    return layer(with_experts(call, **{name: joined(getattr(experts, name)) for name in names}))


@wrong(
    stage="slots",
    says=(r"expert", r"lexic|string|alphabet|sort|permut|shuffl|reorder|" + ANOTHER_EXPERT),
    story="the loader stacks the experts in the order of sorted(names): experts.10 comes before experts.2",
)
def experts_stacked_by_sorted_names(call: MoeCall) -> Tensor:
    held = call.experts.num_experts
    first = call.ep_rank * held
    order = torch.tensor(sorted(range(held), key=lambda expert: f"experts.{first + expert}"))
    return layer(call, local=lambda local: torch.where(local < 0, -1, order[local]))


@wrong(
    stage=("fc2", "activation"),
    says=(
        r"activation|GEMM ?2|fc2|second GEMM",
        r"top_?k|divi|/ ?k|(another|other|wrong|different) (token|row|slot)s?|rows? of token|permut|index",
    ),
    story="GEMM2 is launched with the same top_k as GEMM1: the row that it reads is id // top_k of the expanded rows",
)
def second_launch_divides_rows_by_top_k(call: MoeCall) -> Tensor:
    def activation(rows: Rows, activated: Tensor) -> Tensor:
        rounded = fp32.to_bf16(activated)
        expanded = rounded.new_zeros(call.num_tokens * call.top_k, rounded.shape[1])
        identity = rows.token * call.top_k + rows.slot
        expanded[identity] = rounded
        return expanded[identity // call.top_k]

    return layer(call, activation=activation)


@wrong(
    stage="fc2",
    says=(
        r"expert",
        r"block[_ -]?size|blocks? of (16|32)|misalign|(earlier|previous|preceding|next) expert|"
        + ANOTHER_EXPERT,
    ),
    story="rows are aligned to blocks of 16; GEMM2's blocks have 32 and look their expert up by their own number",
)
def expert_ids_of_another_block_size(call: MoeCall) -> Tensor:
    def expert2(rows: Rows) -> Tensor:
        blocks = (torch.bincount(rows.expert, minlength=call.experts.num_experts) + 15) // 16
        expert_ids = torch.arange(len(blocks)).repeat_interleave(blocks)
        begin = (blocks.cumsum(0) - blocks) * 16
        return expert_ids[(begin[rows.expert] + rows.position) // 32]

    return layer(call, expert2=expert2)


@wrong(
    stage=("slots", "finalize"),
    says=(
        r"expert",
        r"capacity|beyond|after (the|its) first|more than|over(flow|load)|excess|surplus|(last|later) (rows|tokens)",
    ),
    story="a capacity factor of 1.0 is left over from training: an expert drops the tokens beyond M k / E",
)
def tokens_beyond_expert_capacity_dropped(call: MoeCall) -> Tensor:
    capacity = -(-call.num_tokens * call.top_k // call.num_global_experts)

    def local(right: Tensor) -> Tensor:
        flat = right.flatten()
        chosen = flat[:, None] == torch.arange(call.experts.num_experts)
        position = (chosen.cumsum(0) - 1).gather(1, flat.clamp_min(0)[:, None])[:, 0]
        return torch.where(position < capacity, flat, -1).view_as(right)

    return layer(call, local=local)


@wrong(
    stage="fc2",
    says=(
        r"scale",
        r"transpos|reshap|\bview|layout|[- ]major|strid|permut|(another|other|wrong) (row|group|column)",
    ),
    story="the checkpoint has fc2's scales as [E, I/32, H]; the loader reshapes them to [E, H, I/32] untransposed",
)
def fc2_scales_reshaped_instead_of_transposed(call: MoeCall) -> Tensor:
    scales = call.experts.fc2_scales
    assert scales is not None
    stored = scales.transpose(1, 2).contiguous()
    return layer(with_experts(call, fc2_scales=stored.view(scales.shape)))


# Beside the layer


@wrong(
    stage="quantize",
    says=(
        r"max|scale",
        r"(even|odd)([- ]\w+)? (index|indices|element|position|lane|column|value)|every (second|other)|"
        r"half of (the|its|a) (group|element|value)|\b16\b|subset|some of|not all|parity",
    ),
    story="the butterfly of shuffles for a group's maximum ends at offset 2: lane 0 has that of the even elements",
    kind="quantize",
)
def amax_butterfly_ends_one_step_early(values: Tensor, rule: Any, **_: Any) -> dict[str, Tensor]:
    wide = values.float()
    even = torch.arange(values.shape[-1]) % 2 == 0
    _, scales = quantize(torch.where(even, wide, 0.0), rule=rule)
    groups = wide.double().unflatten(-1, (-1, 32))
    magnitude = (groups.abs() / decode_ue8m0(scales, dtype=torch.float64)[..., None]).nan_to_num(0.0)
    codes = torch.zeros_like(groups, dtype=torch.uint8)
    for middle, up in ((0.25, 0), (0.75, 1), (1.25, 0), (1.75, 1), (2.5, 0), (3.5, 1), (5.0, 0)):
        codes += magnitude >= middle if up else magnitude > middle
    codes |= torch.signbit(groups).to(torch.uint8) << 3
    codes[scales == 255] = 0
    return {"packed": pack_codes(codes.flatten(-2)), "scales": scales}


@wrong(
    stage="dequantize",
    says=(r"scale", r"signed|int8|\b128\b|\b127\b|negative|top bit|high bit|sign bit|upper half|large"),
    story="the scale bytes come as int8 and are sign-extended: 128 and above become exponents of -255 and up",
    kind="dequantize",
)
def scale_bytes_sign_extended(
    packed: Tensor, scales: Tensor, convention: Any, dtype: str, **_: Any
) -> dict[str, Tensor]:
    kind = getattr(torch, dtype)
    right = dequantize(packed, scales, convention=convention, dtype=kind)
    exponent = (scales.view(torch.int8).double() - 127).repeat_interleave(32, -1)
    codes = torch.tensor(E2M1_VALUES, dtype=torch.float64)[unpack_codes(packed).long()]
    return {"values": torch.where(exponent < -127, (codes * exponent.exp2()).to(kind), right)}


@wrong(
    stage="routing",
    says=(r"expert", r"\b25[56]\b|beyond|never|highest ids|last experts|only the first|out of reach"),
    story="the top-k kernel is instantiated for 256 experts: of a router with more, those beyond are never looked at",
    kind="routing",
)
def top_k_instantiated_for_256_experts(
    logits: Tensor, preset: str, routed_scaling: str | None = None, **options: Any
) -> dict[str, Tensor]:
    if options.get("tid2eid") is None:
        logits = logits[:, :256]
        if options.get("correction_bias") is not None:
            options["correction_bias"] = options["correction_bias"][:256]
    if routed_scaling is not None:
        options["routed_scaling"] = RoutedScaling(routed_scaling)
    routed = ROUTERS[preset](logits, **options)
    return {"ids": routed.ids, "scales": routed.scales}
