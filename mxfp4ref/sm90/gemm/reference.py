"""The group-scaled GEMM transcribed from `docs/arithmetic.md`, "The GEMM": slow and obvious."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mxfp4ref._compiler import uncompiled
from mxfp4ref.formats.generations import NEWEST, Generation
from mxfp4ref.formats.mxfp4 import GROUP_SIZE, decode_ue8m0, dequantize
from mxfp4ref.sm90 import fp32, tensor_core
from mxfp4ref.sm90.gemm.order import first_pair_swapped, group_order
from mxfp4ref.sm90.tactics import Tactic

__all__ = ["gemm_in_order", "group_scaled_gemm_reference"]

_DEFAULT = Tactic()
_UNIT_SCALE = 127  # the UE8M0 byte of 2^0


@uncompiled
def group_scaled_gemm_reference(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    *,
    tactic: Tactic = _DEFAULT,
    generation: Generation = NEWEST,
    positions: Tensor | None = None,
) -> Tensor:
    """The float32 accumulators of the kernel: two tensor-core steps and one FMA a group.

    Arguments and result are those of `group_scaled_gemm`, which computes the same bits faster.
    """
    order = group_order(scales.shape[2], tactic.tile_k, generation)
    return gemm_in_order(x, packed, scales, order, first_pair_swapped(x, positions, tactic, generation))


def gemm_in_order(x: Tensor, packed: Tensor, scales: Tensor, order: Sequence[int], swapped: Tensor) -> Tensor:
    """The accumulators where groups are added up in this order, but in `swapped [B, M]` rows the second one first."""
    # The tensor core sees the unscaled E2M1 values as bf16.
    weights = dequantize(packed, torch.full_like(scales, _UNIT_SCALE), dtype=torch.bfloat16)
    scale_values = decode_ue8m0(scales, convention="sm90")
    zero = torch.zeros(x.shape[0], x.shape[1], packed.shape[1], dtype=torch.float32, device=x.device)

    terms = []
    for group in order:
        t = zero
        for k in (GROUP_SIZE * group, GROUP_SIZE * group + tensor_core.STEP_SIZE):
            block = slice(k, k + tensor_core.STEP_SIZE)
            t = tensor_core.step(x[:, :, None, block], weights[:, None, :, block], t)
        terms.append((t, scale_values[:, None, :, group].expand_as(t)))

    first, *rest = terms
    acc = fp32.mul(*first)
    if rest:
        second, *rest = rest
        acc = torch.where(swapped[..., None], fp32.fma(*first, fp32.mul(*second)), fp32.fma(*second, acc))
    for t, scale in rest:
        acc = fp32.fma(t, scale, acc)
    return fp32.add(acc, zero)
