"""The activations between the two GEMMs, an entry of one table each (`docs/arithmetic.md`, section 4).

Whatever depends on the activation of a call looks it up here. A loop for a CPU (`elementwise_loops.py`) and a kernel
for a GPU (`gpu/elementwise.py`) are optional: where there is none, the function of the entry is what runs.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mxfp4ref._compiler import uncompiled
from mxfp4ref._words import shown
from mxfp4ref.sm90 import fp32, mufu

__all__ = [
    "ACTIVATIONS",
    "ERF_LARGE",
    "ERF_SMALL",
    "ERF_SPLIT",
    "GEGLU",
    "GEGLU_TANH",
    "GELU",
    "GELU_TANH",
    "HALF_ROOT_TWO",
    "IDENTITY",
    "RELU",
    "RELU2",
    "SILU",
    "SITU",
    "SWIGLU",
    "SWIGLU_BIAS",
    "SWIGLU_STEP",
    "Activation",
    "activate",
    "activation_of",
    "check_no_name",
    "sigmoid",
    "tanh",
    "up_and_gate",
]

SWIGLU, GEGLU, SWIGLU_BIAS, SWIGLU_STEP, GEGLU_TANH, SITU = 3, 4, 5, 7, 8, 10
GELU, RELU, SILU, RELU2, IDENTITY = 0, 1, 2, 6, 9  # without a gate

# float32 bits
_LOG2_E = 0x3FB8AA3B  # 1.44269502
HALF_ROOT_TWO = 0x3F3504F3  # 0.70710678
GELU_TANH = (0x3F4C422A, 0x3D122279)  # sqrt(2 / pi), and that times 0.044715
# CUDA's erff: from this |x| on it is 1 - 2^-(x + x p(x)), below it x + x p(x^2); either p, highest power first.
ERF_SPLIT = 0x3F8060FE
ERF_LARGE = (0x38EB4C3A, 0xBAAE005B, 0x3C09919F, 0xBD24D99A, 0x3E235519, 0x3F69B4F9, 0x3F210A14)
ERF_SMALL = (0x38B1E96A, 0xBA574D20, 0x3BAAD5EA, 0xBCDC1BE7, 0x3DE718AF, 0xBEC093AC, 0x3E0375D3)


def sigmoid(z: Tensor) -> Tensor:
    """1 / (1 + 2^(-z log2 e)) with the special function unit's EX2 and RCP, float32."""
    power = mufu.ex2(fp32.mul(-z, _number(_LOG2_E, z)))
    return mufu.rcp(fp32.add(torch.ones_like(power), power))


def tanh(z: Tensor) -> Tensor:
    """2 sigmoid(2 z) - 1, the last two operations as one FMA, float32."""
    two = torch.full_like(z, 2)
    return fp32.fma(sigmoid(fp32.mul(z, two)), two, torch.full_like(z, -1))


def erf(z: Tensor) -> Tensor:
    """CUDA's erff in fast math: two polynomials by FMAs, the one for large |z| with EX2, float32."""
    sign = z.view(torch.int32) & -(1 << 31)
    magnitude = (z.view(torch.int32) ^ sign).view(torch.float32)
    large = magnitude >= _number(ERF_SPLIT, z)
    power, factor = torch.where(large, magnitude, fp32.mul(z, z)), torch.where(large, -magnitude, z)
    total = torch.where(large, _number(ERF_LARGE[0], z), _number(ERF_SMALL[0], z))
    for of_large, of_small in zip(ERF_LARGE[1:], ERF_SMALL[1:], strict=True):
        total = fp32.fma(total, power, torch.where(large, _number(of_large, z), _number(of_small, z)))
    total = fp32.fma(total, factor, factor)
    rest = fp32.add(torch.ones_like(z), -mufu.ex2(total))
    return torch.where(large, (rest.view(torch.int32) | sign).view(torch.float32), total)


def gelu(gate: Tensor) -> Tensor:
    half, one = torch.full_like(gate, 0.5), torch.ones_like(gate)
    scaled = fp32.mul(gate, _number(HALF_ROOT_TWO, gate))
    return fp32.mul(fp32.mul(half, gate), fp32.add(one, erf(scaled)))


def gelu_tanh(gate: Tensor) -> Tensor:
    """GELU's approximation by tanh.approx."""
    inner = fp32.fma(fp32.mul(_number(GELU_TANH[1], gate), gate), gate, _number(GELU_TANH[0], gate))
    tanh = mufu.tanh(fp32.mul(gate, inner))
    return fp32.mul(torch.full_like(gate, 0.5), fp32.fma(gate, tanh, gate))


def _number(bits: int, like: Tensor) -> Tensor:
    """The float32 number of these bits, a scalar beside `like`."""
    return (
        torch.tensor(np.uint32(bits).view(np.int32), device=like.device).view(torch.float32).expand_as(like)
    )


def silu(gate: Tensor) -> Tensor:
    return fp32.mul(gate, sigmoid(gate))


def relu(x: Tensor) -> Tensor:
    """max.NaN with +0, which -0 becomes: unlike `fp32.maximum` it keeps NaN."""
    return torch.where(x.isnan(), fp32.flush(x), fp32.maximum(x, torch.zeros_like(x)))


def relu2(x: Tensor) -> Tensor:
    rectified = relu(x)
    return fp32.mul(rectified, rectified)


def clamp(x: Tensor, limit: Tensor) -> Tensor:
    """To [-L, L]. Of min or max with a NaN the other operand is left: NaN becomes the limit, even if that is Inf."""
    return fp32.maximum(fp32.minimum(x, limit), -limit)


def _swiglu(up: Tensor, gate: Tensor) -> Tensor:
    return fp32.mul(silu(gate), up)


