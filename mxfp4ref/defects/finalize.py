"""Weighted sums over a token's experts that differ from the kernel's, and routing weights in other places."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref.defects.defect import Applies, Defect, Kind, always, logical, on_stages
from mxfp4ref.defects.ieee import ieee_add, ieee_fma
from mxfp4ref.defects.rounding import bf16, keep
from mxfp4ref.defects.variants.gemm import GemmVariant
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import KERNEL, Stages, forward, select_local, trace
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.gemm.cpu import group_scaled_gemm
from mxfp4ref.sm90.swiglu import swiglu

__all__ = ["FINALIZE_DEFECTS", "ROUTED_SCALING_FACTOR"]

ROUTED_SCALING_FACTOR = 1.5  # DeepSeek-V4-Flash's; a call does not tell

# acc, scale, y, bias -> acc; all float32 of one shape.
_Update = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _finalize_with(update: _Update, first: float = 0.0) -> Callable[..., Tensor]:
    """`finalize` with another step; without a bias, the step gets -0, which changes no number."""

    def run(fc2_output: Tensor, local: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
        acc = torch.full_like(fc2_output[:, 0], first, dtype=torch.float32)
        for slot in range(local.shape[1]):
            used = local[:, slot, None] >= 0
            y = fp32.widen(fc2_output[:, slot])
            b = torch.full_like(y, -0.0) if bias is None else fp32.widen(bias[local[:, slot].clamp(min=0)])
            acc = torch.where(used, update(acc, scales[:, slot, None].expand_as(y), y, b), acc)
        return torch.where((local >= 0).any(1, keepdim=True), acc, 0.0)

    return run


def _fused(acc: Tensor, scale: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    return fp32.fma(scale, fp32.add(y, bias), acc)


def _unfused(acc: Tensor, scale: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    return fp32.add(fp32.mul(scale, fp32.add(y, bias)), acc)


def _bias_unweighted(acc: Tensor, scale: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    return fp32.add(fp32.fma(scale, y, acc), bias)


def _all_bf16(acc: Tensor, scale: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    return bf16(fp32.add(acc, bf16(fp32.mul(scale, fp32.add(y, bias)))))


def _rows_bf16(acc: Tensor, scale: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    return fp32.add(acc, bf16(fp32.mul(scale, fp32.add(y, bias))))


def _biased_bf16(acc: Tensor, scale: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    return fp32.fma(scale, bf16(fp32.add(y, bias)), acc)


def _no_ftz(acc: Tensor, scale: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    return ieee_fma(scale, ieee_add(y, bias), acc)


def _flushed_on_subnormal_grid(acc: Tensor, scale: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    return fp32.flush(ieee_fma(fp32.flush(scale), fp32.add(y, bias), acc))


def _reversed(fc2_output: Tensor, local: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    return finalize(fc2_output.flip(1), local.flip(1), scales.flip(1), bias)


def _by_expert(fc2_output: Tensor, local: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    order = local.argsort(dim=1, stable=True)
    outputs = fc2_output.gather(1, order.unsqueeze(2).expand_as(fc2_output))
    return finalize(outputs, local.gather(1, order), scales.gather(1, order), bias)


def _by_weight(fc2_output: Tensor, local: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    order = scales.argsort(dim=1, stable=True)
    outputs = fc2_output.gather(1, order.unsqueeze(2).expand_as(fc2_output))
    return finalize(outputs, local.gather(1, order), scales.gather(1, order), bias)


def _float64(fc2_output: Tensor, local: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    acc = torch.zeros_like(fc2_output[:, 0], dtype=torch.float64)
    for slot in range(local.shape[1]):
        used = local[:, slot, None] >= 0
        y = fp32.widen(fc2_output[:, slot]).to(torch.float64)
        if bias is not None:
            y = y + fp32.widen(bias[local[:, slot].clamp(min=0)]).to(torch.float64)
        acc = torch.where(used, acc + scales[:, slot, None].to(torch.float64) * y, acc)
    return fp32.round_fp64(acc)


def _pairwise(fc2_output: Tensor, local: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """Products rounded, then neighbours added, as a tree over lanes does."""
    alone = [
        finalize(fc2_output[:, i, None], local[:, i, None], scales[:, i, None], bias)
        for i in range(local.shape[1])
    ]
    while len(alone) > 1:
        pairs = [fp32.add(a, b) for a, b in zip(alone[::2], alone[1::2], strict=False)]
        alone = pairs + alone[len(pairs) * 2 :]
    return alone[0]


def _weighted_activation(call: MoeCall) -> Tensor:
    """DeepSeek's reference: the weight multiplied into the activation before its rounding to bf16."""
    call = logical(call)
    experts, rows = call.experts, trace(call)
    weights = call.token_final_scales[rows.token, rows.slot]
    shape = (*call.token_selected_experts.shape, experts.hidden_size)
    y = torch.zeros(shape, dtype=torch.float32, device=call.input.device)
    for index in torch.unique(rows.expert):
        mine = rows.expert == index
        some = experts.select(index[None])
        optional = (some.fc1_biases, some.swiglu_alpha, some.swiglu_beta, some.swiglu_limit)
        activation = swiglu(rows.fc1_output[mine], *optional)
        weighted = fp32.to_bf16(fp32.mul(activation, weights[mine, None].expand_as(activation)))
        assert some.fc2_scales is not None
        fc2 = group_scaled_gemm(
            weighted[None],
            some.fc2_weights,
            some.fc2_scales,
            tactic=call.kernel.gemm2,
            generation=call.kernel.generation,
        )
        y[rows.token[mine], rows.slot[mine]] = fp32.widen(fp32.to_bf16(fc2[0]))
    local = select_local(call.token_selected_experts, experts.num_experts, call.ep_size, call.ep_rank)
    bias = experts.fc2_biases if call.tp_rank == 0 else None
    ones = torch.ones_like(call.token_final_scales)
    # The bias keeps its weight: the reference has none, and bias2_unweighted is another defect.
    weighted_bias = _finalize_with(lambda acc, scale, y, b: fp32.fma(scale, b, fp32.add(y, acc)))
    if bias is None:
        return fp32.to_bf16(finalize(y, local, ones))
    return fp32.to_bf16(weighted_bias(y, local, call.token_final_scales, bias))


