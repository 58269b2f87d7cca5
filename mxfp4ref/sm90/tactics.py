"""The tactics of flashinfer's SM90 kernel: which tiles and clusters there are, and the ids that force them.

A tactic is a CTA tile (M, N, K) and a cluster of CTAs (the specification, section 8). M are rows of the weights, N
rows of tokens. Only N and K of a tile can show in the output.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = [
    "DEFAULT_TACTIC",
    "TACTICS",
    "Tactic",
    "each_tactic",
    "profile_ids",
    "runnable_tactics",
    "with_tile_k",
]

Tile = tuple[int, int, int]

_TILES: tuple[Tile, ...] = (
    *((m, n, k) for m in (64, 128) for n in (16, 32, 64, 128) for k in (128, 256, 512)),
    *((128, 256, k) for k in (128, 256)),
    *((256, 128, k) for k in (128, 256)),
    (256, 256, 128),
)
_CLUSTERS = ((1, 1), (2, 1), (1, 2), (2, 2))
# Offered by flashinfer's list, refused by the kernel: not enough shared memory.
_REFUSED: frozenset[Tile] = frozenset({(64, 128, 512), (128, 128, 512), (128, 256, 256), (256, 128, 256)})


@dataclass(frozen=True)
class Tactic:
    """One way in which the kernel can run a GEMM.

    Attributes:
        tile: M, N and K of a CTA's tile.
        cluster: CTAs of a cluster along M and N.
    """

    tile: Tile
    cluster: tuple[int, int] = (1, 1)

    def __str__(self) -> str:
        return "{}x{}x{}/{}x{}".format(*self.tile, *self.cluster)


TACTICS = tuple(
    Tactic(tile, cluster) for tile in _TILES for cluster in _CLUSTERS
)  # in the order of their ids
DEFAULT_TACTIC = Tactic((64, 16, 128))


def runnable_tactics(rows: int, depth: int) -> list[Tactic]:
    """The tactics that a GEMM of so many weight rows and so large a K can use."""
    return [
        tactic
        for tactic in TACTICS
        if tactic.tile not in _REFUSED and rows % tactic.tile[0] == 0 and depth % tactic.tile[2] == 0
    ]


def each_tactic(hidden: int, inner: int) -> Iterator[tuple[Tactic, Tactic]]:
    """Every runnable tactic of GEMM1 beside the default of GEMM2, then the other way round."""
    for tactic in runnable_tactics(2 * inner, hidden):
        yield tactic, DEFAULT_TACTIC
    for tactic in runnable_tactics(hidden, inner):
        yield DEFAULT_TACTIC, tactic


def with_tile_k(tile_k: int) -> Tactic:
    """The default tactic with another K tile."""
    return Tactic((*DEFAULT_TACTIC.tile[:2], tile_k))


def profile_ids(first: Tactic, second: Tactic) -> list[int]:
    """flashinfer's `profile_ids` that force these tactics for GEMM1 and GEMM2."""
    return [TACTICS.index(first), len(TACTICS) + TACTICS.index(second)]