def _geglu(up: Tensor, gate: Tensor) -> Tensor:
    return fp32.mul(gelu(gate), up)


def _swiglu_bias(up: Tensor, gate: Tensor, alpha: Tensor, beta: Tensor, limit: Tensor) -> Tensor:
    up, gate = clamp(up, limit), fp32.minimum(gate, limit)
    return fp32.mul(fp32.mul(gate, sigmoid(fp32.mul(gate, alpha))), fp32.add(up, beta))


def _swiglu_step(up: Tensor, gate: Tensor, limit: Tensor) -> Tensor:
    return fp32.mul(fp32.minimum(silu(gate), limit), clamp(up, limit))


def _geglu_tanh(up: Tensor, gate: Tensor) -> Tensor:
    return fp32.mul(gelu_tanh(gate), up)


def _situ(up: Tensor, gate: Tensor, beta: Tensor, linear_beta: Tensor) -> Tensor:
    capped = fp32.mul(tanh(fp32.mul(gate, mufu.rcp(beta))), sigmoid(gate))
    linear = fp32.mul(tanh(fp32.mul(up, mufu.rcp(linear_beta))), linear_beta)
    return fp32.mul(fp32.mul(capped, beta), linear)


@dataclass(frozen=True, eq=False)
class Activation:
    """One activation of the kernel.

    Attributes:
        name, id: the member of flashinfer's `ActivationType`.
        function: from up and gate, or where there is no gate from the one value, the bias included, and the
            parameters, all float32 of one shape, to the result. The kernel multiplies that by a quantisation
            factor, 1 for bf16, so that subnormal results are flushed whatever the function does.
        defaults: the parameters that it reads, by the names of the call's arguments and in the function's order, and
            what is compiled in for each, which counts where it is not given.
        becomes: the id of the activation that the kernel runs instead where any of that one's parameters is given.
        gated: whether fc1 has 2I rows, up and gate, rather than I.
    """

    name: str
    id: int
    function: Callable[..., Tensor]
    defaults: Mapping[str, float] = field(default_factory=dict)
    becomes: int | None = None
    gated: bool = True


ACTIVATIONS = {
    activation.id: activation
    for activation in (
        Activation("Gelu", GELU, gelu, gated=False),
        Activation("Relu", RELU, relu, gated=False),
        Activation("Silu", SILU, silu, gated=False),
        Activation("Swiglu", SWIGLU, _swiglu, becomes=SWIGLU_BIAS),
        Activation("Geglu", GEGLU, _geglu),
        Activation(
            "SwigluBias",
            SWIGLU_BIAS,
            _swiglu_bias,
            {"swiglu_alpha": 1.0, "swiglu_beta": 0.0, "swiglu_limit": torch.inf},
        ),
        Activation("Relu2", RELU2, relu2, gated=False),
        Activation("SwigluStep", SWIGLU_STEP, _swiglu_step, {"swiglu_limit": 7.0}),
        Activation("GegluTanh", GEGLU_TANH, _geglu_tanh),
        Activation("Identity", IDENTITY, fp32.flush, gated=False),
        Activation("Situ", SITU, _situ, {"situ_beta": 4.0, "situ_linear_beta": 25.0}),
    )
}


def check_no_name(activation_type: object) -> None:
    """Raise TypeError, with the number to write instead, where an activation is given by a name."""
    if not isinstance(activation_type, str):
        return
    numbers = {one.name.lower(): f"{one.id} ({one.name})" for one in ACTIVATIONS.values()}
    name = activation_type.lower()
    near = [name] if name in numbers else difflib.get_close_matches(name, numbers)
    words = f"did you mean {' or '.join(numbers[one] for one in near)}?"
    hint = words if near else f"one of {', '.join(numbers.values())}"
    hint = f"write {numbers[name]}" if name in numbers else hint
    raise TypeError(f"activation_type: expected an int, got str {shown(activation_type)}; {hint}")


def activation_of(activation_type: int, given: Collection[str]) -> Activation:
    """What the kernel runs for an id of the table where these parameters are given."""
    activation = ACTIVATIONS[activation_type]
    other = activation if activation.becomes is None else ACTIVATIONS[activation.becomes]
    return other if any(name in other.defaults for name in given) else activation


def up_and_gate(value: Tensor, *, gated: bool) -> tuple[Tensor, Tensor]:
    """The halves of `[..., 2I]`; where there is no gate ones and the only value, `[..., I]`."""
    if not gated:
        return torch.ones_like(value), value
    up, gate = value.chunk(2, dim=-1)
    return up, gate


@uncompiled
def activate(
    activation: Activation, fc1_output: Tensor, bias: Tensor | None, parameters: Sequence[Tensor | None]
) -> Tensor:
    """An activation in float32, before its rounding to bf16.

    Args:
        activation: an entry of the table.
        fc1_output: `[..., 2I]` bf16, fp16 or float32, up in the first half and gate in the second; `[..., I]` where
            the activation has no gate.
        bias: bf16 or fp16, broadcastable to `fc1_output`, or None.
        parameters: those that the activation reads, in its order: float32, broadcastable to `[..., I]`, or None for
            what is compiled in.

    Returns:
        `[..., I] float32`; NaN is 0x7FFFFFFF.
    """
    value = fp32.widen(fc1_output)
    if bias is not None:
        value = fp32.add(value, fp32.widen(bias).expand_as(value))
    halves = value.chunk(2, dim=-1) if activation.gated else (value,)
    given = [
        torch.full_like(halves[0], default) if parameter is None else parameter.expand_as(halves[0])
        for parameter, default in zip(parameters, activation.defaults.values(), strict=True)
    ]
    return activation.function(*halves, *given)
