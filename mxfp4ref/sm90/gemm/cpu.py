"""The group-scaled GEMM of the kernel, fast: by compiled loops on a CPU, by one Triton kernel on a GPU."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from mxfp4ref._validate import check_tensor
from mxfp4ref.formats.generations import NEWEST, Generation
from mxfp4ref.formats.mxfp4 import GROUP_SIZE, PACKED_DTYPES, SCALE_DTYPES
from mxfp4ref.sm90.gemm import compiled
from mxfp4ref.sm90.gemm.order import first_pair_swapped, group_order
from mxfp4ref.sm90.gemm.trial import check_gemm
from mxfp4ref.sm90.tactics import Tactic

__all__ = ["group_scaled_gemm"]

_DEFAULT = Tactic()


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
        generation: of the kernel; shows where the N tile does, and `PLAIN` in the order of the groups.
        positions: `[B, M] int64`, the rows' positions among all rows of their expert; by default 0, 1, 2, ...

    Returns:
        `[B, M, N] float32` after the epilogue's addition of +0: never -0, no subnormals, NaN is 0x7FFFFFFF.

    Raises:
        TypeError: another dtype of a tensor.
        ValueError: shapes that do not match.
    """
    check_tensor("scales", scales, dtype=SCALE_DTYPES, shape=("B", "N", "K/32"))
    sizes = dict(zip(("B", "N", "K/32"), scales.shape, strict=True))
    sizes |= {"K": sizes["K/32"] * GROUP_SIZE, "K/2": sizes["K/32"] * GROUP_SIZE // 2}
    check_tensor("packed", packed, dtype=PACKED_DTYPES, shape=("B", "N", "K/2"), sizes=sizes)
    check_tensor("x", x, dtype=torch.bfloat16, shape=("B", "M", "K"), sizes=sizes)
    if positions is not None:
        check_tensor("positions", positions, dtype=torch.int64, shape=tuple(x.shape[:2]))
    swapped = first_pair_swapped(x, positions, tactic, generation)
    order = group_order(scales.shape[2], tactic.tile_k, generation)
    return _gemm_on(x.device)(x, packed, scales, order, swapped)


@functools.cache
def _gemm_on(device: torch.device) -> Callable[..., Tensor]:
    """The Triton kernel on a GPU, if it runs and gives the right bits; the compiled loops of the CPU elsewhere."""
    if device.type == "cpu":
        return compiled.gemm
    try:
        from mxfp4ref.sm90.gemm import triton_kernel

        check_gemm(triton_kernel.gemm, device)
    except Exception as error:  # no Triton, no C compiler for it, a GPU that it does not know, ...
        warnings.warn(
            f"the GEMM on {device} is computed by the CPU, for its Triton kernel does not run here: "
            f"{type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return _gemm_by_cpu
    return triton_kernel.gemm


def _gemm_by_cpu(x: Tensor, packed: Tensor, scales: Tensor, order: list[int], swapped: Tensor) -> Tensor:
    return compiled.gemm(x.cpu(), packed.cpu(), scales.cpu(), order, swapped.cpu()).to(x.device)
