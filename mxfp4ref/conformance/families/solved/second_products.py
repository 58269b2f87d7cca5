"""GEMM2 of rows of any activation, in every bit."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90.elementwise import to_bf16
from mxfp4ref.sm90.gemm.cpu import group_scaled_gemm

__all__ = ["second_products"]


def second_products(call: MoeCall, activation: Tensor, expert: Tensor) -> Tensor:
    """Rounded, `[R, H] bf16`, of rows of the activation `[R, I] bf16` and their experts `[R]`."""
    y = activation.new_zeros(len(activation), call.experts.hidden_size)
    for number in torch.unique(expert).tolist():
        mine = expert == number
        codes, scales = call.experts.weights("fc2", number)
        assert scales is not None
        product = group_scaled_gemm(
            activation[None, mine],
            codes,
            scales,
            tactic=call.kernel.tactics[1],
            generation=call.kernel.generation,
        )
        y[mine] = to_bf16(product[0])
    return y
