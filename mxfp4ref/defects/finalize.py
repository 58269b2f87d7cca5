"""Weighted sums over a token's experts that differ from the kernel's, and routing weights in other places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mxfp4ref import _ieee
from mxfp4ref.defects.definition import defect
from mxfp4ref.defects.variants.finalize import FinalizeVariant
from mxfp4ref.defects.variants.gemm import GemmVariant
from mxfp4ref.defects.variants.rounding import bf16, keep
from mxfp4ref.defects.variants.sums import pairwise
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import Stages, trace
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.activation import Activation, activate
from mxfp4ref.sm90.finalize import finalize

__all__ = ["ROUTED_SCALING_FACTOR", "activation_weighted"]

ROUTED_SCALING_FACTOR = 1.5  # DeepSeek-V4-Flash's; a call does not tell


def _has_bias(call: MoeCall) -> bool:
    return call.experts.fc2_biases is not None and call.tp_rank == 0


@defect("finalize.step", "NeMo Automodel#2591", applies=_has_bias)
def bias2_unweighted(acc: Tensor, scale: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """fc2 bias added outside the routing weight"""
    return fp32.add(fp32.fma(scale, y, acc), bias)


@defect("stages", "DeepSeek's own reference")
def weight_before_gemm2(call: MoeCall) -> Stages:
    """routing weight multiplied into the activation before its rounding to bf16"""
    # The bias keeps its weight: the reference has none, and bias2_unweighted is another defect.
    biased = FinalizeVariant(lambda acc, scale, y, bias: fp32.fma(scale, bias, fp32.add(y, acc)))
    plain = FinalizeVariant(lambda acc, scale, y, bias: fp32.add(y, acc))
    return Stages(activate=activation_weighted(call), finalize=biased if _has_bias(call) else plain)


def activation_weighted(call: MoeCall) -> Callable[..., Tensor]:
    """The stage `activate`, with the routing weights multiplied into its result; for one forward of this call."""
    take = _in_turn(_weights_by_row(call))

    def weighted(activation: Activation, fc1_output: Tensor, *operands: Any) -> Tensor:
        activated = activate(activation, fc1_output, *operands)
        return fp32.mul(activated, take(len(activated))[:, None].expand_as(activated))

    return weighted


def _weights_by_row(call: MoeCall) -> Tensor:
    """The routing weights of the routed rows, `[R]`, in the order in which the activation is given the rows.

    A forward on row numbers instead of activations tells which row is which slot's.
    """
    device = call.input.device
    take = _in_turn(torch.arange(call.token_selected_experts.numel(), dtype=torch.float32, device=device))

    def number(activation: Activation, fc1_output: Tensor, *operands: object) -> Tensor:
        return take(len(fc1_output))[:, None].expand(-1, call.experts.intermediate_size)

    def no_gemm(x: Tensor, packed: Tensor, *scales: Tensor, **tactic: object) -> Tensor:
        return torch.zeros(*x.shape[:2], packed.shape[1], dtype=torch.float32, device=device)

    stages = Stages(fc1_gemm=no_gemm, activate=number, round_activation=keep, fc2_gemm=no_gemm)
    rows = trace(call, stages)
    weights = torch.empty(len(rows.token), dtype=torch.float32, device=device)
    weights[rows.activation[:, 0].long()] = call.token_final_scales[rows.token, rows.slot]
    return weights


def _in_turn(rows: Tensor) -> Callable[[int], Tensor]:
    """A function that gives the next so many of the rows."""
    done = 0

    def take(count: int) -> Tensor:
        nonlocal done
        done += count
        return rows[done - count : done]

    return take


@defect("stages", "sglang#24492")
def rsf_post_hoc(call: MoeCall) -> Stages:
    """bf16 output multiplied by the routed scaling factor afterwards (taken as 1.5, V4-Flash's)"""
    factor = torch.tensor(ROUTED_SCALING_FACTOR, dtype=torch.float32, device=call.input.device)

    def unscaled(y: Tensor, local: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        return finalize(y, local, scales / factor, bias)

    def scaled(output: Tensor) -> Tensor:
        return fp32.to_bf16(fp32.mul(bf16(output), factor.expand_as(output)))

    return Stages(finalize=unscaled, round_output=scaled)


@defect("finalize.step", "index_add_ references")
def bf16_finalize(acc: Tensor, scale: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """products and the top-k sum rounded to bf16 at every slot"""
    return bf16(fp32.add(acc, bf16(fp32.mul(scale, fp32.add(y, bias)))))


@defect("finalize.step", "separate scale and sum kernels", kind="arithmetic")
def weighted_rows_bf16(acc: Tensor, scale: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """each weighted row rounded to bf16, then summed in float32"""
    return fp32.add(acc, bf16(fp32.mul(scale, fp32.add(y, bias))))


@defect("stages", "Triton fused_moe", kind="arithmetic")
def weight_in_gemm2_epilogue(call: MoeCall) -> Stages:
    """weight multiplied into GEMM2's float32 accumulators, one rounding to bf16, then summed in float32"""
    return Stages(round_fc2=keep, finalize=FinalizeVariant(weighted_rows_bf16))


@defect("round_fc2", "fused finalize of other paths", kind="arithmetic")
def gemm2_kept_fp32(x: Tensor) -> Tensor:
    """no bf16 rounding after GEMM2"""
    return x


@defect("stages", "fused epilogues", kind="arithmetic", applies=_has_bias)
def bias2_before_rounding(call: MoeCall) -> Stages:
    """fc2 bias added to the float32 accumulators, before the rounding to bf16"""
    return Stages(round_fc2=keep, finalize=FinalizeVariant(bias2_bf16))


@defect("finalize.step", "torch references in bf16", kind="arithmetic", applies=_has_bias)
def bias2_bf16(acc: Tensor, scale: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """sum of GEMM2's output and the fc2 bias rounded to bf16"""
    return fp32.fma(scale, bf16(fp32.add(y, bias)), acc)


@defect("finalize.step", "code without FMA", kind="arithmetic")
def finalize_unfused(acc: Tensor, scale: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """product rounded before it is added"""
    return fp32.add(fp32.mul(scale, fp32.add(y, bias)), acc)


@defect("finalize.order", "reversed loops", kind="arithmetic")
def finalize_slots_reversed(local: Tensor, scales: Tensor) -> Tensor:
    """slots summed from the last to the first"""
    return torch.arange(local.shape[1] - 1, -1, -1, device=local.device).expand_as(local)


@defect("finalize.order", "loops over experts with index_add_", kind="arithmetic")
def finalize_by_expert(local: Tensor, scales: Tensor) -> Tensor:
    """slots summed in the order of their expert ids"""
    return local.argsort(dim=1, stable=True)


@defect("finalize.order", "ascending top-k", kind="arithmetic")
def finalize_by_weight(local: Tensor, scales: Tensor) -> Tensor:
    """slots summed from the smallest weight on"""
    return scales.argsort(dim=1, stable=True)


_Bias = Tensor | None


@defect("finalize", "reductions across lanes", kind="arithmetic")
def finalize_pairwise(fc2_output: Tensor, local: Tensor, scales: Tensor, bias: _Bias) -> Tensor:
    """slots summed as a tree"""
    slots = [slice(slot, slot + 1) for slot in range(local.shape[1])]
    products = [finalize(fc2_output[:, slot], local[:, slot], scales[:, slot], bias) for slot in slots]
    return pairwise(products)


@defect("finalize", "wider references", kind="arithmetic")
def finalize_float64(fc2_output: Tensor, local: Tensor, scales: Tensor, bias: _Bias) -> Tensor:
    """slots summed in float64, rounded once"""
    acc = torch.zeros_like(fc2_output[:, 0], dtype=torch.float64)
    for slot in range(local.shape[1]):
        y = fp32.widen(fc2_output[:, slot]).to(torch.float64)
        if bias is not None:
            y = y + fp32.widen(bias[local[:, slot].clamp(min=0)]).to(torch.float64)
        acc = torch.where(local[:, slot, None] >= 0, acc + scales[:, slot, None].to(torch.float64) * y, acc)
    return fp32.round_fp64(acc)


@defect("stages", "einsum references", kind="arithmetic")
def minus_zero_kept(call: MoeCall) -> Stages:
    """sums start from the first product instead of +0, and GEMMs add no +0, so that -0 survives"""
    gemm = GemmVariant(add_zero=False)
    return Stages(fc1_gemm=gemm, fc2_gemm=gemm, finalize=FinalizeVariant(first=-0.0))


@defect("finalize.step", "code compiled without flush-to-zero", kind="arithmetic")
def no_ftz_finalize(acc: Tensor, scale: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """subnormal products and sums of the finalize kept"""
    return _ieee.fma(scale, _ieee.add(y, bias), acc)


@defect("finalize.step", "models of FTZ", kind="arithmetic")
def flush_on_subnormal_grid(acc: Tensor, scale: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """finalize flushes after rounding to the subnormal grid: 2^-126 (1 - 2^-24) becomes 2^-126, not 0"""
    return fp32.flush(_ieee.fma(fp32.flush(scale), fp32.add(y, bias), acc))
