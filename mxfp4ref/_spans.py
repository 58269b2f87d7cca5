"""Numbers in order: in pieces that fit into a cache, and those that follow each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

__all__ = ["runs", "spans"]


def spans(length: int, step: int) -> Iterator[slice]:
    """Slices of `step` that cover `length`."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """The first and the last of each run of numbers that follow each other."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found
