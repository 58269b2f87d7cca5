"""Pipelines that differ from the W4A8 ("Humming") kernel's."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref.defects.definition import defect
from mxfp4ref.formats import humming, wordwise
from mxfp4ref.formats.humming_experts import HummingExperts
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.humming import STAGES, HummingStages
from mxfp4ref.sm90 import fp8, fp32
from mxfp4ref.sm90.gemm.fp8 import fp8_gemm
from mxfp4ref.sm90.row_quantize import QuantizedRows, quantize_rows

_ROWS = "w4a8.quantize_input quantize_activation"
_GEMMS = "w4a8.fc1_gemm fc2_gemm"
_PROMOTED = 128  # values of K after which other FP8 GEMMs add the tensor core's sums up in float32


def _experts(call: MoeCall) -> HummingExperts:
    assert isinstance(call.experts, HummingExperts)
    return call.experts


@defect("w4a8", "docs that call them reserved")
def fp8_residual_ignored(call: MoeCall) -> MoeCall:
    """residual of every expert taken to be one"""
    experts = _experts(call)
    one = torch.ones_like(experts.fc1_residual)
    return replace(call, experts=replace(experts, fc1_residual=one, fc2_residual=one))


@defect("w4a8", "callers of flashinfer's preparation")
def fp8_residual_uncompensated(call: MoeCall) -> MoeCall:
    """residual handed over as it was prepared, without the factor of 64"""
    experts = _experts(call)
    fc1, fc2 = (residual / humming.COMPENSATION for residual in (experts.fc1_residual, experts.fc2_residual))
    return replace(call, experts=replace(experts, fc1_residual=fc1, fc2_residual=fc2))


@defect("w4a8", "a list of five tensors")
def fp8_residual_of_the_other_gemm(call: MoeCall) -> MoeCall:
    """residuals of fc1 and fc2 exchanged"""
    experts = _experts(call)
    return replace(
        call,
        experts=replace(experts, fc1_residual=experts.fc2_residual, fc2_residual=experts.fc1_residual),
    )


@defect("w4a8", "misread layouts")
def fp8_offsets_one_group_later(call: MoeCall) -> MoeCall:
    """offset of the group before, along K"""
    experts = _experts(call)
    assert experts.fc1_scales is not None
    assert experts.fc2_scales is not None
    fc1, fc2 = (offsets.roll(1, 2) for offsets in (experts.fc1_scales, experts.fc2_scales))
    return replace(call, experts=replace(experts, fc1_scales=fc1, fc2_scales=fc2))


@defect("w4a8", "one preparation for both paths")
def fp8_weights_interleaved_for_bf16(call: MoeCall) -> MoeCall:
    """weights in the layout of the bf16 path ("fp4" for "fp4_fp8")"""
    experts = _experts(call)
    fc1, fc2 = (
        humming.deinterleave(wordwise.interleave(w.contiguous()))
        for w in (experts.fc1_weights, experts.fc2_weights)
    )
    return replace(call, experts=replace(experts, fc1_weights=fc1, fc2_weights=fc2))


@defect(_ROWS, "per-tensor scales")
def fp8_scale_of_all_rows(x: Tensor, residual: Tensor) -> QuantizedRows:
    """largest magnitude of all rows instead of each row's"""
    values, factor = quantize_rows(x.reshape(1, -1), torch.ones_like(residual[:1]))
    return QuantizedRows(values.view(x.shape), fp32.mul(factor.expand_as(residual), residual))


