"""The group-scaled GEMM of all experts of a call in one launch, with the tensor core itself as the step.

On a Hopper GPU a matrix product of depth 16 is the step of `docs/arithmetic.md`, bit for bit, so that two of them and
one FMA make a group. `gemm.triton_kernel` computes the same term by term and stays to check this one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxfp4ref.sm90.gpu.primitives import bf16_bits, fma, step
from mxfp4ref.sm90.gpu.routing import Rows
from mxfp4ref.sm90.gpu.weights import (
    LOGICAL,
    load_weights,
    row_stride,
    scale_offsets,
    scale_stride,
    weight_offsets,
)

__all__ = ["Packed", "gemm"]

QUAD = tl.constexpr(128)  # of K: four groups, whose scales are one word in every layout


@dataclass(frozen=True)
class Packed:
    """The weights of one GEMM as they lie in memory.

    Attributes:
        weights: uint8, the codes of `[E, num_rows, depth]`.
        scales: uint8 or int32, in the order that belongs to the layout.
        num_rows, depth: N and K, multiples of 128.
        layout: one of the constants of `gpu.weights`.
    """

    weights: Tensor
    scales: Tensor
    num_rows: int
    depth: int
    layout: int


def gemm(
    x: Tensor,
    packed: Packed,
    rows: Rows,
    *,
    tile_k: int,
    swapped: Tensor | None,
    gathered: bool,
    accumulators: Tensor | None = None,
) -> Tensor:
    """GEMM of every routed row by the weights of its expert.

    Args:
        x: `[M, K] bf16`, contiguous; one row a token if `gathered`, else one a routed row.
        packed: the weights.
        rows: which rows there are; `rows.tiles` says how they are cut.
        tile_k: the K tile of the tactic, which orders the groups.
        swapped: `[P] int32`, whether the row at position p of its expert, modulo P, rounds the second product before
            the first; None where no row does.
        gathered: take each routed row's token from `x`.
        accumulators: `[R, N] float32` to be filled, or None.

    Returns:
        `[R, N] bf16` for R = M * k slots; what lies behind the routed rows is unset.
    """
    tiles, num_columns = rows.tiles, packed.num_rows
    assert num_columns % tiles.columns == 0
    out = torch.empty(len(rows.slot), num_columns, dtype=torch.bfloat16, device=x.device)
    logical = packed.layout == LOGICAL.value
    unused = rows.start  # of the right dtype, since another would make another binary
    _gemm[(rows.max_tiles * (num_columns // tiles.columns),)](
        x,
        rows.slot,
        packed.weights if logical else packed.weights.view(torch.int32),
        packed.scales.view(torch.int32),
        unused if swapped is None else swapped,
        out.view(torch.int16),
        unused if accumulators is None else accumulators.view(torch.int32),
        rows.tile_expert,
        rows.tile_start,
        rows.start,
        rows.before,
        num_columns,
        packed.depth,
        rows.top_k if gathered else 0,
        tile_k // QUAD.value,
        0 if swapped is None else len(swapped),
        int(accumulators is not None),
        LAYOUT=packed.layout,
        COLUMNS=tiles.columns,
        ROWS=tiles.rows,
        STAGES=tiles.stages,
        num_warps=tiles.warps,
        maxnreg=tiles.registers,
    )
    return out


# What differs between calls is an argument, not a constant, so that one binary serves them all: the one of the trial.
@triton.jit(do_not_specialize=["top_k", "quads_per_tile", "period", "keep"])
def _gemm(
    x,  # [M, K] bf16
    slot,  # [R] int32, the flat index of each routed row's slot
    weights,
    scales,  # int32
    swapped,  # [period] int32
    out,  # [R, N] int16, the bits
    accumulators,  # [R, N] int32, the bits
    tile_expert,  # [T] int32
    tile_start,  # [T] int32, the first row of the tile
    start,  # [E + 1] int32, the first row of each expert
    before,  # [E] int32, how many rows of the expert earlier launches have had
    num_columns,  # N
    depth,  # K
    top_k,  # 0 if x has one row a routed row
    quads_per_tile,  # of the tactic's K tile: 1, 2 or 4
    period,  # 0 if no row swaps the first two groups
    keep,  # whether accumulators are to be written
    LAYOUT: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Some columns of some rows of one expert; transposed, since weights are the step's first operand."""
    blocks = num_columns // COLUMNS
    tile = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * COLUMNS
    expert = tl.load(tile_expert + tile)
    if expert >= 0:
        row = tl.load(tile_start + tile) + tl.arange(0, ROWS)
        inside = row < tl.load(start + expert + 1)
        source = row
        if top_k > 0:
            source = tl.load(slot + row, mask=inside, other=0) // top_k
        quads = depth // QUAD
        expert64 = expert.to(tl.int64)
        x_at = x + source.to(tl.int64)[None, :] * depth + tl.arange(0, 16)[:, None]
        weights_at = weights + expert64 * num_columns * row_stride(depth, LAYOUT)
        weights_at += weight_offsets(column, depth, COLUMNS, LAYOUT)
        n = column + tl.arange(0, COLUMNS)
        scales_at = scales + expert64 * num_columns * quads + scale_offsets(n, quads, LAYOUT)
        acc = tl.zeros([COLUMNS, ROWS], tl.float32)
        first = 0
        if period > 0:  # these rows' results differ only if something leaves the range of float32
            position = row - tl.load(start + expert) + tl.load(before + expert)
            swap = (tl.load(swapped + position % period) != 0)[None, :]
            scale = tl.load(scales_at)
            # Groups 0, 1, 0, 2 and 3 (the first tile is in order): rows take group 0 either before or after group 1.
            for part in tl.range(0, 5, num_stages=1):
                group = tl.where(part < 2, part, tl.where(part == 2, 0, part - 1))
                taken = (group != 0) | (swap == (part == 2))
                t = _sum(weights_at, x_at, inside, group, depth, COLUMNS, ROWS, LAYOUT)
                acc = tl.where(taken, fma(t, _scale(scale, group, COLUMNS, ROWS), acc), acc)
            first = 1
        for quad in tl.range(first, quads, num_stages=STAGES):
            scale = tl.load(scales_at + quad * scale_stride(num_columns, LAYOUT))
            # In every tile between the first and the last, the last two groups change places.
            last = (quad + 1) % quads_per_tile == 0
            between = (quad >= quads_per_tile) & (quad < quads - quads_per_tile)
            exchange = (last & between).to(tl.int32)
            for index in tl.static_range(4):
                of_quad = index if index < 2 else index ^ exchange
                t = _sum(weights_at, x_at, inside, quad * 4 + of_quad, depth, COLUMNS, ROWS, LAYOUT)
                acc = fma(t, _scale(scale, of_quad, COLUMNS, ROWS), acc)
        acc += 0.0  # the epilogue: -0 becomes +0
        to = row.to(tl.int64)[None, :] * num_columns + n[:, None]
        tl.store(out + to, bf16_bits(acc), mask=inside[None, :])
        if keep != 0:
            bits = tl.where(acc == acc, acc.to(tl.int32, bitcast=True), 0x7FFFFFFF)
            tl.store(accumulators + to, bits, mask=inside[None, :])


@triton.jit
def _sum(
    weights_at,
    x_at,
    inside,
    group,
    depth,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """The two steps of a group, `[COLUMNS, ROWS] float32`."""
    t = tl.zeros([COLUMNS, ROWS], tl.float32)
    for index in tl.static_range(2):
        weights = load_weights(weights_at, group, index, depth, COLUMNS, LAYOUT)
        x = tl.load(x_at + (group * 32 + index * 16), mask=inside[None, :], other=0.0)
        t = step(weights, x, t)
    return t


@triton.jit
def _scale(words, index, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """The factors of one of 4 groups by the sm90 convention: byte 0 is 0, byte 255 is Inf."""
    scale = (((words >> (8 * index)) & 0xFF) << 23).to(tl.float32, bitcast=True)
    return tl.broadcast_to(scale[:, None], (COLUMNS, ROWS))
