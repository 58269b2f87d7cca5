"""The weighted sum over a token's experts (`docs/arithmetic.md`, section 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref._compiler import uncompiled
from mxfp4ref._validate import check_ids
from mxfp4ref.sm90 import fp32

__all__ = ["finalize"]


@uncompiled
def finalize(fc2_output: Tensor, local: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """Each token's sum of scale * (expert output + bias), slot by slot with one FMA each, as float32.

    Args:
        fc2_output: `[M, k, H] bf16` (or float32), GEMM2's output by slot; anything where the slot is skipped.
        local: `[M, k]` int64, this rank's index of the slot's expert, or -1 for a slot to skip.
        scales: `[M, k] float32`, the routing weights.
        bias: `[E, H] bf16`, added before the weight, or None.

    Returns:
        `[M, H] float32`; zeros for a token without a local expert.

    Raises:
        ValueError: a slot names an expert that has no bias.
    """
    num_tokens, top_k, hidden_size = fc2_output.shape
    if bias is not None:
        check_ids("local", local, minimum=-1, maximum=len(bias) - 1)
    acc = torch.zeros(num_tokens, hidden_size, dtype=torch.float32, device=fc2_output.device)
    for slot in range(top_k):
        tokens = (local[:, slot] >= 0).nonzero().flatten()
        y = fp32.widen(fc2_output[tokens, slot])
        if bias is not None:
            y = fp32.add(y, fp32.widen(bias[local[tokens, slot]]))
        acc[tokens] = fp32.fma(scales[tokens, slot, None], y, acc[tokens])
    return acc
