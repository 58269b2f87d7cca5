"""The tensor core's sum over each 32-wide group of K, for many rows and columns at once.

`blocks` says, from x alone, which sums a matrix product gives exactly and which are put together from several
rows of one. This module multiplies those rows with the weights and puts them together.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from mxfp4ref.formats.mxfp4 import E2M1_VALUES, GROUP_SIZE
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.gemm.analysis import Blocks, spans
from mxfp4ref.sm90.gemm.chunks import POWER_BITS, POWER_OFFSET, Chunk, Step
from mxfp4ref.sm90.tensor_core import FRACTION_BITS, STEP_SIZE

__all__ = ["codes_by_group", "codes_in_units", "direct_sums", "group_sums"]

_POWERS = tuple(2.0 ** (POWER_BITS * (math.frexp(v)[1] - 1)) if v else 0.0 for v in E2M1_VALUES)
_FP32_BIAS = 127
_FP32_EXPONENT = 0xFF << 23
_FP64_EXPONENT = 0x7FF << 52
_RZ24 = -(1 << 29)  # keeps the 24 leading bits of a float64's significand
_ELEMENTS_AT_ONCE = 1 << 18  # of a temporary of the direct sums
_BYTES = GROUP_SIZE // 2
_HALVES = (slice(0, STEP_SIZE), slice(STEP_SIZE, GROUP_SIZE))


def codes_by_group(packed: Tensor) -> Tensor:
    """`[B, N, K/2]` packed codes as `[G, B, N, 16]`, the 16 bytes of a group together."""
    units = codes_in_units(packed, torch.complex128).permute(2, 0, 1).contiguous()
    return units.flatten().view(torch.uint8).view(*units.shape, _BYTES)


def codes_in_units(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Packed codes as numbers of a wider type, to be moved by: a view, or a copy where that can't be."""
    if not packed.is_contiguous() or packed.storage_offset() % dtype.itemsize:
        packed = packed.clone(memory_format=torch.contiguous_format)
    return packed.view(dtype)


def group_sums(blocks: Blocks, chunk: Chunk, codes: Tensor, direct: Tensor | None = None) -> Tensor:
    """`t` of a chunk's groups, `[G, B, M, N] float32`, for the codes of all groups, `[G, B, N, 16]`.

    `direct` is what `direct_sums` gave for the same codes, computed here if it is not given.
    """
    _, batch, num_rows, _ = blocks.x.shape
    num_columns = codes.shape[2]
    index = _index(codes[chunk.groups])  # [G * B, N, 16]
    weights = _unpack(index, E2M1_VALUES)
    t = _products(chunk.rows, weights)
    if chunk.steps:
        t.view(-1, num_columns)[chunk.pairs] = _mixed_sums(blocks, chunk, codes, index, weights)
    t = t.view(-1, batch, num_rows, num_columns)
    at = blocks.direct
    some = slice(at.before[chunk.groups.start], at.before[chunk.groups.stop])
    if some.start < some.stop:
        direct = direct_sums(blocks, codes) if direct is None else direct
        t[at.group[some] - chunk.groups.start, at.expert[some], at.row[some]] = direct[some].to(torch.float32)
    return t


def _products(rows: Tensor, weights: Tensor) -> Tensor:
    """`[L, R, N] float32` from `[L, R, K]` and `[L, N, K]`: every partial sum is exact (see `blocks`)."""
    return torch.bmm(rows, weights.transpose(1, 2))


