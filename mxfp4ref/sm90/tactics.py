"""Which of its many ways the SM90 kernel takes: the tactics of its two GEMMs, and the generation it is of.

A tactic is a CTA tile (M, N, K) and a cluster of CTAs. M are rows of the weights, N rows of tokens. Only N and K of a
tile can show in the output: `docs/arithmetic.md`, "The GEMM".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mxfp4ref._validate import check_instance, check_int, shown
from mxfp4ref.formats.generations import NEWEST, Generation, Tile, check_generation

__all__ = ["TILE_K", "TILE_N", "Sm90Kernel", "Tactic", "each_kernel", "runnable_tactics", "tactics_of"]

TILE_K = (128, 256, 512)
TILE_N = (16, 32, 64, 128, 256)

_CLUSTERS = ((1, 1), (2, 1), (1, 2), (2, 2))


@dataclass(frozen=True)
class Tactic:
    """One way in which the kernel can run a GEMM; by default what it does unless told otherwise.

    Attributes:
        tile: M, N and K of a CTA's tile.
        cluster: CTAs of a cluster along M and N.

    Raises:
        TypeError: not a tuple of three ints and one of two.
    """

    tile: Tile = (64, 16, 128)
    cluster: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        for name, value, count in (("tile", self.tile, 3), ("cluster", self.cluster, 2)):
            if not (isinstance(value, tuple) and len(value) == count and all(type(n) is int for n in value)):
                raise TypeError(f"{name}: expected a tuple of {count} ints, got {shown(value)}")

    def __str__(self) -> str:
        return "{}x{}x{}/{}x{}".format(*self.tile, *self.cluster)

    @property
    def tile_n(self) -> int:
        return self.tile[1]

    @property
    def tile_k(self) -> int:
        return self.tile[2]


@dataclass(frozen=True)
class Sm90Kernel:
    """The tactics of GEMM1 and GEMM2 and the generation of the kernel: all of it that can show in the output.

    Raises:
        TypeError: not two tactics and a generation.
        ValueError: the generation offers no such tactic.
    """

    gemm1: Tactic = Tactic()
    gemm2: Tactic = Tactic()
    generation: Generation = NEWEST

    def __post_init__(self) -> None:
        check_generation(self.generation)
        for name in ("gemm1", "gemm2"):
            tactic = getattr(self, name)
            check_instance(name, tactic, Tactic)
            if tactic.tile not in self.generation.tiles or tactic.cluster not in _CLUSTERS:
                tiles = ", ".join("{}x{}x{}".format(*tile) for tile in self.generation.tiles)
                raise ValueError(
                    f"{name}: expected a tactic of the {self.generation.name} kernel, a tile of {tiles} and a "
                    f"cluster of 1x1, 2x1, 1x2 or 2x2, got {tactic}"
                )

    def __str__(self) -> str:
        return f"{self.gemm1}, {self.gemm2}"

    @classmethod
    def of_tiles(
        cls, tile_k: tuple[int, int], tile_n: tuple[int, int] = (16, 16), generation: Generation = NEWEST
    ) -> Sm90Kernel:
        """The first tactics with these K and N tiles of GEMM1 and GEMM2: `Sm90Kernel.of_tiles((128, 256))`.

        Raises:
            TypeError: not pairs.
            ValueError: the generation has no such tiles.
        """
        check_generation(generation)
        for name, pair in (("tile_k", tile_k), ("tile_n", tile_n)):
            if not (isinstance(pair, tuple) and len(pair) == 2):
                raise TypeError(f"{name}: expected a pair, one for each GEMM, got {shown(pair)}")
        tactics: list[Tactic] = []
        for k, n in zip(tile_k, tile_n, strict=True):
            fitting = [tile for tile in generation.tiles if tile[1:] == (n, k)]
            if not fitting:
                pairs = ", ".join(f"{n}x{k}" for n, k in dict.fromkeys(tile[1:] for tile in generation.tiles))
                raise ValueError(
                    f"tile_k, tile_n: expected N x K of a tile of the {generation.name} kernel, one of {pairs}; got "
                    f"{shown(n)}x{shown(k)}"
                )
            tactics.append(Tactic(fitting[0]))
        return cls(tactics[0], tactics[1], generation)

    @classmethod
    def of_profile_ids(cls, profile_ids: Sequence[int], generation: Generation = NEWEST) -> Sm90Kernel:
        """The tactics that flashinfer's `profile_ids` force: `Sm90Kernel.of_profile_ids([4, 120])`.

        Args:
            profile_ids: one id of each GEMM; those of GEMM2 continue after those of GEMM1, -1 is its default tactic.
            generation: whose list of tactics is numbered.

        Raises:
            TypeError: not two ints.
            ValueError: an id that is not that GEMM's.
        """
        check_generation(generation)
        if not isinstance(profile_ids, Sequence) or isinstance(profile_ids, str):
            raise TypeError(f"profile_ids: expected two ints, one for each GEMM, got {shown(profile_ids)}")
        if len(profile_ids) != 2:
            raise ValueError(
                f"profile_ids: expected two ints, one for each GEMM, got {len(profile_ids)}: {shown(profile_ids)}"
            )
        tactics = tactics_of(generation)
        chosen = []
        for gemm, number in enumerate(profile_ids):
            check_int(f"profile_ids[{gemm}]", number, minimum=-1)
            first = gemm * len(tactics)
            if number != -1 and not first <= number < first + len(tactics):
                other = f", one of GEMM{2 - gemm}" if 0 <= number < 2 * len(tactics) else ""
                raise ValueError(
                    f"profile_ids[{gemm}]: expected -1 or a tactic of GEMM{gemm + 1} of the {generation.name} "
                    f"kernel, {first} to {first + len(tactics) - 1}, got {number}{other}"
                )
            chosen.append(Tactic() if number == -1 else tactics[number - first])
        return cls(chosen[0], chosen[1], generation)

    @property
    def tactics(self) -> tuple[Tactic, Tactic]:
        return self.gemm1, self.gemm2

    @property
    def tile_k(self) -> tuple[int, int]:
        """The K tiles of GEMM1 and GEMM2."""
        return self.gemm1.tile_k, self.gemm2.tile_k

    @property
    def tile_n(self) -> tuple[int, int]:
        """The N tiles of GEMM1 and GEMM2."""
        return self.gemm1.tile_n, self.gemm2.tile_n

    @property
    def profile_ids(self) -> list[int]:
        """flashinfer's `profile_ids` that force these tactics; GEMM2's ids continue after GEMM1's."""
        tactics = tactics_of(self.generation)
        return [tactics.index(self.gemm1), len(tactics) + tactics.index(self.gemm2)]


def tactics_of(generation: Generation) -> tuple[Tactic, ...]:
    """All tactics that a generation offers, in the order of their ids."""
    return tuple(Tactic(tile, cluster) for tile in generation.tiles for cluster in _CLUSTERS)


def runnable_tactics(rows: int, depth: int, generation: Generation = NEWEST) -> list[Tactic]:
    """The tactics that a GEMM of so many weight rows and so large a K can use."""
    return [
        tactic
        for tactic in tactics_of(generation)
        if tactic.tile not in generation.refused and rows % tactic.tile[0] == 0 and depth % tactic.tile_k == 0
    ]


def each_kernel(shapes: Sequence[tuple[int, int]], generation: Generation = NEWEST) -> Iterator[Sm90Kernel]:
    """Every runnable tactic of GEMM1 beside the default of GEMM2, then the other way round.

    Args:
        shapes: weight rows and K of the two GEMMs, as `Experts.gemm_shapes`.
        generation: whose tactics.
    """
    gemm1, gemm2 = shapes
    for tactic in runnable_tactics(*gemm1, generation):
        yield Sm90Kernel(gemm1=tactic, generation=generation)
    for tactic in runnable_tactics(*gemm2, generation):
        yield Sm90Kernel(gemm2=tactic, generation=generation)
