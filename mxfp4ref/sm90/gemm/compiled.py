"""The group-scaled GEMM on a CPU, by the compiled loops of `cpu_loops`; transcribed, where those cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from mxfp4ref._compiled import as_numpy, loops
from mxfp4ref._compiler import uncompiled
from mxfp4ref._spans import spans
from mxfp4ref._threads import spans_in_parallel
from mxfp4ref.formats.experts import StoredWeights
from mxfp4ref.formats.generations import GENERATIONS
from mxfp4ref.formats.mxfp4 import GROUP_SIZE
from mxfp4ref.sm90.gemm.reference import gemm_in_order
from mxfp4ref.sm90.gemm.trial import check_gemm

__all__ = ["compiled_loops", "gemm", "grouped_gemm"]

Array = np.ndarray[Any, Any]

_COLUMNS_AT_ONCE = 1024  # of an expert, on one thread


def compiled_loops() -> ModuleType | None:
    """The loops, or None, after one warning, where they cannot be used."""
    consequence = "the GEMM takes 300 times as long as need be"
    loaded: ModuleType | None = loops("mxfp4ref.sm90.gemm.cpu_loops", _try_out, consequence)
    return loaded


@uncompiled
def gemm(x: Tensor, packed: Tensor, scales: Tensor, order: Sequence[int], swapped: Tensor) -> Tensor:
    """The float32 accumulators of a batch of experts, with as many rows each.

    Args:
        x: `[B, M, K] bf16`, on a CPU as all else.
        packed: `[B, N, K/2] uint8`, E2M1 codes in logical order, the low nibble the even K index.
        scales: `[B, N, K/32] uint8`, UE8M0 by the `sm90` convention.
        order: the order in which groups of K are added up.
        swapped: `[B, M] bool`, rows that take the second group of the order before the first.

    Returns:
        `[B, M, N] float32`: never -0, no subnormals, NaN is 0x7FFFFFFF.
    """
    batch, num_rows, depth = x.shape
    num_columns = packed.shape[1]
    compiled = compiled_loops()
    if compiled is None:
        out = torch.empty(batch, num_rows, num_columns, dtype=torch.float32, device="cpu")
        for columns in spans(num_columns, _COLUMNS_AT_ONCE):
            out[..., columns] = gemm_in_order(x, packed[:, columns], scales[:, columns], order, swapped)
        return out
    ends = [num_rows * (expert + 1) for expert in range(batch)]
    weights = StoredWeights(packed, scales.flatten(1), (0, 0))
    rows, swaps = as_numpy(x.reshape(-1, depth), np.int16), as_numpy(swapped.reshape(-1), np.bool_)
    bits = grouped_gemm(compiled, rows, ends, weights, order, swaps)
    return torch.from_numpy(bits.view(np.float32)).view(batch, num_rows, num_columns)


def grouped_gemm(
    compiled: Any, x: Array, ends: Sequence[int], weights: StoredWeights, order: Sequence[int], swapped: Array
) -> Array:
    """The float32 accumulators of all rows of a layer, which are sorted by expert, from bits to bits.

    Args:
        compiled: `compiled_loops()`.
        x: `[R, K] int16`, of bf16.
        ends: where the rows of each expert end, and those of the next one start.
        weights: of all experts.
        order: as for `gemm`.
        swapped: as for `gemm`, `[R] bool`.

    Returns:
        `[R, N] int32`.
    """
    if ends[-1] != len(x):
        raise ValueError(f"ends: expected the last to be the number of rows, {len(x)}, got {ends[-1]}")
    depth, num_columns = x.shape[1], weights.packed.shape[1]
    num_groups = depth // GROUP_SIZE
    x_bits = x.view(np.uint16).reshape(len(x), num_groups, GROUP_SIZE).transpose(1, 0, 2).copy()
    facts, out = np.empty((num_groups, len(x), 5), np.int32), np.empty((len(x), num_columns), np.int32)
    compiled.classify(x_bits, facts)
    used = [(expert, start, end) for expert, (start, end) in enumerate(pairwise([0, *ends])) if start < end]
    packed, scales, numbers = _in_place(weights, [expert for expert, _, _ in used])
    if num_groups % 4:
        scales = pad(scales.reshape(-1, num_groups), (0, -num_groups % 4)).view(len(scales), -1)
    pieces = [
        (number, start, end, columns.start, columns.stop)
        for number, (_, start, end) in zip(numbers, used, strict=True)
        for columns in spans(num_columns, _COLUMNS_AT_ONCE)
    ]
    of_pieces = np.array(pieces, np.int64).reshape(-1, 5)
    stored = as_numpy(packed, np.int32), as_numpy(scales, np.int32), np.array(weights.orders)
    given = x_bits, facts, swapped, *stored, _steps(tuple(order), bool(swapped.any()))

    def compute(some: slice) -> None:
        compiled.gemm(*given, of_pieces[some], out)

    spans_in_parallel(compute, len(of_pieces), 1, len(ends) * num_columns * depth)
    return out


def _in_place(weights: StoredWeights, used: list[int]) -> tuple[Tensor, Tensor, Sequence[int]]:
    """Weights, scales and the numbers of the used experts there: all, or copies where no loop could read them."""
    for tensor in (weights.packed, weights.scales):
        if not tensor.is_contiguous() or tensor.data_ptr() % 4:
            return weights.packed[used], weights.scales[used], range(len(used))
    return weights.packed, weights.scales, used


@lru_cache
def _steps(order: tuple[int, ...], any_swapped: bool) -> Array:
    """Groups in their order and who takes them: 0 rows that do not swap the first two, 1 rows that do, 2 all."""
    steps = [(group, 2) for group in order]
    if any_swapped and len(steps) > 1:
        steps[:2] = [(order[0], 0), (order[1], 2), (order[0], 1)]
    return np.array(steps, dtype=np.int64)


def _try_out(compiled: Any) -> None:
    """In every byte order."""

    def gemm(
        layout: Any, x: Tensor, packed: Tensor, scales: Tensor, order: list[int], swaps: Tensor
    ) -> Tensor:
        orders = (0, 0)
        if layout is not None:
            packed, scales, orders = layout.interleave(packed), layout.fold(scales), layout.ORDERS
        stored = StoredWeights(packed, scales.flatten(1), orders)
        out = grouped_gemm(compiled, as_numpy(x[0], np.int16), [x.shape[1]], stored, order, swaps[0].numpy())
        return torch.from_numpy(out.view(np.float32))[None]

    for layout in (None, *(generation.layout for generation in GENERATIONS)):
        check_gemm(partial(gemm, layout), torch.device("cpu"))
