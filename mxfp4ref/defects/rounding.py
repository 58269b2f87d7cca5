"""Roundings to bf16 between the stages that differ from the kernel's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mxfp4ref.defects.defect import Defect, on_stages
from mxfp4ref.defects.variants.gemm import GemmVariant, tensor_core_sum
from mxfp4ref.model.forward import Stages
from mxfp4ref.sm90 import fp32

__all__ = ["ROUNDING_DEFECTS", "bf16", "keep"]


def bf16(x: Tensor) -> Tensor:
    """float32 rounded to bf16, as float32."""
    return fp32.widen(fp32.to_bf16(x))


def keep(x: Tensor) -> Tensor:
    """No rounding at all."""
    return x


def _truncate(x: Tensor) -> Tensor:
    bits = x.view(torch.int32)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return torch.where(nan, fp32.BF16_NAN, bits >> 16).to(torch.int16).view(torch.bfloat16)


def _half_away(x: Tensor) -> Tensor:
    bits = x.view(torch.int32)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return torch.where(nan, fp32.BF16_NAN, (bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)


def _saturate(x: Tensor) -> Tensor:
    rounded = fp32.to_bf16(x).view(torch.int16)
    infinite = rounded & 0x7FFF == 0x7F80
    return torch.where(infinite, rounded - 1, rounded).view(torch.bfloat16)


def _nan_as(pattern: int) -> Callable[[Tensor], Tensor]:
    def rounding(x: Tensor) -> Tensor:
        bits = fp32.to_bf16(x).view(torch.int16)
        return torch.where(x.isnan(), pattern - 0x10000 if pattern > 0x7FFF else pattern, bits).to(
            torch.int16
        )

    return lambda x: rounding(x).view(torch.bfloat16)


def _through_fp16(x: Tensor) -> Tensor:
    return fp32.to_bf16(x.to(torch.float16).to(torch.float32))


def _rounding(function: Callable[[Tensor], Tensor]) -> Stages:
    return Stages(round_fc1=function, round_activation=function, round_fc2=function, round_output=function)


ROUNDING_DEFECTS: tuple[Defect, ...] = (
    on_stages(
        "gemm1_kept_fp32", "no bf16 rounding after GEMM1", ("flashinfer#4087",), Stages(round_fc1=keep)
    ),
    on_stages(
        "act_kept_fp32",
        "no bf16 rounding after the activation",
        ("flashinfer#4087",),
        Stages(round_activation=keep, fc2_gemm=GemmVariant(group_sum=tensor_core_sum)),
    ),
    on_stages(
        "fc1_truncated",
        "GEMM1's output cut to bf16 instead of rounded",
        ("bit shifts for conversions",),
        Stages(round_fc1=_truncate),
        kind="arithmetic",
    ),
    on_stages(
        "activation_truncated",
        "activation cut to bf16 instead of rounded",
        ("bit shifts for conversions",),
        Stages(round_activation=_truncate),
        kind="arithmetic",
    ),
    on_stages(
        "fc2_truncated",
        "GEMM2's output cut to bf16 instead of rounded",
        ("bit shifts for conversions",),
        Stages(round_fc2=_truncate),
        kind="arithmetic",
    ),
    on_stages(
        "output_truncated",
        "output cut to bf16 instead of rounded",
        ("bit shifts for conversions",),
        Stages(round_output=_truncate),
        kind="arithmetic",
    ),
    on_stages(
        "round_half_away",
        "every rounding to bf16 takes ties away from zero",
        ("adding 0x8000",),
        _rounding(_half_away),
        kind="arithmetic",
    ),
    on_stages(
        "bf16_saturates",
        "every rounding to bf16 gives the largest number instead of Inf",
        ("saturating conversions",),
        _rounding(_saturate),
        kind="arithmetic",
    ),
    on_stages(
        "activation_fp16",
        "activation passed through float16",
        ("half-precision intermediates",),
        Stages(round_activation=_through_fp16),
    ),
    on_stages(
        "nan_as_7fc0",
        "NaN in the output written as 0x7FC0",
        ("torch's conversion to bf16",),
        Stages(round_output=_nan_as(0x7FC0)),
        kind="arithmetic",
    ),
    on_stages(
        "nan_as_ffc0",
        "NaN in the output written as 0xFFC0",
        ("x86, whose invalid operations give negative NaNs",),
        Stages(round_output=_nan_as(0xFFC0)),
        kind="arithmetic",
    ),
)
