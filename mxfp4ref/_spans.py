"""Work in pieces that fit into a cache."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["spans"]


def spans(length: int, step: int) -> Iterator[slice]:
    """Slices of `step` that cover `length`."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
