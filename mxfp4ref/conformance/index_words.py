"""Index maps in words: what has come from where."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["map_words"]

_MOST_LISTED = 6


def map_words(got: Tensor, name: str, count: int, *, of: Tensor | None = None) -> str:
    """How indices came to be others, in words; "" where they have not, or where no rule gives all of them.

    Args:
        got: `[N] int64`, what is there.
        name: what is counted: "token", "row of fc1", ...
        count: how many there are.
        of: `[N] int64`, what should be there; by default 0, 1, 2, ...
    """
    want = torch.arange(len(got)) if of is None else of
    if torch.equal(got, want) or not len(got):
        return ""
    rules = [*_shifts(got, want, name, count), *_blocks(got, want, name, count)]
    if words := next((words for words, made in rules if torch.equal(made, got)), ""):
        return words
    return _listed(got, want, name)


def _shifts(got: Tensor, want: Tensor, name: str, count: int) -> list[tuple[str, Tensor]]:
    shift = int(got[0] - want[0])
    rules = []
    if shift:
        rules.append((f"{name} n is {name} n {shift:+d}", want + shift))
        around = shift % count
        signed = around if around <= count // 2 else around - count
        rules.append((f"{name} n is {name} n {signed:+d}, around the end", (want + signed) % count))
        rules.append(
            (f"{name} n is {name} n {shift:+d}, the last ones stay", (want + shift).clamp(0, count - 1))
        )
    rules.append((f"every {name} is {name} {int(got[0])}", torch.full_like(want, int(got[0]))))
    rules.append((f"in reverse: {name} n is {name} {count - 1} - n", count - 1 - want))
    return rules


def _blocks(got: Tensor, want: Tensor, name: str, count: int) -> list[tuple[str, Tensor]]:
    rules = []
    for size in range(2, count):
        rules.append((f"{name} n is {name} n modulo {size}", want % size))
    size = 1
    while size < count:
        rules.append(
            (f"neighbouring blocks of {size} are exchanged: {name} n is {name} n ^ {size}", want ^ size)
        )
        rules.append((f"{name} n is {name} n // {2 * size}", want // (2 * size)))
        size *= 2
    for rows in range(2, count):
        if count % rows == 0:
            transposed = want % rows * (count // rows) + want // rows
            rules.append((f"transposed: {name} n is number n // {rows} of part n modulo {rows}", transposed))
    return rules


def _listed(got: Tensor, want: Tensor, name: str) -> str:
    """A map that is no rule, if there is enough to tell that it is one map."""
    pairs = sorted(set(zip(want.tolist(), got.tolist(), strict=True)))
    if len(pairs) != len({a for a, _ in pairs}) or len(want) < 2 * len(pairs):
        return ""
    changed = [(a, b) for a, b in pairs if a != b]
    shown = ", ".join(f"{a} is {b}" for a, b in changed[:_MOST_LISTED])
    return f"{name} {shown}{', ...' if len(changed) > _MOST_LISTED else ''}"
