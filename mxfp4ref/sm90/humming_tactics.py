"""The tactics of the W4A8 ("Humming") kernel. None shows in the output: they are here to be checked.

Its list is that of the W4A16 kernel and ten more, of one warpgroup, for decoding: five tiles, each with a schedule
for a K of up to 384 and one for more.
"""

from __future__ import annotations

from collections.abc import Sequence

from mxfp4ref._validate import check_int, shown
from mxfp4ref.formats.generations import NEWEST
from mxfp4ref.sm90.tactics import tactics_of

__all__ = ["NUM_TACTICS", "check_humming_profile_ids", "runs"]

_WARPGROUP_TILES = tuple((128, tile_n, 128) for tile_n in (8, 16, 32, 40, 64))
_SHORT_K = 384  # up to which the first schedule of a tile runs, and above it the second
NUM_TACTICS = len(tactics_of(NEWEST)) + 2 * len(_WARPGROUP_TILES)


def runs(number: int, rows: int, depth: int) -> bool:
    """Whether the tactic of this number, from 0 on, can run a GEMM of so many weight rows and so large a K."""
    ordinary = tactics_of(NEWEST)
    if number < len(ordinary):
        tile = ordinary[number].tile
        return rows % tile[0] == 0 and depth % tile[2] == 0
    tile_number, rolling = divmod(number - len(ordinary), 2)
    tile = _WARPGROUP_TILES[tile_number]
    return rows % tile[0] == 0 and depth % tile[2] == 0 and (depth > _SHORT_K) == bool(rolling)


def check_humming_profile_ids(profile_ids: Sequence[int], shapes: Sequence[tuple[int, int]]) -> None:
    """Raise unless flashinfer's `profile_ids` force tactics that can run GEMMs of these weight rows and K.

    Raises:
        TypeError: not two ints.
        ValueError: an id that is not that GEMM's, or whose tactic cannot run it.
    """
    if not isinstance(profile_ids, Sequence) or isinstance(profile_ids, str):
        raise TypeError(f"profile_ids: expected two ints, one for each GEMM, got {shown(profile_ids)}")
    if len(profile_ids) != 2:
        raise ValueError(
            f"profile_ids: expected two ints, one for each GEMM, got {len(profile_ids)}: {shown(profile_ids)}"
        )
    for gemm, (number, (rows, depth)) in enumerate(zip(profile_ids, shapes, strict=True)):
        check_int(f"profile_ids[{gemm}]", number, minimum=-1)
        first = gemm * NUM_TACTICS
        if number == -1:
            continue
        if not first <= number < first + NUM_TACTICS:
            raise ValueError(
                f"profile_ids[{gemm}]: expected -1 or a tactic of GEMM{gemm + 1} of the W4A8 kernel, {first} to "
                f"{first + NUM_TACTICS - 1}, got {number}"
            )
        if not runs(number - first, rows, depth):
            raise ValueError(
                f"profile_ids[{gemm}]: expected a tactic that the kernel can run for the {rows} weight rows and "
                f"K = {depth} of GEMM{gemm + 1}, got {number}"
            )
