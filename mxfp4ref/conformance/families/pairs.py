"""Two changes at once: which first ones go with a second one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import chain

from torch import Tensor

from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.families.hypothesis import (
    FAILURES,
    Hypothesis,
    Pipeline,
    SlotRows,
    composed,
)
from mxfp4ref.conformance.families.solved.weight_rules import weight_rules

__all__ = ["alike", "pair_in_the_sum", "pairs"]

_TRIED = 8  # first changes
_LOOKED_AT = 4  # tokens, before all of them


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
        pair = composed(first, second)
        if pair.predicts(pipeline, got):
            found.append(pair)
    return found


def pair_in_the_sum(
    pipeline: Pipeline, rows: SlotRows, got: Tensor, first: Hypothesis, seconds: Iterable[Hypothesis]
) -> Hypothesis | None:
    """The first change, of the slots' rows, with a second of these or of the sum, if they predict every bit of `got`.

    Args:
        pipeline: the right one.
        rows: what its weighted sum is made of.
        got: `[M, H] bf16`.
        first: with `of_rows`.
        seconds: others than those with `of_rows` or `of_sum` are left out.
    """
    of_first = first.of_rows
    if of_first is None:
        return None
    changed = of_first(rows)
    wrong = differing(changed.output(pipeline), got)
    telling = wrong.sum(1).argsort(descending=True, stable=True)
    some = telling[:_LOOKED_AT]
    for second in chain(weight_rules(changed, got, wrong), seconds):
        try:
            both = changed if second.of_rows is None else second.of_rows(changed)
            run = pipeline if second.of_sum is None else second.change(pipeline)
            few = replace(both, y=both.y[some], local=both.local[some], weights=both.weights[some])
            if (second.of_rows or second.of_sum) and not bool(differing(few.output(run), got[some]).any()):
                pair = composed(first, second)
                if not bool(differing(pair.change(pipeline).run(), got).any()):
                    return pair
        except FAILURES:
            continue
    return None
