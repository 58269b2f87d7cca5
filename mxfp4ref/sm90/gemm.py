"""The group-scaled GEMM of the kernel, fast, and equal to `gemm_reference` bit for bit.

For each output element and each 32-wide group of K the tensor core gives a sum `t` (see `group_sums`), and
`acc = fma(t, scale, acc)` follows in float32 (the specification, section 3). A scale is a power of two, so
`t * scale` is exact and the fused multiply-add is a float32 addition, as long as nothing leaves float32's
normal range. Rows in which something may, by bounds on x and the scales, are added up in float64 and rounded
to float32 group by group: a float64 sum of two numbers of 24 bits, rounded again to 24 bits, is as if rounded
once, since 53 >= 2 * 24 + 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref.layout import GENERATIONS
from mxfp4ref.mxfp4 import GROUP_SIZE, decode_ue8m0
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.gemm_reference import first_pair_swapped, group_order
from mxfp4ref.sm90.group_sums import Blocks, analyse, direct_sums, group_sums, machine, spans

__all__ = ["group_scaled_gemm"]

# A tile's float64 weights and sums should stay in a CPU's cache; a GPU takes all columns of most layers.
_ROWS_AT_ONCE = 64
_COLUMNS_AT_ONCE = 1024
_DIRECT_SUMS_ON_GPU = 1 << 25
_GROUPS_AT_ONCE = {"cpu": 16, "gpu": 8}


def group_scaled_gemm(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    *,
    tile_k: int = 128,
    tile_n: int = 16,
    positions: Tensor | None = None,
    generation: str = GENERATIONS[-1],
) -> Tensor:
    """The float32 accumulators of `x @ W^T` for a batch of experts, bit for bit as the kernel has them.

    Args:
        x: `[B, M, K] bf16`, the rows routed to each expert in token order.
        packed: `[B, N, K/2] uint8`, E2M1 codes in logical order, the low nibble the even K index.
        scales: `[B, N, K/32] uint8`, UE8M0 by the `sm90` convention.
        tile_k: the tactic's K tile, which orders the groups.
        tile_n: the tactic's N tile, visible only where the first two groups over- or underflow.
        positions: `[B, M] int64`, the rows' positions among all rows of their expert; by default 0, 1, 2, ...
        generation: the flashinfer generation, one of `layout.GENERATIONS`; visible where `tile_n` is.

    Returns:
        `[B, M, N] float32` after the epilogue's addition of +0: never -0, no subnormals, NaN is 0x7FFFFFFF.
    """
    batch, num_rows, _ = x.shape
    num_columns, num_groups = scales.shape[1:]
    batch, num_rows, _ = x.shape
    num_columns, num_groups = scales.shape[1:]
    if positions is None:
        positions = torch.arange(num_rows, device=x.device).expand(batch, num_rows)
    swapped = first_pair_swapped(positions, tile_k, tile_n, generation)
    order = group_order(num_groups, tile_k)
    # Groups change places only within a K tile, so whole tiles are taken at once.
    groups_at_once = max(_GROUPS_AT_ONCE[machine(x.device)], tile_k // GROUP_SIZE)
    # NaN times any weight is NaN: such a row needs no sums.
    nan_rows = x.isnan().any(-1, keepdim=True)
    x = x.masked_fill(nan_rows, 0.0)
    out = torch.empty(batch, num_rows, num_columns, dtype=torch.float32, device=x.device)
    for rows in spans(num_rows, _ROWS_AT_ONCE):
        blocks = analyse(x[:, rows])
        column_step = _COLUMNS_AT_ONCE
        if machine(x.device) == "gpu":
            column_step = min(
                4 * _COLUMNS_AT_ONCE, max(64, _DIRECT_SUMS_ON_GPU // max(1, len(blocks.direct)))
            )
        for columns in spans(num_columns, column_step):
            out[:, rows, columns] = _tile(
                blocks, packed[:, columns], scales[:, columns], order, groups_at_once, swapped[:, rows]
            )
    out.view(torch.int32).masked_fill_(nan_rows, fp32.FP32_NAN)
    return out


def _tile(
    blocks: Blocks, packed: Tensor, scales: Tensor, order: list[int], groups_at_once: int, swapped: Tensor
) -> Tensor:
    """The accumulators `[B, M, N] float32` of a tile of rows and columns."""
    scales = scales.transpose(1, 2).contiguous()  # [B, G, N]
    scale = decode_ue8m0(scales, convention="sm90", dtype=torch.float64)
    careful = _may_leave_range(blocks, scales)  # [B, M]
    expert, row = careful.nonzero(as_tuple=True)
    careful_acc = torch.zeros(len(row), scale.shape[2], dtype=torch.float32, device=packed.device)
    acc = torch.zeros(*careful.shape, scale.shape[2], dtype=torch.float32, device=packed.device)
    direct = direct_sums(blocks, packed)
    for groups in spans(len(order), groups_at_once):
        t = group_sums(blocks, groups, packed, direct)  # [B, G, M, N] float64
        positions = [group - groups.start for group in order[groups]]
        if len(row):
            chosen = t[expert, :, row]  # [R, G, N]
            products = chosen.masked_fill_(chosen.abs() < 2.0**-126, 0.0).mul_(scale[expert, groups])
            _add_carefully(careful_acc, products, positions, swapped[careful] if groups.start == 0 else None)
        if len(row) < careful.numel():
            products = t.mul_(scale[:, groups, None]).to(torch.float32)
            for position in positions:
                acc += products[:, position]
    if len(row):
        acc[expert, row] = careful_acc
    acc += 0.0  # the epilogue: -0 becomes +0
    return fp32.flush(acc) if len(row) else acc  # the canonical NaN


def _may_leave_range(blocks: Blocks, scales: Tensor) -> Tensor:
    """`[B, M] bool`: rows in which a product or a sum may overflow, be subnormal, or meet Inf."""
    # Neither t nor t * scale may reach 2^127, so a scale counts as one at least.
    largest = decode_ue8m0(scales.amax(-1), convention="sm90", dtype=torch.float64).clamp(min=1.0)  # [B, G]
    # A scale of 0 makes no subnormals.
    exponent = torch.where(scales == 0, 255, scales).amin(-1).to(torch.int64) - 127
    total = (blocks.bound * largest.unsqueeze(-1)).sum(1)  # [B, M]
    lowest = (blocks.unit + exponent.clamp(max=0).unsqueeze(-1)).amin(1)
    return ~((total < 2.0**127) & (lowest >= -126))


def _add_carefully(acc: Tensor, products: Tensor, positions: list[int], swapped: Tensor | None) -> None:
    """Add `[R, G, N] float64` products to `[R, N] float32` in order, with every rounding and flush.

    `swapped` rows round the second product before the first one; given for the first groups only.
    """
    for taken, position in enumerate(positions):
        acc.copy_(_rounded_sum(acc, products[:, position]))
        if swapped is not None and taken == 1:
            early = _rounded_sum(torch.zeros_like(acc), products[:, positions[1]])
            early = _rounded_sum(early, products[:, positions[0]])
            acc.copy_(torch.where(swapped.unsqueeze(-1), early, acc))


def _rounded_sum(acc: Tensor, product: Tensor) -> Tensor:
    """fma.rn.ftz.f32 for a product of 24 bits."""
    total = acc.to(torch.float64) + product
    # What rounds to below 2^-126 with unlimited exponent is flushed; the sign of a zero is lost in the end.
    return total.to(torch.float32).masked_fill_(total.abs() < 2.0**-126 * (1 - 2.0**-25), 0.0)
