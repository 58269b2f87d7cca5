"""The kernel's activation in replaceable parts, and sigmoids other than the kernel's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mxfp4ref.routing import scoring
from mxfp4ref.sm90 import fp32, mufu
from mxfp4ref.sm90.swiglu import sigmoid

__all__ = [
    "SwigluVariant",
    "clamp_both",
    "divide",
    "effective_limit",
    "ex2_argument",
    "multiply_in_order",
    "one_plus_ex2",
    "sigmoid_exact",
    "sigmoid_exact_ex2",
    "sigmoid_exact_rcp",
    "sigmoid_libm",
    "sigmoid_tanh",
]

_LOG2_E = 0x3FB8AA3B
_LN2 = 0.6931471805599453
_FARTHEST = 200.0  # exp(-200) is far below float32


def clamp_both(up: Tensor, gate: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    return fp32.maximum(fp32.minimum(up, limit), -limit), fp32.minimum(gate, limit)


def multiply_in_order(gate: Tensor, weight: Tensor, up: Tensor) -> Tensor:
    return fp32.mul(fp32.mul(gate, weight), up)


@dataclass(frozen=True)
class SwigluVariant:
    """The kernel's activation with something changed, called like `swiglu`.

    Attributes:
        add: of the bias and of beta.
        clamp: up, gate and limit to up and gate.
        multiply: by alpha.
        sigmoid: of gate * alpha.
        product: of gate, its sigmoid and up + beta.
    """

    add: Callable[[Tensor, Tensor], Tensor] = fp32.add
    clamp: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = clamp_both
    multiply: Callable[[Tensor, Tensor], Tensor] = fp32.mul
    sigmoid: Callable[[Tensor], Tensor] = sigmoid
    product: Callable[[Tensor, Tensor, Tensor], Tensor] = multiply_in_order

    def __call__(
        self,
        fc1_output: Tensor,
        bias: Tensor | None = None,
        alpha: Tensor | None = None,
        beta: Tensor | None = None,
        limit: Tensor | None = None,
    ) -> Tensor:
        value = fp32.widen(fc1_output)
        if bias is not None:
            value = self.add(value, fp32.widen(bias).expand_as(value))
        up, gate = value.chunk(2, dim=-1)
        limit = effective_limit(gate, alpha, beta, limit)
        scaled = gate
        if limit is not None:
            up, gate = self.clamp(up, gate, limit)
            scaled = gate if alpha is None else self.multiply(gate, alpha.expand_as(gate))
            up = self.add(up, torch.zeros_like(up) if beta is None else beta.expand_as(up))
        return self.product(gate, self.sigmoid(scaled), up)


def effective_limit(gate: Tensor, *parameters: Tensor | None) -> Tensor | None:
    """The last of the parameters, Inf if it is missing and others are given, in the shape of the gate."""
    limit = parameters[-1]
    if limit is not None:
        return limit.expand_as(gate)
    return None if all(parameter is None for parameter in parameters) else torch.full_like(gate, torch.inf)


# Sigmoids, of float32 arguments.


def _exp(x: Tensor) -> Tensor:
    """e^x in float64, exact to 46 bits (rounded to float32, wrong once in millions); NaN stays NaN."""
    return torch.where(x.isnan(), x, scoring._exp(x.nan_to_num().clamp(-_FARTHEST, _FARTHEST)))


def ex2_argument(z: Tensor) -> Tensor:
    """The kernel's argument of EX2: -z log2 e."""
    return fp32.mul(-z, torch.tensor(_LOG2_E, dtype=torch.int32, device=z.device).view(torch.float32))


def sigmoid_exact(z: Tensor) -> Tensor:
    result = fp32.flush(scoring.sigmoid(z.nan_to_num()))
    return torch.where(z.isnan(), z, result)


def sigmoid_libm(z: Tensor) -> Tensor:
    e = fp32.round_fp64(_exp(-z.to(torch.float64)))
    return divide(torch.ones_like(e), fp32.add(torch.ones_like(e), e))


def sigmoid_exact_ex2(z: Tensor) -> Tensor:
    e = fp32.round_fp64(_exp(ex2_argument(z).to(torch.float64) * _LN2))
    return mufu.rcp(fp32.add(torch.ones_like(e), e))


def sigmoid_exact_rcp(z: Tensor) -> Tensor:
    e = mufu.ex2(ex2_argument(z))
    return divide(torch.ones_like(e), fp32.add(torch.ones_like(e), e))


def sigmoid_tanh(z: Tensor) -> Tensor:
    half = fp32.mul(z, torch.full_like(z, 0.5)).to(torch.float64)
    tanh = fp32.round_fp64(2 / (1 + _exp(-2 * half)) - 1)
    return fp32.mul(torch.full_like(tanh, 0.5), fp32.add(torch.ones_like(tanh), tanh))


def divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b rounded to float32: a float64 quotient of float32 numbers rounds as the exact one does."""
    return fp32.round_fp64(a.to(torch.float64) / b.to(torch.float64))


def one_plus_ex2(z: Tensor) -> Tensor:
    e = mufu.ex2(ex2_argument(z))
    return fp32.add(torch.ones_like(e), e)
