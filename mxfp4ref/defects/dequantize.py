"""Dequantisations that differ from `formats.mxfp4.dequantize` in ways that the kernel's output cannot show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mxfp4ref.defects.defect import Defect, always
from mxfp4ref.formats.mxfp4 import GROUP_SIZE, dequantize, unpack_codes

__all__ = ["DEQUANTIZE_DEFECTS", "DequantizeCall", "dequantize_call"]


@dataclass(frozen=True)
class DequantizeCall:
    """The arguments of `dequantize` to bf16: `packed [..., K/2]`, `scales [..., K/32]` and the convention."""

    packed: Tensor
    scales: Tensor
    convention: str = "ocp"


def dequantize_call(call: DequantizeCall) -> Tensor:
    """`[..., K] bf16`."""
    return dequantize(call.packed, call.scales, convention=call.convention)


def _minus_zero_lost(call: DequantizeCall) -> Tensor:
    return dequantize_call(call).masked_fill(unpack_codes(call.packed) == 8, 0.0)


def _subnormals_flushed(call: DequantizeCall) -> Tensor:
    bits = dequantize_call(call).view(torch.int16)
    return torch.where(bits & 0x7F80 == 0, bits & ~0x7FFF, bits).view(torch.bfloat16)


def _other_convention(call: DequantizeCall) -> Tensor:
    other = "sm90" if call.convention == "ocp" else "ocp"
    return dequantize(call.packed, call.scales, convention=other)


def _nan_for_zero_only(call: DequantizeCall) -> Tensor:
    # Byte 255 as Inf, as "sm90" has it, but byte 0 as 2^-127, as "ocp" has it.
    packed, scales = call.packed, call.scales.view(torch.uint8)
    ends = dequantize(packed, scales, convention="sm90")
    rest = dequantize(packed, scales, convention="ocp")
    return torch.where((scales == 255).repeat_interleave(GROUP_SIZE, -1), ends, rest)


def _dequantize(
    name: str, summary: str, seen_in: tuple[str, ...], run: Callable[[DequantizeCall], Tensor]
) -> Defect:
    return Defect(name, summary, seen_in, "defect", "dequantize", run, always)


DEQUANTIZE_DEFECTS: tuple[Defect, ...] = (
    _dequantize(
        "minus_zero_lost", "code 8 decoded as +0", ("gguf", "flashinfer's C++ helper"), _minus_zero_lost
    ),
    _dequantize(
        "subnormal_weights_flushed",
        "bf16 subnormals become zeros of their sign",
        ("exponent additions on bit patterns",),
        _subnormals_flushed,
    ),
    _dequantize(
        "other_convention",
        "bytes 0 and 255 by the other convention (ocp: 2^-127 and NaN; sm90: 0 and Inf)",
        ("TransformerEngine#3262", "triton#11624"),
        _other_convention,
    ),
    _dequantize(
        "byte_255_infinite",
        "byte 0 is 2^-127, byte 255 Inf, and NaN for zero codes",
        ("flashinfer's own test helper",),
        _nan_for_zero_only,
    ),
)
