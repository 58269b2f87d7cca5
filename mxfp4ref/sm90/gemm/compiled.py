"""The group-scaled GEMM on a CPU, by the compiled loops of `cpu_loops`; transcribed, where those cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mxfp4ref._compiled import as_numpy, loops
from mxfp4ref._compiler import uncompiled
from mxfp4ref._spans import spans
from mxfp4ref.formats.mxfp4 import GROUP_SIZE
from mxfp4ref.sm90.gemm.reference import gemm_in_order
from mxfp4ref.sm90.gemm.trial import check_gemm
from mxfp4ref.sm90.threads import in_parallel

__all__ = ["Weights", "gemm", "grouped_gemm"]

_COLUMNS_AT_ONCE = 1024  # of an expert: for smaller pieces threads wait for the interpreter's lock

Weights = Callable[[int, slice], tuple[Tensor, Tensor]]


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

    def weights(expert: int, columns: slice) -> tuple[Tensor, Tensor]:
        return packed[expert, columns], scales[expert, columns]

    ends = [num_rows * (expert + 1) for expert in range(batch)]
    out = grouped_gemm(x.reshape(-1, depth), ends, weights, num_columns, order, swapped.reshape(-1))
    return out.view(batch, num_rows, num_columns)


@uncompiled
def grouped_gemm(
    x: Tensor, ends: Sequence[int], weights: Weights, num_columns: int, order: Sequence[int], swapped: Tensor
) -> Tensor:
    """The float32 accumulators of all rows of a layer, which are sorted by expert.

    Args:
        x: `[R, K] bf16`.
        ends: where the rows of each expert end, and those of the next one start.
        weights: gives packed codes `[n, K/2]` and scales `[n, K/32]` of some columns of an expert, uint8 in logical
            order. Several threads call it, for blocks of 1024 columns.
        num_columns: N, the same of every expert.
        order: as for `gemm`.
        swapped: as for `gemm`, `[R]`.

    Returns:
        `[R, N] float32`.
    """
    consequence = "the GEMM takes 300 times as long as need be"
    compiled = loops("mxfp4ref.sm90.gemm.cpu_loops", _try_out, consequence)
    if compiled is not None:
        return _by_loops(compiled, x, ends, weights, num_columns, order, swapped)
    out = torch.empty(len(x), num_columns, dtype=torch.float32, device="cpu")
    for expert, rows in _experts_with_rows(ends):
        for columns in spans(num_columns, _COLUMNS_AT_ONCE):
            arguments = (x[rows], *weights(expert, columns), swapped[rows])
            of_rows, packed, scales, swaps = (tensor.unsqueeze(0) for tensor in arguments)
            out[rows, columns] = gemm_in_order(of_rows, packed, scales, order, swaps)[0]
    return out


def _by_loops(
    compiled: Any,
    x: Tensor,
    ends: Sequence[int],
    weights: Weights,
    num_columns: int,
    order: Sequence[int],
    swapped: Tensor,
) -> Tensor:
    out = torch.empty(len(x), num_columns, dtype=torch.float32, device="cpu")
    steps = _steps(order)
    pieces: list[tuple[Any, ...]] = []
    for expert, rows in _experts_with_rows(ends):
        by_group = x[rows].reshape(rows.stop - rows.start, -1, GROUP_SIZE).transpose(0, 1)
        x_bits = as_numpy(by_group, np.uint16)
        facts = np.empty((*x_bits.shape[:2], 3), np.int16)
        compiled.classify(x_bits, facts)
        of_expert = (expert, x_bits, facts, as_numpy(swapped[rows], np.bool_), as_numpy(out[rows], np.int32))
        pieces += [(*of_expert, columns) for columns in spans(num_columns, _COLUMNS_AT_ONCE)]

    def compute(piece: tuple[Any, ...]) -> None:
        expert, x_bits, facts, swaps, out_bits, columns = piece
        packed, scales = weights(expert, columns)
        words, scale_bytes = as_numpy(packed, np.int32), as_numpy(scales, np.uint8)
        compiled.gemm(x_bits, facts, words, scale_bytes, steps, swaps, out_bits[:, columns])

    in_parallel(compute, pieces, x.device, len(ends) * num_columns * x.shape[1])
    return out


def _experts_with_rows(ends: Sequence[int]) -> Iterator[tuple[int, slice]]:
    for expert, (start, end) in enumerate(pairwise([0, *ends])):
        if end > start:
            yield expert, slice(start, end)


def _steps(order: Sequence[int]) -> np.ndarray[Any, Any]:
    """Groups in their order and who takes them: 0 rows that do not swap the first two, 1 rows that do, 2 all."""
    steps = [(group, 2) for group in order]
    if len(steps) > 1:
        steps[:2] = [(order[0], 0), (order[1], 2), (order[0], 1)]
    return np.array(steps, dtype=np.int64)


def _try_out(compiled: Any) -> None:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, order: Sequence[int], swapped: Tensor) -> Tensor:
        def weights(expert: int, columns: slice) -> tuple[Tensor, Tensor]:
            return packed[expert, columns], scales[expert, columns]

        return _by_loops(compiled, x[0], [x.shape[1]], weights, packed.shape[1], order, swapped[0])[None]

    check_gemm(gemm, torch.device("cpu"))