def _quotients(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as float32 and 448 over their largest magnitudes, correctly rounded; one for a row of zeros."""
    x = fp32.flush(fp32.widen(x))
    largest = torch.where(x.isnan(), 0.0, x.abs()).amax(1, keepdim=True).clamp(min=448 / torch.finfo().max)
    return x, torch.where((x == 0).all(1, keepdim=True), 1.0, fp32.round_fp64(448 / largest.double()))


@defect(_ROWS, "references in torch", kind="arithmetic")
def fp8_quotient_exact(x: Tensor, residual: Tensor) -> QuantizedRows:
    """448 over the maximum correctly rounded, and the reciprocal of that"""
    x, quotient = _quotients(x)
    factor = fp32.mul(fp32.round_fp64(1 / quotient.double())[:, 0], residual)
    return QuantizedRows(fp8.to_e4m3(fp32.mul(x, quotient.expand_as(x))), factor)


@defect(_ROWS, "vLLM's and DeepSeek's per-token FP8", kind="arithmetic")
def fp8_factor_exact(x: Tensor, residual: Tensor) -> QuantizedRows:
    """rows as the kernel has them, but the factor is the maximum over 448"""
    _, quotient = _quotients(x)
    largest = torch.where(quotient == 1, 448.0, fp32.round_fp64(448 / quotient.double()))[:, 0]
    factor = fp32.mul(fp32.round_fp64(largest.double() / 448), residual)
    return QuantizedRows(quantize_rows(x, residual).values, factor)


@defect("w4a8.quantize_activation", "kernels with a buffer in between", kind="arithmetic")
def fp8_activation_bf16(x: Tensor, residual: Tensor) -> QuantizedRows:
    """activation rounded to bf16 before its row is quantised"""
    return quantize_rows(fp32.to_bf16(x), residual)


@defect(_ROWS, "AMD's E4M3")
def fp8_largest_is_240(x: Tensor, residual: Tensor) -> QuantizedRows:
    """rows scaled to 240, the largest number of E4M3FNUZ"""
    values, factor = quantize_rows(fp32.mul(fp32.widen(x), torch.full(x.shape, 240 / 448)), residual)
    return QuantizedRows(values, factor)


def _weights(packed: Tensor, offsets: Tensor) -> Tensor:
    return fp8.e4m3_values(packed.device)[humming.e4m3_weights(packed, offsets).long()].double()


def _numbers(x: Tensor) -> Tensor:
    return fp8.e4m3_values(x.device)[x.long()].double()


@defect(_GEMMS, "references in torch", kind="arithmetic")
def fp8_accumulator_exact(x: Tensor, packed: Tensor, offsets: Tensor) -> Tensor:
    """products summed up exactly and rounded once to float32"""
    return fp32.round_fp64(_numbers(x) @ _weights(packed, offsets).T)


@defect(_GEMMS, "CPU references", kind="arithmetic")
def fp8_accumulator_float32(x: Tensor, packed: Tensor, offsets: Tensor) -> Tensor:
    """every step of 32 products added to a float32 accumulator of 24 bits"""
    numbers, weights = _numbers(x), _weights(packed, offsets)
    total = torch.zeros(len(x), len(packed), dtype=torch.float32, device=x.device)
    for start in range(0, x.shape[1], fp8.STEP_SIZE):
        some = slice(start, start + fp8.STEP_SIZE)
        total = fp32.round_fp64(total.double() + numbers[:, some] @ weights[:, some].T)
    return total


@defect(_GEMMS, "DeepGEMM and other FP8 GEMMs", kind="arithmetic")
def fp8_accumulator_promoted(x: Tensor, packed: Tensor, offsets: Tensor) -> Tensor:
    """accumulators added up in float32 after every 128 of K"""
    total = torch.zeros(len(x), len(packed), dtype=torch.float32, device=x.device)
    for start in range(0, x.shape[1], _PROMOTED):
        some, groups = (
            slice(start // 2, (start + _PROMOTED) // 2),
            slice(start // 32, (start + _PROMOTED) // 32),
        )
        part = fp8_gemm(x[:, start : start + _PROMOTED], packed[:, some], offsets[:, groups])
        total = fp32.add(total, part)
    return total


@defect(_GEMMS, "split kernels", kind="arithmetic")
def fp8_k_descending(x: Tensor, packed: Tensor, offsets: Tensor) -> Tensor:
    """steps of 32 products from the last of K to the first"""
    order = torch.arange(x.shape[1], device=x.device).view(-1, fp8.STEP_SIZE).flip(0)
    columns = (order[:, :1] // 2 + torch.arange(16, device=x.device)).reshape(-1)
    return fp8_gemm(x[:, order.reshape(-1)], packed[:, columns], offsets.flip(1))


@defect("w4a8.scale_fc1 scale_fc2", "epilogues after a conversion", kind="arithmetic")
def fp8_rounded_before_factor(accumulators: Tensor, factor: Tensor) -> Tensor:
    """accumulators rounded to bf16 before the row's factor is multiplied in"""
    rounded = fp32.widen(fp32.to_bf16(accumulators))
    return fp32.mul(rounded, factor[:, None].expand_as(rounded))


def _is_fp16(call: MoeCall) -> bool:
    return call.input.dtype == torch.float16


@defect("w4a8.stages", "buffers that are bf16 whatever the input", applies=_is_fp16)
def fp8_output_through_bf16(call: MoeCall) -> HummingStages:
    """fp16 output rounded to bf16 on its way"""
    stages = STAGES[call.input.dtype]
    if not _is_fp16(call):
        return stages
    return replace(stages, round_output=lambda x: fp32.to_fp16(fp32.widen(fp32.to_bf16(x))))
