"""float32 with its subnormals, whatever the CPU does with them: exactly to float64, and back with one rounding.

A CPU that flushes subnormals does so to float32 operands and results, conversions included. In float64 all
float32 numbers are normal, and so are their products, quotients and square roots; 53 >= 2 * 24 + 2 bits, so that
one operation in float64 rounds to float32 as if it had been rounded once. A fused multiply-add is two operations,
and needs more care.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["add", "fma", "mul", "to_fp32", "to_fp64"]

_SMALLEST_NORMAL = 2.0**-126
_SIGN = -(1 << 31)


def to_fp64(x: Tensor) -> Tensor:
    """The float64 values of float32 numbers."""
    bits = x.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    subnormal = torch.copysign(magnitude.to(torch.float64) * 2.0**-149, bits.to(torch.float64))
    return torch.where(magnitude < 0x00800000, subnormal, x.to(torch.float64))


def to_fp32(x: Tensor) -> Tensor:
    """float64 to the nearest float32, ties to even."""
    # 2^-149 is the spacing of subnormals; what rounds up to 2^23 of them is the smallest normal number.
    small = x.abs() < _SMALLEST_NORMAL
    count = (torch.where(small, x.abs(), 0.0) * 2.0**149).round().to(torch.int32)
    sign = (x.view(torch.int64) >> 32).to(torch.int32) & _SIGN
    return torch.where(small, count | sign, x.to(torch.float32).view(torch.int32)).view(torch.float32)


def add(a: Tensor, b: Tensor) -> Tensor:
    """float32 `a + b`."""
    return to_fp32(to_fp64(a) + to_fp64(b))


def mul(a: Tensor, b: Tensor) -> Tensor:
    """float32 `a * b`."""
    return to_fp32(to_fp64(a) * to_fp64(b))


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """float32 `a * b + c`, rounded once. Unlike `sm90.fp32.fma` it keeps subnormals."""
    product, c = to_fp64(a) * to_fp64(b), to_fp64(c)  # exact: 24 + 24 bits
    total = product + c
    # TwoSum gives the error of the sum. Where there is one, round to odd: of the two float64 neighbours of the exact
    # value keep the odd one, which is never a tie of the second rounding, to 24 bits.
    c_part = total - product
    error = (product - (total - c_part)) + (c - c_part)
    bits = total.view(torch.int64)
    inexact_even = (error != 0) & ((bits & 1) == 0) & total.isfinite()
    bits = torch.where(inexact_even, bits + torch.where((error < 0) == (total < 0), 1, -1), bits)
    return to_fp32(bits.view(torch.float64))
