"""Maps of where an output differs, as data for `templates/map.svg.j2`, and the one legend that they have by ulp."""

from __future__ import annotations

import base64
import struct
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from mxfp4ref.conformance.diagnosis import ULP_BINS

__all__ = ["LEGEND", "PAPER", "Band", "MismatchMap", "UlpClass", "darkened", "mismatch_maps"]

_ROWS, _COLUMNS = 64, 256  # a map's cells; larger outputs are pooled
_TILE = 128  # columns of an output tile of most of the kernel's tactics
_LEFT, _TOP, _WIDTH, _LOWEST, _HIGHEST = 46, 24, 344, 72, 192  # the plot, in units of the drawing
_LABEL = 26, 12  # the room of a label, across and down


@dataclass(frozen=True)
class UlpClass:
    """A range of distances in ulp, one of `ULP_BINS`: its name, and its colour on light paper and on dark."""

    label: str
    light: str
    dark: str


# The greater the distance, the further from the paper in lightness, so that nobody has to see hues; NaN by its hue.
LEGEND = (
    UlpClass("up to 1 ulp", "#f3cd62", "#6e4210"),
    UlpClass("2 ulp", "#e8a52c", "#96560c"),
    UlpClass("3 to 4 ulp", "#d97f14", "#bf6e10"),
    UlpClass("5 to 16 ulp", "#b75a0c", "#e28d2c"),
    UlpClass("17 to 256 ulp", "#863a0b", "#f6b860"),
    UlpClass("more", "#4d1d08", "#ffe9bd"),
    UlpClass("NaN on one side", "#3b82f6", "#4d9bff"),
)
PAPER = UlpClass("equal bits", "#eceef3", "#262a34")
assert len(LEGEND) == len(ULP_BINS)


@dataclass(frozen=True)
class Band:
    """A stretch of an axis: where it begins and ends, in units of the drawing, and its label or ""."""

    begin: float
    end: float
    label: str

    @property
    def middle(self) -> float:
        return (self.begin + self.end) / 2


@dataclass(frozen=True)
class MismatchMap:
    """A map, and its axes in the drawing's units.

    Attributes:
        title: what its rows are.
        cells: a PNG in base64, in the colours for light paper and transparent where the bits are equal.
        left, top, width, height: the plot's place.
        x, y: the names of the axes below and at the left.
        columns: ticks below, of no width.
        rows: ticks at the left of no width, or bands of experts.
        tiles: bands above, one for each tile of 128 columns; none where the output is no kernel call's.
        cell: how many rows and columns a cell stands for; it shows the largest distance of them.
    """

    title: str
    cells: str
    height: float
    x: str
    y: str
    columns: tuple[Band, ...]
    rows: tuple[Band, ...]
    tiles: tuple[Band, ...]
    cell: tuple[float, float]
    left: int = _LEFT
    top: int = _TOP
    width: int = _WIDTH

    @property
    def pooled(self) -> str:
        """What a cell stands for, in words; "" if for one element."""
        down, across = self.cell
        if self.cell == (1, 1):
            return ""
        return f"A cell shows the largest distance of some {down:.3g} × {across:.3g} elements."