def _scaled_afterwards(call: MoeCall) -> Tensor:
    call = logical(call)
    factor = torch.tensor(ROUTED_SCALING_FACTOR, dtype=torch.float32, device=call.input.device)
    output = forward(replace(call, token_final_scales=call.token_final_scales / factor))
    return fp32.to_bf16(fp32.mul(fp32.widen(output), factor.expand_as(output)))


def _has_bias(call: MoeCall) -> bool:
    return call.experts.fc2_biases is not None and call.tp_rank == 0


def _variant(
    name: str,
    summary: str,
    seen_in: str,
    finalize: Callable[..., Tensor],
    applies: Applies = always,
    kind: Kind = "arithmetic",
    stages: Stages = KERNEL,
) -> Defect:
    stages = replace(stages, finalize=finalize)
    return on_stages(name, summary, (seen_in,), stages, applies=applies, kind=kind)


FINALIZE_DEFECTS: tuple[Defect, ...] = (
    _variant(
        "bias2_unweighted",
        "fc2 bias added outside the routing weight",
        "NeMo Automodel#2591",
        _finalize_with(_bias_unweighted),
        _has_bias,
        "defect",
    ),
    Defect(
        "weight_before_gemm2",
        "routing weight multiplied into the activation before its rounding to bf16",
        ("DeepSeek's own reference",),
        "defect",
        "moe",
        _weighted_activation,
        always,
    ),
    Defect(
        "rsf_post_hoc",
        "bf16 output multiplied by the routed scaling factor afterwards (taken as 1.5, V4-Flash's)",
        ("sglang#24492",),
        "defect",
        "moe",
        _scaled_afterwards,
        always,
    ),
    _variant(
        "bf16_finalize",
        "products and the top-k sum rounded to bf16 at every slot",
        "index_add_ references",
        _finalize_with(_all_bf16),
        kind="defect",
    ),
    _variant(
        "weighted_rows_bf16",
        "each weighted row rounded to bf16, then summed in float32",
        "separate scale and sum kernels",
        _finalize_with(_rows_bf16),
    ),
    _variant(
        "weight_in_gemm2_epilogue",
        "weight multiplied into GEMM2's float32 accumulators, one rounding to bf16, then summed in float32",
        "Triton fused_moe",
        _finalize_with(_rows_bf16),
        stages=Stages(round_fc2=keep),
    ),
    on_stages(
        "gemm2_kept_fp32",
        "no bf16 rounding after GEMM2",
        ("fused finalize of other paths",),
        Stages(round_fc2=keep),
        kind="arithmetic",
    ),
    _variant(
        "bias2_before_rounding",
        "fc2 bias added to the float32 accumulators, before the rounding to bf16",
        "fused epilogues",
        _finalize_with(_biased_bf16),
        _has_bias,
        stages=Stages(round_fc2=keep),
    ),
    _variant(
        "bias2_bf16",
        "sum of GEMM2's output and the fc2 bias rounded to bf16",
        "torch references in bf16",
        _finalize_with(_biased_bf16),
        _has_bias,
    ),
    _variant(
        "finalize_unfused", "product rounded before it is added", "code without FMA", _finalize_with(_unfused)
    ),
    _variant(
        "finalize_slots_reversed", "slots summed from the last to the first", "reversed loops", _reversed
    ),
    _variant(
        "finalize_by_expert",
        "slots summed in the order of their expert ids",
        "loops over experts with index_add_",
        _by_expert,
    ),
    _variant("finalize_by_weight", "slots summed from the smallest weight on", "ascending top-k", _by_weight),
    _variant("finalize_pairwise", "slots summed as a tree", "reductions across lanes", _pairwise),
    _variant("finalize_float64", "slots summed in float64, rounded once", "wider references", _float64),
    _variant(
        "minus_zero_kept",
        "sums start from the first product instead of +0, and GEMMs add no +0, so that -0 survives",
        "einsum references",
        _finalize_with(_fused, first=-0.0),
        stages=Stages(fc1_gemm=GemmVariant(add_zero=False), fc2_gemm=GemmVariant(add_zero=False)),
    ),
    _variant(
        "no_ftz_finalize",
        "subnormal products and sums of the finalize kept",
        "code compiled without flush-to-zero",
        _finalize_with(_no_ftz),
    ),
    _variant(
        "flush_on_subnormal_grid",
        "finalize flushes after rounding to the subnormal grid: 2^-126 (1 - 2^-24) becomes 2^-126, not 0",
        "models of FTZ",
        _finalize_with(_flushed_on_subnormal_grid),
    ),
)
