"""Slots sorted by expert on the GPU, without the host ever seeing how many rows an expert has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxfp4ref.sm90.gpu.tiles import Tiles

__all__ = ["Rows", "route"]

_SLOTS_AT_ONCE = 1024


@dataclass(frozen=True)
class Rows:
    """R = M * k slots, those of this rank first, by expert and within an expert by token; the rest is unset.

    Attributes:
        top_k: k, so that slot // k is the token.
        tiles: how the GEMMs cut the rows.
        slot: `[R] int32`, the flat index of each row's slot.
        expert: `[R] int32`, this rank's index of each row's expert.
        row: `[R] int32`, the row of each slot, -1 for slots that are skipped.
        start: `[E + 1] int32`, the first row of each expert, then the number of rows.
        before: `[E] int32`, how many rows of each expert came before these.
        count: `[E] int32`, how many rows of each expert are among these.
        tile_expert, tile_start: `[max_tiles] int32`, the expert and the first row of each tile; -1 for no tile.
    """

    top_k: int
    tiles: Tiles
    slot: Tensor
    expert: Tensor
    row: Tensor
    start: Tensor
    before: Tensor
    count: Tensor
    tile_expert: Tensor
    tile_start: Tensor

    @property
    def max_tiles(self) -> int:
        return len(self.tile_expert)


def route(ids: Tensor, num_experts: int, first_expert: int, tiles: Tiles, before: Tensor) -> Rows:
    """The rows of some tokens.

    Args:
        ids: `[M, k] int32`, global expert ids, contiguous.
        num_experts, first_expert: this rank owns `num_experts` ids from `first_expert` on. Of an expert that a token
            names twice only the first slot counts.
        tiles: how the GEMMs cut the rows.
        before: `[E] int32`, how many rows of each expert earlier tokens have had.
    """
    num_slots, top_k = ids.numel(), ids.shape[1]
    busy = min(num_experts, num_slots)
    # A tile is full, or the last of its expert.
    max_tiles = (num_slots + busy * (tiles.rows - 1)) // tiles.rows
    sizes = (num_slots, num_slots, num_slots, num_slots, num_experts + 1, max_tiles, max_tiles)
    local, slot, expert, row, start, tile_expert, tile_start = _empty(sizes, ids.device)
    count = torch.zeros(num_experts, dtype=torch.int32, device=ids.device)
    if num_slots:
        _count[triton.cdiv(num_slots, _SLOTS_AT_ONCE),](
            ids, local, row, count, num_slots, first_expert, num_experts, TOP_K=top_k, SLOTS=_SLOTS_AT_ONCE
        )
    _place[num_experts,](
        local,
        count,
        slot,
        expert,
        row,
        start,
        tile_expert,
        tile_start,
        num_slots,
        num_experts,
        max_tiles,
        EXPERTS=triton.next_power_of_2(num_experts),
        ROWS=tiles.rows,
        SLOTS=_SLOTS_AT_ONCE,
    )
    return Rows(top_k, tiles, slot, expert, row, start, before, count, tile_expert, tile_start)


def _empty(sizes: Sequence[int], device: torch.device) -> Iterator[Tensor]:
    """int32 vectors in one piece of memory, each where 16 bytes can be read at once."""
    padded = [-(-size // 4) * 4 for size in sizes]
    pieces = torch.empty(sum(padded), dtype=torch.int32, device=device).split(padded)
    return (piece[:size] for piece, size in zip(pieces, sizes, strict=True))


@triton.jit(do_not_specialize=["num_slots", "first_expert", "num_experts"])
def _count(
    ids,
    local,
    row,
    count,
    num_slots,
    first_expert,
    num_experts,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """This rank's index of each slot's expert, -1 for none, and the number of each expert's slots."""
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    inside = slot < num_slots
    chosen = tl.load(ids + slot, mask=inside, other=-1)
    index = chosen.to(tl.int64) - first_expert
    owned = inside & (index >= 0) & (index < num_experts)
    for other in tl.static_range(TOP_K - 1):
        earlier = slot % TOP_K > other
        named = tl.load(ids + slot // TOP_K * TOP_K + other, mask=inside & earlier, other=-1)
        owned = owned & ((named != chosen) | (earlier == 0))
    index = tl.where(owned, index, -1).to(tl.int32)
    tl.store(local + slot, index, mask=inside)
    tl.store(row + slot, tl.full([SLOTS], -1, tl.int32), mask=inside)
    tl.atomic_add(count + index, tl.full([SLOTS], 1, tl.int32), mask=owned)


@triton.jit(do_not_specialize=["num_slots", "num_experts", "max_tiles"])
def _place(
    local,
    count,
    slot,
    expert,
    row,
    start,
    tile_expert,
    tile_start,
    num_slots,
    num_experts,
    max_tiles,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """One expert's rows in the order of their slots, and its tiles."""
    this = tl.program_id(0)
    each = tl.arange(0, EXPERTS)
    counts = tl.load(count + each, mask=each < num_experts, other=0)
    tiles = (counts + (ROWS - 1)) // ROWS
    first_row = tl.sum(tl.where(each < this, counts, 0))
    first_tile = tl.sum(tl.where(each < this, tiles, 0))
    num_rows = tl.sum(tl.where(each == this, counts, 0))
    num_tiles = tl.sum(tl.where(each == this, tiles, 0))
    tl.store(start + this, first_row)
    for index in range(num_tiles):
        tl.store(tile_expert + first_tile + index, this)
        tl.store(tile_start + first_tile + index, first_row + index * ROWS)
    if this == num_experts - 1:
        tl.store(start + num_experts, first_row + num_rows)
        for index in range(first_tile + num_tiles, max_tiles):
            tl.store(tile_expert + index, -1)
    to = first_row
    if num_rows > 0:
        for begin in range(0, num_slots, SLOTS):
            at = begin + tl.arange(0, SLOTS)
            mine = tl.load(local + at, mask=at < num_slots, other=-1) == this
            places = to + tl.cumsum(mine.to(tl.int32), 0) - 1
            tl.store(slot + places, at, mask=mine)
            tl.store(expert + places, tl.full([SLOTS], 0, tl.int32) + this, mask=mine)
            tl.store(row + at, places, mask=mine)
            to += tl.sum(mine.to(tl.int32))
