"""Float32 operations without flush to zero, exact on any machine, for pipelines that lack `.ftz`."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ieee_add", "ieee_fma", "ieee_mul"]


def ieee_fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """`a * b + c` of numbers whose product float64 holds (24 bits each), rounded to float32 once."""
    product = a.to(torch.float64) * b.to(torch.float64)
    c = c.to(torch.float64)
    total = product + c
    c_part = total - product
    error = (product - (total - c_part)) + (c - c_part)
    # Round to odd: where the sum was inexact and came out even, its odd neighbour on the error's side.
    bits = total.view(torch.int64)
    step = torch.where((error < 0) == (total < 0), 1, -1)
    bits = torch.where((error != 0) & (bits & 1 == 0) & total.isfinite(), bits + step, bits)
    return bits.view(torch.float64).to(torch.float32)


def ieee_add(a: Tensor, b: Tensor) -> Tensor:
    """`a + b`, rounded to float32."""
    return ieee_fma(a, torch.ones_like(a), b)


def ieee_mul(a: Tensor, b: Tensor) -> Tensor:
    """`a * b`, rounded to float32; the sign of a zero is the product's."""
    return (a.to(torch.float64) * b.to(torch.float64)).to(torch.float32)
