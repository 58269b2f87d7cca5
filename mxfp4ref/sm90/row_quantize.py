"""Rows of activations as FP8 with one factor a row, as the W4A8 kernel makes them before either GEMM.

`docs/arithmetic.md`, section 11. Divisions compile to the approximate reciprocal and a product (`--use_fast_math`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mxfp4ref._compiler import uncompiled
from mxfp4ref.sm90 import fp32, mufu
from mxfp4ref.sm90.fp8 import E4M3_MAX, to_e4m3

__all__ = ["QuantizedRows", "quantize_rows", "scale_rows"]

_LEAST_AMAX = 0x03E00001  # the float32 bits of 448 / FLT_MAX: 448 over less than that would be Inf


class QuantizedRows(NamedTuple):
    """Rows as the tensor core gets them.

    Attributes:
        values: `[R, K] uint8`, E4M3.
        factor: `[R] float32`, what a sum of products is multiplied by.
    """

    values: Tensor
    factor: Tensor


@uncompiled
def quantize_rows(x: Tensor, residual: Tensor) -> QuantizedRows:
    """Each row divided by its largest magnitude over 448, and what undoes that.

    Args:
        x: `[R, K] bf16`, or float32 for the activation between the GEMMs, which is not rounded to bf16.
        residual: `[R] float32`, that of the row's expert, as the call takes it.
    """
    x = fp32.widen(x)
    # NaN is no magnitude; neither is a subnormal number, which counts as zero.
    magnitude = fp32.flush(x).view(torch.int32) & 0x7FFFFFFF
    magnitude = torch.where(magnitude > 0x7F800000, 0, magnitude)
    largest = magnitude.amax(1) if x.shape[1] else magnitude.new_zeros(len(x))
    highest = torch.full_like(residual, E4M3_MAX)
    quotient = fp32.mul(mufu.rcp(largest.clamp(min=_LEAST_AMAX).view(torch.float32)), highest)
    quotient = torch.where(largest == 0, 1.0, quotient)
    values = to_e4m3(fp32.mul(x, quotient[:, None].expand_as(x)))
    return QuantizedRows(values, fp32.mul(mufu.rcp(quotient), residual))


@uncompiled
def scale_rows(accumulators: Tensor, factor: Tensor) -> Tensor:
    """The epilogue: `[R, N] float32` sums of products times their rows' factors `[R]`, float32."""
    return fp32.mul(accumulators, factor[:, None].expand_as(accumulators))
