"""SwiGLU as a stage alone, with any of its parameters (`docs/arithmetic.md`, section 4)."""

from __future__ import annotations

from torch import Tensor

from mxfp4ref.sm90.activation import ACTIVATIONS, SWIGLU, SWIGLU_BIAS, activate

__all__ = ["swiglu"]


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
    given = (alpha, beta, limit)
    if alpha is beta is limit is None:
        return activate(ACTIVATIONS[SWIGLU], fc1_output, bias, ())
    return activate(ACTIVATIONS[SWIGLU_BIAS], fc1_output, bias, given)
