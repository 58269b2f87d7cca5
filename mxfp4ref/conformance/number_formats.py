"""Formats that numbers may be held in on their way, with what those of float32 become in each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["NUMBER_FORMATS", "cut", "nearest", "to_tf32"]


def _as(dtype: torch.dtype, most: float = torch.inf) -> Callable[[Tensor], Tensor]:
    return lambda x: x.clamp(-most, most).to(dtype).float()


def cut(bits: int) -> Callable[[Tensor], Tensor]:
    """float32 with so many bits of the significand cut off."""
    return lambda x: (x.float().view(torch.int32) >> bits << bits).view(torch.float32)


def nearest(x: Tensor, dropped: int) -> Tensor:
    """float32 rounded to so many bits fewer, ties to even."""
    bits = x.view(torch.int32)
    half = (1 << (dropped - 1)) - 1 + (bits >> dropped & 1)
    return torch.where(x.isfinite(), (bits + half) >> dropped << dropped, bits).view(torch.float32)


def to_tf32(x: Tensor) -> Tensor:
    return nearest(x.float(), 13)


def _whole(parts: int) -> Callable[[Tensor], Tensor]:
    return lambda x: ((x.double() * parts).round() / parts).float()


# Of weights, the likely ones first; in words that follow "weights are".
NUMBER_FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "rounded to bf16": _as(torch.bfloat16),
    "rounded to float16": _as(torch.float16),
    "cut to bf16 (the lower half of the bits dropped)": cut(16),
    "rounded to TF32": to_tf32,
    "cut to TF32": cut(13),
    "rounded to float8 e4m3": _as(torch.float8_e4m3fn, 448.0),
    "rounded to float8 e5m2": _as(torch.float8_e5m2),
    **{f"rounded to whole {n}ths, as a byte holds them": _whole(n) for n in (255, 256, 127, 128)},
}
