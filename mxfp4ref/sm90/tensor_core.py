"""One tensor-core step: 16 bf16 products added to a float32 number, slow and obvious.

A transcription of `docs/arithmetic.md`, section 3, in integers. `gemm` computes the same results faster and
the tests hold one against the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref._compiler import uncompiled
from mxfp4ref.sm90.fp32 import FP32_NAN

__all__ = ["FRACTION_BITS", "STEP_SIZE", "shift", "step", "to_fp32_toward_zero", "unpack_fp32"]

STEP_SIZE = 16
FRACTION_BITS = 25  # terms are truncated to multiples of 2^(largest exponent - 25)

_BF16_INF = 0x7F80
_FP32_INF = 0x7F800000
_NO_EXPONENT = -(1 << 20)  # the exponent of a term that takes no part


@uncompiled
def step(a: Tensor, b: Tensor, c: Tensor, *, fraction_bits: int = FRACTION_BITS) -> Tensor:
    """c + sum over i of a[i] * b[i], as one wgmma/mma step of Hopper computes it.

    Args:
        a: `[..., 16] bf16`.
        b: `[..., 16] bf16`; the leading dimensions broadcast with those of `a`.
        c: `[...] float32`, broadcasting likewise.
        fraction_bits: 25 on the hardware; other values model other adders.

    Returns:
        `[...] float32`, truncated toward zero, subnormals kept, never -0; NaN is 0x7FFFFFFF.
    """
    a_bits = a.view(torch.int16).to(torch.int64)
    b_bits = b.view(torch.int16).to(torch.int64)
    c_bits = c.view(torch.int32).to(torch.int64)
    a_sign, a_exponent, a_significand = _unpack(a_bits, 8)
    b_sign, b_exponent, b_significand = _unpack(b_bits, 8)
    c_sign, c_exponent, c_significand = unpack_fp32(c_bits)

    # Exact products, not renormalised: the value is significand * 2^(exponent - 14), significand < 2^16.
    sign = a_sign * b_sign
    significand = a_significand * b_significand
    exponent = torch.where(significand == 0, _NO_EXPONENT, a_exponent + b_exponent)
    c_exponent = torch.where(c_significand == 0, _NO_EXPONENT, c_exponent)
    largest = torch.maximum(exponent.amax(-1), c_exponent)

    # Every term in units of 2^(largest - fraction_bits), truncated toward zero; the sum is exact.
    terms = sign * shift(significand, exponent - 14 - (largest.unsqueeze(-1) - fraction_bits))
    c_term = c_sign * shift(c_significand, c_exponent - 23 - (largest - fraction_bits))
    total = terms.sum(-1) + c_term
    result = to_fp32_toward_zero(total, largest - fraction_bits)

    # Special values: NaN operands, 0 * Inf and Inf - Inf; Inf.
    a_magnitude, b_magnitude, c_magnitude = a_bits & 0x7FFF, b_bits & 0x7FFF, c_bits & 0x7FFFFFFF
    infinite = (a_magnitude == _BF16_INF) | (b_magnitude == _BF16_INF)
    nan = (a_magnitude > _BF16_INF) | (b_magnitude > _BF16_INF)
    nan = nan | (infinite & ((a_magnitude == 0) | (b_magnitude == 0)))
    nan = nan.any(-1) | (c_magnitude > _FP32_INF)
    plus = (infinite & (sign > 0)).any(-1) | (c_bits == _FP32_INF)
    minus = (infinite & (sign < 0)).any(-1) | (c_bits == _FP32_INF - (1 << 31))
    result = torch.where(plus, _FP32_INF, torch.where(minus, _FP32_INF - (1 << 31), result))
    result = torch.where(nan | (plus & minus), FP32_NAN, result)
    return result.to(torch.int32).view(torch.float32)


def _unpack(bits: Tensor, precision: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sign (+-1), exponent and integer significand of bf16 (precision 8) or float32 (24) bits."""
    fraction_bits = precision - 1
    biased = (bits >> fraction_bits) & 0xFF
    fraction = bits & ((1 << fraction_bits) - 1)
    significand = torch.where(biased == 0, fraction, fraction + (1 << fraction_bits))
    significand = torch.where(biased == 0xFF, 0, significand)  # Inf and NaN are handled apart
    return torch.where(bits < 0, -1, 1), biased.clamp(min=1) - 127, significand


def unpack_fp32(bits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sign (+-1), exponent and integer significand of float32 bits, given as signed int64."""
    return _unpack(bits, 24)


def shift(significand: Tensor, left: Tensor) -> Tensor:
    """significand * 2^left, truncated to an integer."""
    return torch.where(left >= 0, significand << left.clamp(0, 40), significand >> (-left).clamp(0, 40))


def to_fp32_toward_zero(total: Tensor, unit: Tensor) -> Tensor:
    """The float32 bits (as int64) of total * 2^unit, truncated toward zero."""
    magnitude = total.abs()
    length = torch.zeros_like(magnitude)  # the bit length of the magnitude
    for width in (32, 16, 8, 4, 2, 1):
        length += torch.where((magnitude >> length) >> width != 0, width, 0)
    length += (magnitude != 0).to(torch.int64)
    exponent = (length - 1 + unit).clamp(min=-126)  # of the leading bit; subnormals share -126
    significand = shift(magnitude, unit - (exponent - 23))
    # The leading bit adds one to the exponent field when it is there and nothing when it is not.
    bits = ((exponent + 126) << 23) + significand
    bits = torch.where(exponent > 127, 0x7F800000, bits)
    bits = torch.where(magnitude == 0, 0, bits)
    bits = torch.where(bits == 0, 0, torch.where(total < 0, bits - (1 << 31), bits))
    return bits
