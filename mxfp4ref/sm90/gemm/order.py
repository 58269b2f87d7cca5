"""The order in which the kernel adds up the groups of K: `docs/arithmetic.md`, "The GEMM"."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref.formats.generations import NEWEST, Generation
from mxfp4ref.formats.mxfp4 import GROUP_SIZE
from mxfp4ref.sm90.tactics import Tactic

__all__ = ["first_pair_swapped", "group_order"]


def group_order(num_groups: int, tile_k: int, generation: Generation = NEWEST) -> list[int]:
    """The order in which the 32-wide groups of K are accumulated.

    Ascending, except that in every K tile but the first and the last the last two groups are swapped, unless the
    generation is one that does not.

    >>> group_order(16, 128)
    [0, 1, 2, 3, 4, 5, 7, 6, 8, 9, 11, 10, 12, 13, 14, 15]

    Raises:
        ValueError: no groups, of which no kernel makes a sum.
    """
    if num_groups < 1:
        raise ValueError(f"K/32: expected at least one group of {GROUP_SIZE} along K, got {num_groups}")
    per_tile = tile_k // GROUP_SIZE
    order = list(range(num_groups))
    if not generation.swaps_groups:
        return order
    for last in range(2 * per_tile - 1, num_groups - per_tile, per_tile):
        order[last - 1], order[last] = order[last], order[last - 1]
    return order


def first_pair_swapped(x: Tensor, positions: Tensor | None, tactic: Tactic, generation: Generation) -> Tensor:
    """In which rows of `x [B, M, K]` the second group's product is rounded alone and the first one's fused.

    Visible only where one of the two leaves float32's range. `positions [B, M]` are the rows' positions among all
    rows of their expert, by default 0, 1, 2, ... Returns `[B, M] bool`.
    """
    if positions is None:
        positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    swapped: Tensor = generation.first_pair_swapped(positions, tactic.tile_n, tactic.tile_k)
    return swapped
