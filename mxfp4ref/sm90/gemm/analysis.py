"""What can be said of the tensor core's sums from x alone, and the rows of x that they are computed from.

A pair of a row of x and a K group of 32 (two steps of 16 products, `docs/arithmetic.md`, section 3) is

- plain, if every partial sum of its products is a float32 number whatever the weights: all are multiples of one
  unit and below 2^24 of them. Then nothing is truncated, and a float32 matrix product gives the group's sum
  exactly, in whatever order and on whatever device it adds.
- mixed otherwise. Each step is put together, in float64, from rows whose products have exact float32 sums: the
  large elements ("high"), the small ones ("low"), and one row for each element whose product may be truncated
  ("risky"), since that depends on the weights of the column. A step with risky elements, or one that may truncate
  what it carries over from the step before, is "wide".
- direct, if x is infinite or the exponents lie too far apart for float32: to be summed term by term.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mxfp4ref.formats.mxfp4 import GROUP_SIZE
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.gemm.chunks import (
    HIGHEST_TERM,
    LOWEST_TOP,
    NONE,
    STEPS,
    Chunk,
    MixedPairs,
    make_chunks,
    two_to_the,
)
from mxfp4ref.sm90.tensor_core import STEP_SIZE

__all__ = ["Blocks", "Direct", "analyse", "spans"]

_WEIGHT_BOUND = 6.0 * (1 + 2.0**-40)  # the largest weight, and room for the rounding of a bound itself
_LARGEST_WEIGHT_EXPONENT = 2
_SMALLEST_WEIGHT_EXPONENT = -1  # of 0.5, which is also the unit of all weights


@dataclass(frozen=True)
class Direct:
    """F pairs of a group and a row of an expert that are to be summed term by term, sorted by group."""

    group: Tensor  # [F]
    expert: Tensor  # [F]
    row: Tensor  # [F]
    before: list[int]  # [G + 1], how many belong to earlier groups

    def __len__(self) -> int:
        return self.before[-1]

    @classmethod
    def where(cls, chosen: Tensor) -> Direct:
        """The pairs that a mask `[G, B, M] bool` marks."""
        group, expert, row = chosen.nonzero(as_tuple=True)
        return cls(group, expert, row, before=[0, *itertools.accumulate(chosen.sum((1, 2)).tolist())])


@dataclass(frozen=True)
class Blocks:
    """Rows of x, `[B, M, K] bf16`, by K group."""

    x: Tensor  # [G, B, M, 32] bf16
    bound: Tensor  # [G, B, M] float64: |t| is at most this; Inf where x is not finite
    unit: Tensor  # [G, B, M] int32: t is a multiple of 2^unit
    direct: Direct
    chunks: list[Chunk]


def analyse(x: Tensor, groups_at_once: int) -> Blocks:
    """Split `[B, M, K] bf16` into groups and decide how each row takes each of them."""
    batch, num_rows, depth = x.shape
    num_groups = depth // GROUP_SIZE
    grouped = x.reshape(batch, num_rows, num_groups, GROUP_SIZE).permute(2, 0, 1, 3).contiguous()
    steps = grouped.view(num_groups, batch, num_rows, STEPS, STEP_SIZE)
    index = steps.view(torch.int16).to(torch.int32).add_(1 << 15).flatten()
    values, exponent, unit = (t.index_select(0, index).view(steps.shape) for t in _properties(x.device))

    top = exponent.amax(-1)  # [G, B, M, 2]
    step_unit = unit.amin(-1)
    bound = values.abs().sum(-1).mul_(_WEIGHT_BOUND)
    # The second step also takes the first one's result, whose exponent is bounded by its magnitude.
    largest_term = top + _LARGEST_WEIGHT_EXPONENT
    carried = torch.where(bound[..., 0] == 0, -NONE, torch.frexp(bound[..., 0]).exponent - 1)
    largest_term[..., 1] = torch.maximum(largest_term[..., 1], carried)
    total = bound.sum(-1).nan_to_num_(torch.inf, torch.inf)
    group_unit = step_unit.amin(-1)

    plain = (total < two_to_the(group_unit + 24)) & (total < 2.0**127) & (group_unit >= -126)
    scaled = (top < LOWEST_TOP) | (largest_term > HIGHEST_TERM)
    too_far = (top < largest_term + LOWEST_TOP) & scaled & (top > -NONE)
    direct = torch.isinf(total) | (too_far.any(-1) & ~plain)
    pairs = (~plain & ~direct).flatten().nonzero().squeeze(1)

    def of_pairs(t: Tensor) -> Tensor:
        return t.flatten(0, 2).index_select(0, pairs)

    block = pairs // num_rows
    mixed = MixedPairs(
        group=block // batch,
        expert=block % batch,
        row=pairs % num_rows,
        x=of_pairs(values),
        exponent=of_pairs(exponent),
        unit=of_pairs(unit),
        top=of_pairs(top),
        largest_term=of_pairs(largest_term),
        carried_unit=of_pairs(step_unit)[:, 0],
        scaled=of_pairs(scaled),
        may_overflow=of_pairs(total) >= 2.0**127,
    )
    plain_rows = grouped.masked_fill(~plain.unsqueeze(-1), 0.0).to(torch.float32).flatten(0, 1)
    return Blocks(
        x=grouped,
        bound=total,
        unit=group_unit,
        direct=Direct.where(direct),
        chunks=list(make_chunks(plain_rows, mixed, batch, groups_at_once)),
    )


def spans(length: int, step: int) -> Iterator[slice]:
    """Slices of `step` that cover `length`."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


@functools.cache
def _properties(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """`[65536]` each, by the bf16's bits as int16, plus 2^15.

    The value, float64; the exponent, int32, -4096 for zeros; the exponent of the unit of the products with
    weights, int32, 4096 for zeros.
    """
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32, device="cpu")
    field, fraction = (bits >> 7) & 0xFF, bits & 0x7F
    significand = torch.where(field == 0, fraction, fraction + 0x80)
    exponent = field.clamp(min=1) - 127
    trailing = sum(((significand & ((2 << n) - 1)) == 0).to(torch.int32) for n in range(7))
    unit = exponent - 7 + trailing + _SMALLEST_WEIGHT_EXPONENT
    values = fp32.bf16_to_fp64(bits.to(torch.int16).view(torch.bfloat16))
    zero = significand == 0
    tables = (values, torch.where(zero, -NONE, exponent), torch.where(zero, NONE, unit))
    return tuple(table.to(device) for table in tables)  # type: ignore[return-value]
