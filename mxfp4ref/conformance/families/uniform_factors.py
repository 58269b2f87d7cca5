"""One factor that an output is off by, read off its numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref.conformance.families.known_factors import simple_between
from mxfp4ref.sm90 import fp32

__all__ = ["uniform_factors"]


def uniform_factors(output: Tensor, right: Tensor, wrong: Tensor) -> list[float]:
    """Numbers that every element is off by, up to rounding: the simplest of those that all elements allow."""
    got, want = (fp32.widen(t.contiguous()).to(torch.float64) for t in (output, right))
    usable = wrong & got.isfinite() & want.isfinite() & (want.abs() > 2.0**-100) & (got.abs() > 2.0**-100)
    if int(usable.sum()) < 8:
        return []
    ratio = got[usable] / want[usable]
    middle = float(ratio.median())
    if float(((ratio - middle).abs() <= 2.0**-6 * abs(middle)).double().mean()) < 0.7:
        return []
    # Most elements lie within one rounding of either side: their common interval.
    low = float((ratio.abs() * (1 - 2.0**-8)).quantile(0.9)) if len(ratio) < 1 << 20 else abs(middle)
    high = float((ratio.abs() * (1 + 2.0**-8)).quantile(0.1)) if len(ratio) < 1 << 20 else abs(middle)
    sign = -1.0 if middle < 0 else 1.0
    low, high = min(low, high), max(low, high)
    low, high = min(low, abs(middle) * (1 - 2.0**-8)), max(high, abs(middle) * (1 + 2.0**-8))
    return [sign * f for f in simple_between(low, high) if sign * f != 1]
