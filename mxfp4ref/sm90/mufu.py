"""The special function unit's EX2 and RCP, bit for bit (the specification, section 4)."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["ex2", "rcp"]

_INF = 0x7F800000
_NAN = 0x7FFFFFFF


def ex2(x: Tensor) -> Tensor:
    """ex2.approx.ftz.f32: `2^x` of a float32 tensor of any shape."""
    bits = x.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    exponent = magnitude >> 23
    # |x| as a fixed-point number with 23 fraction bits, cut off below. From 2^8 on every result is 0 or Inf.
    significand = (magnitude & 0x7FFFFF) | 0x800000
    fixed = torch.where(
        exponent >= 127,
        significand << (exponent - 127).clamp(0, 7),
        significand >> (127 - exponent).clamp(0, 31),
    )
    fixed = torch.where(exponent >= 127 + 8, 1 << 30, fixed)
    # -(N + F) = -(N + 1) + (1 - F), and the unit takes 1 - F one unit too small: -|x| is the complement ~|x|,
    # except where F is 0.
    mirrored = torch.where((fixed & 0x7FFFFF) == 0, -fixed, ~fixed)
    fixed = torch.where(bits < 0, mirrored, fixed)
    scale = (fixed >> 23) + 127
    result = (scale.clamp(1, 254) << 23) | _mantissa("ex2", fixed & 0x7FFFFF)
    result = torch.where(scale < 1, 0, torch.where(scale > 254, _INF, result))
    return torch.where(magnitude > _INF, _NAN, result).view(torch.float32)


def rcp(x: Tensor) -> Tensor:
    """rcp.approx.ftz.f32: `1 / x` of a float32 tensor of any shape."""
    bits = x.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    exponent = magnitude >> 23
    # 1/(m 2^e): the table covers m in [1, 2), its result lies in (1/2, 1].
    result = _mantissa("rcp", magnitude & 0x7FFFFF) + ((127 - exponent) << 23)
    result = torch.where(exponent == 0, _INF, torch.where(result < 0x00800000, 0, result))
    result = result | (bits ^ magnitude)
    return torch.where(magnitude > _INF, _NAN, result).view(torch.float32)


@lru_cache
def _table(name: str, device: torch.device) -> Tensor:
    with np.load(Path(__file__).with_name("mufu_tables.npz")) as tables:
        return torch.from_numpy(tables[name].astype(np.int32)).to(device)


def _mantissa(name: str, index: Tensor) -> Tensor:
    return _table(name, index.device)[index.long()]
