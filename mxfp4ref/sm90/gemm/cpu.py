"""The group-scaled GEMM of the kernel, fast, and equal to `gemm_reference` bit for bit.

For each output element and each 32-wide group of K the tensor core gives a sum `t` (see `group_sums`), and
`acc = fma(t, scale, acc)` follows in float32 (`docs/arithmetic.md`, section 3). A scale is a power of two, so
`t * scale` is exact and the fused multiply-add is a float32 addition, as long as nothing leaves float32's
normal range. Rows in which something may, by bounds on x and the scales, are added up in float64 and rounded
to float32 group by group: a float64 sum of two numbers of 24 bits, rounded again to 24 bits, is as if rounded
once, since 53 >= 2 * 24 + 2.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from mxfp4ref.formats.generations import NEWEST, Generation
from mxfp4ref.formats.mxfp4 import GROUP_SIZE, decode_ue8m0
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.gemm.analysis import Blocks, analyse, spans
from mxfp4ref.sm90.gemm.order import first_pair_swapped, group_order
from mxfp4ref.sm90.gemm.sums import codes_by_group, direct_sums, group_sums
from mxfp4ref.sm90.tactics import Tactic
from mxfp4ref.sm90.threads import in_parallel

__all__ = ["group_scaled_gemm"]

_DEFAULT = Tactic()
_ROWS_AT_ONCE = 64
# Bounds of a chunk's memory. Smaller ones fit a cache, but many short operations cost more than that gains.
_PRODUCTS_AT_ONCE = 1 << 22
_COLUMNS_AT_ONCE = 4096
_GROUPS_AT_ONCE = 8


def group_scaled_gemm(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    *,
    tactic: Tactic = _DEFAULT,
    generation: Generation = NEWEST,
    positions: Tensor | None = None,
) -> Tensor:
    """The float32 accumulators of `x @ W^T` for a batch of experts, bit for bit as the kernel has them.

    Args:
        x: `[B, M, K] bf16`, the rows routed to each expert in token order.
        packed: `[B, N, K/2] uint8`, E2M1 codes in logical order, the low nibble the even K index.
        scales: `[B, N, K/32] uint8`, UE8M0 by the `sm90` convention.
        tactic: its K tile orders the groups; its N tile shows only where the first two groups over- or underflow.
        generation: of the kernel; shows where the N tile does.
        positions: `[B, M] int64`, the rows' positions among all rows of their expert; by default 0, 1, 2, ...

    Returns:
        `[B, M, N] float32` after the epilogue's addition of +0: never -0, no subnormals, NaN is 0x7FFFFFFF.
    """
    batch, num_rows, _ = x.shape
    num_columns, num_groups = scales.shape[1:]
    swapped = first_pair_swapped(x, positions, tactic, generation)
    order = group_order(num_groups, tactic.tile_k)
    on_gpu = _gemm_on_gpu(x.device)
    if on_gpu is not None:
        return on_gpu(x, packed, scales, order, swapped)
    if x.device.type == "cpu":
        _keep_freed_memory()
    # Groups change places only within a K tile, so whole tiles are taken at once.
    groups_at_once = max(_GROUPS_AT_ONCE, tactic.tile_k // GROUP_SIZE)
    # NaN times any weight is NaN: such a row needs no sums.
    nan_rows = x.isnan().any(-1, keepdim=True)
    x = x.masked_fill(nan_rows, 0.0)
    out = torch.empty(batch, num_rows, num_columns, dtype=torch.float32, device=x.device)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        for rows in spans(num_rows, _ROWS_AT_ONCE):
            blocks = analyse(x[:, rows], groups_at_once)
            column_step = _columns_at_once(blocks)
            tiles = list(spans(num_columns, column_step))
            tile = functools.partial(_tile, blocks, packed, scales, order, swapped[:, rows])
            for columns, accumulators in zip(
                tiles, in_parallel(tile, tiles, x.device, column_step * x.shape[2]), strict=True
            ):
                out[:, rows, columns] = accumulators
    out.view(torch.int32).masked_fill_(nan_rows, fp32.FP32_NAN)
    return out


def _columns_at_once(blocks: Blocks) -> int:
    at_once = _PRODUCTS_AT_ONCE // max(chunk.num_products for chunk in blocks.chunks)
    return max(256, min(_COLUMNS_AT_ONCE, at_once // 256 * 256))


@functools.cache
def _gemm_on_gpu(device: torch.device) -> Callable[..., Tensor] | None:
    """`gemm_triton.gemm` where Triton is to be had, runs, and gives the right bits; None elsewhere."""
    if device.type != "cuda":
        return None
    try:
        from mxfp4ref.sm90.gemm import triton_kernel as gemm_triton

        _check_on(device, gemm_triton.gemm)
    except Exception as error:  # no Triton, no C compiler for it, a GPU that it does not know, ...
        warnings.warn(
            f"the GEMM on {device} takes 20 to 40 times as long as need be, for its Triton kernel does not run here: "
            f"{type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return gemm_triton.gemm


def _check_on(device: torch.device, gemm: Callable[..., Tensor]) -> None:
    """Hold a GEMM against this one on numbers of every kind: compilers have faults too."""
    generator = torch.Generator("cpu").manual_seed(0)

    def random_bytes(*shape: int) -> Tensor:
        return torch.randint(256, shape, dtype=torch.uint8, generator=generator, device="cpu")

    x, packed, scales = (
        random_bytes(1, 8, 768).view(torch.bfloat16),
        random_bytes(1, 64, 192),
        random_bytes(1, 64, 12),
    )
    x[:, :4] = torch.randn(1, 4, 384, generator=generator, device="cpu").to(torch.bfloat16)
    scales[:, :32] = 120 + scales[:, :32] % 8
    scales[:, 48:, :2] = 254  # each of the first two products overflows, so that their order shows
    tactic = Tactic((64, 64, 128))
    expected = group_scaled_gemm(x, packed, scales, tactic=tactic)
    swapped = first_pair_swapped(x, None, tactic, NEWEST)
    moved = (tensor.to(device) for tensor in (x, packed, scales))
    got = gemm(*moved, group_order(12, 128), swapped.to(device)).cpu()
    differing = int((got.view(torch.int32) != expected.view(torch.int32)).sum())
    if differing:
        raise ArithmeticError(f"{differing} of {got.numel()} elements of a trial are wrong")


def _keep_freed_memory() -> None:
    """Let glibc reuse up to 62 MiB of freed memory, which it would hand back and then fetch page by page again.

    It takes the size of a freed block of up to 32 MiB for one that is to be kept, twice that for all together.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