def _mixed_sums(blocks: Blocks, chunk: Chunk, codes: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """`t` of the chunk's mixed pairs, `[P, N] float32`."""
    num_columns = weights.shape[1]
    powers: Tensor | None = None
    carried: Tensor | None = None
    unsure: Tensor | None = None
    for step, elements in zip(chunk.steps, _HALVES, strict=True):
        if carried is not None:
            carried = carried.index_select(0, chunk.reorder)
            unsure = None if unsure is None else unsure.index_select(0, chunk.reorder)
        parts = _products(step.rows, weights[..., elements]).view(-1, num_columns).index_select(0, step.parts)
        power_parts = parts[:0]
        if len(step.power_parts):
            if step.power_blocks is None:
                powers = some_powers = _unpack(index, _POWERS) if powers is None else powers
            else:
                some_powers = _unpack(_index(codes[step.power_blocks]), _POWERS)
            products = _products(step.power_rows, some_powers[..., elements])
            power_parts = products.view(-1, num_columns).index_select(0, step.power_parts)
        carried, mask = _step(step, parts, power_parts, carried, chunk.may_overflow)
        if mask is not None:
            unsure = mask if unsure is None else mask.logical_or_(unsure)
    assert carried is not None
    if unsure is not None:
        pair, column = unsure.nonzero(as_tuple=True)
        if len(pair):
            carried[pair, column] = _elements(blocks, chunk, codes, pair, column)
    return carried.to(torch.float32)


def _step(
    step: Step, parts: Tensor, powers: Tensor, carried: Tensor | None, may_overflow: bool
) -> tuple[Tensor, Tensor | None]:
    """One step of P mixed pairs: `[P, N] float64` after `carried`, and where, if anywhere, that may be wrong."""
    num_pairs, wide = step.num_pairs, len(powers)
    total = parts[:num_pairs].to(torch.float64).add_(parts[num_pairs : 2 * num_pairs])
    if step.scale is not None and carried is not None:
        carried = carried.mul_(step.scale)
    unsure = None
    if wide:
        # The largest term's power of two as float32 bits: 205 / 1024 is a fifth, for exponent fields up to 255.
        largest = (powers.view(torch.int32) >> 23).mul_(205 << 13).bitwise_and_(_FP32_EXPONENT)
        largest.add_((step.top + (_FP32_BIAS - (_FP32_BIAS + POWER_OFFSET) // POWER_BITS)) << 23)
        if carried is not None:
            power = carried[:wide].to(torch.float32).view(torch.int32).bitwise_and_(_FP32_EXPONENT)
            largest = torch.maximum(largest, power)
        if step.limit is not None:
            unsure = torch.zeros(total.shape, dtype=torch.bool, device=total.device)
            torch.lt(largest, step.limit, out=unsure[:wide])
        # What may be truncated is, to multiples of 2^(exponent - 25).
        per_unit = (_wrapped((2 * _FP32_BIAS + FRACTION_BITS) << 23) - largest).view(torch.float32)
        if len(step.singles):
            units = per_unit.index_select(0, step.singles)
            truncated = parts[2 * num_pairs :].mul_(units).trunc_().div_(units)
            # Each sum is exact in float64, so that their order does not matter.
            total.index_add_(0, step.singles, truncated.to(torch.float64))
        if carried is not None:
            per_unit_64 = per_unit.to(torch.float64)
            total[:wide] += carried[:wide].mul_(per_unit_64).trunc_().div_(per_unit_64)
    if carried is not None:
        total[wide:] += carried[wide:]
    if step.scale is not None:
        total /= step.scale
    _cut(total, may_overflow)
    return total, unsure


def _wrapped(value: int) -> int:
    """As a signed number of 32 bits."""
    return (value + (1 << 31)) % (1 << 32) - (1 << 31)


def _cut(t: Tensor, may_overflow: bool) -> None:
    """Truncate sums to 24 bits in place; from 2^128 on they are Inf."""
    t.view(torch.int64).bitwise_and_(_RZ24)
    if may_overflow:
        t.masked_fill_(t >= 2.0**128, torch.inf).masked_fill_(t <= -(2.0**128), -torch.inf)


def direct_sums(blocks: Blocks, codes: Tensor) -> Tensor:
    """`t` of the rows and groups that are summed term by term, `[F, N] float64`, for codes `[G, B, N, 16]`."""
    at, num_columns = blocks.direct, codes.shape[2]
    out = torch.empty(len(at), num_columns, dtype=torch.float64, device=codes.device)
    for some in spans(len(at), max(1, _ELEMENTS_AT_ONCE // (num_columns * GROUP_SIZE))):
        group, expert, row = at.group[some], at.expert[some], at.row[some]
        out[some] = _term_by_term(blocks.x[group, expert, row].unsqueeze(1), codes[group, expert])
    return out


def _elements(blocks: Blocks, chunk: Chunk, codes: Tensor, pair: Tensor, column: Tensor) -> Tensor:
    """`t` of single elements of mixed pairs, `[F] float64`."""
    out = torch.empty(len(pair), dtype=torch.float64, device=codes.device)
    for some in spans(len(pair), _ELEMENTS_AT_ONCE // GROUP_SIZE):
        group, expert, row = (of_pair[pair[some]] for of_pair in (chunk.group, chunk.expert, chunk.row))
        out[some] = _term_by_term(blocks.x[group, expert, row], codes[group, expert, column[some]])
    return out


def _term_by_term(x: Tensor, codes: Tensor) -> Tensor:
    """`tensor_core.step` twice: `[..., 32] bf16` and `[..., 16]` bytes of packed codes give `[...] float64`."""
    values = fp32.bf16_to_fp64(x)
    nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).to(torch.int64)
    weights = torch.tensor(E2M1_VALUES, dtype=torch.float64, device=codes.device)[nibbles]
    carried = values.new_zeros(nibbles.shape[:-1])
    for elements in _HALVES:
        carried = _direct_step(values[..., elements], weights[..., elements], carried)
    return carried


def _direct_step(x: Tensor, weights: Tensor, carried: Tensor) -> Tensor:
    """`tensor_core.step` on float64 values: `[..., 16]`, `[..., 16]` and `[...]` give `[...]`."""
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


def _index(codes: Tensor) -> Tensor:
    """`[..., N, 16]` bytes with two codes each as indices, `[L, N, 16] int32`."""
    return codes.to(torch.int32, memory_format=torch.contiguous_format).view(-1, *codes.shape[-2:])


def _unpack(index: Tensor, of_code: tuple[float, ...]) -> Tensor:
    """What codes stand for, `[L, N, 32] float32` of `[L, N, 16]` bytes with two codes each."""
    pairs = _pairs(of_code, index.device).index_select(0, index.view(-1))
    return pairs.view(torch.float32).view(*index.shape[:2], GROUP_SIZE)


@functools.cache
def _pairs(of_code: tuple[float, ...], device: torch.device) -> Tensor:
    """`[256] int64`: the two float32 values of a byte's codes, moved as one unit and never computed with."""
    byte = torch.arange(256, device="cpu")
    values = torch.tensor(of_code, dtype=torch.float32, device="cpu")[torch.stack((byte & 15, byte >> 4), -1)]
    return values.view(torch.int64).flatten().to(device)
