"""One factor that an output is off by, or one magnitude that it is cut off at, read off its numbers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypothesis import Hypothesis, of_output
from mxfp4ref.conformance.families.solved.known_factors import simple_between
from mxfp4ref.sm90 import fp32

__all__ = ["clamps", "uniform_factors"]

_FEWEST = 4  # elements that have one magnitude


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


def clamps(output: Tensor, right: Tensor, wrong: Tensor) -> Iterator[Hypothesis]:
    """A clamp, where all elements that differ have one magnitude, and larger ones of the same sign are expected."""
    got, want = (fp32.widen(t[wrong]) for t in (output, right))
    sizes = torch.unique(got.abs())
    if len(got) < _FEWEST or len(sizes) != 1 or not 0 < float(sizes[0]) < torch.inf:
        return
    if bool(((want.abs() > sizes[0]) & (want.signbit() == got.signbit())).all()):
        largest = float(sizes[0])
        words = f"the output, or a stage just before it, is clamped to -{largest:g} ... {largest:g}"
        yield of_output("output", ("finalize", "fc2"), words, lambda t: t.clamp(-largest, largest), 2.1)
