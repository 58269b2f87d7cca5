"""Roundings that several defects share."""

from __future__ import annotations

from torch import Tensor

from mxfp4ref.sm90 import fp32

__all__ = ["bf16", "half", "keep"]


def bf16(x: Tensor) -> Tensor:
    """float32 rounded to bf16, as float32."""
    return fp32.widen(fp32.to_bf16(x))


def half(x: Tensor) -> Tensor:
    """float32 rounded to float16, as float32."""
    return x.half().float()


def keep(x: Tensor) -> Tensor:
    """No rounding at all."""
    return x
