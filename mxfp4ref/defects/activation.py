"""Activations that differ from the kernel's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mxfp4ref.defects.defect import Applies, Defect, Kind, always, given, on_stages
from mxfp4ref.defects.ieee import ieee_add, ieee_mul
from mxfp4ref.defects.rounding import bf16, keep
from mxfp4ref.defects.variants.swiglu import (
    SwigluVariant,
    clamp_both,
    divide,
    effective_limit,
    ex2_argument,
    multiply_in_order,
    one_plus_ex2,
    sigmoid_exact,
    sigmoid_exact_ex2,
    sigmoid_exact_rcp,
    sigmoid_libm,
    sigmoid_tanh,
)
from mxfp4ref.model.forward import Stages
from mxfp4ref.sm90 import fp32, mufu
from mxfp4ref.sm90.swiglu import swiglu

__all__ = ["ACTIVATION_DEFECTS"]

_Optional = Tensor | None

# Clamps.


def _clamp_up_above(up: Tensor, gate: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    return fp32.minimum(up, limit), fp32.minimum(gate, limit)


def _clamp_gate_below(up: Tensor, gate: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    up, gate = clamp_both(up, gate, limit)
    return up, fp32.maximum(gate, -limit)


def _clamp_propagating(up: Tensor, gate: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    clamped_up, clamped_gate = clamp_both(up, gate, limit)
    return torch.where(up.isnan(), up, clamped_up), torch.where(gate.isnan(), gate, clamped_gate)


def _clamp_after_silu(
    x: Tensor, bias: _Optional, alpha: _Optional, beta: _Optional, limit: _Optional
) -> Tensor:
    def clamp(up: Tensor, gate: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
        return clamp_both(up, gate, limit)[0], gate

    def product(gate: Tensor, weight: Tensor, up: Tensor) -> Tensor:
        silu = fp32.mul(gate, weight)
        high = effective_limit(gate, alpha, beta, limit)
        return fp32.mul(silu if high is None else fp32.minimum(silu, high), up)

    return SwigluVariant(clamp=clamp, product=product)(x, bias, alpha, beta, limit)


# Products.


def _limit(x: Tensor, *parameters: _Optional) -> _Optional:
    return effective_limit(x.chunk(2, dim=-1)[1].to(torch.float32), *parameters)


def _silu_divided(gate: Tensor, denominator: Tensor, up: Tensor) -> Tensor:
    return fp32.mul(divide(gate, denominator), up)


def _gate_up_first(gate: Tensor, weight: Tensor, up: Tensor) -> Tensor:
    return fp32.mul(fp32.mul(gate, up), weight)


def _up_weighted_first(gate: Tensor, weight: Tensor, up: Tensor) -> Tensor:
    return fp32.mul(gate, fp32.mul(weight, up))


def _silu_bf16(gate: Tensor, weight: Tensor, up: Tensor) -> Tensor:
    return fp32.mul(bf16(fp32.mul(gate, weight)), up)


def _product_float64(gate: Tensor, weight: Tensor, up: Tensor) -> Tensor:
    return fp32.round_fp64(gate.to(torch.float64) * weight.to(torch.float64) * up.to(torch.float64))


def _beta_fused(x: Tensor, bias: _Optional, alpha: _Optional, beta: _Optional, limit: _Optional) -> Tensor:
    def product(gate: Tensor, weight: Tensor, up: Tensor) -> Tensor:
        silu = fp32.mul(gate, weight)
        if beta is None:
            return fp32.mul(silu, up)
        return fp32.fma(silu, up, fp32.mul(silu, beta.expand_as(silu)))

    return SwigluVariant(product=product)(x, bias, alpha, None, _limit(x, alpha, beta, limit))


def _beta_after_product(
    x: Tensor, bias: _Optional, alpha: _Optional, beta: _Optional, limit: _Optional
) -> Tensor:
    product = SwigluVariant()(x, bias, alpha, None, _limit(x, alpha, beta, limit))
    return product if beta is None else fp32.add(product, beta.expand_as(product))


def _alpha_on_gate(x: Tensor, bias: _Optional, alpha: _Optional, beta: _Optional, limit: _Optional) -> Tensor:
    def product(gate: Tensor, weight: Tensor, up: Tensor) -> Tensor:
        gate = gate if alpha is None else fp32.mul(gate, alpha.expand_as(gate))
        return multiply_in_order(gate, weight, up)

    return SwigluVariant(product=product)(x, bias, alpha, beta, limit)


def _alpha_in_constant(
    x: Tensor, bias: _Optional, alpha: _Optional, beta: _Optional, limit: _Optional
) -> Tensor:
    def ex2_form(scaled: Tensor) -> Tensor:
        e = mufu.ex2(scaled)
        return mufu.rcp(fp32.add(torch.ones_like(e), e))

    if alpha is None:
        return swiglu(x, bias, alpha, beta, limit)
    return SwigluVariant(sigmoid=ex2_form)(x, bias, ex2_argument(alpha), beta, limit)


def _bias_then_bf16(
    x: Tensor, bias: _Optional, alpha: _Optional, beta: _Optional, limit: _Optional
) -> Tensor:
    if bias is not None:
        x = fp32.add(x, fp32.widen(bias).expand_as(x))
    return swiglu(fp32.to_bf16(x), None, alpha, beta, limit)


def _bias_bf16(x: Tensor, bias: _Optional, alpha: _Optional, beta: _Optional, limit: _Optional) -> Tensor:
    if bias is not None:
        x = fp32.to_bf16(fp32.add(fp32.widen(x), fp32.widen(bias).expand_as(x)))
    return swiglu(x, None, alpha, beta, limit)


def _variant(
    name: str,
    summary: str,
    seen_in: str,
    applies: Applies = always,
    kind: Kind = "arithmetic",
    **changes: Any,
) -> Defect:
    stages = Stages(swiglu=SwigluVariant(**changes))
    return on_stages(name, summary, (seen_in,), stages, applies=applies, kind=kind)


ACTIVATION_DEFECTS: tuple[Defect, ...] = (
    _variant(
        "limit_one_sided",
        "up clamped from above only",
        "vllm#47392",
        given("swiglu_limit"),
        "defect",
        clamp=_clamp_up_above,
    ),
    _variant(
        "gate_clamped_below",
        "gate clamped to [-L, L]",
        "gpt-oss ports",
        given("swiglu_limit"),
        "defect",
        clamp=_clamp_gate_below,
    ),
    on_stages(
        "clamp_after_silu",
        "min(silu(gate), L) instead of silu(min(gate, L))",
        ("flashinfer#3492",),
        Stages(swiglu=_clamp_after_silu),
        applies=given("swiglu_limit"),
    ),
    on_stages(
        "beta_after_product",
        "beta added to the product instead of up",
        ("misread formulas",),
        Stages(swiglu=_beta_after_product),
        applies=given("swiglu_beta"),
    ),
    on_stages(
        "alpha_on_gate",
        "alpha multiplied into the gate itself, not only into the sigmoid's argument",
        ("misread formulas",),
        Stages(swiglu=_alpha_on_gate),
        applies=given("swiglu_alpha"),
    ),
    _variant(
        "clamp_propagates_nan",
        "a NaN gate or up stays NaN where the kernel's min and max give the limit",
        "torch.clamp",
        given("swiglu_alpha", "swiglu_beta", "swiglu_limit"),
        clamp=_clamp_propagating,
    ),
    on_stages(
        "bias1_before_rounding",
        "fc1 bias added to the float32 accumulators, before the rounding to bf16",
        ("fused epilogues",),
        Stages(round_fc1=keep, swiglu=_bias_then_bf16),
        kind="arithmetic",
        applies=given("fc1_biases"),
    ),
    on_stages(
        "bias1_bf16",
        "sum of GEMM1's output and the fc1 bias rounded to bf16",
        ("torch references in bf16",),
        Stages(swiglu=_bias_bf16),
        applies=given("fc1_biases"),
        kind="arithmetic",
    ),
    _variant("sigmoid_exact", "correctly rounded sigmoid", "mathematics", sigmoid=sigmoid_exact),
    _variant(
        "sigmoid_libm",
        "1 / (1 + exp(-x)), exp and division each correctly rounded to float32",
        "CPU references, CUDA's precise expf",
        sigmoid=sigmoid_libm,
    ),
    _variant("ex2_exact", "EX2 correctly rounded", "exp2f", sigmoid=sigmoid_exact_ex2),
    _variant("rcp_exact", "reciprocal correctly rounded", "__frcp_rn", sigmoid=sigmoid_exact_rcp),
    _variant(
        "sigmoid_tanh",
        "0.5 + 0.5 tanh(x / 2), tanh correctly rounded",
        "kernels built on tanh.approx",
        sigmoid=sigmoid_tanh,
    ),
    _variant(
        "silu_divided",
        "gate / (1 + e) in one rounding instead of gate * (1 / (1 + e))",
        "x / (1 + expf(-x))",
        sigmoid=one_plus_ex2,
        product=_silu_divided,
    ),
    _variant("gate_up_first", "(gate * up) * sigmoid", "reordered products", product=_gate_up_first),
    _variant("up_weighted_first", "gate * (sigmoid * up)", "reordered products", product=_up_weighted_first),
    _variant(
        "silu_bf16", "silu(gate) rounded to bf16 before up", "F.silu(gate) * up in bf16", product=_silu_bf16
    ),
    _variant(
        "product_unrounded",
        "gate * sigmoid * up in float64, rounded once",
        "wider references",
        product=_product_float64,
    ),
    on_stages(
        "beta_fused",
        "silu * up + silu * beta with one FMA instead of silu * (up + beta)",
        ("expanded products",),
        Stages(swiglu=_beta_fused),
        kind="arithmetic",
        applies=given("swiglu_beta"),
    ),
    on_stages(
        "alpha_in_constant",
        "gate * (alpha * log2 e) instead of (gate * alpha) * log2 e",
        ("compilers that reassociate",),
        Stages(swiglu=_alpha_in_constant),
        kind="arithmetic",
        applies=given("swiglu_alpha"),
    ),
    _variant(
        "no_ftz_activation",
        "subnormal sums and products of the activation kept",
        "code compiled without flush-to-zero",
        add=ieee_add,
        multiply=ieee_mul,
        product=lambda gate, weight, up: ieee_mul(ieee_mul(gate, weight), up),
    ),
)
