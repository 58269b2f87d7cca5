"""Computations of a dequantisation that give other values: types on the way, and scale bytes taken otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mxfp4ref._choices import Convention
from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.families.hypotheses.decodings import readings
from mxfp4ref.formats.mxfp4 import E2M1_VALUES, GROUP_SIZE, SCALE_BIAS, decode_ue8m0, unpack_codes

__all__ = ["computed_otherwise"]

_TYPES: dict[str, Callable[[Tensor], Tensor]] = {
    "fp16": lambda x: x.half().double(),
    "bf16": lambda x: x.bfloat16().double(),
    "float32": lambda x: x.float().double(),
    "FP8 (e4m3)": lambda x: x.float().to(torch.float8_e4m3fn).double(),
    "FP8 (e5m2)": lambda x: x.float().to(torch.float8_e5m2).double(),
}


def computed_otherwise(inputs: Mapping[str, Any], got: Tensor) -> str:
    """The computation that gives every value, but the bits of NaN; "" where none is known.

    Args:
        inputs: of a golden case of kind "dequantize".
        got: `[..., K]`, of a floating-point dtype.
    """
    packed, scales = inputs["packed"].cpu(), inputs["scales"].cpu().view(torch.uint8)
    code = torch.tensor(E2M1_VALUES, dtype=torch.float64)[unpack_codes(packed).long()]
    ways = (
        *_computations(code, scales, inputs["convention"]),
        *_of_other_groups(code, decode_ue8m0(scales, inputs["convention"], torch.float64)),
        *((w, f(packed, scales)) for w, f in readings()),
    )
    return next((words for words, made in ways if _same(made.to(got.dtype), got)), "")


def _same(made: Tensor, got: Tensor) -> bool:
    return not bool((differing(made, got) & ~(made.isnan() & got.isnan())).any())


def _computations(code: Tensor, scales: Tensor, convention: Convention) -> Iterator[tuple[str, Tensor]]:
    """In words, and the values in float64."""
    byte = scales.long().repeat_interleave(GROUP_SIZE, -1)
    right = decode_ue8m0(scales, convention, torch.float64).repeat_interleave(GROUP_SIZE, -1)
    power = (byte - SCALE_BIAS).double()
    signed = (power - 256 * (byte > 127)).exp2()
    bits = torch.where(byte == 255, torch.inf, (byte.int() << 23).view(torch.float32).double())
    taken = "the scale byte is taken as signed (int8): 128 as -128"
    ends = "bytes 0 and 255 are taken as 2^-127 and 2^128"
    factors = {
        "": right,
        ends: power.exp2(),
        taken: signed,
        f"{taken}, but for byte 255": torch.where(byte == 255, right, signed),
        f"{taken}, where that is below -127": torch.where(signed < 2.0**-127, signed, right),
        "the scale byte is shifted into a float32's exponent: byte 0 is 0 and byte 255 Inf": bits,
    }
    for words, factor in factors.items():
        if words not in ("", ends):
            yield words, code * factor
        more = f": {words}" * bool(words)
        for name, cast in _TYPES.items():
            yield f"code times scale is formed in {name}{more}", cast(code * cast(factor))
            yield f"the scale is converted to {name}{more}", code * cast(factor)
            yield f"code times scale is rounded to {name}{more}", cast(code * factor)
        largest = 65504.0
        saturated = (
            (code * factor.clamp(max=largest).half().double()).clamp(-largest, largest).half().double()
        )
        yield f"code times scale is formed in fp16, saturating at 65504{more}", saturated


def _of_other_groups(code: Tensor, factors: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Values with the scales of other groups, in words: of codes `[..., K]` and scales `[..., K / 32]` in float64."""
    groups, at = factors.shape[-1], torch.arange(code.shape[-1])
    every = torch.arange(code.numel()).view(code.shape)
    yield (
        "element k has the scale of group k modulo their number: repeated, not interleaved",
        code * factors[..., at % groups],
    )
    for size in (8, 16, 64, 128):
        words = f"groups are taken to have {size} elements, not {GROUP_SIZE}: element k has scale k // {size}"
        yield f"{words} of its row, around the end", code * factors[..., at // size % groups]
        yield f"{words} of all, around the end", code * factors.flatten()[every // size % factors.numel()]
    for by, words in ((1, "next"), (-1, "previous")):
        told = f"each group has the scale of the {words} one"
        yield f"{told} of its row, around the end", code * factors[..., (at // GROUP_SIZE + by) % groups]
        yield (
            f"{told} of all, around the end",
            code * factors.flatten()[(every // GROUP_SIZE + by) % factors.numel()],
        )
    if factors.dim() == 2:
        turned = factors.T.reshape(factors.shape)
        yield (
            "the scales are read as [K / 32, N], which lie as [N, K / 32]",
            code * turned[:, at // GROUP_SIZE],
        )
