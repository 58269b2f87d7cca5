"""Roundings to bf16 between the stages that differ from the kernel's."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref.defects.definition import defect
from mxfp4ref.defects.variants.gemm import GemmVariant
from mxfp4ref.defects.variants.rounding import keep
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import Stages
from mxfp4ref.sm90 import fp32

_EVERY_ROUNDING = "round_fc1 round_activation round_fc2 round_output"


@defect("round_fc1", "flashinfer#4087")
def gemm1_kept_fp32(x: Tensor) -> Tensor:
    """no bf16 rounding after GEMM1"""
    return x


@defect("stages", "flashinfer#4087")
def act_kept_fp32(call: MoeCall) -> Stages:
    """no bf16 rounding after the activation"""
    return Stages(round_activation=keep, fc2_gemm=GemmVariant())  # the kernel's own takes bf16 only


def _upper_half(x: Tensor, added: int) -> Tensor:
    """The upper half of the float32 bits after an addition to them, or NaN."""
    return (
        torch.where(x.isnan(), fp32.BF16_NAN, (x.view(torch.int32) + added) >> 16)
        .to(torch.int16)
        .view(torch.bfloat16)
    )


_SHIFTS = "bit shifts for conversions"


@defect("round_fc1", _SHIFTS, kind="arithmetic")
def fc1_truncated(x: Tensor) -> Tensor:
    """GEMM1's output cut to bf16 instead of rounded"""
    return _upper_half(x, 0)


@defect("round_activation", _SHIFTS, kind="arithmetic")
def activation_truncated(x: Tensor) -> Tensor:
    """activation cut to bf16 instead of rounded"""
    return _upper_half(x, 0)


@defect("round_fc2", _SHIFTS, kind="arithmetic")
def fc2_truncated(x: Tensor) -> Tensor:
    """GEMM2's output cut to bf16 instead of rounded"""
    return _upper_half(x, 0)


@defect("round_output", _SHIFTS, kind="arithmetic")
def output_truncated(x: Tensor) -> Tensor:
    """output cut to bf16 instead of rounded"""
    return _upper_half(x, 0)


@defect(_EVERY_ROUNDING, "adding 0x8000", kind="arithmetic")
def round_half_away(x: Tensor) -> Tensor:
    """every rounding to bf16 takes ties away from zero"""
    return _upper_half(x, 0x8000)


@defect(_EVERY_ROUNDING, "saturating conversions", kind="arithmetic")
def bf16_saturates(x: Tensor) -> Tensor:
    """every rounding to bf16 gives the largest number instead of Inf"""
    rounded = fp32.to_bf16(x).view(torch.int16)
    return torch.where(rounded & 0x7FFF == 0x7F80, rounded - 1, rounded).view(torch.bfloat16)


@defect("round_activation", "half-precision intermediates")
def activation_fp16(x: Tensor) -> Tensor:
    """activation passed through float16"""
    return fp32.to_bf16(x.to(torch.float16).to(torch.float32))


def _with_nan(x: Tensor, bits: int) -> Tensor:
    return fp32.to_bf16(x).view(torch.int16).masked_fill(x.isnan(), bits).view(torch.bfloat16)


@defect("round_output", "torch's conversion to bf16", kind="arithmetic")
def nan_as_7fc0(x: Tensor) -> Tensor:
    """NaN in the output written as 0x7FC0"""
    return _with_nan(x, 0x7FC0)


@defect("round_output", "x86, whose invalid operations give negative NaNs", kind="arithmetic")
def nan_as_ffc0(x: Tensor) -> Tensor:
    """NaN in the output written as 0xFFC0"""
    return _with_nan(x, 0xFFC0 - 0x10000)
