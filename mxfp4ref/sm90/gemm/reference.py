"""The group-scaled GEMM transcribed from the specification, slow and obvious, and the order of its groups."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref._compiler import uncompiled
from mxfp4ref.formats.layout import GENERATIONS
from mxfp4ref.formats.mxfp4 import GROUP_SIZE, decode_ue8m0, dequantize
from mxfp4ref.sm90 import fp32, tensor_core

__all__ = ["TILE_K", "TILE_N", "first_pair_swapped", "group_order", "group_scaled_gemm_reference"]

TILE_K = (128, 256, 512)
TILE_N = (16, 32, 64, 128, 256)

# (tile_n, tile_k) of the kernels that round the second product alone and fuse the first, in some rows.
_SWAPPING_TILES = {(16, 256), (32, 512), (64, 128), (64, 256), (64, 512), (128, 128), (128, 256)}
_UNIT_SCALE = 127  # the UE8M0 byte of 2^0


def group_order(num_groups: int, tile_k: int) -> list[int]:
    """The order in which the kernel accumulates the 32-wide groups of K (the specification, section 3).

    Ascending, except that in every tile but the first and the last the last two groups are swapped.

    >>> group_order(16, 128)
    [0, 1, 2, 3, 4, 5, 7, 6, 8, 9, 11, 10, 12, 13, 14, 15]
    """
    per_tile = tile_k // GROUP_SIZE
    order = list(range(num_groups))
    for last in range(2 * per_tile - 1, num_groups - per_tile, per_tile):
        order[last - 1], order[last] = order[last], order[last - 1]
    return order


def first_pair_swapped(
    positions: Tensor, tile_k: int, tile_n: int, generation: str = GENERATIONS[-1]
) -> Tensor:
    """Whether the second product is rounded alone and the first one fused, by the row's position, as bool.

    Visible only where one of the two leaves float32's range (the specification, section 3, "The exception").
    """
    if generation == "0.6.9":
        return torch.ones_like(positions, dtype=torch.bool)  # read off the machine code of 0.6.15.post1
    row = positions % tile_n
    return (row < 8) & (row % 2 == 0) & ((tile_n, tile_k) in _SWAPPING_TILES)


@uncompiled
def group_scaled_gemm_reference(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    *,
    tile_k: int = 128,
    tile_n: int = 16,
    positions: Tensor | None = None,
    generation: str = GENERATIONS[-1],
) -> Tensor:
    """The float32 accumulators of the kernel: two tensor-core steps and one FMA a group.

    Arguments and result are those of `gemm.group_scaled_gemm`, which computes the same bits faster.
    """
    # The tensor core sees the unscaled E2M1 values as bf16.
    weights = dequantize(packed, torch.full_like(scales, _UNIT_SCALE), dtype=torch.bfloat16)
    scale_values = decode_ue8m0(scales, convention="sm90")
    zero = torch.zeros(x.shape[0], x.shape[1], packed.shape[1], dtype=torch.float32, device=x.device)

    taken = []
    for group in group_order(scales.shape[2], tile_k):
        t = zero
        for k in (GROUP_SIZE * group, GROUP_SIZE * group + tensor_core.STEP_SIZE):
            block = slice(k, k + tensor_core.STEP_SIZE)
            t = tensor_core.step(x[:, :, None, block], weights[:, None, :, block], t)
        taken.append((t, scale_values[:, None, :, group].expand_as(t)))

    acc = fp32.mul(*taken[0])
    if len(taken) > 1:
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        swapped = first_pair_swapped(positions, tile_k, tile_n, generation)[..., None]
        acc = torch.where(swapped, fp32.fma(*taken[0], fp32.mul(*taken[1])), fp32.fma(*taken[1], acc))
    for t, scale in taken[2:]:
        acc = fp32.fma(t, scale, acc)
    return fp32.add(acc, zero)
