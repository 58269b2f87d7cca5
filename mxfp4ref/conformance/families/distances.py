"""How far two outputs are from each other."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mxfp4ref._compiled import as_numpy
from mxfp4ref.conformance.comparison import differing, ulp_distance
from mxfp4ref.sm90 import fp32

__all__ = [
    "angle_between",
    "last_place",
    "may_underflow",
    "share",
    "solvable",
    "sum_noise",
    "surprise",
    "ulps_apart",
]

_UNDERFLOW = 2.0**-100  # below which sums lose what is below float32's least number
_SMALL = 2.0**-9  # the least number of FP8 e4m3; that of fp16 is smaller
_BELOW = 0.05  # of those kept
_SUM = 2.0**-21  # of the terms, that float32 may round off in their sum


def surprise(got: Tensor, want: Tensor) -> float:
    """How many bits predicting `got` tells where it differs from `want`: one for a rounding, more further off."""
    mask = differing(got, want)
    far = ulp_distance(got, want)[mask].clamp(max=62)
    return float((1 + far.clamp(min=1).to(torch.float64)).log2().sum())


def ulps_apart(output: Tensor, got: Tensor) -> float:
    """How many bits two outputs in bf16 are apart, on average; looked up, as each hypothesis is asked."""
    order, bits = _tables()
    one, other = (order[as_numpy(t.cpu(), np.uint16)] for t in (output, got))
    return float(bits[np.minimum(np.abs(one - other), 1 << 15)].mean())


@cache
def _tables() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Of each bf16 its place in the order of numbers, NaNs far from all others; and the bits of each distance."""
    every = torch.arange(1 << 16, dtype=torch.int32, device="cpu")
    magnitude = every & 0x7FFF
    order = torch.where(every == magnitude, magnitude, -magnitude).to(torch.int64)
    order = torch.where(magnitude > 0x7F80, (every.to(torch.int64) + 1) << 32, order)
    return order.numpy(), np.log2(1 + np.arange((1 << 15) + 1, dtype=np.float64))


def angle_between(output: Tensor, got: Tensor) -> float:
    """The sine of the angle between them; 1 where there is none."""
    one, other = (fp32.widen(t.contiguous()).to(torch.float64).flatten() for t in (output, got))
    lengths = float(one.norm() * other.norm())
    if not 0 < lengths < float("inf"):
        return 1.0
    return float(max(1 - (float(one @ other) / lengths) ** 2, 0.0) ** 0.5)


def last_place(values: Tensor) -> Tensor:
    """A unit in the last place that bf16 has for numbers of any dtype, as float64."""
    values = values.to(torch.float64)
    return torch.ldexp(torch.ones_like(values), torch.frexp(values).exponent - 8)


def sum_noise(size: Tensor, terms: Tensor) -> Tensor:
    """How far off a sum may be, `[H]`: rounded to bf16 where it has this size `[H]`, of terms `[n, H]` in float32."""
    return (last_place(size).square() / 12 + (_SUM * terms).square().sum(0)).sqrt()


def solvable(values: Tensor) -> bool:
    """Whether numbers are large enough to be solved for what they are sums of: not zero, and far from underflow."""
    return bool(values.abs().max() > _UNDERFLOW) if values.numel() else False


def share(equal: Tensor, of: Tensor) -> float:
    """The part of the elements of a mask that another one has; 1 of none."""
    return float(equal[of].double().mean()) if bool(of.any()) else 1.0


def may_underflow(lost: Tensor, kept: Tensor) -> bool:
    """Whether numbers are missing because they are small: all are below what FP8 resolves, most below those kept."""
    if not len(lost) or float(lost.max()) >= _SMALL:
        return False
    below = torch.searchsorted(kept.sort().values, lost.contiguous(), right=True)
    return float(below.double().mean()) <= _BELOW * len(kept)
