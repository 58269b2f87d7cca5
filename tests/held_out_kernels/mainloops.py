"""What goes wrong between problem list and accumulators: stages, layouts, tables, tensor maps, tile orders."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward
from mxfp4ref.sm90.fp32 import to_bf16
from mxfp4ref.sm90.tactics import Tactic
from tests.held_out_kernels.by_hand import Rows, groups_of, layer, right_gemm, with_experts
from tests.held_out_kernels.definition import wrong

FC1, FC2 = "GEMM ?1|fc1|first GEMM", "GEMM ?2|fc2|second GEMM|down"
OTHERS = "next|previous|before|after|another|other|earlier|shift|off by|neighbou?r|instead of|swap|exchang"
EARLIER = "previous|before|preced|another|other|earlier|shift|old"
MISSING = "left out|missing|drop|zero|lost|not computed|lack|omit|skipp|not written"


@wrong(
    stage="fc1",
    says=(
        FC1,
        "code|weight",
        "\\bK\\b|tile|group|columns|elements|stage",
        EARLIER + "|stale|first|repeat|again|reus|not (re)?loaded|instead of",
    ),
    story="the barrier's phase is not flipped when the ring of three stages wraps: from the fourth K tile of 64 on, "
    "GEMM1's codes are those of three tiles before",
)
def fc1_codes_of_the_stage_before(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        late = packed.clone()
        late[:, 96:] = packed[:, :-96]
        return right_gemm(x, late, scales, tactic)

    return layer(call, gemm1=gemm)


@wrong(
    stage="fc1",
    says=(
        "scale",
        "layout|permut|order|swizzl|interleav|blocked|128x4|transpos|shuffl|wrong place|of (other|another)",
    ),
    story="fc1's scales were prepared for Blackwell, in blocks of 128x4, and are read row by row",
)
def fc1_scales_in_blackwells_layout(call: MoeCall) -> Tensor:
    scales = call.experts.fc1_scales
    assert scales is not None
    experts, rows, groups = scales.shape
    if rows % 128 or groups % 4:
        return forward(call)
    blocks = scales.view(experts, rows // 128, 4, 32, groups // 4, 4).permute(0, 1, 4, 3, 2, 5)
    return forward(with_experts(call, fc1_scales=blocks.reshape(scales.shape).contiguous()))


@wrong(
    stage="fc1",
    says=(
        "scale",
        "row|column|gate|up",
        "64|128|warp ?group|half|halves|tile|block",
        OTHERS + "|repeat|share|first",
    ),
    story="the second consumer warpgroup takes the first one's scales: of each 128 rows of fc1 the last 64 have "
    "the scales of the first 64",
)
def fc1_scales_of_the_other_warpgroup(call: MoeCall) -> Tensor:
    scales = call.experts.fc1_scales
    assert scales is not None
    row = torch.arange(scales.shape[1])
    return forward(with_experts(call, fc1_scales=scales[:, row & ~64].contiguous()))


@wrong(
    stage=("fc1", "fc2"),
    says=("code|\\bLUT\\b|table|entr|E2M1|nibble", "-0|(minus|negative) zero|\\b8\\b|0x8|1000|signed zero"),
    story="the table that turns codes into bf16 has -0.5 where -0 belongs, at code 8",
)
def minus_zero_is_minus_a_half(call: MoeCall) -> Tensor:
    def changed(packed: Tensor) -> Tensor:
        bytes_ = packed.view(torch.uint8)
        low, high = bytes_ & 15, bytes_ >> 4
        low, high = (torch.where(code == 8, 9, code) for code in (low, high))
        return (low | high << 4).to(torch.uint8)

    return layer(
        call,
        gemm1=lambda x, packed, scales, tactic: right_gemm(x, changed(packed), scales, tactic),
        gemm2=lambda x, packed, scales, tactic: right_gemm(x, changed(packed), scales, tactic),
    )


@wrong(
    stage="fc2",
    says=(
        "scale",
        "e4m3|fp8|e5m2|format|dtype|data ?type|ue8m0|e8m0|decod|interpret|not a power|power of two",
    ),
    story="the scale tensor's dtype is wrong: GEMM2 takes its bytes for float8_e4m3 as in NVFP4, not for exponents",
)
def fc2_scales_read_as_e4m3(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        factors = scales.view(torch.uint8).view(torch.float8_e4m3fn).float()
        parts = groups_of(x, packed, torch.full_like(scales.view(torch.uint8), 127))
        acc = torch.zeros_like(parts[0])
        for part, factor in zip(parts, factors.T, strict=True):
            acc = acc + part * factor
        return acc

    return layer(call, gemm2=gemm)


@wrong(
    stage=("activation", "fc2", "slots"),
    says=("row|token|slot|position", "expert|count|beyond|tile|more than|first \\d|after the", MISSING),
    story="the fence after the update of GEMM2's tensor map is missing: it has the base of this expert and the "
    "number of rows of the expert before, and rows beyond that are filled with zeros",
)
def fc2_tensor_map_has_the_row_count_before(call: MoeCall) -> Tensor:
    def activation(rows: Rows, a: Tensor) -> Tensor:
        active, mine, counts = rows.expert.unique(return_inverse=True, return_counts=True)
        before = counts[(torch.arange(len(active)) - 1).clamp(min=0)]
        return to_bf16(a).masked_fill((rows.position >= before[mine])[:, None], 0.0)

    return layer(call, activation=activation)


@wrong(
    stage=("fc2", "finalize"),
    says=("tile|column|block|\\brows?\\b", "last|wave|\\bend\\b|expert", MISSING + "|stale"),
    story="a persistent grid of 12 CTAs: the last wave, which is not full, of GEMM2's tiles is not computed",
)
def fc2_last_wave_not_computed(call: MoeCall) -> Tensor:
    def fc2(rows: Rows, acc: Tensor) -> Tensor:
        out, columns = to_bf16(acc), -(-acc.shape[1] // 64)
        tiles: list[tuple[int, int, int]] = []
        for first in (rows.position == 0).nonzero()[:, 0].tolist():
            count = int((rows.expert == rows.expert[first]).sum())
            for row in range(first, first + count, 16):
                tiles += [(row, min(row + 16, first + count), 64 * column) for column in range(columns)]
        if len(tiles) > 12:
            for begin, end, column in tiles[len(tiles) // 12 * 12 :]:
                out[begin:end, column : column + 64] = 0.0
        return out

    return layer(call, fc2=fc2)


@wrong(
    stage=("fc2", "finalize"),
    says=(
        "tile|block",
        "row|token|column",
        OTHERS + "|raster|transpos|permut|order|mixed|wrong (tile|place)",
    ),
    story="GEMM2's tiles of 16 rows and 64 columns of an expert are counted along the columns when computed and "
    "along the rows when stored, so that experts of more than 16 rows have them mixed",
)
def fc2_tiles_stored_in_another_raster(call: MoeCall) -> Tensor:
    def fc2(rows: Rows, acc: Tensor) -> Tensor:
        right = to_bf16(acc)
        if acc.shape[1] % 64:
            return right
        out, columns = right.clone(), acc.shape[1] // 64
        for expert in rows.expert.unique():
            mine = rows.expert == expert
            count = int(mine.sum())
            high = -(-count // 16)
            whole = right.new_zeros(16 * high, acc.shape[1])
            whole[:count] = right[mine]
            stored = torch.zeros_like(whole)
            for tile in range(high * columns):
                r, c = divmod(tile, columns)
                to_c, to_r = divmod(tile, high)
                stored[16 * to_r : 16 * to_r + 16, 64 * to_c : 64 * to_c + 64] = whole[
                    16 * r : 16 * r + 16, 64 * c : 64 * c + 64
                ]
            out[mine] = stored[:count]
        return out

    return layer(call, fc2=fc2)


@wrong(
    stage=("slots", "input", "fc1"),
    says=("expert", "32|31|from|beyond|above|high|larger|last|later", "row|token|offset|input|slot"),
    story="rows per expert are summed up warp by warp and the first warp's total is not carried: experts from 32 on "
    "begin again at the first sorted row and multiply the rows of other experts",
)
def row_offsets_without_carry_beyond_32_experts(call: MoeCall) -> Tensor:
    def x(rows: Rows, taken: Tensor) -> Tensor:
        row = torch.arange(len(taken))
        return taken[torch.where(rows.expert >= 32, row - int((rows.expert < 32).sum()), row)]

    return layer(call, x=x)


@wrong(
    stage="fc2",
    says=(
        "\\bK\\b|group|partial|split|part|element",
        "twice|double|again|two times|2 times|repeat|counted",
        FC2 + "|column|tile",
    ),
    story="stream-K: the fix-up of one tile, the first 16 rows of the first expert that has any and columns 64 to "
    "127, adds the last quarter of K twice",
)
def fc2_fix_up_added_twice(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        acc = right_gemm(x, packed, scales, tactic).clone()
        if fixed:
            return acc
        fixed.append(True)
        parts = groups_of(x[:16], packed[64:128], scales[64:128])
        peer = torch.zeros_like(parts[0])
        for part in parts[-(-3 * len(parts) // 4) :]:
            peer = peer + part
        acc[:16, 64:128] += peer
        return acc

    fixed: list[bool] = []
    return layer(call, gemm2=gemm)


@wrong(
    stage=("fc1", "activation"),
    says=(
        "gate|\\bup\\b|halves",
        "swap|exchang|order|revers|place|mixed|for each other|instead|role",
        "one row|single|one token|alone|\\b1 (row|token)|one slot|lone|only (row|token)|count|few",
    ),
    story="experts with a single row take a GEMV path, whose order of halves is [gate; up], not [up; gate]",
)
def gate_and_up_swapped_in_the_gemv_path(call: MoeCall) -> Tensor:
    inner = 2 * call.experts.fc2_weights.shape[-1]

    def swapped(rows: Rows, halves: Tensor) -> Tensor:
        single = torch.bincount(rows.expert)[rows.expert] == 1 if len(rows.expert) else rows.expert == 1
        return torch.where(single[:, None], halves.roll(inner, 1), halves)

    def fc1(rows: Rows, acc: Tensor) -> Tensor:
        return swapped(rows, to_bf16(acc)) if acc.shape[1] == 2 * inner else to_bf16(acc)

    return layer(call, fc1=fc1)
