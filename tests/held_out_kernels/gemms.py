"""GEMMs that read or write the right numbers in the wrong place."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref import MoeCall
from mxfp4ref.sm90.fp32 import to_bf16
from mxfp4ref.sm90.tactics import Tactic
from tests.held_out_kernels.by_hand import Rows, layer, right_gemm, with_experts
from tests.held_out_kernels.definition import wrong

GEMM1, GEMM2 = "GEMM ?1|fc1|first GEMM", "GEMM ?2|fc2|second GEMM|down"
MISSING = "drop|missing|omit|left out|not added|skipped|ignored|lost"


@wrong(
    stage=("fc1", "activation"),
    says=("column|rows|block", "swap|exchang|permut|order|trade|pair"),
    story="the epilogue stores blocks of 32 columns of GEMM1 in pairs the wrong way round",
)
def fc1_column_blocks_swapped(call: MoeCall) -> Tensor:
    def fc1(rows: Rows, acc: Tensor) -> Tensor:
        return to_bf16(acc).unflatten(1, (-1, 2, 32)).flip(2).flatten(1)

    return layer(call, fc1=fc1)


@wrong(
    stage=("fc2", "finalize"),
    says=("column|\\brows?\\b", "shift|rotat|permut|block|order|swap|exchang"),
    story="GEMM2's columns arrive shifted by a block of 16",
)
def fc2_columns_rotated(call: MoeCall) -> Tensor:
    return layer(call, fc2=lambda rows, acc: to_bf16(acc).roll(16, 1))


@wrong(
    stage="fc2",
    says=(
        GEMM2 + "|column|output",
        "column|block|tile",
        "neighbou?r|next|previous|same|repeat|duplicate|twice|of block",
    ),
    story="the last tile of 64 columns of GEMM2 is written twice, the one before it never",
)
def fc2_last_column_tile_written_twice(call: MoeCall) -> Tensor:
    def fc2(rows: Rows, acc: Tensor) -> Tensor:
        out = to_bf16(acc)
        out[:, -128:-64] = out[:, -64:]
        return out

    return layer(call, fc2=fc2)


@wrong(
    stage=("fc1", "input"),
    says=("group|\\bK\\b|32", "swap|exchang|pair|permut|order"),
    story="neighbouring K groups of the weights and scales are exchanged in GEMM1",
)
def fc1_k_groups_swapped(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        moved = packed.unflatten(1, (-1, 2, 16)).flip(2).flatten(1)
        return right_gemm(x, moved, scales.unflatten(1, (-1, 2)).flip(2).flatten(1), tactic)

    return layer(call, gemm1=gemm)


@wrong(
    stage=("fc2", "activation"),
    says=("group|\\bK\\b|32", "shift|rotat|next|previous|off by one|one too"),
    story="GEMM2 reads the activation one K group too far",
)
def fc2_k_shifted_by_a_group(call: MoeCall) -> Tensor:
    return layer(
        call, gemm2=lambda x, packed, scales, tactic: right_gemm(x.roll(-32, 1), packed, scales, tactic)
    )


@wrong(
    stage=("fc2", "activation"),
    says=("last|tail|end", "group|\\bK\\b|32|column", MISSING + "|zero"),
    story="GEMM2's loop over K leaves its last group out",
)
def fc2_last_group_left_out(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        x = x.clone()
        x[:, -32:] = 0
        return right_gemm(x, packed, scales, tactic)

    return layer(call, gemm2=gemm)


@wrong(
    stage=("fc1", "input"),
    says=("group|\\bK\\b|tile", "every|third|n-th|period|multiple|\\b3\\b|each", MISSING + "|zero"),
    story="a pipeline of three stages loses every third tile of 64 along K in GEMM1",
)
def fc1_every_third_k_tile_lost(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        kept = torch.arange(x.shape[1]) // 64 % 3 != 2
        return right_gemm(x * kept, packed, scales, tactic)

    return layer(call, gemm1=gemm)


@wrong(
    stage=("fc1", "fc2"),
    says=("tail|last|end|beyond|remain", "group|\\bK\\b|tile", MISSING + "|zero"),
    story="K beyond a multiple of 256 is left out in both GEMMs",
)
def k_remainder_of_256_left_out(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        whole = x.shape[1] // 256 * 256 or x.shape[1]
        return right_gemm(x * (torch.arange(x.shape[1]) < whole), packed, scales, tactic)

    return layer(call, gemm1=gemm, gemm2=gemm)


@wrong(
    stage=("fc1", "input"),
    says=("nibble|code|byte|pair|even|odd", "swap|exchang|order|permut|trade"),
    story="codes of a byte are swapped in the last K group of fc1 only",
)
def nibbles_swapped_in_the_last_group(call: MoeCall) -> Tensor:
    packed = call.experts.fc1_weights.clone()
    packed[..., -16:] = packed[..., -16:] >> 4 | packed[..., -16:] << 4
    return layer(with_experts(call, fc1_weights=packed))


@wrong(
    stage=("activation", "fc1"),
    says=("gate|up", "swap|exchang|order|trade|interchang|for each other", "expert"),
    story="one expert of the checkpoint has gate and up the other way round",
)
def gate_and_up_swapped_in_expert_one(call: MoeCall) -> Tensor:
    def fc1(rows: Rows, acc: Tensor) -> Tensor:
        swapped = acc.roll(acc.shape[1] // 2, 1)
        return to_bf16(torch.where((rows.expert == 1)[:, None], swapped, acc))

    return layer(call, fc1=fc1)


@wrong(
    stage=("fc2", "finalize"),
    says=("sign|negat|-1\\b|minus", "column|block"),
    story="the sign bit is lost and inverted in one block of 16 columns of fc2",
)
def fc2_negated_in_a_column_block(call: MoeCall) -> Tensor:
    packed = call.experts.fc2_weights.clone()
    packed[:, 32:48] ^= 0x88
    return layer(with_experts(call, fc2_weights=packed))


@wrong(
    stage="fc1",
    says=("sign|negat|absolute|positive", "GEMM ?1|fc1|weight|code"),
    story="the sign bit of fc1's codes is masked away",
)
def fc1_signs_lost(call: MoeCall) -> Tensor:
    return layer(with_experts(call, fc1_weights=call.experts.fc1_weights & 0x77))


@wrong(
    stage=("fc1", "input"),
    says=("transpos|permut|order|interleav|swap|shuffl|exchang", "column|\\bK\\b|input|channel|hidden|group"),
    story="the input's columns are read in the order of a 2 x 128 transposition",
)
def input_columns_interleaved(call: MoeCall) -> Tensor:
    return layer(call, x=lambda rows, x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1))


@wrong(
    stage=("fc2", "activation"),
    says=("\\bK\\b|group|column|activation", "first|second|half|lower|upper", MISSING + "|zero"),
    story="only the first half of the activation reaches GEMM2: the size of the shard is halved twice",
)
def fc2_second_half_of_k_left_out(call: MoeCall) -> Tensor:
    def activation(rows: Rows, a: Tensor) -> Tensor:
        a = to_bf16(a)
        a[:, a.shape[1] // 2 :] = 0
        return a

    return layer(call, activation=activation)