def mismatch_maps(bins: Tensor, experts: Tensor | None = None) -> list[MismatchMap]:
    """The output as it lies in memory, and of a kernel call once more with its rows in the order of experts.

    Args:
        bins, experts: as in `Diagnosis`.
    """
    if experts is not None:
        by_token = _map("Tokens by columns", bins, "column", "token", tiled=True)
        slots = (experts >= 0).nonzero()
        ids = experts[slots[:, 0], slots[:, 1]]
        if len(set(ids.tolist())) < 2:
            return [by_token]
        order = torch.argsort(ids, stable=True)
        rows = bins[slots[order, 0]]
        title = "The same, for each expert the tokens that it works on"
        if len(set(slots[:, 0].tolist())) < len(bins):
            title += "; tokens without one are left out"
        return [by_token, _map(title, rows, "column", "expert", tiled=True, experts=ids[order])]
    if bins.dim() < 2:
        return [_map("Elements", bins.reshape(1, -1), "element", "")]
    flat = bins.reshape(-1, bins.shape[-1])
    if bins.dim() == 2:
        return [_map("Rows by columns", flat, "column", "row")]
    ids = torch.arange(bins.shape[0]).repeat_interleave(len(flat) // max(bins.shape[0], 1))
    return [_map("Rows of each expert by columns", flat, "column", "expert", experts=ids)]


def darkened() -> list[list[float]]:
    """What a filter makes of red, green and blue on dark paper, from 0 to 1: for each of 256 shades another.

    A shade that no class has, as of a screen with other colours, is taken for the nearest that one has.
    """
    tables = []
    for at in (1, 3, 5):
        light, dark = (
            [int(getattr(one, name)[at : at + 2], 16) for one in LEGEND] for name in ("light", "dark")
        )
        nearest = (min(range(len(LEGEND)), key=lambda i: abs(light[i] - shade)) for shade in range(256))
        tables.append([dark[i] / 255 for i in nearest])
    return tables


def _map(
    title: str, bins: Tensor, x: str, y: str, *, tiled: bool = False, experts: Tensor | None = None
) -> MismatchMap:
    rows, columns = bins.shape
    cells = min(rows, _ROWS), min(columns, _COLUMNS)
    pooled = torch.nn.functional.adaptive_max_pool2d(bins[None].to(torch.float32), cells)[0].to(torch.uint8)
    height = float(min(max(8 * rows, _LOWEST), _HIGHEST))
    if experts is None:
        left = _ticks(rows, _TOP, height, _LABEL[1])
    else:
        left = _bands(experts.tolist(), _TOP, height, _LABEL[1])
    tiles = [column // _TILE for column in range(columns)] if tiled and columns > _TILE else []
    return MismatchMap(
        title,
        _png(pooled, [one.light for one in LEGEND]),
        height,
        x,
        y,
        _ticks(columns, _LEFT, _WIDTH, _LABEL[0]),
        left,
        _bands(tiles, _LEFT, _WIDTH, _LABEL[0]),
        (rows / cells[0], columns / cells[1]),
    )


def _ticks(count: int, start: float, length: float, room: int) -> tuple[Band, ...]:
    """A tick in the middle of every 1st, 2nd, 4th ... cell, as there is room for its label."""
    step = 1
    while step < count and step * length / count < room:
        step *= 2
    places = ((n, start + (n + 0.5) * length / count) for n in range(0, count, step))
    return tuple(Band(place, place, str(n)) for n, place in places)


def _bands(of_cell: list[int], start: float, length: float, room: int) -> tuple[Band, ...]:
    """A band for each run of equal numbers, which is its label where there is room for it."""
    edges = [n for n in range(1, len(of_cell)) if of_cell[n] != of_cell[n - 1]]
    found: list[Band] = []
    free = start
    for begin, end in zip([0, *edges], [*edges, len(of_cell)], strict=True) if of_cell else ():
        one, other = (start + n * length / len(of_cell) for n in (begin, end))
        fits = (one + other) / 2 - room / 2 >= free - 0.5 or not found
        found.append(Band(one, other, str(of_cell[begin]) if fits else ""))
        free = (one + other) / 2 + room / 2 if fits else free
    return tuple(found)


def _png(cells: Tensor, colours: list[str]) -> str:
    """Numbers, 0 transparent and n the nth colour, as a PNG in base64."""
    palette = b"".join(bytes.fromhex(colour[1:]) for colour in colours)
    height, width = cells.shape
    lines = b"".join(b"\0" + row.numpy().tobytes() for row in cells)
    chunks = {
        # A byte a cell, which is a palette's index.
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0),
        b"PLTE": b"\0\0\0" + palette,
        b"tRNS": b"\0",
        b"IDAT": zlib.compress(lines, 9),
        b"IEND": b"",
    }
    data = b"\x89PNG\r\n\x1a\n"
    for name, content in chunks.items():
        data += (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )
    return base64.b64encode(data).decode("ascii")
