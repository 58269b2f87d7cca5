"""The GEMM for experts whose weights are bf16, the dequantised-reference route.

No hardware is modelled here. The rounding points are fixed so that every machine gives the same bits: exact
products, added in float64 in ascending order of K with one rounding an addition, then one rounding to float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref._compiler import uncompiled
from mxfp4ref.sm90 import fp32

__all__ = ["dense_gemm"]


@uncompiled
def dense_gemm(x: Tensor, weights: Tensor, scales: None = None, **_kernel: object) -> Tensor:
    """`x @ weights^T`, `[B, M, K] bf16` by `[B, N, K] bf16`, as `[B, M, N] float32`.

    What else the GEMMs of `Stages` are given (tactic, generation, positions) has no effect.
    """
    rows, columns = x.shape[1], weights.shape[1]
    total = torch.zeros(x.shape[0], rows, columns, dtype=torch.float64, device=x.device)
    for start in range(0, x.shape[2], 256):
        chunk = slice(start, start + 256)
        factors = fp32.bf16_to_fp64(x[..., chunk].contiguous()).permute(2, 0, 1).contiguous()
        others = fp32.bf16_to_fp64(weights[..., chunk].contiguous()).permute(2, 0, 1).contiguous()
        for factor, other in zip(factors, others, strict=True):
            # Two operations, not one fused: the product is exact either way, the sum is rounded once.
            total += factor[:, :, None] * other[:, None, :]
    return fp32.round_fp64(total)
