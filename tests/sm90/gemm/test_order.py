"""The order in which groups are added up, and the rows that swap the first pair (`docs/arithmetic.md`, 3)."""

from __future__ import annotations

import pytest
import torch

from mxfp4ref.formats.generations import BYTEWISE, PLAIN, WORDWISE
from mxfp4ref.sm90.gemm.order import first_pair_swapped, group_order
from mxfp4ref.sm90.tactics import TILE_K, TILE_N, Tactic
from tests.helpers import exact
from tests.helpers.gemm_inputs import SWAPPING

# K = 1024 as `docs/arithmetic.md` writes it: "0 1 2 3 | 4 5 7 6 | 8 9 11 10 | ... | 28 29 30 31".
ORDERS = {
    (4, 128): [0, 1, 2, 3],
    (8, 128): [0, 1, 2, 3, 4, 5, 6, 7],
    (12, 128): [0, 1, 2, 3, 4, 5, 7, 6, 8, 9, 10, 11],
    (32, 128): [
        0, 1, 2, 3, 4, 5, 7, 6, 8, 9, 11, 10, 12, 13, 15, 14,
        16, 17, 19, 18, 20, 21, 23, 22, 24, 25, 27, 26, 28, 29, 30, 31,
    ],
    (8, 256): [0, 1, 2, 3, 4, 5, 6, 7],
    (16, 256): list(range(16)),
    (24, 256): [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 15, 14, 16, 17, 18, 19, 20, 21, 22, 23],
    (32, 512): list(range(32)),
    (48, 512): [*range(30), 31, 30, *range(32, 48)],
}  # fmt: skip


@pytest.mark.parametrize(("num_groups", "tile_k"), ORDERS)
def test_group_order(num_groups: int, tile_k: int) -> None:
    assert group_order(num_groups, tile_k) == ORDERS[num_groups, tile_k]


@pytest.mark.parametrize("tile_k", TILE_K)
def test_group_order_of_any_length(tile_k: int) -> None:
    for tiles in range(1, 13):
        num_groups = tiles * tile_k // 32
        assert group_order(num_groups, tile_k) == exact.group_order(num_groups, tile_k)


def test_the_oldest_kernel_adds_in_ascending_order() -> None:
    for num_groups in range(4, 64, 4):
        assert group_order(num_groups, 128, PLAIN) == list(range(num_groups))
        assert group_order(num_groups, 128, BYTEWISE) == exact.group_order(num_groups, 128)


def test_first_pair_swapped() -> None:
    """Rows 0, 2, 4, 6 modulo the tile's N, of the tiles that `docs/arithmetic.md` lists."""
    x, positions = torch.zeros(1, 1024, 32), torch.arange(1024)
    for tile_n in TILE_N:
        for tile_k in TILE_K:
            listed = (tile_n, tile_k) in SWAPPING
            expected = [listed and row % tile_n in (0, 2, 4, 6) for row in range(1024)]
            tactic = Tactic((64, tile_n, tile_k))
            got = first_pair_swapped(x, positions, tactic, WORDWISE)
            assert got.dtype == torch.bool
            assert got.tolist() == expected
            assert first_pair_swapped(x, positions, tactic, BYTEWISE).all()
