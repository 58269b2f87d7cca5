"""Orders in which float32 terms are added up, each sum rounded by a function."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mxfp4ref.defects.variants.rounding import keep
from mxfp4ref.sm90 import fp32

__all__ = ["in_turn", "pairwise"]

_Round = Callable[[Tensor], Tensor]


def in_turn(terms: list[Tensor], rounded: _Round = keep) -> Tensor:
    """One after the other."""
    total, *others = terms
    for term in others:
        total = rounded(fp32.add(total, term))
    return total


def pairwise(terms: list[Tensor], rounded: _Round = keep) -> Tensor:
    """As a tree of neighbours."""
    while len(terms) > 1:
        pairs = [rounded(fp32.add(a, b)) for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[2 * len(pairs) :]
    return terms[0]
