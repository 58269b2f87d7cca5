"""Intervals in float64 that enclose every float32 evaluation, for `bounds`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mxfp4ref.sm90 import fp32

__all__ = [
    "HUGE",
    "SLACK",
    "TINY",
    "UNIT",
    "Interval",
    "add",
    "flushed",
    "nearest_bf16",
    "rounded",
    "stored",
    "widened",
]

UNIT = 2.0**-23  # of float32 rounded in either direction
SLACK = 2.0**-46  # more than float64 loses in the few operations between two uses
TINY = 2.0**-125  # below this a float32 or bf16 result may be flushed
HUGE = 2.0**127


@dataclass(frozen=True)
class Interval:
    """float64 ends of an evaluation in which nothing overflows; where both are one NaN or infinity, it is that.

    `overflows` says where another evaluation may have left float32's range.
    """

    low: Tensor
    high: Tensor
    overflows: Tensor

    def certain(self, where: Tensor, value: Tensor) -> Interval:
        """With the kernel's own value at these places."""
        value = value.to(torch.float64)
        return Interval(
            torch.where(where, value, self.low),
            torch.where(where, value, self.high),
            self.overflows & ~where,
        )

    def unknown(self, where: Tensor) -> Interval:
        """With any number at these places, an infinity or NaN."""
        return Interval(
            torch.where(where, -HUGE, self.low), torch.where(where, HUGE, self.high), self.overflows | where
        )


def add(value: Interval, bias: Tensor) -> Interval:
    shift = fp32.bf16_to_fp64(bias.contiguous())
    return rounded(Interval(value.low + shift, value.high + shift, value.overflows))


def rounded(value: Interval) -> Interval:
    """One float32 rounding in either direction, or none."""
    return _spread(value, UNIT + SLACK, may_flush=True)


def widened(value: Interval) -> Interval:
    return _spread(value, SLACK, may_flush=False)


def _spread(value: Interval, relative: float, *, may_flush: bool) -> Interval:
    """With both ends moved outwards; an infinity or NaN stays what it is."""
    low, high = value.low, value.high
    low = torch.where(torch.isfinite(low), low - low.abs() * relative, low)
    high = torch.where(torch.isfinite(high), high + high.abs() * relative, high)
    low, high = flushed(low, high) if may_flush else (low, high)
    return Interval(low, high, value.overflows | _beyond(low) | _beyond(high))


def _beyond(end: Tensor) -> Tensor:
    return torch.isfinite(end) & (end.abs() >= HUGE)


def stored(value: Interval, storage: str) -> Interval:
    """Rounding to bf16 is monotonic: the ends go to the ends. What is beyond bf16's range is kept."""
    value = widened(value)
    low, high = flushed(_to_bf16_grid(value.low), _to_bf16_grid(value.high))
    if storage == "bf16":
        return Interval(low, high, value.overflows)
    return Interval(torch.minimum(value.low, low), torch.maximum(value.high, high), value.overflows)


def _to_bf16_grid(value: Tensor) -> Tensor:
    bits = value.view(torch.int64)
    rounded = (bits + (1 << 44) - 1 + ((bits >> 45) & 1)) >> 45 << 45
    return torch.where(torch.isfinite(value), rounded, bits).view(torch.float64)


def nearest_bf16(value: Tensor) -> Tensor:
    rounded = _to_bf16_grid(value)
    return torch.where(
        rounded.abs() >= 2.0**128, torch.copysign(torch.full_like(value, math.inf), value), rounded
    )


def flushed(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Where a result may be subnormal: kept, flushed, or rounded up to the smallest normal number."""
    low = torch.where((low != 0) & (low.abs() < TINY), torch.where(low < 0, -TINY, 0.0), low)
    high = torch.where((high != 0) & (high.abs() < TINY), torch.where(high > 0, TINY, 0.0), high)
    return low, high
