"""SwigluSteps, SiTUs and Geglus that differ from the kernel's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mxfp4ref.defects.activation import _divide, _exp
from mxfp4ref.defects.definition import activated_by, defect, given, runs
from mxfp4ref.defects.variants.rounding import bf16
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90 import fp32, mufu
from mxfp4ref.sm90.activation import clamp, gelu, sigmoid, silu, tanh

_is_step = runs("SwigluStep")
_Function = Callable[[Tensor], Tensor]


@defect("activation.SwigluStep", "SwiGLU's order")
def step_limit_before_silu(up: Tensor, gate: Tensor, limit: Tensor) -> Tensor:
    """SwigluStep as silu(min(gate, L)) instead of min(silu(gate), L)"""
    return fp32.mul(silu(fp32.minimum(gate, limit)), clamp(up, limit))


@defect("activation.SwigluStep", "both clamped alike")
def step_gate_clamped_below(up: Tensor, gate: Tensor, limit: Tensor) -> Tensor:
    """SwigluStep's silu(gate) clamped to [-L, L], which shows where L is below 0.28"""
    return fp32.mul(clamp(silu(gate), limit), clamp(up, limit))


@defect("activation.SwigluStep", "vllm#47392")
def step_limit_one_sided(up: Tensor, gate: Tensor, limit: Tensor) -> Tensor:
    """SwigluStep's up clamped from above only"""
    return fp32.mul(fp32.minimum(silu(gate), limit), fp32.minimum(up, limit))


@defect("activation.SwigluStep", "torch.clamp", kind="arithmetic")
def step_clamp_propagates_nan(up: Tensor, gate: Tensor, limit: Tensor) -> Tensor:
    """SwigluStep's NaNs stay NaN where the kernel's min and max give the limit"""
    gated = silu(gate)
    product = fp32.mul(fp32.minimum(gated, limit), clamp(up, limit))
    return torch.where(gated.isnan(), gated, torch.where(up.isnan(), up, product))


@defect("activation.SwigluStep", "F.silu(gate) in bf16", kind="arithmetic")
def step_silu_bf16(up: Tensor, gate: Tensor, limit: Tensor) -> Tensor:
    """SwigluStep's silu(gate) rounded to bf16 before the clamp"""
    return fp32.mul(fp32.minimum(bf16(silu(gate)), limit), clamp(up, limit))


@defect(
    "call",
    "one kernel for all SwiGLUs",
    applies=lambda call: _is_step(call) and given("swiglu_alpha", "swiglu_beta")(call),
)
def step_reads_alpha_and_beta(call: MoeCall) -> MoeCall:
    """SwigluStep with alpha and beta, which it does not read, as SwiGLU has them"""
    if not _is_step(call):
        return call

    def function(up: Tensor, gate: Tensor, alpha: Tensor, beta: Tensor, limit: Tensor) -> Tensor:
        gated = fp32.mul(gate, sigmoid(fp32.mul(gate, alpha)))
        return fp32.mul(fp32.minimum(gated, limit), fp32.add(clamp(up, limit), beta))

    return activated_by(call, function, {"swiglu_alpha": 1.0, "swiglu_beta": 0.0, "swiglu_limit": 7.0})


@defect("activation.Situ", "capped gates")
def situ_sigmoid_of_capped(up: Tensor, gate: Tensor, beta: Tensor, linear_beta: Tensor) -> Tensor:
    """SiTU's sigmoid of the capped gate instead of the gate"""
    capped = _cap(gate, beta)
    return fp32.mul(fp32.mul(capped, sigmoid(capped)), _cap(up, linear_beta))


@defect("activation.Situ", "swapped arguments")
def situ_betas_swapped(up: Tensor, gate: Tensor, beta: Tensor, linear_beta: Tensor) -> Tensor:
    """SiTU's beta and linear beta swapped"""
    return _situ(up, gate, linear_beta, beta)


@defect("activation.Situ", "SwiGLU's up")
def situ_up_uncapped(up: Tensor, gate: Tensor, beta: Tensor, linear_beta: Tensor) -> Tensor:
    """SiTU's up taken as it is, not capped"""
    return fp32.mul(_gated(gate, beta), up)


@defect("activation.Situ", "torch.clamp in place of tanh")
def situ_clamped(up: Tensor, gate: Tensor, beta: Tensor, linear_beta: Tensor) -> Tensor:
    """SiTU's gate and up clamped at their beta instead of capped by a tanh"""
    return fp32.mul(fp32.mul(clamp(gate, beta), sigmoid(gate)), clamp(up, linear_beta))


