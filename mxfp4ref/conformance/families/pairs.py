"""Two changes at once: which first ones go with a second one."""

from __future__ import annotations

from torch import Tensor

from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.families.hypothesis import Hypothesis, Pipeline, composed

__all__ = ["alike", "pairs"]

_TRIED = 8  # first changes


def alike(distance: float) -> float:
    """What the distances share that changes leave an output at which are one, told by other words."""
    return round(distance, 2)


def pairs(pipeline: Pipeline, got: Tensor, firsts: list[Hypothesis], second: Hypothesis) -> list[Hypothesis]:
    """Of the first changes, each with the second one, those that predict every bit of `got`.

    Args:
        pipeline: the right one.
        got: `[M, H] bf16`.
        firsts: as many as there is time for are tried.
        second: what is changed besides.
    """
    found = []
    for first in [h for h in firsts if not h.name][:_TRIED]:
        if first.of_rows is not None and second.of_rows is not None:
            continue  # the one would not see what the other does
        pair = composed(first, second) if first.of_rows is None else composed(second, first)
        output = pair.run(pipeline)
        if output is not None and not bool(differing(output, got).any()):
            found.append(pair)
    return found
