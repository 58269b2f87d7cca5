"""What goes wrong on the way to the accumulators: strides of copies, stages, unpacking, multicast, tiles, maps."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward
from mxfp4ref.formats.mxfp4 import pack_codes, unpack_codes
from mxfp4ref.sm90.fp32 import to_bf16
from mxfp4ref.sm90.tactics import Tactic
from tests.held_out_kernels.by_hand import Rows, groups_of, layer, local_experts, right_gemm, with_experts
from tests.held_out_kernels.definition import wrong

FC1, FC2 = "GEMM ?1|fc1|first GEMM", "GEMM ?2|fc2|second GEMM|down"
OTHERS = "next|previous|before|after|another|other|earlier|later|shift|off by|neighbou?r|instead|swap|exchang|wrong"
MISSING = (
    "left out|missing|drop|zero|lost|not computed|lack|omit|skipp|ignored|not (loaded|added|read|written)"
)


def _counts(rows: Rows) -> Tensor:
    """How many rows the expert of each row has."""
    return torch.bincount(rows.expert)[rows.expert] if len(rows.expert) else rows.expert


@wrong(
    stage="fc1",
    says=(
        "scale",
        "\\bK\\b|group|tile|128|four|\\b4\\b",
        "first|repeat|same|stuck|not advanc|stale|again|reus|earlier|before|previous|another|other|wrong|modulo",
    ),
    story="the stage's index is not applied to the scales in shared memory: every K tile of 128 of GEMM1 is scaled "
    "with the four scales of the first one",
)
def fc1_scales_not_advanced_along_k(call: MoeCall) -> Tensor:
    scales = call.experts.fc1_scales
    assert scales is not None
    return forward(
        with_experts(call, fc1_scales=scales[..., torch.arange(scales.shape[-1]) % 4].contiguous())
    )


@wrong(
    stage=("input", "slots", "fc1"),
    says=(
        "input|\\brows?\\b|token",
        "overwrit|stale|garbage|activation|" + OTHERS,
        "expert|first|beyond|after|later|begin|prefix",
    ),
    story="the workspace of the activation begins where that of the sorted input does: where I > H, an expert's "
    "first rows of input are the activation of the experts before it",
)
def activation_overlaps_the_input(call: MoeCall) -> Tensor:
    experts = call.experts
    inner, hidden = 2 * experts.fc2_weights.shape[-1], experts.hidden_size
    if inner <= hidden:
        return forward(call)
    local = local_experts(call)
    token = local.flatten().argsort(stable=True)[int((local < 0).sum()) :] // local.shape[1]
    shared = call.input[token].flatten()
    found: list[Tensor] = []
    first = 0

    def x(rows: Rows, taken: Tensor) -> Tensor:
        return shared.view(-1, hidden)[first : first + len(taken)].clone()

    def kept(rows: Rows, a: Tensor) -> Tensor:
        found.append(to_bf16(a))
        return found[-1]

    def nothing(a: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        return torch.zeros(len(a), len(packed))

    for expert in sorted(set(local[local >= 0].tolist())):
        only = torch.where(local == expert, local, -1)
        layer(call, local=lambda right, only=only: only, x=x, activation=kept, gemm2=nothing)
        written = found[-1].flatten()[: max(len(shared) - first * inner, 0)]
        shared[first * inner : first * inner + len(written)] = written
        first += len(found[-1])
    return layer(call, activation=lambda rows, a: torch.cat(found) if found else to_bf16(a))


@wrong(
    stage="fc2",
    says=(
        "scale",
        FC2,
        "accumul|running|product|multipl|compound|cumul|repeated|more than once|later|earlier|\\bsum\\b|so far|all",
    ),
    story="the running accumulators are scaled after each K group of GEMM2, not the group's own part: a group is "
    "multiplied by its scale and by all later ones",
)
def fc2_accumulator_rescaled_with_each_group(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        factors = torch.exp2(scales.view(torch.uint8).float() - 127)
        parts = groups_of(x, packed, torch.full_like(scales.view(torch.uint8), 127))
        acc = torch.zeros_like(parts[0])
        for part, factor in zip(parts, factors.T, strict=True):
            acc = (acc + part) * factor
        return acc

    return layer(call, gemm2=gemm)


@wrong(
    stage="fc2",
    says=(
        "code|\\bLUT\\b|table|entr|nibble|E2M1|value",
        "-6|(minus|negative) (six|6)|\\b15\\b|0xF\\b|1111|largest negative|most negative",
    ),
    story="the last entry of the table in registers is that of code 14: GEMM2 takes -4 for -6, and 6 for 6",
)
def fc2_code_fifteen_is_minus_four(call: MoeCall) -> Tensor:
    codes = unpack_codes(call.experts.fc2_weights)
    changed = pack_codes(torch.where(codes == 15, 14, codes).to(codes.dtype))
    return forward(with_experts(call, fc2_weights=changed))


@wrong(
    stage="fc1",
    says=(
        "code|nibble|weight|element",
        "order|permut|interleav|shuffl|swap|transpos|position|moved|apart",
        "eight|\\b8\\b|word|32.?bit|four bytes|within|even|odd|nibble",
    ),
    story="a word of eight of fc1's codes is widened by two masks, low nibbles first: codes 0 2 4 6 1 3 5 7 meet the "
    "input's columns 0 to 7",
)
def fc1_words_unpacked_low_nibbles_first(call: MoeCall) -> Tensor:
    codes = unpack_codes(call.experts.fc1_weights)
    words = codes.view(*codes.shape[:-1], -1, 4, 2).transpose(-1, -2)
    return forward(with_experts(call, fc1_weights=pack_codes(words.flatten(-3).contiguous())))


@wrong(
    stage=("input", "fc1"),
    says=(
        "input|hidden|\\bx\\b|GEMM ?1|fc1",
        "fp16|float16|half precision|underflow|flush|tiny|subnormal|denormal|too small|range|overflow|65504",
    ),
    story="GEMM1 was built for fp16 and the input is cast: exact between 2^-14 and 65504, bits are lost below 2^-17, "
    "everything below 2^-25, and what is larger is Inf",
)
def input_through_fp16(call: MoeCall) -> Tensor:
    return layer(call, x=lambda rows, x: x.half().to(torch.bfloat16))


@wrong(
    stage="fc1",
    says=(
        "scale",
        "\\brows?\\b|column|stride|pitch|align|padd|layout",
        "stride|pitch|align|padd|skip|every|twice|doubl|permut|layout|" + OTHERS,
    ),
    story="a tensor map wants strides of 16 bytes: that of fc1's scale rows is rounded up, but the rows are dense: "
    "with 8 groups row n has the scales of row 2n, in the end those of the expert after",
)
def fc1_scale_stride_rounded_up(call: MoeCall) -> Tensor:
    scales = call.experts.fc1_scales
    assert scales is not None
    experts, count, groups = scales.shape
    bytes_ = scales.view(torch.uint8)
    padded = torch.cat([bytes_.flatten(), bytes_.new_zeros(16 * count)])  # what lies behind the tensor
    stride = -(-groups // 16) * 16
    first = torch.arange(experts)[:, None, None] * count * groups
    index = first + torch.arange(count)[:, None] * stride + torch.arange(groups)
    return forward(with_experts(call, fc1_scales=padded[index].view(scales.dtype)))


@wrong(
    stage="fc2",
    says=(FC2, "\\bK\\b|half|\\b32\\b|group|element", "\\blast\\b|128|256|tile|block|column|from", MISSING),
    story="each CTA of a pair multicasts half of the activation's K tile; where H has an odd number of tiles of 128 "
    "the last one has no peer, and of each 64 of K its GEMM2 lacks the last 32",
)
def fc2_multicast_half_missing_in_the_odd_tile(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        acc = right_gemm(x, packed, scales, tactic)
        if len(packed) % 256 != 128 or len(packed) == 128:
            return acc
        half = x.masked_fill(torch.arange(x.shape[1]) % 64 >= 32, 0.0)
        acc[:, -128:] = right_gemm(half, packed[-128:].contiguous(), scales[-128:].contiguous(), tactic)
        return acc

    return layer(call, gemm2=gemm)


@wrong(
    stage="fc2",
    says=("expert", "tile|\\brows?\\b|slot|token|some", OTHERS + "|not (its|their) own"),
    story="four persistent CTAs look for the expert of their next tile of 16 rows, and the cursor moves on by one "
    "expert at most: GEMM2 takes the weights of an expert too early in the list",
)
def fc2_cursor_advances_one_expert_a_step(call: MoeCall) -> Tensor:
    def expert2(rows: Rows) -> Tensor:
        counts = torch.bincount(rows.expert, minlength=call.experts.num_experts)
        tiles = -(-counts // 16)
        ends = tiles.cumsum(0).tolist()
        owner = torch.zeros(ends[-1], dtype=torch.int64)
        for block in range(4):
            cursor = 0
            for tile in range(block, ends[-1], 4):
                if tile >= ends[cursor]:
                    cursor += 1
                owner[tile] = cursor
        tile_of_row = (tiles.cumsum(0) - tiles)[rows.expert] + rows.tile(16)
        return owner[tile_of_row]

    return layer(call, expert2=expert2)


@wrong(
    stage=("slots", "fc1", "fc2", "finalize"),
    says=(
        "\\brows?\\b|token|slot",
        "\\b8\\b|eight|sixteen|\\b16\\b|full|multiple|tile|\\blast\\b|exact|divisib|beyond",
        MISSING,
    ),
    story="the last tile of an expert keeps its first (rows mod 8) rows: where an expert's rows are a multiple of "
    "eight that is none, and its last eight are lost",
)
def full_last_tile_is_masked_away(call: MoeCall) -> Tensor:
    def fc2(rows: Rows, acc: Tensor) -> Tensor:
        counts = _counts(rows)
        lost = (counts % 8 == 0) & (rows.position >= counts - 8)
        return to_bf16(acc).masked_fill(lost[:, None], 0.0)

    return layer(call, fc2=fc2)


@wrong(
    stage=("slots", "input", "fc1"),
    says=(
        "\\brows?\\b|token|slot|input",
        OTHERS + "|consecutive|sequential|permut",
        "gather|four|\\b4\\b|expert|token|input",
    ),
    story="a tensor map's gather of four rows is issued as a box of four: each four sorted rows of an expert have "
    "the first one's token and the three tokens that follow it in the batch",
)
def gather_of_four_consecutive_tokens(call: MoeCall) -> Tensor:
    def x(rows: Rows, taken: Tensor) -> Tensor:
        within = rows.position % 4
        first = rows.token[torch.arange(len(within)) - within]
        return call.input[(first + within).clamp(max=len(call.input) - 1)]

    return layer(call, x=x)


@wrong(
    stage=("finalize", "fc2", "slots"),
    says=(
        "\\brows?\\b|token|slot",
        "256|(eight|8).?bit|wrap|modulo|beyond|\\bfrom\\b|later|overflow|uint8",
        OTHERS + "|\\bfirst|same|repeat|wrap|modulo",
    ),
    story="the map from slots to sorted rows is kept in eight bits: what was sorted to row 256 and beyond adds rows "
    "0, 1, ... to its token",
)
def row_map_in_eight_bits(call: MoeCall) -> Tensor:
    return layer(call, fc2=lambda rows, acc: to_bf16(acc)[torch.arange(len(acc)) % 256])