@defect("activation.Situ", "tanhf", kind="arithmetic")
def situ_tanh_exact(up: Tensor, gate: Tensor, beta: Tensor, linear_beta: Tensor) -> Tensor:
    """SiTU's tanh correctly rounded"""

    def exact(z: Tensor) -> Tensor:
        power = _exp(-2 * z.to(torch.float64).abs())
        return fp32.round_fp64(torch.copysign((1 - power) / (1 + power), z))

    return _situ(up, gate, beta, linear_beta, tanh=exact)


@defect("activation.Situ", "CUTLASS's own tanh", kind="arithmetic")
def situ_tanh_approx(up: Tensor, gate: Tensor, beta: Tensor, linear_beta: Tensor) -> Tensor:
    """SiTU's tanh by tanh.approx, off by 2^-11, instead of 2 sigmoid(2 z) - 1"""
    return _situ(up, gate, beta, linear_beta, tanh=mufu.tanh)


@defect("activation.Situ", "code compiled without fast math", kind="arithmetic")
def situ_reciprocal_exact(up: Tensor, gate: Tensor, beta: Tensor, linear_beta: Tensor) -> Tensor:
    """SiTU's 1 / beta correctly rounded"""
    return _situ(up, gate, beta, linear_beta, scale=lambda x, b: fp32.mul(x, _divide(torch.ones_like(b), b)))


@defect("activation.Situ", "beta * tanh(gate / beta)", kind="arithmetic")
def situ_divided(up: Tensor, gate: Tensor, beta: Tensor, linear_beta: Tensor) -> Tensor:
    """SiTU's gate / beta in one rounding instead of gate * (1 / beta)"""
    return _situ(up, gate, beta, linear_beta, scale=_divide)


@defect("activation.Situ", "reordered products", kind="arithmetic")
def situ_beta_first(up: Tensor, gate: Tensor, beta: Tensor, linear_beta: Tensor) -> Tensor:
    """SiTU's (tanh * beta) * sigmoid instead of (tanh * sigmoid) * beta"""
    return fp32.mul(fp32.mul(_cap(gate, beta), sigmoid(gate)), _cap(up, linear_beta))


@defect("activation.Situ", "torch references in bf16", kind="arithmetic")
def situ_gate_bf16(up: Tensor, gate: Tensor, beta: Tensor, linear_beta: Tensor) -> Tensor:
    """SiTU's two factors rounded to bf16 before their product"""
    return fp32.mul(bf16(_gated(gate, beta)), bf16(_cap(up, linear_beta)))


@defect("activation.Geglu Gelu", "GegluTanh", "F.gelu(x, approximate='tanh')", kind="arithmetic")
def gelu_by_tanh(*up_and_gate: Tensor) -> Tensor:
    """GELU, with a gate or without, by the approximation with tanh"""
    x = up_and_gate[-1].to(torch.float64)
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    power = _exp(-2 * inner.abs())
    tanh = torch.copysign((1 - power) / (1 + power), inner)
    weighted = fp32.round_fp64(0.5 * x * (1 + tanh))
    return fp32.mul(weighted, up_and_gate[0]) if len(up_and_gate) > 1 else weighted


@defect("activation.Geglu", "F.gelu(gate) in bf16", kind="arithmetic")
def gelu_bf16(up: Tensor, gate: Tensor) -> Tensor:
    """Geglu's gelu(gate) rounded to bf16 before up"""
    return fp32.mul(bf16(gelu(gate)), up)


def _times_reciprocal(x: Tensor, b: Tensor) -> Tensor:
    return fp32.mul(x, mufu.rcp(b))


def _cap(
    x: Tensor, b: Tensor, *, tanh: _Function = tanh, scale: Callable[..., Tensor] = _times_reciprocal
) -> Tensor:
    return fp32.mul(tanh(scale(x, b)), b)


def _gated(
    gate: Tensor, beta: Tensor, *, tanh: _Function = tanh, scale: Callable[..., Tensor] = _times_reciprocal
) -> Tensor:
    return fp32.mul(fp32.mul(tanh(scale(gate, beta)), sigmoid(gate)), beta)


def _situ(
    up: Tensor, gate: Tensor, beta: Tensor, linear_beta: Tensor, **parts: Callable[..., Tensor]
) -> Tensor:
    """The kernel's, with another tanh or another way to divide by beta."""
    return fp32.mul(_gated(gate, beta, **parts), _cap(up, linear_beta, **parts))
