"""The rows of x from which the sums of "mixed" pairs are put together; what those are is said in `blocks`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mxfp4ref.formats.mxfp4 import GROUP_SIZE
from mxfp4ref.sm90.tensor_core import FRACTION_BITS, STEP_SIZE

__all__ = [
    "HIGHEST_TERM",
    "LOWEST_TOP",
    "NONE",
    "POWER_BITS",
    "POWER_OFFSET",
    "STEPS",
    "Chunk",
    "MixedPairs",
    "Step",
    "make_chunks",
    "two_to_the",
]

STEPS = GROUP_SIZE // STEP_SIZE
NONE = 1 << 12  # the unit of zeros, and minus the exponent of zeros: beyond any other
_KINDS = 3  # of rows of a step: high, low, single elements

# 16 products of |x| < 2^(e + 1) and |w| <= 6 are below 2^(e + 7.6): multiples of 2^(e - 16) have an exact sum.
_HIGH_BITS = 16
# The largest exponent of a step's products is found by a product too: a sum of up to 16 powers of 2^5 has the
# exponent of the largest. float32 holds 2^5 to the powers of exponents down to 43 below that of the largest element.
POWER_BITS = 5
POWER_OFFSET = 103  # 127 + 103 is a multiple of 5
_NEAR = 43
# Within these exponents of a step's largest element and term no product or sum leaves float32's normal range.
LOWEST_TOP, HIGHEST_TERM = -56, 121


@dataclass(frozen=True)
class MixedPairs:
    """P mixed pairs, sorted by group. Exponents are int32."""

    group: Tensor  # [P]
    expert: Tensor  # [P]
    row: Tensor  # [P]
    x: Tensor  # [P, 2, 16] float64
    exponent: Tensor  # [P, 2, 16], of the elements; -4096 for zeros
    unit: Tensor  # [P, 2, 16]: an element's products are multiples of 2^unit; 4096 for zeros
    top: Tensor  # [P, 2], the largest exponent of a step's elements
    largest_term: Tensor  # [P, 2], the largest that one of its terms can have
    carried_unit: Tensor  # [P]: the first step's result is a multiple of 2^this
    scaled: Tensor  # [P, 2] bool: float32 would not hold the step's rows as they are
    may_overflow: Tensor  # [P] bool: float32 would not hold a step's result


@dataclass(frozen=True)
class Step:
    """One of the two steps of a chunk's P mixed pairs, wide ones first.

    L is the number of the chunk's blocks, W that of the pairs that are wide.

    Attributes:
        num_pairs: P.
        rows: `[L, R, 16]`, to be multiplied with the step's weights.
        parts: `[2 * P + ...]`, which of the L * R products count: for each pair that of its high and that of its low
            elements, then those of single elements.
        singles: `[...]`, the pairs that the single elements belong to.
        power_rows: `[L', S, 16]`, powers, for the blocks that have wide pairs.
        power_blocks: the groups and the experts of those, `[L']` each; None if L' is L.
        power_parts: `[W]`, which of the L' * S products count.
        top: `[W, 1] int32`, the exponent of the step's largest element, when scaled.
        limit: `[W, 1] int32`, the float32 bits of a power of two: in a column without a term as large, elements
            count that have no row. None where there are no such elements.
        scale: `[P, 1] float64`, the power of two that the rows are scaled by; None where none is.
    """

    num_pairs: int
    rows: Tensor
    parts: Tensor
    singles: Tensor
    power_rows: Tensor
    power_blocks: tuple[Tensor, Tensor] | None
    power_parts: Tensor
    top: Tensor
    limit: Tensor | None
    scale: Tensor | None


@dataclass(frozen=True)
class Chunk:
    """Some groups of all rows, ready to be multiplied with any weights: L = groups * B blocks, group by group.

    Attributes:
        groups: which of K's groups.
        rows: `[L, M, 32]`: the rows of x, zero where a pair is not plain.
        steps: the two steps of the mixed pairs; empty where there are none.
        reorder: `[P]`, the places of the second step's pairs among those of the first.
        pairs: `[P]`, which of the L * M rows the mixed pairs are, in the second step's order.
        group, expert, row: `[P]` each, the same as indices.
        may_overflow: whether a step's result may leave float32's range.
    """

    groups: slice
    rows: Tensor
    steps: tuple[Step, ...]
    reorder: Tensor
    pairs: Tensor
    group: Tensor
    expert: Tensor
    row: Tensor
    may_overflow: bool

    @property
    def num_products(self) -> int:
        """How many products there are for each column, those with powers left out."""
        return sum(rows.shape[0] * rows.shape[1] for rows in (self.rows, *(step.rows for step in self.steps)))


def make_chunks(plain: Tensor, mixed: MixedPairs, batch: int, at_once: int) -> Iterator[Chunk]:
    """Chunks of so many groups, of `plain` rows `[G * B, M, 32]` and the mixed pairs."""
    # Products of risky elements may be truncated; those of elements that are not near have no row, see `Step.limit`.
    risky = mixed.unit < (mixed.largest_term - FRACTION_BITS).unsqueeze(-1)
    near = mixed.exponent >= (mixed.top - _NEAR).unsqueeze(-1)
    single = risky & near
    low = (mixed.unit < (mixed.top - _HIGH_BITS).unsqueeze(-1)) & ~risky
    cut = mixed.carried_unit < mixed.largest_term[:, 1] - FRACTION_BITS
    wide = risky.any(-1)
    wide[:, 1] |= cut & (mixed.top[:, 1] > -NONE)

    shift = torch.where(mixed.scaled & (mixed.top > -NONE), -mixed.largest_term, 0)
    x = (mixed.x * two_to_the(shift).unsqueeze(-1)).to(torch.float32)
    powers = two_to_the(POWER_BITS * (mixed.exponent - mixed.top.unsqueeze(-1)) + POWER_OFFSET)
    powers = powers.masked_fill_(~near, 0.0).to(torch.float32)
    top = (mixed.top + shift).clamp_(min=LOWEST_TOP)
    limit = _limits(mixed, near).add_(shift).clamp_(-127, 127).add_(127).bitwise_left_shift_(23)

    # By chunk, wide pairs before others.
    block = mixed.group * batch + mixed.expert
    length = at_once * batch  # of a chunk, in blocks
    rank = block // length * STEPS - wide.T.to(torch.int64)
    order = torch.argsort(rank, dim=1, stable=True)
    flags = torch.cat([(limit > 0).any(0), (shift != 0).any(0), mixed.may_overflow.any()[None]]).tolist()
    has_limit, has_scale, may_overflow = flags[:STEPS], flags[STEPS : 2 * STEPS], flags[-1]
    position = torch.empty_like(order[0])
    position[order[0]] = torch.arange(len(position), device=position.device)

    steps = []
    for s, of_step in enumerate(order.unbind(0)):
        own, own_risky, own_low, own_single = (t[:, s][of_step] for t in (x, risky, low, single))
        wide_ones = of_step[wide[of_step, s]]
        steps.append(
            _steps(
                *_parts(own, own_risky, own_low, own_single, block[of_step]),
                _Rows(powers[wide_ones, s], block[wide_ones], torch.zeros_like(wide_ones)),
                top[of_step, s, None],
                limit[of_step, s, None] if has_limit[s] else None,
                two_to_the(shift[of_step, s, None]) if has_scale[s] else None,
                len(plain),
                length,
                batch,
            )
        )
    reorder = position[order[1]]
    group, expert, row, block = (t[order[1]] for t in (mixed.group, mixed.expert, mixed.row, block))
    first = 0
    for first_block, both_steps in zip(range(0, len(plain), length), zip(*steps, strict=True), strict=True):
        rows = plain[first_block : first_block + length]
        here = slice(first, first + both_steps[0].num_pairs)
        yield Chunk(
            groups=slice(first_block // batch, (first_block + len(rows)) // batch),
            rows=rows,
            steps=both_steps if here.start < here.stop else (),
            reorder=reorder[here] - first,
            pairs=(block[here] - first_block) * plain.shape[1] + row[here],
            group=group[here],
            expert=expert[here],
            row=row[here],
            may_overflow=may_overflow,
        )
        first = here.stop


def _steps(
    parts: _Rows,
    singles: Tensor,
    powers: _Rows,
    top: Tensor,
    limit: Tensor | None,
    scale: Tensor | None,
    num_blocks: int,
    length: int,
    batch: int,
) -> Iterator[Step]:
    """One of the steps, of each chunk of so many blocks in turn; `top` and the next two are `[P, 1]`."""
    part_list = _Listing.of(parts, torch.arange(num_blocks, device=top.device), num_blocks, length, _KINDS)
    power_blocks = torch.unique(powers.block)
    power_list = _Listing.of(powers, power_blocks, num_blocks, length, 1)
    pair = single = power = 0
    for index, ((rows, places), (power_rows, power_places)) in enumerate(
        zip(part_list.matrices(), power_list.matrices(), strict=True)
    ):
        num_pairs, _, num_singles = part_list.counts[index]
        (num_wide,) = power_list.counts[index]
        those, wide = slice(pair, pair + num_pairs), slice(pair, pair + num_wide)
        which = power_blocks[power : power + len(power_rows)]
        yield Step(
            num_pairs=num_pairs,
            rows=rows,
            parts=places,
            singles=singles[single : single + num_singles] - pair,
            power_rows=power_rows,
            power_blocks=None if len(power_rows) == len(rows) else (which // batch, which % batch),
            power_parts=power_places,
            top=top[wide],
            limit=None if limit is None else limit[wide],
            scale=None if scale is None else scale[those],
        )
        pair, single, power = those.stop, single + num_singles, power + len(power_rows)


def _limits(mixed: MixedPairs, near: Tensor) -> Tensor:
    """`[P, 2]`: the exponent of a term beside which everything that has no row is truncated to zero."""
    far = torch.where(near, -NONE, mixed.exponent).amax(-1)
    # Where all near weights of a column are zero, the powers say no more than that every term is below this.
    lowest = mixed.top - _NEAR - 2
    limit = torch.where(far > -NONE, torch.maximum(far + 4 + FRACTION_BITS, lowest), -NONE)
    # Then the exponent of the carried number decides, which may be lower still.
    lost = mixed.carried_unit < lowest[:, 1] - 1 - FRACTION_BITS
    limit[:, 1] = torch.where(lost, torch.maximum(limit[:, 1], lowest[:, 1]), limit[:, 1])
    return limit


@dataclass(frozen=True)
class _Rows:
    """Rows of some kinds, each for a block."""

    values: Tensor  # [X, 16]
    block: Tensor  # [X]
    kind: Tensor  # [X]


def _parts(x: Tensor, risky: Tensor, low: Tensor, single: Tensor, block: Tensor) -> tuple[_Rows, Tensor]:
    """High, low and single elements of a step, `[P, 16]`, as rows, and the pairs of the single ones."""
    pair, element = single.nonzero(as_tuple=True)
    alone = x.new_zeros(len(pair), STEP_SIZE).scatter_(1, element[:, None], x[pair, element, None])
    high = torch.zeros_like(block)
    rows = _Rows(
        values=torch.cat([x.masked_fill(risky | low, 0.0), x.masked_fill(~low, 0.0), alone]),
        block=torch.cat([block, block, block[pair]]),
        kind=torch.cat([high, high + 1, torch.full_like(pair, 2)]),
    )
    return rows, pair


@dataclass(frozen=True)
class _Listing:
    """Rows sorted by chunk and kind, and where they are put: each below the others of its block."""

    values: Tensor  # [X, 16]
    chunk: Tensor  # [X]
    place: Tensor  # [X], which of the chunk's rows
    first: Tensor  # [chunks], how many rows there are before the chunk's
    counts: list[list[int]]  # [chunks][kinds], how many of the rows have values
    num_blocks: list[int]  # [chunks]
    depth: list[int]  # [chunks], the largest number of rows of a block, and so the size of all

    @classmethod
    def of(cls, rows: _Rows, blocks: Tensor, num_blocks: int, length: int, num_kinds: int) -> _Listing:
        """Chunks consist of those of `blocks` (sorted, of so many) that are in a span of `length`."""
        starts = torch.arange(0, num_blocks + length, length, device=blocks.device)
        num_chunks = len(starts) - 1
        bounds = torch.searchsorted(blocks, starts)
        key = rows.block // length * num_kinds + rows.kind
        order = torch.argsort(key, stable=True)
        block, chunk = rows.block[order], key[order] // num_kinds
        by_block = torch.argsort(block, stable=True)
        ascending = block[by_block]
        rank = torch.arange(len(block), device=block.device) - torch.searchsorted(ascending, ascending)
        slot = torch.empty_like(block).index_copy_(0, by_block, rank)
        depth = bounds.new_zeros(num_chunks).scatter_reduce_(0, chunk, slot + 1, "amax")
        number = torch.searchsorted(blocks, block) - bounds[chunk]
        counts = bounds.new_zeros(num_chunks * num_kinds).index_add_(0, key, torch.ones_like(key))
        sizes = bounds.diff()
        rows_of_chunk = sizes * depth
        numbers = torch.cat([sizes[:, None], depth[:, None], counts.view(num_chunks, num_kinds)], 1).tolist()
        return cls(
            values=rows.values[order],
            chunk=chunk,
            place=number * depth[chunk] + slot,
            first=rows_of_chunk.cumsum(0) - rows_of_chunk,
            counts=[one[2:] for one in numbers],
            num_blocks=[one[0] for one in numbers],
            depth=[one[1] for one in numbers],
        )

    def matrices(self) -> Iterator[tuple[Tensor, Tensor]]:
        """For each chunk the rows, `[L, R, 16]`, and the places of those that have values among the L * R."""
        sizes = [blocks * depth for blocks, depth in zip(self.num_blocks, self.depth, strict=True)]
        buffer = self.values.new_zeros(sum(sizes), STEP_SIZE)
        buffer[self.first[self.chunk] + self.place] = self.values
        counts = [sum(of_kind) for of_kind in self.counts]
        matrices, places = buffer.split(sizes), self.place.split(counts)  # type: ignore[no-untyped-call]
        for matrix, place, blocks, depth in zip(matrices, places, self.num_blocks, self.depth, strict=True):
            yield matrix.view(blocks, depth, STEP_SIZE), place


def two_to_the(exponent: Tensor) -> Tensor:
    """2^exponent as float64; 0 or Inf beyond its normal range."""
    bits = exponent.to(torch.int64).add(1023).clamp_(0, 2047) << 52
    return bits.view(torch.float64)
