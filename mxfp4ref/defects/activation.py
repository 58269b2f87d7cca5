"""SwiGLUs that differ from the kernel's, and what all activations have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mxfp4ref import _ieee
from mxfp4ref.defects.definition import defect, given, runs
from mxfp4ref.defects.variants.rounding import bf16, keep
from mxfp4ref.defects.variants.swiglu import Operands, SwigluVariant, clamp_both, silu
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import Stages
from mxfp4ref.routing import scoring
from mxfp4ref.sm90 import fp32, mufu
from mxfp4ref.sm90.activation import Activation, activate

_has_alpha, _has_beta, _has_limit = given("swiglu_alpha"), given("swiglu_beta"), given("swiglu_limit")
_is_swiglu = runs("Swiglu", "SwigluBias")
_Pair = tuple[Tensor, Tensor]


@defect("swiglu.clamp", "vllm#47392", applies=_has_limit)
def limit_one_sided(up: Tensor, gate: Tensor, limit: Tensor) -> _Pair:
    """up clamped from above only"""
    return fp32.minimum(up, limit), fp32.minimum(gate, limit)


@defect("swiglu.clamp", "gpt-oss ports", applies=_has_limit)
def gate_clamped_below(up: Tensor, gate: Tensor, limit: Tensor) -> _Pair:
    """gate clamped to [-L, L]"""
    up, gate = clamp_both(up, gate, limit)
    return up, fp32.maximum(gate, -limit)


@defect("stages", "flashinfer#3492", applies=lambda call: _has_limit(call) and _is_swiglu(call))
def clamp_after_silu(call: MoeCall) -> Stages:
    """min(silu(gate), L) instead of silu(min(gate, L))"""

    def clamp(up: Tensor, gate: Tensor, limit: Tensor) -> _Pair:
        return clamp_both(up, gate, limit)[0], gate

    def product(x: Operands) -> Tensor:
        return fp32.mul(fp32.minimum(silu(x), x.limit), x.shifted)

    return Stages(activate=SwigluVariant(clamp=clamp, product=product))


@defect("swiglu.product", "misread formulas", applies=_has_beta)
def beta_after_product(x: Operands) -> Tensor:
    """beta added to the product instead of up"""
    return fp32.add(fp32.mul(silu(x), x.up), x.beta)


@defect("swiglu.product", "misread formulas", applies=_has_alpha)
def alpha_on_gate(x: Operands) -> Tensor:
    """alpha multiplied into the gate itself, not only into the sigmoid's argument"""
    return fp32.mul(fp32.mul(fp32.mul(x.gate, x.alpha), x.sigmoid), x.shifted)


@defect(
    "swiglu.clamp",
    "torch.clamp",
    kind="arithmetic",
    applies=given("swiglu_alpha", "swiglu_beta", "swiglu_limit"),
)
def clamp_propagates_nan(up: Tensor, gate: Tensor, limit: Tensor) -> _Pair:
    """a NaN gate or up stays NaN where the kernel's min and max give the limit"""
    clamped_up, clamped_gate = clamp_both(up, gate, limit)
    return torch.where(up.isnan(), up, clamped_up), torch.where(gate.isnan(), gate, clamped_gate)


@defect("stages", "fused epilogues", kind="arithmetic", applies=given("fc1_biases"))
def bias1_before_rounding(call: MoeCall) -> Stages:
    """fc1 bias added to the float32 accumulators, before the rounding to bf16"""
    return Stages(round_fc1=keep, activate=bias1_bf16)


@defect("activate", "torch references in bf16", kind="arithmetic", applies=given("fc1_biases"))
def bias1_bf16(
    activation: Activation, x: Tensor, bias: Tensor | None, parameters: Sequence[Tensor | None]
) -> Tensor:
    """sum of GEMM1's output and the fc1 bias rounded to bf16"""
    if bias is not None:
        x = fp32.add(fp32.widen(x), fp32.widen(bias).expand_as(x))
    return activate(activation, x if x.dtype == torch.bfloat16 else fp32.to_bf16(x), None, parameters)


def _exp(x: Tensor) -> Tensor:
    """e^x in float64, exact to 46 bits (rounded to float32, wrong once in millions); NaN stays NaN."""
    farthest = 200.0  # exp(-200) is far below float32
    return torch.where(x.isnan(), x, scoring._exp(x.nan_to_num().clamp(-farthest, farthest)))


def _ex2_argument(z: Tensor) -> Tensor:
    """The kernel's argument of EX2: -z log2 e."""
    return fp32.mul(-z, torch.tensor(0x3FB8AA3B, dtype=torch.int32, device=z.device).view(torch.float32))


