"""The generations of flashinfer's SM90 kernel: one record each of all in which they differ.

Generations do not follow the releases' numbers: the newer mainloop came with 0.6.16, was reverted in 0.6.16.post3
and came back in 0.6.18. So a generation is named by what it does to weights. A release belongs to the generation
whose MoE mainloop it has, compared byte by byte in the sources.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pickle import PicklingError
from typing import Any, Protocol

from torch import Tensor

from mxfp4ref._validate import check_instance, shown
from mxfp4ref.formats import bytewise, plain, wordwise

__all__ = [
    "BYTEWISE",
    "GENERATIONS",
    "NEWEST",
    "PLAIN",
    "WORDWISE",
    "Generation",
    "Tile",
    "check_generation",
    "generation_named",
    "generation_of",
]

Tile = tuple[int, int, int]


class Layout(Protocol):
    """A module that brings weights `[E, R, K/2]` and scales `[E, R, G]` into the kernel's order and back."""

    SCALE_ROWS: int  # R has to be a multiple of it
    SCALE_AXES: str  # of the folded scales
    ORDERS: tuple[int, int]  # of weights and scales, in the compiled loops; 0 is logical order

    def interleave(self, packed: Tensor) -> Tensor: ...
    def deinterleave(self, interleaved: Tensor) -> Tensor: ...
    def fold(self, scales: Tensor) -> Tensor: ...
    def unfold(self, folded: Tensor) -> Tensor: ...
    def folded_shape(self, experts: int, rows: int, groups: int) -> tuple[int, ...]: ...
    def logical_shape(self, folded: tuple[int, ...]) -> tuple[int, int, int] | None: ...


@dataclass(frozen=True, repr=False)
class Generation:
    """One kernel, as far as it differs from the others.

    Attributes:
        name: how this package calls it.
        releases: the releases of flashinfer-python that have it.
        recorded_as: its name in the stored goldens and hardware records.
        layout: where the bytes of its weights and scales lie.
        first_pair_swapped: (positions of rows in their expert, a tensor or an array, tile_n, tile_k) to whether the
            kernel rounds the product of the second K group alone and fuses the first one's; see
            `docs/arithmetic.md`, "The exception".
        tiles: M, N and K of the tiles that its GEMMs offer; tactics are numbered in this order, four clusters a tile.
        swaps_groups: whether the last two groups of every K tile but the first and the last trade places.
        refused: tiles that are offered but do not run, for lack of shared memory.
        forces_tactics: whether `profile_ids` forces a tactic; 0.6.16.post3 to 0.6.17 take it and ignore it.
        known_faults: what is wrong with it on hardware, in words.
    """

    name: str
    releases: tuple[str, ...]
    recorded_as: str
    layout: Layout
    first_pair_swapped: Callable[[Any, int, int], Any]
    tiles: tuple[Tile, ...]
    swaps_groups: bool = True
    refused: frozenset[Tile] = frozenset()
    forces_tactics: bool = True
    known_faults: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return self.name.upper()

    @property
    def spans(self) -> str:
        """Its releases, as spans of all that are known: "0.6.10 to 0.6.15.post1, 0.6.16.post3 to 0.6.17"."""
        spans: list[list[str]] = []
        before = False
        for release in sorted((r for one in _NAMED for r in one.releases), key=_by_number):
            here = release in self.releases
            if here and before:
                spans[-1][1:] = [release]
            elif here:
                spans.append([release])
            before = here
        return ", ".join(" to ".join(span) for span in spans)

    def __reduce__(self) -> tuple[Callable[[str], Generation], tuple[str]]:
        if self not in _NAMED:  # a changed record must not become the one whose name it has kept
            raise PicklingError(
                f"generation: expected one of GENERATIONS, which have names, got another {self!r}"
            )
        return generation_named, (self.name,)  # the record itself, also in another process

    def __copy__(self) -> Generation:
        return self  # nothing in it can change

    def __deepcopy__(self, memo: object) -> Generation:
        return self


def _by_number(release: str) -> list[int]:
    return [int(part.removeprefix("post")) for part in release.split(".")]


# (tile_n, tile_k) of the kernels that round the second product alone and fuse the first, in rows 0, 2, 4, 6.
_SWAPPING_TILES = {(16, 256), (32, 512), (64, 128), (64, 256), (64, 512), (128, 128), (128, 256)}


def _some_rows_of_some_tiles(positions: Any, tile_n: int, tile_k: int) -> Any:
    row = positions % tile_n
    return (row < 8) & (row % 2 == 0) & ((tile_n, tile_k) in _SWAPPING_TILES)


