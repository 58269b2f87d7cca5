"""The kernel's SwiGLU in replaceable parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.activation import SWIGLU, SWIGLU_BIAS, Activation, activate, sigmoid

__all__ = ["Operands", "SwigluVariant", "clamp_both", "multiply_in_order", "silu"]


@dataclass(frozen=True)
class Operands:
    """What the product is made of, float32 of one shape.

    Attributes:
        gate, up: clamped.
        sigmoid: of `scaled`, gate * alpha.
        shifted: up + beta.
        alpha, beta, limit: 1, 0 and Inf where a layer has others of them but not these.
    """

    gate: Tensor
    up: Tensor
    sigmoid: Tensor
    scaled: Tensor
    shifted: Tensor
    alpha: Tensor
    beta: Tensor
    limit: Tensor


def clamp_both(up: Tensor, gate: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    return fp32.maximum(fp32.minimum(up, limit), -limit), fp32.minimum(gate, limit)


def silu(x: Operands) -> Tensor:
    return fp32.mul(x.gate, x.sigmoid)


def multiply_in_order(x: Operands) -> Tensor:
    return fp32.mul(silu(x), x.shifted)


@dataclass(frozen=True)
class SwigluVariant:
    """The kernel's SwiGLU with something changed, called like `activate`; other activations are the kernel's.

    Attributes:
        add: of the bias and of beta.
        clamp: up, gate and limit to up and gate.
        multiply: by alpha.
        sigmoid: of gate * alpha.
        product: of the clamped gate, its sigmoid and up + beta.
    """

    add: Callable[[Tensor, Tensor], Tensor] = fp32.add
    clamp: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = clamp_both
    multiply: Callable[[Tensor, Tensor], Tensor] = fp32.mul
    sigmoid: Callable[[Tensor], Tensor] = sigmoid
    product: Callable[[Operands], Tensor] = multiply_in_order

    def __call__(
        self,
        activation: Activation,
        fc1_output: Tensor,
        bias: Tensor | None,
        parameters: Sequence[Tensor | None],
    ) -> Tensor:
        if activation.id not in (SWIGLU, SWIGLU_BIAS):
            return activate(activation, fc1_output, bias, parameters)
        plain = activation.id == SWIGLU
        alpha, beta, limit = (None, None, None) if plain else parameters
        value = fp32.widen(fc1_output)
        if bias is not None:
            value = self.add(value, fp32.widen(bias).expand_as(value))
        up, gate = value.chunk(2, dim=-1)
        defaults = zip((alpha, beta, limit), (1.0, 0.0, torch.inf), strict=True)
        given = [torch.full_like(gate, d) if p is None else p.expand_as(gate) for p, d in defaults]
        if not plain:
            up, gate = self.clamp(up, gate, given[2])
        scaled = gate if alpha is None else self.multiply(gate, given[0])
        shifted = up if plain else self.add(up, given[1])
        return self.product(Operands(gate, up, self.sigmoid(scaled), scaled, shifted, *given))
