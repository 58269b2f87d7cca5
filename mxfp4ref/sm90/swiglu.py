"""The activation between the two GEMMs: bias, clamp, sigmoid, product (`docs/arithmetic.md`, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref._compiler import uncompiled
from mxfp4ref.sm90 import fp32, mufu

__all__ = ["sigmoid", "swiglu"]

_LOG2_E = 0x3FB8AA3B  # the float32 bits of log2(e), 1.44269502


@uncompiled
def swiglu(
    fc1_output: Tensor,
    bias: Tensor | None = None,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    limit: Tensor | None = None,
) -> Tensor:
    """The gated activation in float32, before its rounding to bf16.

    Args:
        fc1_output: `[..., 2I] bf16` (or float32), up in the first half and gate in the second.
        bias: `[..., 2I] bf16`, broadcastable to `fc1_output`, or None.
        alpha, beta, limit: float32, broadcastable to `[..., I]`, or None. Where any is given the clamped
            form is used and the missing ones are 1, 0 and +Inf; where none is, the plain form.

    Returns:
        `[..., I] float32`; NaN is 0x7FFFFFFF.
    """
    value = fp32.widen(fc1_output)
    if bias is not None:
        value = fp32.add(value, fp32.widen(bias).expand_as(value))
    up, gate = value.chunk(2, dim=-1)
    if alpha is None and beta is None and limit is None:
        return fp32.mul(fp32.mul(gate, sigmoid(gate)), up)
    # A NaN operand of min or max gives the other one: a NaN gate or up becomes the limit, even if that is Inf.
    limit = torch.full_like(gate, torch.inf) if limit is None else limit.expand_as(gate)
    up = fp32.maximum(fp32.minimum(up, limit), -limit)
    gate = fp32.minimum(gate, limit)
    scaled = gate if alpha is None else fp32.mul(gate, alpha.expand_as(gate))
    shift = torch.zeros_like(up) if beta is None else beta.expand_as(up)
    return fp32.mul(fp32.mul(gate, sigmoid(scaled)), fp32.add(up, shift))


def sigmoid(z: Tensor) -> Tensor:
    """1 / (1 + 2^(-z log2 e)) with the special function unit's EX2 and RCP, float32."""
    log2_e = torch.tensor(_LOG2_E, dtype=torch.int32, device=z.device).view(torch.float32)
    power = mufu.ex2(fp32.mul(-z, log2_e))
    return mufu.rcp(fp32.add(torch.ones_like(power), power))
