"""Hypotheses on tiles of columns, or parts of tiles, that are read from, or written to, another tile's place.

A pipeline that reads a buffer too early, too late or twice does so wherever it lies: in the input and in the weights
of GEMM1 along K, in GEMM1's output, in the activation, in the weights of GEMM2 and in its output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypotheses.tensors import mapped
from mxfp4ref.conformance.families.hypothesis import Change, Hypothesis
from mxfp4ref.formats.mxfp4 import GROUP_SIZE
from mxfp4ref.model.call import MoeCall

__all__ = ["tile_column_hypotheses"]

_BYTES = GROUP_SIZE // 2  # of a K group's codes
_STALE = ", as where a tile is read or written too early or late (stale)"
_TILES = (128, 64, 256, 32)
_AWAY = {
    1: "the next",
    -1: "the one before",
    -2: "the one 2 before",
    -3: "the one 3 before",
    -4: "the one 4 before",
}
_Which = Callable[[Tensor, int], Tensor]  # numbers of tiles and how many there are, to a mask
_WHICH: tuple[tuple[str, _Which, tuple[int, ...]], ...] = (
    ("the last", lambda i, n: i == n - 1, (-1, -2, -3, -4)),
    ("every odd", lambda i, n: i % 2 == 1, (-1,)),
    ("every even", lambda i, n: (i % 2 == 0) & (i < n - 1), (1,)),
    ("every third", lambda i, n: i % 3 == 2, (-1,)),
    ("every fourth", lambda i, n: i % 4 == 3, (-1,)),
    ("the second", lambda i, n: i == 1, (-1,)),
    ("the first", lambda i, n: i == 0, (1,)),
)
# In each tile that has such a one: places that are read another tile's.
_IN_PARTS: tuple[tuple[str, _Which, tuple[int, ...]], ...] = (
    ("each", lambda i, n: i >= 0, (1, -1, -2)),
    ("the last", lambda i, n: i == n - 1, (-1, -2)),
)


@dataclass(frozen=True)
class _Moved:
    """Columns that are another tile's: words behind the place, `[n] int64` of how many there are, the cost."""

    words: str
    index: Callable[[int], Tensor]
    cost: float
    whole: bool  # whether whole K groups are moved

    def of(self, columns: int) -> Tensor:
        """ValueError where none is moved, or some may be beyond whole tiles."""
        index = self.index(columns)
        if bool((index == torch.arange(columns)).all()):
            raise ValueError("columns: none is moved")
        return index


def tile_column_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """Of every place that has columns."""
    moved = list(_moved())
    for family, what, stages, change in _places():
        for one in moved:
            words = f"{what} {one.words}{_STALE}"
            yield Hypothesis(family, stages, words, change(one), one.cost)
    for fc in ("fc1", "fc2"):
        for kind, names in (
            ("weights with their scales", ("weights", "scales")),
            ("weights (codes without the scales)", ("weights",)),
            ("scales", ("scales",)),
        ):
            for one in (one for one in moved if one.whole):
                tensors = tuple(f"{fc}_{name}" for name in names)
                yield Hypothesis(
                    "K groups",
                    (fc,),
                    f"GEMM{fc[-1]}'s {kind} have along K {one.words}{_STALE}",
                    mapped(tensors, lambda name, t, m=one: _along_k(name, t, m)),
                    one.cost + 0.05,
                )


def _places() -> Iterator[tuple[str, str, tuple[str, ...], Callable[[_Moved], Change]]]:
    """Family, words, stages, and what makes a change of what is moved there."""

    def of_input(moved: _Moved) -> Change:
        return lambda p: p.calling(input=_columns(p.call.input, moved))

    def behind(stage: str, *, halves: bool = False) -> Callable[[_Moved], Change]:
        def change(moved: _Moved) -> Change:
            def on(t: Tensor, *, gated: bool) -> Tensor:
                parts = t.chunk(2, dim=1) if gated else (t,)
                return torch.cat([_columns(part, moved) for part in parts], 1)

            return lambda p: p.behind(stage, lambda t: on(t, gated=halves and p.call.experts.gated))

        return change

    yield "input", "in the input, as GEMM1 reads it,", ("input", "fc1"), of_input
    yield (
        "GEMM1's output",
        "in up and gate of GEMM1's output",
        ("fc1", "activation"),
        behind("round_fc1", halves=True),
    )
    yield (
        "GEMM2's input",
        "in the activation, as it is stored or as GEMM2 reads it,",
        ("activation", "fc2"),
        behind("round_activation"),
    )
    yield "GEMM2's output", "in GEMM2's output", ("fc2", "finalize"), behind("round_fc2")


def _moved() -> Iterator[_Moved]:
    for size in _TILES:
        for which, chosen, sources in _WHICH:
            for away in sources:
                words = f"{which} tile of {size} columns is {_AWAY[away]}"
                yield _Moved(words, _index(size, 0, size, chosen, away), 1.5 + 0.02 * abs(away), True)
        for width in sorted({8, 16, 32, size // 2} - {size}):
            for first, end in ((size - width, "last"), (0, "first")):
                for which, chosen, sources in _IN_PARTS:
                    for away in sources:
                        of = "of each" if which == "each" else f"of {which}"
                        yield _Moved(
                            f"the {end} {width} columns {of} tile of {size} are those of {_AWAY[away]}",
                            _index(size, first, width, chosen, away),
                            1.6 + 0.02 * abs(away),
                            width % GROUP_SIZE == 0,
                        )


def _index(size: int, first: int, width: int, chosen: _Which, away: int) -> Callable[[int], Tensor]:
    def index(n: int) -> Tensor:
        at, tiles = torch.arange(n), n // size
        tile, place = at // size, at % size
        here = chosen(tile, tiles) & (place >= first) & (place < first + width) & (tile < tiles)
        here &= (tile + away >= 0) & (tile + away < tiles)
        return torch.where(here, at + away * size, at)

    return index


def _columns(t: Tensor, moved: _Moved) -> Tensor:
    return t[:, moved.of(t.shape[1]).to(t.device)]


def _along_k(name: str, tensor: Tensor, moved: _Moved) -> Tensor:
    unit = _BYTES if name.endswith("weights") else 1
    parts = tensor.reshape(*tensor.shape[:2], -1, unit)
    groups = moved.of(parts.shape[2] * GROUP_SIZE)[::GROUP_SIZE] // GROUP_SIZE
    return parts[:, :, groups.to(tensor.device)].reshape(tensor.shape)
