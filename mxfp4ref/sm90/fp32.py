"""One float32 operation as a CUDA core does it: `.ftz` arithmetic, exact on any machine.

Operands and results are float32 tensors; subnormal operands count as zeros of their sign, subnormal
results become zeros of their sign, and every NaN that is produced is 0x7FFFFFFF (`docs/arithmetic.md`,
sections 4 and 9). Sums and products are formed in float64, where a product of two float32 numbers is
exact and the error of a sum is known exactly; rounding is done once, on the integer view, so nothing
depends on the machine's rounding or subnormal mode.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "BF16_NAN",
    "FP16_NAN",
    "FP32_NAN",
    "add",
    "bf16_to_fp64",
    "flush",
    "fma",
    "maximum",
    "minimum",
    "mul",
    "round_fp64",
    "to_bf16",
    "to_fp16",
    "widen",
]

FP32_NAN = 0x7FFFFFFF
BF16_NAN = FP16_NAN = 0x7FFF

_FP64_TAIL = (1 << 29) - 1  # the fraction bits that float64 has and float32 lacks
_FP64_TIE = 1 << 28
_FP64_SIGN = -(1 << 63)
_SMALLEST_KEPT = 2.0**-126 * (1 - 2.0**-25)  # rounds to 2^-126; what is smaller is flushed


def flush(x: Tensor) -> Tensor:
    """Subnormals become zeros of the same sign, NaNs the canonical NaN; the rest is unchanged."""
    bits = x.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    bits = torch.where(magnitude < 0x00800000, bits ^ magnitude, bits)
    return torch.where(magnitude > 0x7F800000, FP32_NAN, bits).view(torch.float32)


def add(a: Tensor, b: Tensor) -> Tensor:
    """add.rn.ftz.f32: `a + b`."""
    return round_fp64(*_two_sum(_fp64(a), _fp64(b)))


def mul(a: Tensor, b: Tensor) -> Tensor:
    """mul.rn.ftz.f32: `a * b`."""
    return round_fp64(_fp64(a) * _fp64(b))


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """fma.rn.ftz.f32: `a * b + c`, rounded once."""
    return round_fp64(*_two_sum(_fp64(a) * _fp64(b), _fp64(c)))


def minimum(a: Tensor, b: Tensor) -> Tensor:
    """min.ftz.f32: the smaller; the other operand where one is NaN; -0 < +0."""
    return _select(a, b, smaller=True)


def maximum(a: Tensor, b: Tensor) -> Tensor:
    """max.ftz.f32: the larger; the other operand where one is NaN; -0 < +0."""
    return _select(a, b, smaller=False)


def to_bf16(x: Tensor) -> Tensor:
    """cvt.rn.bf16.f32: nearest bfloat16, ties to even, every NaN 0x7FFF; subnormals are kept."""
    bits = x.view(torch.int32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return torch.where(nan, BF16_NAN, rounded).to(torch.int16).view(torch.bfloat16)


def to_fp16(x: Tensor) -> Tensor:
    """cvt.rn.f16.f32: nearest fp16, ties to even, beyond its range Inf, every NaN 0x7FFF; subnormals are kept."""
    bits = x.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    # Numbers below 2^-14 are subnormal: multiples of 2^-24, which adding 1/2 rounds to in a float32 (ulp 2^-24).
    small = (magnitude.view(torch.float32) + 0.5).view(torch.int32) - 0x3F000000
    # Others: rebias the exponent and round 13 of 23 fraction bits away; a carry goes on into the exponent.
    kept = magnitude - ((127 - 15) << 23)
    large = (kept + 0xFFF + ((kept >> 13) & 1)) >> 13
    rounded = torch.where(magnitude < ((127 - 14) << 23), small, large).clamp(max=0x7C00)
    rounded = torch.where(bits < 0, rounded | -0x8000, rounded)
    return torch.where(magnitude > 0x7F800000, FP16_NAN, rounded).to(torch.int16).view(torch.float16)


def widen(x: Tensor) -> Tensor:
    """bf16 or fp16 as float32, subnormals included in every CPU mode; float32 as it is."""
    if x.dtype == torch.float32:
        return x
    if x.dtype == torch.float16:
        return _widen_fp16(x)
    return (x.view(torch.int16).to(torch.int32) << 16).view(torch.float32)


def _widen_fp16(x: Tensor) -> Tensor:
    bits = x.view(torch.int16).to(torch.int32)
    magnitude = bits & 0x7FFF
    # Subnormals are multiples of 2^-24, normal float32 numbers; Inf and NaN keep an exponent of all ones.
    normal = (magnitude << 13) + ((127 - 15) << 23)
    normal = torch.where(magnitude < 0x7C00, normal, (magnitude << 13) + ((255 - 31) << 23))
    wide = torch.where(magnitude < 0x0400, (magnitude.to(torch.float32) * 2.0**-24).view(torch.int32), normal)
    return (wide | (bits & -(1 << 31))).view(torch.float32)


def bf16_to_fp64(x: Tensor) -> Tensor:
    """The exact float64 values of bfloat16 numbers, subnormals included in every CPU mode."""
    bits = x.view(torch.int16).to(torch.int64)
    magnitude = bits & 0x7FFF
    exponent = magnitude >> 7
    fraction = magnitude & 0x7F
    # float64's exponent is rebiased by 1023 - 127; all-ones stays all-ones (Inf, NaN).
    wide = ((exponent + torch.where(exponent == 255, 2047 - 255, 896)) << 52) | (fraction << 45)
    # A bf16 subnormal is fraction * 2^-133, a normal float64: an exact int conversion and product.
    subnormal = (fraction.to(torch.float64) * 2.0**-133).view(torch.int64)
    wide = torch.where(exponent == 0, subnormal, wide)
    return (wide | (bits & _FP64_SIGN)).view(torch.float64)


def _fp64(x: Tensor) -> Tensor:
    bits = x.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    return torch.where(magnitude < 0x00800000, bits ^ magnitude, bits).view(torch.float32).to(torch.float64)


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Knuth's TwoSum: the float64 sum and its exact error."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


def round_fp64(total: Tensor, error: Tensor | None = None) -> Tensor:
    """`total + error` rounded to nearest even once, to 24 bits with unlimited exponent, then flushed or made Inf.

    `error` is what was lost when `total` was rounded to float64. It matters only where `total` lies just between
    two float32 numbers: elsewhere rounding the rounded number is rounding the number.
    """
    if error is not None:
        bits = total.view(torch.int64)
        tie = (bits & _FP64_TAIL) == _FP64_TIE
        outward = torch.where((error < 0) == (total < 0), 1, -1)
        total = torch.where(tie & (error != 0), bits + outward, bits).view(torch.float64)
    magnitude = total.abs()
    kept = magnitude >= _SMALLEST_KEPT  # False for NaN, which stays NaN
    # Below 2^-126 what is kept rounds up to it, and the rest is made a zero of its sign.
    value = torch.copysign(magnitude.clamp_(min=2.0**-126), total).to(torch.float32).mul_(kept)
    return value.view(torch.int32).masked_fill_(value.isnan(), FP32_NAN).view(torch.float32)


def _select(a: Tensor, b: Tensor, *, smaller: bool) -> Tensor:
    a_bits, b_bits = flush(a).view(torch.int32), flush(b).view(torch.int32)
    # Sign-magnitude to two's complement: an order of all numbers in which -0 < +0.
    a_key = torch.where(a_bits < 0, ~(a_bits & 0x7FFFFFFF), a_bits)
    b_key = torch.where(b_bits < 0, ~(b_bits & 0x7FFFFFFF), b_bits)
    take_a = (a_key <= b_key) == smaller
    chosen = torch.where(take_a, a_bits, b_bits)
    chosen = torch.where(a_bits == FP32_NAN, b_bits, torch.where(b_bits == FP32_NAN, a_bits, chosen))
    return chosen.view(torch.float32)
