"""FP8: rounding to E4M3, and the tensor-core step of 32 E4M3 products, slow and obvious.

A transcription of `docs/arithmetic.md`, section 10, in integers. E4M3 numbers are bytes, as the kernel has them:
sign, 4 bits of exponent (bias 7), 3 of fraction; no Inf; 0x7F and 0xFF are NaN. `gemm.fp8` computes the same sums
faster and the tests hold one against the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref._compiler import uncompiled
from mxfp4ref.sm90.fp32 import FP32_NAN
from mxfp4ref.sm90.tensor_core import shift, to_fp32_toward_zero, unpack_fp32

__all__ = ["E4M3_MAX", "E4M3_NAN", "FRACTION_BITS", "STEP_SIZE", "e4m3_values", "step", "to_e4m3"]

E4M3_MAX, E4M3_NAN = 448.0, 0x7F
STEP_SIZE = 32
FRACTION_BITS = 13  # terms are truncated to multiples of 2^(largest exponent - 13), and so is the result

_FP32_INF = 0x7F800000
_NO_EXPONENT = -(1 << 20)  # the exponent of a term that takes no part


@uncompiled
def to_e4m3(x: Tensor) -> Tensor:
    """cvt.rn.satfinite.e4m3.f32: nearest E4M3, ties to even, beyond +-448 that; subnormals kept, every NaN 0x7F.

    Args:
        x: `[...] float32`.

    Returns:
        `[...] uint8`.
    """
    bits = x.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    # Numbers below 2^-6 are subnormal: multiples of 2^-9, which adding 2^14 rounds to in a float32 (ulp 2^-9).
    small = (magnitude.view(torch.float32) + 2.0**14).view(torch.int32) - 0x46800000
    # Others: rebias the exponent and round 20 of 23 fraction bits away; a carry goes on into the exponent.
    kept = magnitude - ((127 - 7) << 23)
    large = (kept + 0x7FFFF + ((kept >> 20) & 1)) >> 20
    rounded = torch.where(magnitude < ((127 - 6) << 23), small, large).clamp(max=E4M3_NAN - 1)
    rounded = torch.where(bits < 0, rounded | 0x80, rounded)
    return torch.where(magnitude > _FP32_INF, E4M3_NAN, rounded).to(torch.uint8)


def e4m3_values(device: torch.device | None = None) -> Tensor:
    """The number of each byte, `[256] float32`."""
    return torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).to(torch.float32)


@uncompiled
def step(a: Tensor, b: Tensor, c: Tensor, *, fraction_bits: int = FRACTION_BITS) -> Tensor:
    """c + sum over i of a[i] * b[i], as one wgmma step of Hopper computes it.

    Args:
        a: `[..., 32] uint8`, E4M3.
        b: `[..., 32] uint8`; the leading dimensions broadcast with those of `a`.
        c: `[...] float32`, broadcasting likewise.
        fraction_bits: 13 on the hardware; other values, up to 25, model other adders.

    Returns:
        `[...] float32` with `fraction_bits` fraction bits (23 at most), truncated toward zero, never -0; NaN is
        0x7FFFFFFF.
    """
    a_bits, b_bits = a.to(torch.int64), b.to(torch.int64)
    a_sign, a_exponent, a_significand = _unpack(a_bits)
    b_sign, b_exponent, b_significand = _unpack(b_bits)
    c_bits = c.view(torch.int32).to(torch.int64)
    c_sign, c_exponent, c_significand = unpack_fp32(c_bits)

    # Exact products, not renormalised: the value is significand * 2^(exponent - 6), significand < 2^8.
    sign = a_sign * b_sign
    significand = a_significand * b_significand
    exponent = torch.where(significand == 0, _NO_EXPONENT, a_exponent + b_exponent)
    c_exponent = torch.where(c_significand == 0, _NO_EXPONENT, c_exponent)
    largest = torch.maximum(exponent.amax(-1), c_exponent)

    # Every term in units of 2^(largest - fraction_bits), truncated toward zero; the sum is exact.
    terms = sign * shift(significand, exponent - 6 - (largest.unsqueeze(-1) - fraction_bits))
    c_term = c_sign * shift(c_significand, c_exponent - 23 - (largest - fraction_bits))
    total = terms.sum(-1) + c_term
    result = to_fp32_toward_zero(total, largest - fraction_bits)
    result = result & -(1 << max(23 - fraction_bits, 0)) if fraction_bits < 23 else result

    c_magnitude = c_bits & 0x7FFFFFFF
    result = torch.where(c_magnitude == _FP32_INF, c_bits, result)
    nan = (((a_bits & 0x7F) == E4M3_NAN) | ((b_bits & 0x7F) == E4M3_NAN)).any(-1) | (c_magnitude > _FP32_INF)
    return torch.where(nan, FP32_NAN, result).to(torch.int32).view(torch.float32)


def _unpack(bits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sign (+-1), exponent and integer significand (below 16) of E4M3 bytes."""
    biased, fraction = (bits >> 3) & 15, bits & 7
    significand = torch.where(biased == 0, fraction, fraction + 8)
    return torch.where(bits >= 128, -1, 1), biased.clamp(min=1) - 7, significand