def _plus_one(x: Tensor) -> Tensor:
    return fp32.add(torch.ones_like(x), x)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b rounded to float32: a float64 quotient of float32 numbers rounds as the exact one does."""
    return fp32.round_fp64(a.to(torch.float64) / b.to(torch.float64))


@defect("swiglu.sigmoid", "mathematics", kind="arithmetic")
def sigmoid_exact(z: Tensor) -> Tensor:
    """correctly rounded sigmoid"""
    return torch.where(z.isnan(), z, fp32.flush(scoring.sigmoid(z.nan_to_num())))


@defect("swiglu.sigmoid", "CPU references, CUDA's precise expf", kind="arithmetic")
def sigmoid_libm(z: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), exp and division each correctly rounded to float32"""
    e = fp32.round_fp64(_exp(-z.to(torch.float64)))
    return _divide(torch.ones_like(e), _plus_one(e))


@defect("swiglu.sigmoid", "exp2f", kind="arithmetic")
def ex2_exact(z: Tensor) -> Tensor:
    """EX2 correctly rounded"""
    ln2 = 0.6931471805599453
    return mufu.rcp(_plus_one(fp32.round_fp64(_exp(_ex2_argument(z).to(torch.float64) * ln2))))


@defect("swiglu.sigmoid", "__frcp_rn", kind="arithmetic")
def rcp_exact(z: Tensor) -> Tensor:
    """reciprocal correctly rounded"""
    return _divide(torch.ones_like(z), _plus_one(mufu.ex2(_ex2_argument(z))))


@defect("swiglu.sigmoid", "kernels built on tanh.approx", kind="arithmetic")
def sigmoid_tanh(z: Tensor) -> Tensor:
    """0.5 + 0.5 tanh(x / 2), tanh correctly rounded"""
    half = torch.full_like(z, 0.5)
    argument = fp32.mul(z, half).to(torch.float64)
    return fp32.mul(half, _plus_one(fp32.round_fp64(2 / (1 + _exp(-2 * argument)) - 1)))


@defect("swiglu.product", "x / (1 + expf(-x))", kind="arithmetic")
def silu_divided(x: Operands) -> Tensor:
    """gate / (1 + e) in one rounding instead of gate * (1 / (1 + e))"""
    return fp32.mul(_divide(x.gate, _plus_one(mufu.ex2(_ex2_argument(x.scaled)))), x.shifted)


@defect("swiglu.product", "reordered products", kind="arithmetic")
def gate_up_first(x: Operands) -> Tensor:
    """(gate * up) * sigmoid"""
    return fp32.mul(fp32.mul(x.gate, x.shifted), x.sigmoid)


@defect("swiglu.product", "reordered products", kind="arithmetic")
def up_weighted_first(x: Operands) -> Tensor:
    """gate * (sigmoid * up)"""
    return fp32.mul(x.gate, fp32.mul(x.sigmoid, x.shifted))


@defect("swiglu.product", "F.silu(gate) * up in bf16", kind="arithmetic")
def silu_bf16(x: Operands) -> Tensor:
    """silu(gate) rounded to bf16 before up"""
    return fp32.mul(bf16(silu(x)), x.shifted)


@defect("swiglu.product", "wider references", kind="arithmetic")
def product_unrounded(x: Operands) -> Tensor:
    """gate * sigmoid * up in float64, rounded once"""
    gate, sigmoid, shifted = (factor.to(torch.float64) for factor in (x.gate, x.sigmoid, x.shifted))
    return fp32.round_fp64(gate * sigmoid * shifted)


@defect("swiglu.product", "expanded products", kind="arithmetic", applies=_has_beta)
def beta_fused(x: Operands) -> Tensor:
    """silu * up + silu * beta with one FMA instead of silu * (up + beta)"""
    return fp32.fma(silu(x), x.up, fp32.mul(silu(x), x.beta))


@defect("swiglu.product", "compilers that reassociate", kind="arithmetic", applies=_has_alpha)
def alpha_in_constant(x: Operands) -> Tensor:
    """gate * (alpha * log2 e) instead of (gate * alpha) * log2 e"""
    sigmoid = mufu.rcp(_plus_one(mufu.ex2(fp32.mul(x.gate, _ex2_argument(x.alpha)))))
    return fp32.mul(fp32.mul(x.gate, sigmoid), x.shifted)


@defect("stages", "code compiled without flush-to-zero", kind="arithmetic", applies=_is_swiglu)
def no_ftz_activation(call: MoeCall) -> Stages:
    """subnormal sums and products of the activation kept"""

    def product(x: Operands) -> Tensor:
        return _ieee.mul(_ieee.mul(x.gate, x.sigmoid), x.shifted)

    return Stages(activate=SwigluVariant(add=_ieee.add, multiply=_ieee.mul, product=product))
