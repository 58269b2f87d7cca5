"""Formats that weights may be held in on their way, each with what numbers of float32 become in it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["NUMBER_FORMATS"]


def _as(dtype: torch.dtype, most: float = torch.inf) -> Callable[[Tensor], Tensor]:
    return lambda x: x.clamp(-most, most).to(dtype).float()


def _cut(bits: int) -> Callable[[Tensor], Tensor]:
    return lambda x: (x.view(torch.int32) >> bits << bits).view(torch.float32)


def _to_tf32(x: Tensor) -> Tensor:
    bits = x.view(torch.int32)
    return _cut(13)((bits + 0xFFF + (bits >> 13 & 1)).view(torch.float32))


def _whole(parts: int) -> Callable[[Tensor], Tensor]:
    return lambda x: ((x.double() * parts).round() / parts).float()


# The likely ones first; in words that follow "weights are".
NUMBER_FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "rounded to bf16": _as(torch.bfloat16),
    "rounded to float16": _as(torch.float16),
    "cut to bf16 (the lower half of the bits dropped)": _cut(16),
    "rounded to TF32": _to_tf32,
    "cut to TF32": _cut(13),
    "rounded to float8 e4m3": _as(torch.float8_e4m3fn, 448.0),
    "rounded to float8 e5m2": _as(torch.float8_e5m2),
    **{f"rounded to whole {n}ths, as a byte holds them": _whole(n) for n in (255, 256, 127, 128)},
}
