"""GEMM2's tiles, of an expert's rows and some columns: not computed, added twice, or stored in each other's place.

Which tiles are concerned is read off the blocks of the output that are wrong, before anything is computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypothesis import Hypothesis, Pipeline, SlotRows, local_of, of_slots
from mxfp4ref.conformance.families.places import concerns_what_is_wrong
from mxfp4ref.conformance.families.slot_kinds import position_in_expert
from mxfp4ref.model.call import MoeCall

__all__ = ["tile_hypotheses"]

_ROWS = (16, 64, 128, 8, 32, 256)
_COLUMNS = (64, 128, 256, 32, 16)
_STAGES = ("fc2", "finalize")
_SWAPPED = (
    ": of experts with more than one tile of rows they lie in each other's places, as in another raster"
)
_WAVES = 264  # tiles at once
_PERIODS = 33
_ORDINALS = {2: "second", 3: "third"}
_MOST_ALIKE = 8  # ways to count tiles that come to the same ones
_MOST_TOLD = 4  # sizes of waves that leave the same tiles


@dataclass(frozen=True)
class _Tiles:
    """GEMM2's tiles of a call of `C = H / columns` columns of tiles.

    Attributes:
        rows, columns: of a tile.
        expert, row: `[M, k]`, the slot's expert, and its row among the expert's; -1 if skipped.
        counts: `[E]`, how many rows each expert has.
        across: C.
    """

    rows: int
    columns: int
    expert: Tensor
    row: Tensor
    counts: Tensor
    across: int

    @classmethod
    def of(cls, call: MoeCall, local: Tensor, rows: int, columns: int) -> _Tiles:
        position, _ = position_in_expert(local)
        counts = torch.bincount(local[local >= 0], minlength=call.experts.num_experts)
        return cls(rows, columns, local, position, counts, -(-call.experts.hidden_size // columns))

    @property
    def down(self) -> Tensor:
        """Tiles of rows, by expert."""
        return -(-self.counts // self.rows)

    @property
    def total(self) -> int:
        return int(self.down.sum()) * self.across

    def number(self, by_columns: bool) -> Tensor:
        """Each slot's tiles in the order in which they are counted, `[M, k, C]`; -1 if skipped.

        Args:
            by_columns: whether, of an expert, the tiles of one row come one after the other.
        """
        mine = self.expert.clamp(min=0)
        down, at = self.down, self.row.clamp(min=0) // self.rows
        first = ((down.cumsum(0) - down) * self.across)[mine]
        column = torch.arange(self.across, device=mine.device)
        if by_columns:
            number = (first + at * self.across)[..., None] + column
        else:
            number = (first + at)[..., None] + down[mine][..., None] * column
        return torch.where(self.expert[..., None] >= 0, number, -1)

    def to_columns(self, blocks: Tensor, hidden: int) -> Tensor:
        """What holds of blocks `[..., C]`, by column, `[..., H]`."""
        return blocks.repeat_interleave(self.columns, -1)[..., :hidden]


_Which = Callable[[_Tiles], Tensor]  # tiles to which of them, `[M, k, C] bool`


def tile_hypotheses(call: MoeCall, wrong: Tensor) -> Iterator[Hypothesis]:
    """Those that concern the blocks of the output that are wrong, `wrong [M, H] bool`, and hardly any others."""
    local = local_of(Pipeline(call))
    hidden = call.experts.hidden_size
    weighs = (local >= 0) & (call.token_final_scales != 0)
    seen = Counter[tuple[int, ...]]()
    across = [c for c in _COLUMNS if c < hidden]
    biased = call.experts.fc1_biases is not None
    for (column, columns), (row, rows) in product(enumerate(across), enumerate(_ROWS)):
        tiles = _Tiles.of(call, local, rows, columns)
        padded = torch.nn.functional.pad(wrong, (0, tiles.across * columns - hidden))
        blocks = padded.view(len(wrong), -1, columns).any(2)
        size, cost = f"GEMM2's tiles of {rows} rows of an expert x {columns} columns", (row + 2 * column) / 50
        for words, which, more in _sets(tiles, blocks, weighs):
            chosen = which(tiles)
            if len(chosen[weighs].unique(dim=0)) == 1:  # type: ignore[no-untyped-call]
                continue  # it is columns, of all rows
            alike = tuple(tiles.to_columns(chosen, hidden).flatten().nonzero().flatten().tolist())
            seen[alike] += 1
            if seen[alike] <= _MOST_ALIKE:
                rows_alone = torch.equal(chosen[weighs].any(1), chosen[weighs].all(1))
                for one in _changed(size, words, (rows, columns), which, cost + more):
                    yield _of_either(one) if rows_alone and "zeros" in one.words and not biased else one
        for words, stored, more in _rasters():
            at, source = stored(tiles)
            moved = (tiles.row[..., None] != at) | (source != torch.arange(tiles.across, device=local.device))
            if concerns_what_is_wrong((moved & weighs[..., None]).any(1), blocks):
                yield _mixed(f"{size} are {words}", (rows, columns), stored, cost + more)


def _sets(tiles: _Tiles, blocks: Tensor, weighs: Tensor) -> Iterator[tuple[str, _Which, float]]:
    """Sets of tiles that may be those, their words behind "of GEMM2's tiles", cost."""
    if not bool(blocks.any()) or bool(blocks.all()):
        return
    few = torch.where(blocks, weighs.sum(1, keepdim=True), weighs.shape[1] + 1).flatten().argmin()
    for by_columns, order in ((True, "along the columns"), (False, "down the rows")):
        number = torch.where(weighs[..., None], tiles.number(by_columns), -1)
        last = number.amax(1)
        low, high = int(last[~blocks].amax()), int(last[blocks].amin())
        sizes = range(2, min(tiles.total, _WAVES + 1))
        for n in [n for n in sizes if low < tiles.total // n * n <= high][:_MOST_TOLD]:
            yield (
                f"counted {order}, those of the last wave, which is not full, of {n} at once (CTAs)",
                lambda t, n=n, b=by_columns: t.number(b) >= t.total // n * n,
                1.4 + n / 1000,
            )
        suspects = number.transpose(1, 2).reshape(-1, number.shape[1])[few].tolist()
        for at in sorted({n for n in suspects if n >= 0}):
            words = (
                f"counted {order}, the {'last' if at == tiles.total - 1 else f'one with number {at} alone'}"
            )
            if concerns_what_is_wrong((number == at).any(1), blocks):
                yield (
                    words,
                    lambda t, at=at - tiles.total * (at == tiles.total - 1), b=by_columns: (
                        t.number(b) == at % t.total
                    ),
                    1.5,
                )
            for n in range(2, min(tiles.total // 2, _PERIODS)):
                if concerns_what_is_wrong(((number % n == at % n) & (number >= 0)).any(1), blocks):
                    yield (
                        f"counted {order}, every {_ORDINALS.get(n, f'{n}th')} from number {at % n} on",
                        lambda t, n=n, a=at % n, b=by_columns: (t.number(b) >= 0) & (t.number(b) % n == a),
                        1.6 + n / 100,
                    )


def _of_either(hypothesis: Hypothesis) -> Hypothesis:
    """Of rows that are zero as a whole, as they are too where GEMM1's are."""
    words = f"{hypothesis.words}, or GEMM1's tiles of these rows are not"
    return replace(hypothesis, stages=("fc2", "fc1"), words=words)


