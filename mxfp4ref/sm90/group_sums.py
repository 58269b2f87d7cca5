"""The tensor core's sum over each 32-wide group of K, for many rows and columns at once.

A group is two steps of 16 products (the specification, section 3). Three ways to the same bits:

- Exact: where no term can be truncated, whatever the weights, a step is the exact sum cut to 24 bits. All
  partial sums are multiples of one unit and below 2^53 of them, so a float64 matrix product holds them
  exactly in whatever order a BLAS adds; the cut is a mask on the bits.
- Wide: elements of x so small beside the largest that their products may be truncated are left out of the
  matrix product, truncated one by one and added; the sum is exact again.
- Direct: every term by itself, where x is infinite, and for wide rows while they are few: the wide way costs
  many small operations however few the rows. On a GPU always, and where a step may overflow.

Which way a row takes in a group is decided from x alone.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mxfp4ref.mxfp4 import E2M1_VALUES, GROUP_SIZE
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.tensor_core import FRACTION_BITS, STEP_SIZE

__all__ = ["Blocks", "Direct", "analyse", "direct_sums", "group_sums", "machine", "spans", "unpack_groups"]

_WEIGHT_BOUND = 6.0 * (1 + 2.0**-40)  # the largest weight, and room for the rounding of a bound itself
_LARGEST_WEIGHT_EXPONENT = 2
_SMALLEST_WEIGHT_EXPONENT = -1  # of 0.5, which is also the unit of all weights
_LOWEST = -256  # below the exponent of any product
_NONE = 1 << 12  # the unit of zeros, and minus the exponent of zeros: beyond any other
_FP32_BIAS = 127
_FP64_BIAS = 1023
_FP64_EXPONENT = 0x7FF << 52
_RZ24 = -(1 << 29)  # keeps the 24 leading bits of a float64's significand
_FEW = 1 / 32  # of all rows and groups
_ELEMENTS_AT_ONCE = {"cpu": 1 << 18, "gpu": 1 << 24}  # of a temporary in the wide and direct ways
_HALVES = (slice(0, STEP_SIZE), slice(STEP_SIZE, GROUP_SIZE))


@dataclass(frozen=True)
class Blocks:
    """Rows of x by K group, `[B, G, M, ...]`, and what can be said of them without the weights."""

    values: Tensor  # [B, G, M, 32] float64
    exponents: Tensor  # [B, G, M, 32] int16; -4096 for zeros
    risky: Tensor  # [B, G, M, 32] bool: the product may be truncated
    wide: Tensor  # [B, G, M, 2] bool: in this step a product, or what the first step carries over, may be
    direct: Direct  # the rows and groups to sum term by term
    may_overflow: bool  # some step of a row that is not summed so may leave float32's range
    bound: Tensor  # [B, G, M] float64: |t| is at most this; Inf where x is not finite
    unit: Tensor  # [B, G, M] int64: t is a multiple of 2^unit


@dataclass(frozen=True)
class Direct:
    """F pairs of a group and a row of an expert, sorted by group."""

    group: Tensor  # [F]
    expert: Tensor  # [F]
    row: Tensor  # [F]
    before: list[int]  # [G + 1], how many belong to earlier groups

    def __len__(self) -> int:
        return self.before[-1]

    @classmethod
    def where(cls, chosen: Tensor) -> Direct:
        """The pairs that a mask `[B, G, M] bool` marks."""
        per_group = chosen.sum((0, 2)).tolist()
        group, expert, row = chosen.transpose(0, 1).nonzero(as_tuple=True)
        return cls(group, expert, row, before=[0, *itertools.accumulate(per_group)])


def analyse(x: Tensor) -> Blocks:
    """Split `[B, M, K] bf16` into groups and decide how each row takes each of them."""
    batch, num_rows, depth = x.shape
    grouped = x.reshape(batch, num_rows, depth // GROUP_SIZE, GROUP_SIZE).transpose(1, 2).contiguous()
    values = fp32.bf16_to_fp64(grouped)
    magnitude = grouped.view(torch.int16).to(torch.int64) & 0x7FFF
    field = magnitude >> 7
    significand = (magnitude & 0x7F) | ((field != 0).to(torch.int64) << 7)
    exponent = torch.where(significand == 0, -_NONE, field.clamp(min=1) - 127)
    lowest_bit = exponent - 7 + _trailing_zeros(x.device)[significand]
    unit = torch.where(significand == 0, _NONE, lowest_bit + _SMALLEST_WEIGHT_EXPONENT)

    halves = (*values.shape[:-1], 2, STEP_SIZE)
    largest = exponent.view(halves).amax(-1) + _LARGEST_WEIGHT_EXPONENT
    bound = _WEIGHT_BOUND * values.abs().view(halves).sum(-1)
    # The second step also takes the first one's result, whose exponent is bounded by its magnitude.
    carried = torch.frexp(bound[..., 0]).exponent.to(torch.int64) - 1
    largest[..., 1] = torch.maximum(largest[..., 1], torch.where(bound[..., 0] == 0, -_NONE, carried))

    risky = unit.view(halves) < largest.unsqueeze(-1) - FRACTION_BITS
    smallest = unit.view(halves).amin(-1)
    carry_cut = smallest[..., 0] < largest[..., 1] - FRACTION_BITS
    total = bound.sum(-1).nan_to_num(torch.inf, torch.inf)
    wide = risky.any(-1)
    wide[..., 1] |= carry_cut
    huge = total >= 2.0**127
    any_wide = wide.any(-1)
    direct = torch.isinf(total)
    if machine(x.device) == "gpu":
        direct = huge | any_wide
    elif int(any_wide.sum()) <= any_wide.numel() * _FEW:
        direct = direct | any_wide
    return Blocks(
        values=values,
        exponents=exponent.to(torch.int16),
        risky=risky.view(values.shape) & ~direct.unsqueeze(-1),
        wide=wide & ~direct.unsqueeze(-1),
        direct=Direct.where(direct),
        may_overflow=machine(x.device) == "cpu" and bool((huge & ~direct).any()),
        bound=total,
        unit=smallest.amin(-1),
    )


def group_sums(blocks: Blocks, groups: slice, packed: Tensor, direct: Tensor | None = None) -> Tensor:
    """`t` of some groups, `[B, G, M, N] float64` that are float32 numbers, for `[B, N, K/2]` packed codes.

    `direct` is what `direct_sums` gave for the same codes, computed here if it is not given.
    """
    weights = unpack_groups(packed, groups).flatten(0, 1)  # [B * G, N, 32] float64
    x = blocks.values[:, groups].masked_fill(blocks.risky[:, groups], 0.0).flatten(0, 1)
    t = x.new_zeros(len(x), x.shape[1], weights.shape[1])
    for half, elements in enumerate(_HALVES):
        _add_truncated_terms(t, blocks, groups, weights, half)
        t.baddbmm_(x[..., elements], weights[..., elements].transpose(1, 2))
        _cut(t, blocks.may_overflow)
    t = t.view(*blocks.unit[:, groups].shape, -1)
    some = slice(blocks.direct.before[groups.start], blocks.direct.before[groups.stop])
    if some.start < some.stop:
        direct = direct_sums(blocks, packed) if direct is None else direct
        at = blocks.direct
        t[at.expert[some], at.group[some] - groups.start, at.row[some]] = direct[some]
    return t


def _cut(t: Tensor, may_overflow: bool) -> None:
    """Truncate sums to 24 bits in place; from 2^128 on they are Inf."""
    t.view(torch.int64).bitwise_and_(_RZ24)
    if may_overflow:
        t.masked_fill_(t >= 2.0**128, torch.inf).masked_fill_(t <= -(2.0**128), -torch.inf)


def _add_truncated_terms(t: Tensor, blocks: Blocks, groups: slice, weights: Tensor, half: int) -> None:
    """Begin a step of the rows that go the wide way: truncate what is carried over, add the risky products."""
    block, row = blocks.wide[:, groups, :, half].flatten(0, 1).nonzero(as_tuple=True)
    if len(block) == 0:
        return
    elements = _HALVES[half]
    # Rows with the most risky elements first: element j then concerns the first few rows.
    count = blocks.risky[:, groups, :, elements].flatten(0, 1)[block, row].sum(1)
    order = torch.argsort(count, descending=True, stable=True)
    block, row, count = block[order], row[order], count[order]
    distinct, which = torch.unique(block, return_inverse=True)
    some_weights = weights if len(distinct) == len(weights) else weights.index_select(0, distinct)
    columns = some_weights[..., elements].transpose(1, 2).contiguous()  # [U, 16, N]
    # The biased exponents, raised by _NONE where there is one: of a zero weight it stays below all others.
    fields = columns.to(torch.float32).view(torch.int32).bitwise_right_shift_(23).bitwise_and_(0xFF)
    fields = fields.to(torch.int16)
    column_exponents = fields.clamp(max=1).mul_(_NONE).add_(fields)
    risky, values, exponents = (
        part[:, groups, :, elements].flatten(0, 1)[block, row]
        for part in (blocks.risky, blocks.values, blocks.exponents)
    )
    element = torch.argsort(risky.logical_not(), dim=1, stable=True)
    per_row = count.tolist()
    for some in spans(len(block), max(1, _ELEMENTS_AT_ONCE["cpu"] // columns.shape[2])):
        carried = t[block[some], row[some]]
        products = column_exponents.index_select(0, which[some]) + exponents[some].unsqueeze(-1)
        largest = products.amax(1).to(torch.int64).sub_(_NONE + _FP32_BIAS)
        largest = torch.maximum(largest, _carried_exponent(carried))
        # Where every term is zero any unit will do.
        per_unit = _two_to_the(FRACTION_BITS - largest.clamp_(min=_LOWEST))
        total = carried.mul_(per_unit).trunc_()
        for j in range(per_row[some.start]):
            n = sum(c > j for c in per_row[some])
            those = slice(some.start, some.start + n)
            product = columns[which[those], element[those, j]] * values[those].gather(
                1, element[those, j, None]
            )
            total[:n] += product.mul_(per_unit[:n]).trunc_()
        t[block[some], row[some]] = total.div_(per_unit)


def direct_sums(blocks: Blocks, packed: Tensor) -> Tensor:
    """`t` of the rows and groups that are summed term by term, `[F, N] float64`."""
    at = blocks.direct
    out = torch.empty(len(at), packed.shape[1], dtype=torch.float64, device=packed.device)
    by_group = packed.view(*packed.shape[:2], -1, GROUP_SIZE // 2)
    for some in spans(
        len(at), max(1, _ELEMENTS_AT_ONCE[machine(packed.device)] // (packed.shape[1] * GROUP_SIZE))
    ):
        expert, group, row = at.expert[some], at.group[some], at.row[some]
        codes = by_group[expert, :, group]  # [some, N, 16]
        weights = unpack_groups(codes, slice(0, 1)).squeeze(1)
        values = blocks.values[expert, group, row].unsqueeze(1)
        carried = out.new_zeros(weights.shape[:2])
        for elements in _HALVES:
            carried = _direct_step(values[..., elements], weights[..., elements], carried)
        out[some] = carried
    return out


def _direct_step(x: Tensor, weights: Tensor, carried: Tensor) -> Tensor:
    """`tensor_core.step` on float64 values: `[F, 1, 16]`, `[F, N, 16]` and `[F, N]` give `[F, N]`."""
    products = x * weights  # 10 bits: exact
    infinite = products.sum(-1) + carried
    # The largest exponent as a power of two; zeros take no part, subnormals have exponent -126.
    largest = (_power(x, lowest=2.0**-126) * _power(weights)).amax(-1)
    largest = torch.maximum(largest, _power(carried, lowest=2.0**-126))
    per_unit = torch.where(largest == 0, 1.0, 2.0**FRACTION_BITS / largest)
    # Integers below 2^33, summed exactly in any order.
    total = products.mul_(per_unit.unsqueeze(-1)).trunc_().sum(-1) + (carried * per_unit).trunc_()
    total /= per_unit
    _cut(total, may_overflow=True)
    finite = x.isfinite().all(-1) & carried.isfinite()
    return torch.where(finite, total, infinite)


def _power(x: Tensor, lowest: float = 0.0) -> Tensor:
    """The power of two at or below |x|, at least `lowest`; 0 for 0."""
    power = (x.view(torch.int64) & _FP64_EXPONENT).view(torch.float64)
    return torch.where(x == 0, 0.0, power.clamp(min=lowest)) if lowest else power


def unpack_groups(packed: Tensor, groups: slice) -> Tensor:
    """The float64 values `[B, G, N, 32]` of some K groups of `[B, N, K/2]` packed codes."""
    half = GROUP_SIZE // 2
    codes = packed.unflatten(-1, (-1, half))[:, :, groups].transpose(1, 2)  # type: ignore[no-untyped-call]
    if machine(packed.device) == "cpu":
        words = codes.clone(memory_format=torch.contiguous_format).view(torch.int16)
        index = words.to(torch.int32).add_(1 << 15)
        values = _four_codes(packed.device).index_select(0, index.flatten())
    else:
        # Rows are gathered one by one on a GPU; a pair of values as one complex number is not a row.
        index = codes.to(torch.int32, memory_format=torch.contiguous_format)
        values = torch.view_as_real(_two_codes(packed.device)[index])
    return values.view(*codes.shape[:-1], GROUP_SIZE)


def machine(device: torch.device) -> str:
    """ "cpu", where caches are small, or "gpu", where launches are dear: what sizes are chosen by."""
    return "cpu" if device.type == "cpu" else "gpu"


def spans(length: int, step: int) -> Iterator[slice]:
    """Slices of `step` that cover `length`."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _exponent(x: Tensor) -> Tensor:
    """The exponent of float64 numbers, int64; -1023 for zero."""
    return ((x.view(torch.int64) >> 52) & 0x7FF) - _FP64_BIAS


