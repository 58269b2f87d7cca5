"""The group-scaled GEMM on a GPU, as one Triton kernel: every product of every tensor-core step, one by one.

This is `tensor_core.step` again, term by term, and the FMA that follows. It is used where it runs and gives what the
transcription gives.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["gemm"]

_COLUMNS = 128  # of one program, each of whose threads has one


def gemm(x: Tensor, packed: Tensor, scales: Tensor, order: list[int], swapped: Tensor) -> Tensor:
    """What `gemm.group_scaled_gemm` returns, for the order of the groups and the rows that swap the first two.

    Args:
        x: `[B, M, K] bf16`.
        packed: `[B, N, K/2] uint8`.
        scales: `[B, N, K/32] uint8`.
        order: the groups of K as they are added.
        swapped: `[B, M] bool`, the rows for which the first two change places.
    """
    batch, num_rows, _ = x.shape
    num_columns, num_groups = scales.shape[1:]
    out = torch.empty(batch, num_rows, num_columns, dtype=torch.float32, device=x.device)
    if out.numel():
        with torch.cuda.device_of(x):
            _gemm[batch * num_rows, triton.cdiv(num_columns, _COLUMNS)](
                x.contiguous().view(torch.int16),
                x.isfinite().all(-1),
                # Neighbouring threads read neighbouring columns.
                _words(packed).transpose(1, 2).contiguous(),
                scales.transpose(1, 2).contiguous(),
                torch.tensor(order, dtype=torch.int32, device=x.device),
                swapped.contiguous(),
                out.view(torch.int32),
                num_rows,
                num_columns,
                num_groups,
                COLUMNS=_COLUMNS,
            )
    return out


def _words(packed: Tensor) -> Tensor:
    """Eight codes a word: a view, or a copy where that can't be."""
    if not packed.is_contiguous() or packed.storage_offset() % 4:
        packed = packed.clone(memory_format=torch.contiguous_format)
    return packed.view(torch.int32)


@triton.jit(do_not_specialize=["num_rows", "num_columns", "num_groups"])  # one compilation for all shapes
def _gemm(
    x,  # [B, M, K] int16, the bits
    finite,  # [B, M] bool: no Inf or NaN in the row
    words,  # [B, K/8, N] int32, 8 codes each
    scales,  # [B, G, N] uint8
    order,  # [G] int32
    swapped,  # [B, M] bool
    out,  # [B, M, N] int32, the bits
    num_rows,
    num_columns,
    num_groups,
    COLUMNS: tl.constexpr,
):
    """Some columns of one row of one expert."""
    row = tl.program_id(0).to(tl.int64)
    expert = row // num_rows
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < num_columns
    x += row * num_groups * 32
    words += expert * num_groups * 4 * num_columns + column
    scales += expert * num_groups * num_columns + column
    all_finite = tl.load(finite + row)
    swap = tl.load(swapped + row).to(tl.int32) if num_groups > 1 else 0
    acc = tl.full([COLUMNS], 0.0, tl.float32)
    for position in range(num_groups):
        group = tl.load(order + (position ^ swap if position < 2 else position))
        t = tl.full([COLUMNS], 0.0, tl.float64)
        for step in tl.static_range(2):
            word = group * 4 + step * 2
            low = tl.load(words + word * num_columns, mask=inside, other=0)
            high = tl.load(words + (word + 1) * num_columns, mask=inside, other=0)
            t = _step(x + word * 8, low, high, t, all_finite)
        scale = tl.load(scales + group * num_columns, mask=inside, other=0).to(tl.int32)
        scale = (scale << 23).to(tl.float32, bitcast=True)  # the sm90 convention, as it is defined
        # fma.rn.ftz.f32: float64 rounds once more than it does, but 53 bits >= 2 * 24 + 2.
        t = tl.where(tl.abs(t) < 2.0**-126, 0.0, t)
        total = acc.to(tl.float64) + t * scale.to(tl.float64)
        acc = tl.where(tl.abs(total) < 2.0**-126 * (1 - 2.0**-25), 0.0, total.to(tl.float32))
    # A sum that starts with +0 is never -0, so that the epilogue's +0 changes nothing.
    bits = tl.where(acc == acc, acc.to(tl.int32, bitcast=True), 0x7FFFFFFF)
    tl.store(out + row * num_columns + column, bits, mask=inside)


