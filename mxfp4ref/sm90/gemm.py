"""The group-scaled GEMM of the kernel, fast, and equal to `gemm_reference` bit for bit.

For each output element and each 32-wide group of K, two tensor-core steps of 16 products give `t`; then
`acc = fma(t, scale, acc)` in float32 (the specification, section 3). The fast path uses float64 matrix
products and float32 additions that are exact, or round exactly where the hardware does:

- Where the exponents within a group lie close together the tensor core truncates nothing, and a step is the
  exact sum cut to 24 bits. All partial sums are multiples of one unit and below 2^53 of them, so float64 holds
  them exactly in whatever order a BLAS adds; the cut is a mask on the bits.
- A scale is a power of two, so `t * scale` is exact, and the fused multiply-add is a float32 addition, as
  long as nothing leaves float32's normal range.

Both conditions are decided from bounds on x and the scales alone. Groups that fail the first are redone term
by term (`_truncating_step`), rows that may fail the second are accumulated with `fp32.fma`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mxfp4ref.mxfp4 import E2M1_VALUES, GROUP_SIZE, decode_ue8m0
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.gemm_reference import first_pair_swapped, group_order
from mxfp4ref.sm90.tensor_core import FRACTION_BITS, STEP_SIZE

__all__ = ["group_scaled_gemm"]

_WEIGHT_BOUND = 6.0 * (1 + 2.0**-40)  # the largest weight, and room for the rounding of a bound itself
_LARGEST_WEIGHT_EXPONENT = 2
_SMALLEST_WEIGHT_EXPONENT = -1  # of 0.5, which is also the unit of all weights
_NOTHING = 1 << 12  # stands for the unit of a block of zeros: larger than any exponent
_FP64_EXPONENT = 0x7FF << 52
_RZ24 = -(1 << 29)  # keeps the 24 leading bits of a float64's significand
_GROUPS_PER_TILE = 16  # a multiple of every tactic's groups per K tile, so that swaps stay inside


def group_scaled_gemm(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    *,
    tile_k: int = 128,
    tile_n: int = 16,
    positions: Tensor | None = None,
) -> Tensor:
    """The float32 accumulators of `x @ W^T` for a batch of experts, bit for bit as the kernel has them.

    Args:
        x: `[B, M, K] bf16`, the rows routed to each expert in token order.
        packed: `[B, N, K/2] uint8`, E2M1 codes in logical order, the low nibble the even K index.
        scales: `[B, N, K/32] uint8`, UE8M0 by the `sm90` convention.
        tile_k: the tactic's K tile, which orders the groups.
        tile_n: the tactic's N tile, visible only where the first two groups over- or underflow.
        positions: `[B, M] int64`, the rows' positions among all rows of their expert; by default 0, 1, 2, ...

    Returns:
        `[B, M, N] float32` after the epilogue's addition of +0: never -0, no subnormals, NaN is 0x7FFFFFFF.
    """
    batch, num_rows, _ = x.shape
    num_columns, num_groups = scales.shape[1:]
    out = torch.empty(batch, num_rows, num_columns, dtype=torch.float32, device=x.device)
    order = group_order(num_groups, tile_k)
    if positions is None:
        positions = torch.arange(num_rows, device=x.device).expand(batch, num_rows)
    swapped = first_pair_swapped(positions, tile_k, tile_n)
    row_step, column_step = _tile_shape(x.device, batch, num_rows)
    for rows in _spans(num_rows, row_step):
        blocks = _analyse(x[:, rows])
        for columns in _spans(num_columns, column_step):
            out[:, rows, columns] = _tile(
                blocks, packed[:, columns], scales[:, columns], order, swapped[:, rows]
            )
    return out


@dataclass(frozen=True)
class _Blocks:
    """The rows of x by K group, `[B, G, M, ...]`, and what can be said of a group without the weights."""

    values: Tensor  # [B, G, M, 32] float64
    exact: Tensor  # [B, G, M] bool: no tensor-core step truncates, whatever the weights
    bound: Tensor  # [B, G, M] float64: |t| is at most this; Inf or NaN where x is not finite
    unit: Tensor  # [B, G, M] int64: t is a multiple of 2^unit


def _analyse(x: Tensor) -> _Blocks:
    batch, num_rows, depth = x.shape
    bits = x.reshape(batch, num_rows, depth // GROUP_SIZE, GROUP_SIZE).transpose(1, 2).contiguous()
    values = fp32.bf16_to_fp64(bits)
    magnitude = bits.view(torch.int16).to(torch.int64) & 0x7FFF
    field = magnitude >> 7
    significand = (magnitude & 0x7F) | ((field != 0).to(torch.int64) << 7)
    exponent = field.clamp(min=1) - 127
    trailing_zeros = _trailing_zeros(x.device)[significand]

    halves = (*values.shape[:-1], 2, STEP_SIZE)
    largest = torch.where(significand == 0, -_NOTHING, exponent).view(halves).amax(-1)
    unit = torch.where(significand == 0, _NOTHING, exponent - 7 + trailing_zeros).view(halves).amin(-1)
    unit = unit + _SMALLEST_WEIGHT_EXPONENT
    largest = largest + _LARGEST_WEIGHT_EXPONENT
    half_bound = _WEIGHT_BOUND * values.abs().view(halves).sum(-1)

    # The second step also takes the first step's result, whose exponent is bounded by its magnitude.
    carried = torch.frexp(half_bound[..., 0]).exponent.to(torch.int64) - 1
    carried = torch.where(half_bound[..., 0] == 0, -_NOTHING, carried)
    largest_second = torch.maximum(largest[..., 1], carried)
    whole_unit = unit.amin(-1)
    exact = (unit[..., 0] >= largest[..., 0] - FRACTION_BITS) & (whole_unit >= largest_second - FRACTION_BITS)
    bound = half_bound.sum(-1)
    return _Blocks(values, exact & (bound < 2.0**127), bound, whole_unit)


def _tile(blocks: _Blocks, packed: Tensor, scales: Tensor, order: list[int], swapped: Tensor) -> Tensor:
    """The accumulators `[B, M, N] float32` of a tile of rows and columns."""
    scales = scales.transpose(1, 2).contiguous()  # [B, G, N]
    scale = decode_ue8m0(scales, convention="sm90")
    batch, num_groups, num_columns = scale.shape
    careful = _may_leave_range(blocks, scales)  # [B, M]
    careful_expert, careful_row = careful.nonzero(as_tuple=True)
    careful_acc: Tensor | None = None
    acc = torch.zeros(batch, swapped.shape[1], num_columns, dtype=torch.float32, device=packed.device)
    for groups in _spans(num_groups, _GROUPS_PER_TILE):
        t = _group_sums(blocks, groups, packed)  # [B, G, M, N] float64
        positions = [group - groups.start for group in order[groups]]
        if len(careful_row):
            chosen = t[careful_expert, :, careful_row].to(torch.float32)  # [rows, G, N]
            chosen_scale = scale[careful_expert, groups]
            careful_acc = _fused(chosen, chosen_scale, positions, careful_acc, swapped[careful])
        products = t.mul_(scale[:, groups, None, :]).to(torch.float32)
        for position in positions:
            acc += products[:, position]
    acc += 0.0  # the epilogue: -0 becomes +0
    if careful_acc is not None:
        acc[careful_expert, careful_row] = fp32.add(careful_acc, torch.zeros_like(careful_acc))
    return acc


def _group_sums(blocks: _Blocks, groups: slice, packed: Tensor) -> Tensor:
    """`t` of the specification for some groups, `[B, G, M, N] float64` that are float32 numbers."""
    x = blocks.values[:, groups]
    weights = _unpack(packed, groups)  # [B, G, N, 32] float64
    shape = (x.shape[0], x.shape[1], x.shape[2], weights.shape[2])
    x, weights = x.flatten(0, 1), weights.flatten(0, 1)
    first, second = slice(0, STEP_SIZE), slice(STEP_SIZE, GROUP_SIZE)
    t = torch.bmm(x[..., first], weights[..., first].transpose(1, 2))
    t.view(torch.int64).bitwise_and_(_RZ24)
    t.baddbmm_(x[..., second], weights[..., second].transpose(1, 2))
    t.view(torch.int64).bitwise_and_(_RZ24)

    batch, row = (~blocks.exact[:, groups]).flatten(0, 1).nonzero(as_tuple=True)
    for some in _spans(len(row), max(1, _WORDS_AT_ONCE // weights[0].numel())):
        b, r = batch[some], row[some]
        factors = x[b, r].unsqueeze(1), weights[b]  # [some, 1, 32], [some, N, 32]
        carried = _truncating_step(factors[0][..., first], factors[1][..., first], None)
        t[b, r] = _truncating_step(factors[0][..., second], factors[1][..., second], carried)
    return t.view(shape)


def _truncating_step(x: Tensor, weights: Tensor, carried: Tensor | None) -> Tensor:
    """`tensor_core.step` on float64 values: `[F, 1, 16]`, `[F, N, 16]` and `[F, N]` give `[F, N]`."""
    products = x * weights  # 10 bits: exact
    # Powers of two below the factors; a subnormal x has exponent -126, zero products take no part.
    x_power = torch.where(x == 0, 0.0, _power_of_two(x).clamp(min=2.0**-126))
    largest = (x_power * _power_of_two(weights)).amax(-1)
    if carried is None:
        carried = torch.zeros_like(largest)
    carried_power = torch.where(carried == 0, 0.0, _power_of_two(carried).clamp(min=2.0**-126))
    unit = torch.maximum(largest, carried_power) * 2.0**-FRACTION_BITS
    per_unit = torch.where(unit == 0, 0.0, 1 / unit)
    # Integers below 2^33, summed exactly in any order.
    total = (products * per_unit.unsqueeze(-1)).trunc_().sum(-1) + (carried * per_unit).trunc_()
    result = total.mul_(unit)
    result.view(torch.int64).bitwise_and_(_RZ24)
    result = torch.where(result.abs() >= 2.0**128, result * torch.inf, result)
    ordinary = x.isfinite().all(-1) & carried.isfinite()
    return torch.where(ordinary, result, products.sum(-1) + carried)


def _may_leave_range(blocks: _Blocks, scales: Tensor) -> Tensor:
    """`[B, M] bool`: rows in which a product or a sum may overflow, be subnormal, or meet Inf."""
    largest = decode_ue8m0(scales.amax(-1), convention="sm90").to(torch.float64)  # [B, G]
    # A scale of 0 makes no subnormals. Inf * 0 makes NaN here, which compares as not below.
    exponent = torch.where(scales == 0, 255, scales).amin(-1).to(torch.int64) - 127
    total = (blocks.bound.nan_to_num(torch.inf, torch.inf) * largest.unsqueeze(-1)).sum(1)  # [B, M]
    lowest = (blocks.unit + exponent.clamp(max=0).unsqueeze(-1)).amin(1)
    return ~((total < 2.0**127) & (lowest >= -126))


def _fused(t: Tensor, scale: Tensor, positions: list[int], acc: Tensor | None, swapped: Tensor) -> Tensor:
    """The accumulation with every rounding and flush: `[R, G, N]` float32, in the order of `positions`."""
    if acc is None:
        first, positions = positions[0], positions[1:]
        acc = fp32.mul(t[:, first], scale[:, first])
        if positions:
            second, positions = positions[0], positions[1:]
            late = fp32.fma(t[:, second], scale[:, second], acc)
            early = fp32.fma(t[:, first], scale[:, first], fp32.mul(t[:, second], scale[:, second]))
            acc = torch.where(swapped.unsqueeze(-1), early, late)
    for position in positions:
        acc = fp32.fma(t[:, position], scale[:, position], acc)
    return acc


def _unpack(packed: Tensor, groups: slice) -> Tensor:
    """The float64 values `[B, G, N, 32]` of some K groups of `[B, N, K/2]` packed codes."""
    half = GROUP_SIZE // 2
    some = packed[..., groups.start * half : groups.stop * half].contiguous().view(torch.int16)
    batch, columns, _ = some.shape
    some = some.view(batch, columns, -1, GROUP_SIZE // 4).transpose(1, 2)
    index = some.to(torch.int32, memory_format=torch.contiguous_format).add_(1 << 15)
    values = _four_codes(packed.device).index_select(0, index.flatten())
    return values.view(*index.shape[:-1], GROUP_SIZE)


@functools.cache
def _four_codes(device: torch.device) -> Tensor:
    """`[65536, 4] float64`: the values of four codes, by their 16 bits read as int16, plus 2^15."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int64, device=device)
    shifts = torch.arange(0, 16, 4, dtype=torch.int64, device=device)
    values = torch.tensor(E2M1_VALUES, dtype=torch.float64, device=device)
    return values[(bits[:, None] >> shifts) & 15]


@functools.cache
def _trailing_zeros(device: torch.device) -> Tensor:
    counts = [(value & -value).bit_length() - 1 if value else 0 for value in range(256)]
    return torch.tensor(counts, dtype=torch.int64, device=device)


def _power_of_two(x: Tensor) -> Tensor:
    """The largest power of two not above |x|; 0 for 0."""
    return (x.view(torch.int64) & _FP64_EXPONENT).view(torch.float64)


_WORDS_AT_ONCE = 1 << 20  # weights that the term-by-term step handles at once


def _tile_shape(device: torch.device, batch: int, num_rows: int) -> tuple[int, int]:
    """Rows and columns of a tile: on a CPU its float64 weights should stay in the cache."""
    row_step = 64
    return row_step, 512 if device.type == "cpu" else 4096


def _spans(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