def _carried_exponent(carried: Tensor) -> Tensor:
    """The exponent with which a float32 number takes part in a step; small for zero."""
    return torch.where(carried == 0, -_FP64_BIAS, _exponent(carried).clamp_(min=-126))


def _two_to_the(exponent: Tensor) -> Tensor:
    return ((exponent + _FP64_BIAS) << 52).view(torch.float64)


@functools.cache
def _four_codes(device: torch.device) -> Tensor:
    """`[65536, 4] float64`: the values of four codes, by their 16 bits read as int16, plus 2^15."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int64, device=device)
    shifts = torch.arange(0, 16, 4, dtype=torch.int64, device=device)
    values = torch.tensor(E2M1_VALUES, dtype=torch.float64, device=device)
    return values[(bits[:, None] >> shifts) & 15]


@functools.cache
def _two_codes(device: torch.device) -> Tensor:
    """`[256] complex128`: the values of two codes by their byte, never computed with."""
    pairs = _four_codes(device).view(256, 256, 2, 2)[128, :, 0].contiguous()
    return torch.view_as_complex(pairs)


@functools.cache
def _trailing_zeros(device: torch.device) -> Tensor:
    counts = [(value & -value).bit_length() - 1 if value else 0 for value in range(256)]
    return torch.tensor(counts, dtype=torch.int64, device=device)