def _every_row(positions: Any, tile_n: int, tile_k: int) -> Any:
    return positions >= 0  # read off the machine code of 0.6.15.post1


def _no_row(positions: Any, tile_n: int, tile_k: int) -> Any:
    return positions < 0


_RACE = (
    "a race (flashinfer#5438): under load the last K groups of a tile are scaled by the next expert's scales, "
    "in sporadic tiles of 16 rows, mostly where a GEMM has a single K tile"
)


BYTEWISE = Generation(
    name="bytewise",
    releases=(
        *(
            "0.6.10",
            "0.6.10.post1",
            "0.6.11",
            "0.6.11.post1",
            "0.6.11.post2",
            "0.6.11.post3",
            "0.6.12",
            "0.6.13",
        ),
        *("0.6.14", "0.6.15", "0.6.15.post1", "0.6.16.post3", "0.6.16.post4", "0.6.17"),
    ),
    recorded_as="0.6.9",
    layout=bytewise,
    first_pair_swapped=_every_row,
    tiles=(
        *((64, n, 128) for n in (16, 32, 64, 128)),
        *((128, n, 128) for n in (16, 32, 64)),
    ),
    forces_tactics=False,
    known_faults=(_RACE,),
)
WORDWISE = Generation(
    name="wordwise",
    releases=(
        *("0.6.16", "0.6.16.post1", "0.6.16.post2", "0.6.18", "0.6.18.post1"),
        *("0.7.0", "0.7.0.post1", "0.7.1", "0.7.2", "0.7.2.post1"),
    ),
    recorded_as="0.6.16",
    layout=wordwise,
    first_pair_swapped=_some_rows_of_some_tiles,
    tiles=(
        *((m, n, k) for m in (64, 128) for n in (16, 32, 64, 128) for k in (128, 256, 512)),
        *((128, 256, k) for k in (128, 256)),
        *((256, 128, k) for k in (128, 256)),
        (256, 256, 128),
    ),
    refused=frozenset({(64, 128, 512), (128, 128, 512), (128, 256, 256), (256, 128, 256)}),
)

# What the drop-in computes for `weight_layout="logical_weights_folded_scales"`. The mainloop's source is the same in
# all these releases, byte for byte; 0.6.9 was run on an H100. It adds the groups up in ascending order.
PLAIN = Generation(
    name="plain",
    releases=("0.6.4", "0.6.7", "0.6.8", "0.6.8.post1", "0.6.9"),
    recorded_as="plain",
    layout=plain,
    first_pair_swapped=_no_row,
    tiles=BYTEWISE.tiles,
    swaps_groups=False,
    forces_tactics=False,
    known_faults=(_RACE,),
)

GENERATIONS = (BYTEWISE, WORDWISE)  # those whose weights have an order of their own, which goldens hold
_NAMED = (*GENERATIONS, PLAIN)
NEWEST = WORDWISE  # the default everywhere, and what goldens and records that name no generation are of
# What is known of other releases.
_OLDER = "has an older mainloop that takes weights in logical order, for which there are no goldens"
_WITHOUT_GOLDENS = dict.fromkeys(PLAIN.releases, _OLDER)


def check_generation(value: object) -> None:
    """Raise TypeError unless `value` is a record of this module."""
    if not isinstance(value, Generation):
        names = " or ".join(map(repr, _NAMED))
        raise TypeError(f"generation: expected {names} of mxfp4ref.formats.generations, got {shown(value)}")


def generation_named(name: str) -> Generation:
    """The generation of that name, or of that name in a stored golden or record.

    Raises:
        ValueError: there is none.
    """
    for generation in _NAMED:
        if name in (generation.name, generation.recorded_as):
            return generation
    names = " or ".join(repr(generation.name) for generation in _NAMED)
    raise ValueError(f"generation: expected {names}, got {name!r}")


def generation_of(release: str) -> Generation:
    """The generation of a release of flashinfer-python, such as "0.6.17"; a local part ("+cu130") does not count.

    Raises:
        TypeError: not a string.
        ValueError: it is in no record.
    """
    check_instance("release", release, str)
    public = release.partition("+")[0]
    for generation in GENERATIONS:
        if public in generation.releases:
            return generation
    known = _WITHOUT_GOLDENS.get(public, "is in no record of mxfp4ref.formats.generations")
    raise ValueError(
        f"flashinfer {release} {known}; CONTRIBUTING.md, 'Adding a generation of flashinfer', says how to find out "
        "which kernel a release has, and how to add it"
    )