@triton.jit
def _step(x, low, high, carried, all_finite):
    """A step's result as float64: 16 elements of x, the codes of 8 and 8 of each column, and what is carried over."""
    largest = tl.maximum(_exponent(carried), -127)  # as small as that of any product
    for k in tl.static_range(16):
        nibble = (low if k < 8 else high) >> (4 * (k % 8))
        largest = tl.maximum(largest, _exponent_of_x(tl.load(x + k)) + _exponent_of_code(nibble))
    # In units of 2^(largest - 25). A product is below 3 * 2^25 of them, so that 16 and the carried one fit 31 bits.
    per_unit = ((25 - largest + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)
    total = (carried * per_unit).to(tl.int32)
    for k in tl.static_range(16):
        nibble = (low if k < 8 else high) >> (4 * (k % 8))
        bits = tl.load(x + k).to(tl.int32)
        # Significands are in units of 2^-7 and 2^-1, which leaves 17 of the 25 bits.
        product = (_significand_of_x(bits) * _significand_of_code(nibble)) << 17
        smaller_by = largest - (_exponent_of_x(bits) + _exponent_of_code(nibble))
        magnitude = product >> tl.minimum(smaller_by, 31)
        sign = ((bits << 16) ^ (nibble << 28)) >> 31  # 0 or -1
        total += (magnitude ^ sign) - sign
    result = total.to(tl.float64)
    result = (result.to(tl.int64, bitcast=True) & -(1 << 29)).to(
        tl.float64, bitcast=True
    ) / per_unit  # 24 bits
    result = tl.where(tl.abs(result) < 2.0**128, result, result * float("inf"))
    special = tl.full(carried.shape, 0.0, tl.float64)
    if not all_finite:
        for k in tl.static_range(16):
            nibble = (low if k < 8 else high) >> (4 * (k % 8))
            bits = tl.load(x + k).to(tl.int32)
            value = tl.where((bits & 0x7F80) == 0x7F80, (bits << 16).to(tl.float32, bitcast=True), 0.0)
            weight = _significand_of_code(nibble).to(tl.float32)
            special += value * tl.where((nibble & 8) == 0, weight, -weight)  # Inf * 0 is NaN
    return tl.where((special == 0) & (tl.abs(carried) < float("inf")), result, special + carried)


@triton.jit
def _exponent(x):
    """Of float64 numbers that float32 could hold, so -126 at least; -1000 for zeros, which take no part."""
    field = ((x.to(tl.int64, bitcast=True) >> 52) & 0x7FF).to(tl.int32)
    return tl.where(x == 0, -1000, tl.maximum(field - 1023, -126))


@triton.jit
def _exponent_of_x(bits):
    """Of bf16 numbers; -1000 for zeros."""
    return tl.where((bits & 0x7FFF) == 0, -1000, tl.maximum((bits.to(tl.int32) >> 7) & 0xFF, 1) - 127)


@triton.jit
def _significand_of_x(bits):
    """Of bf16 numbers, in units of 2^-7."""
    return (bits & 0x7F) | tl.where((bits & 0x7F80) == 0, 0, 0x80)


@triton.jit
def _exponent_of_code(nibble):
    """Of E2M1 numbers, -1 to 2; -1000 for zeros."""
    code = nibble & 7
    return tl.where(code == 0, -1000, ((0x33221100 >> (4 * code)) & 0xF) - 1)


@triton.jit
def _significand_of_code(nibble):
    """Of E2M1 numbers, in units of 1/2: 0, 2 or 3."""
    return (0x32323220 >> (4 * (nibble & 7))) & 0xF