def _tile(
    blocks: Blocks, packed: Tensor, scales: Tensor, order: list[int], swapped: Tensor, columns: slice
) -> Tensor:
    """The accumulators `[B, M, N] float32` of some rows and columns."""
    codes = codes_by_group(packed[:, columns])
    scales = scales[:, columns].permute(2, 0, 1).contiguous()  # [G, B, N]
    scale = (scales.to(torch.int32) << 23).view(torch.float32)  # the sm90 convention, as it is defined
    careful = _may_leave_range(blocks, scales)  # [B, M]
    expert, row = careful.nonzero(as_tuple=True)
    careful_acc = torch.zeros(len(row), scales.shape[2], dtype=torch.float32, device=packed.device)
    acc = torch.zeros(*careful.shape, scales.shape[2], dtype=torch.float32, device=packed.device)
    direct = direct_sums(blocks, codes)
    for chunk in blocks.chunks:
        t = group_sums(blocks, chunk, codes, direct)  # [G, B, M, N] float32
        taken = order[chunk.groups]
        if len(row):
            some, factor = t[:, expert, row].to(torch.float64), scale[chunk.groups, expert].to(torch.float64)
            products = some.masked_fill_(some.abs() < 2.0**-126, 0.0).mul_(factor)  # [G, R, N]
            positions = [group - chunk.groups.start for group in taken]
            first = chunk.groups.start == 0
            _add_carefully(careful_acc, products, positions, swapped[careful] if first else None)
        if len(row) < careful.numel():
            for group in taken:
                acc.addcmul_(t[group - chunk.groups.start], scale[group].unsqueeze(1))
    if len(row):
        acc[expert, row] = careful_acc
    acc += 0.0  # the epilogue: -0 becomes +0
    return fp32.flush(acc) if len(row) else acc  # the canonical NaN


def _may_leave_range(blocks: Blocks, scales: Tensor) -> Tensor:
    """`[B, M] bool`: rows in which a product or a sum may overflow, be subnormal, or meet Inf."""
    # Neither t nor t * scale may reach 2^127, so a scale counts as one at least.
    largest = decode_ue8m0(scales.amax(-1), convention="sm90", dtype=torch.float64).clamp(min=1.0)  # [G, B]
    # A scale of 0 makes no subnormals.
    exponent = torch.where(scales == 0, 255, scales).amin(-1).to(torch.int64) - 127
    total = (blocks.bound * largest.unsqueeze(-1)).sum(0)  # [B, M]
    lowest = (blocks.unit + exponent.clamp(max=0).unsqueeze(-1)).amin(0)
    return ~((total < 2.0**127) & (lowest >= -126))


def _add_carefully(acc: Tensor, products: Tensor, positions: list[int], swapped: Tensor | None) -> None:
    """Add `[G, R, N] float64` products to `[R, N] float32` in order, with every rounding and flush.

    `swapped` rows round the second product before the first one; given for the first groups only.
    """
    for taken, position in enumerate(positions):
        acc.copy_(_rounded_sum(acc, products[position]))
        if swapped is not None and taken == 1:
            early = _rounded_sum(torch.zeros_like(acc), products[positions[1]])
            early = _rounded_sum(early, products[positions[0]])
            acc.copy_(torch.where(swapped.unsqueeze(-1), early, acc))


def _rounded_sum(acc: Tensor, product: Tensor) -> Tensor:
    """fma.rn.ftz.f32 for a product of 24 bits."""
    total = acc.to(torch.float64) + product
    # What rounds to below 2^-126 with unlimited exponent is flushed; the sign of a zero is lost in the end.
    return total.to(torch.float32).masked_fill_(total.abs() < 2.0**-126 * (1 - 2.0**-25), 0.0)