def _changed(
    size: str, words: str, shape: tuple[int, int], which: _Which, cost: float
) -> Iterator[Hypothesis]:
    for factor, what in ((0.0, "are not computed (zeros)"), (2.0, "are added twice")):

        def on(rows: SlotRows, factor: float = factor) -> SlotRows:
            tiles = _Tiles.of(rows.call, rows.local, *shape)
            chosen = tiles.to_columns(which(tiles), rows.y.shape[2])
            return replace(rows, y=torch.where(chosen, factor * rows.y, rows.y))

        one = of_slots("tiles", _STAGES, f"of {size}, {words}, {what}", on, cost + 0.1 * (factor > 0))
        yield replace(one, across_tokens=True, slow=True)


_Stored = Callable[
    [_Tiles], tuple[Tensor, Tensor]
]  # tiles to the row of the expert, and the column of tiles, there


def _rasters() -> Iterator[tuple[str, _Stored, float]]:
    """Orders of tiles: words behind "GEMM2's tiles", which tile lies where each slot's should, cost."""

    def taken(tiles: _Tiles, inverse: bool) -> tuple[Tensor, Tensor]:
        down = tiles.down[tiles.expert.clamp(min=0)][..., None].clamp(min=1)
        row = tiles.row.clamp(min=0)[..., None]
        at, column = row // tiles.rows, torch.arange(tiles.across, device=row.device)
        number = at * tiles.across + column if inverse else column * down + at
        source = (
            (number % down, number // down) if inverse else (number // tiles.across, number % tiles.across)
        )
        return source[0] * tiles.rows + row % tiles.rows, source[1]

    yield (
        f"counted along the columns when computed and down the rows when stored{_SWAPPED}",
        lambda t: taken(t, False),
        1.4,
    )
    yield (
        f"counted down the rows when computed and along the columns when stored{_SWAPPED}",
        lambda t: taken(t, True),
        1.4,
    )


def _mixed(words: str, shape: tuple[int, int], stored: _Stored, cost: float) -> Hypothesis:
    def on(rows: SlotRows) -> SlotRows:
        tiles = _Tiles.of(rows.call, rows.local, *shape)
        y, hidden = rows.y, rows.y.shape[2]
        if hidden % tiles.columns:
            return rows
        row, column = stored(tiles)
        flat, size = tiles.expert.flatten(), tiles.expert.numel() + 1
        key = flat * size + tiles.row.flatten()
        order = key.argsort()
        wanted = (tiles.expert[..., None] * size + row).flatten()
        place = torch.searchsorted(key[order], wanted).clamp(max=len(flat) - 1)
        source = torch.where(
            key[order][place] == wanted, order[place], len(flat)
        )  # rows beyond the last are zero
        blocks = torch.cat((y.flatten(0, 1), torch.zeros_like(y[0, :1]))).view(
            len(flat) + 1, -1, tiles.columns
        )
        moved = blocks[source, column.flatten()].view(y.shape)
        return replace(rows, y=torch.where(tiles.expert[..., None] >= 0, moved, y))

    return replace(of_slots("tiles", _STAGES, words, on, cost), across_tokens=True, slow=True)
