"""Suite `tensor_core`: single steps of 16 products, d = c + sum of a b."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref.goldens.cases.definition import Content, define
from mxfp4ref.goldens.cases.source import Source
from mxfp4ref.sm90.tensor_core import step

_STEPS = 512


def _step(a: Tensor, b: Tensor, c: Tensor) -> Content:
    return Content({"a": a, "b": b, "c": c, "d": step(a, b, c)})


def _float32(source: Source, name: str, low: int, high: int) -> Tensor:
    exponent = source.range(f"{name}.exponent", low + 127, high + 127, _STEPS).to(torch.int64)
    bits = source.words(f"{name}.fraction", _STEPS)
    bits = (bits & 0x807FFFFF) | exponent << 23
    return torch.where(bits >> 31 == 1, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)


@define("tensor_core", unique_for="one step alone")
def close_exponents(source: Source) -> Content:
    """Tensor-core steps of 16 products with exponents close together: nothing is truncated, the step is the
    exact sum rounded toward zero.
    """
    a, b = (source.spread(name, -2, 2, _STEPS, 16) for name in "ab")
    return _step(a, b, _float32(source, "c", -2, 4))


@define("tensor_core", unique_for="one step alone")
def wide_exponents(source: Source) -> Content:
    """Tensor-core steps of 16 products with exponents over 40 binades: most terms are truncated to multiples
    of 2^(emax - 25), some vanish; a step with 24 or 26 bits, or with products normalised first, differs.
    """
    a, b = (source.spread(name, -10, 10, _STEPS, 16) for name in "ab")
    return _step(a, b, _float32(source, "c", -20, 20))


@define("tensor_core", unique_for="one step alone")
def cancelling(source: Source) -> Content:
    """Tensor-core steps whose largest terms cancel, so that the sum is what truncation left of the small
    ones; exact zeros, too.
    """
    a, b = (source.spread(name, -12, 4, _STEPS, 16) for name in "ab")
    half = source.spread("large", 8, 12, _STEPS, 4)
    a[:, 0:4], a[:, 8:12], b[:, 8:12] = half, -half, b[:, 0:4]
    b[::8, 4:8], b[::8, 12:16] = 0.0, 0.0
    return _step(a, b, torch.where(torch.arange(_STEPS) % 8 == 0, 0.0, _float32(source, "c", -12, 0)))


@define("tensor_core", unique_for="one step alone")
def subnormals(source: Source) -> Content:
    """Tensor-core steps with subnormal operands (exponent -126, not normalised) and results, which the step
    keeps: flushing them to zero shows.
    """
    bits = source.words("a", _STEPS, 16) & 0x807F
    a = torch.where(bits >= 1 << 15, bits - (1 << 16), bits).to(torch.int16).view(torch.bfloat16)
    b = source.spread("b", -24, 8, _STEPS, 16)
    return _step(a, b, _float32(source, "c", -126, -120))


@define("tensor_core", unique_for="one step alone")
def special_values(source: Source) -> Content:
    """Tensor-core steps with zeros of both signs, Inf and NaN in a, b and c, and sums that overflow: 0 * Inf,
    Inf - Inf, NaN 0x7FFFFFFF.
    """
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3e38, -3e38, 1.0])
    a, b = (special[(source.bytes(name, _STEPS, 16) & 7).long()].to(torch.bfloat16) for name in "ab")
    c = special[(source.bytes("c", _STEPS) & 7).long()]
    # A NaN or Inf in all of 16 is too much of it: three quarters of the terms are ordinary.
    ordinary = source.bytes("ordinary", _STEPS, 16) < 240
    a = torch.where(ordinary, source.spread("a.ordinary", -3, 3, _STEPS, 16), a)
    b = torch.where(ordinary, source.spread("b.ordinary", -3, 3, _STEPS, 16), b)
    b[::16, :] = 0.0
    return _step(a, b, c)
