"""Rounding of exact fractions to bf16, float32 and float64, subnormals and overflow as IEEE 754 has them."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from tests.helpers.exact import floor_log2

# Significand bits with the leading one, largest exponent, integer type of the same width.
FORMATS = {
    torch.bfloat16: (8, 127, torch.int16),
    torch.float32: (24, 127, torch.int32),
    torch.float64: (53, 1023, torch.int64),
}
DTYPES = sorted(FORMATS, key=str)


def round_to_bits(value: Fraction, dtype: torch.dtype) -> int:
    """RN even of a non-negative fraction."""
    digits, largest, _ = FORMATS[dtype]
    exponent = max(floor_log2(value), 1 - largest) if value else 1 - largest
    unit = exponent - digits + 1
    divisor = value.denominator << max(unit, 0)
    steps, rest = divmod(value.numerator << max(-unit, 0), divisor)
    if 2 * rest > divisor or (2 * rest == divisor and steps % 2):
        steps += 1
    if steps == 1 << digits:
        steps, exponent = steps // 2, exponent + 1
    if exponent > largest:
        return 2 * largest + 1 << digits - 1
    if steps < 1 << digits - 1:
        return steps
    return (exponent + largest << digits - 1) + steps - (1 << digits - 1)


def unsigned_bits(values: Tensor) -> list[int]:
    integer = FORMATS[values.dtype][2]
    mask = (1 << torch.iinfo(integer).bits) - 1
    return [bits & mask for bits in values.flatten().view(integer).tolist()]
