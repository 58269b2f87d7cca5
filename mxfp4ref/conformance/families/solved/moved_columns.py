"""The right numbers of a row at other columns: an output that is stored in another order, or shifted."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from mxfp4ref.conformance.findings.finding import Evidence, counted

__all__ = ["moved_columns"]

_ROWS, _SCREENED = 64, 8  # that are looked at, and first
_FEWEST = 16  # wrong elements, of which fewer may be others by chance
_FURTHEST = 128  # columns, that one is looked for
_ALMOST_ALL = 0.875  # of the columns, where some at the ends have nothing that could be shifted there
_SHOWN = 4  # runs of columns


def moved_columns(got: Tensor, want: Tensor, wrong: Tensor) -> Evidence | None:
    """Whether the rows that differ have the bits of the expected ones, in another order or shifted.

    Args:
        got, want: `[M, H] bf16`.
        wrong: `[M, H] bool`.
    """
    rows = wrong.any(1).nonzero().flatten()
    if int(wrong.sum()) < _FEWEST:
        return None
    if not _place(got, want, rows[:_SCREENED]) or not (place := _place(got, want, rows[:_ROWS])):
        return None
    tokens = counted(len(rows), "token")
    if len(rows) > _ROWS:
        tokens = f"the first {_ROWS} of the {tokens} that differ"
    # Not final: GEMM2's rows of one expert, moved before the sum, look alike where its tokens have no other slot.
    return Evidence(
        ("fc2", "finalize"), f"in {tokens} the output has the right numbers at other columns: {place}", 3
    )


def _place(got: Tensor, want: Tensor, rows: Tensor) -> str:
    """Where the numbers of these rows are from; "" if they are others."""
    bits, right = (t[rows].contiguous().view(torch.int16) for t in (got, want))
    # [offset, column]: whether a column has, in all of these rows, what belongs so many columns further on.
    offsets = sorted(range(-_FURTHEST, _FURTHEST + 1), key=lambda d: (abs(d), d))
    offsets = [d for d in offsets if abs(d) < bits.shape[1]]
    telling = (bits & 0x7FFF).any(0)  # where zeros are everywhere, they come from nowhere
    same = torch.stack([(bits == right.roll(-d, 1)).all(0) & telling for d in offsets])
    if torch.equal(bits.sort(1).values, right.sort(1).values):
        return _in_words(same, offsets) or "each row has its own, in another order"
    numbers = (bits & 0x7FFF).ne(0).any(0)  # zeros are no column's own
    return _shift(same & numbers, offsets, (bits != right).any(0))


def _shift(same: Tensor, offsets: list[int], wrong: Tensor) -> str:
    """One offset of almost all columns that differ."""
    shares = same[:, wrong].float().mean(1)
    best = int(shares.argmax())
    if float(shares[best]) < _ALMOST_ALL or int(same[best, wrong].sum()) < _FEWEST:
        return ""
    distance = counted(abs(offsets[best]), "column")
    return (
        f"{int(same[best, wrong].sum())} of the {int(wrong.sum())} columns that differ have what belongs {distance} "
        f"{'further on' if offsets[best] > 0 else 'before'}"
    )


def _in_words(same: Tensor, offsets: list[int]) -> str:
    """Where each column is from, by the smallest blocks of columns of which all are alike; "" without such."""
    width = same.shape[1]
    for size in (*(2**n for n in range(1, width.bit_length()) if width % 2**n == 0), width):
        alike = same.view(len(offsets), -1, size).all(1)
        if bool(alike.any(0).all()):
            break
    else:
        return ""
    nearest = [offsets[i] for i in alike.to(torch.uint8).argmax(0).tolist()]
    source = [(column + d) % width for column, d in enumerate(nearest)]
    moved = [column for column, d in enumerate(nearest) if d]
    runs = [list(run) for d, run in groupby(range(size), key=lambda column: nearest[column]) if d]
    each = f" of each {size}" if size < width else ""
    inside = all(0 <= c + d < size for c, d in enumerate(nearest))
    exchanged = inside and all(source[source[column]] == column for column in moved)
    told = [f"{_run(run)} have those of {_run([c + nearest[c] for c in run])}" for run in runs[:_SHOWN]]
    more = ["..."] * (len(runs) > _SHOWN)
    what = "exchanged" if exchanged else "moved"
    span = range(moved[0], moved[-1] + 1)
    between = "" if len(span) == len(moved) else "some of "
    return f"{between}columns {_run(list(span))}{each} are {what}: {', '.join([*told, *more])}"


def _run(columns: list[int]) -> str:
    first, last = columns[0], columns[-1]
    return str(first) if first == last else f"{first} to {last}"
