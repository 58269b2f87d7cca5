"""Dequantisations that differ from `formats.mxfp4.dequantize` in ways that the kernel's output cannot show."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxfp4ref._choices import Convention
from mxfp4ref.defects.definition import defect
from mxfp4ref.formats.mxfp4 import GROUP_SIZE, dequantize, unpack_codes

__all__ = ["DequantizeCall", "dequantize_call"]


@dataclass(frozen=True)
class DequantizeCall:
    """The arguments of `dequantize` to bf16: `packed [..., K/2]`, `scales [..., K/32]` and the convention."""

    packed: Tensor
    scales: Tensor
    convention: Convention = "ocp"


def dequantize_call(call: DequantizeCall) -> Tensor:
    """`[..., K] bf16`."""
    return dequantize(call.packed, call.scales, convention=call.convention)


@defect("dequantize", "gguf", "flashinfer's C++ helper")
def minus_zero_lost(call: DequantizeCall) -> Tensor:
    """code 8 decoded as +0"""
    return dequantize_call(call).masked_fill(unpack_codes(call.packed) == 8, 0.0)


@defect("dequantize", "exponent additions on bit patterns")
def subnormal_weights_flushed(call: DequantizeCall) -> Tensor:
    """bf16 subnormals become zeros of their sign"""
    bits = dequantize_call(call).view(torch.int16)
    return torch.where(bits & 0x7F80 == 0, bits & ~0x7FFF, bits).view(torch.bfloat16)


@defect("dequantize", "TransformerEngine#3262", "triton#11624")
def other_convention(call: DequantizeCall) -> Tensor:
    """bytes 0 and 255 by the other convention (ocp: 2^-127 and NaN; sm90: 0 and Inf)"""
    other: Convention = "sm90" if call.convention == "ocp" else "ocp"
    return dequantize(call.packed, call.scales, convention=other)


@defect("dequantize", "flashinfer's own test helper")
def byte_255_infinite(call: DequantizeCall) -> Tensor:
    """byte 0 is 2^-127, byte 255 Inf, and NaN for zero codes"""
    last = (call.scales.view(torch.uint8) == 255).repeat_interleave(GROUP_SIZE, -1)
    ocp, sm90 = (dequantize(call.packed, call.scales, convention=name) for name in ("ocp", "sm90"))
    return torch.where(last, sm90, ocp)
