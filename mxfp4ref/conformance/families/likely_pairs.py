"""Two mistakes before the weighted sum, neither of which shows without the other: every pair of the likely ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, combinations, groupby, product
from typing import Any

from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.families.batches import each
from mxfp4ref.conformance.families.hypotheses.preparations import preparation_hypotheses
from mxfp4ref.conformance.families.hypotheses.tensors import layout_hypotheses
from mxfp4ref.conformance.families.hypothesis import (
    FAILURES,
    Change,
    Hypothesis,
    Pipeline,
    composed,
    fields_set,
    unchecked,
)
from mxfp4ref.conformance.families.named import named_hypotheses
from mxfp4ref.conformance.families.twos import SIMPLE
from mxfp4ref.model.call import MoeCall

__all__ = ["BEFORE_THE_SUM", "likely_pairs"]

BEFORE_THE_SUM = {"input", "fc1", "activation", "fc2"}
_LIKELY = 1.1  # the most that one of two assumes


@dataclass(frozen=True)
class _One:
    """A change, the fields that it sets, and its number among those of one token that give different outputs."""

    hypothesis: Hypothesis
    sets: frozenset[str]
    number: int

    def beside(self, other: _One) -> Hypothesis:
        """Both; the tensors that either makes are the same objects in all of its pairs."""
        one, two = self.hypothesis, other.hypothesis
        return replace(composed(one, two), change=_both(one.change, two.change))


def likely_pairs(part: Pipeline) -> Iterator[Hypothesis]:
    """Pairs of changes of different tensors, parameters and stages, those of named defects first.

    Args:
        part: the right pipeline of one token; of changes that give the same there, one is paired.
    """
    outputs, known = [part.run()], list[_One]()
    for _, some in groupby(sorted(_every(part.call), key=lambda h: h.cost), lambda h: h.cost):
        new = list[_One]()
        for h, output, _ in each(part, some, list):
            h = replace(h, change=_once(h.change))
            sets = _fields_set(part, h)
            if sets and output is not None and all(bool(differing(output, o).any()) for o in outputs):
                new.append(_One(h, frozenset(sets), len(outputs)))
                outputs.append(output)
        pairs = [
            pair
            for pair in chain(product(known, new), combinations(new, 2))
            if not pair[0].sets & pair[1].sets
        ]
        known += new
        for one, other in sorted(pairs, key=_activation):
            yield one.beside(other)


def _activation(pair: tuple[_One, _One]) -> int:
    """A number by which pairs with the same activation, which takes longest, are computed together."""
    return min((one.number for one in pair if "activate" in one.sets), default=0)


def _every(call: MoeCall) -> Iterator[Hypothesis]:
    generators = (named_hypotheses, *SIMPLE, preparation_hypotheses, layout_hypotheses)
    for h in chain.from_iterable(generator(call) for generator in generators):
        if h.cost <= _LIKELY and set(h.stages) <= BEFORE_THE_SUM and not h.slow:
            yield h


def _fields_set(right: Pipeline, hypothesis: Hypothesis) -> set[str]:
    """Which fields of experts, call and stages a change sets; none where it is more than that."""
    try:
        changed = hypothesis.change(right)
    except FAILURES:
        return set()
    if changed.run_call or changed.rows or changed.after or type(changed.call) is not type(right.call):
        return set()
    return {
        name for level in zip(_levels(right), _levels(changed), strict=True) for name in fields_set(*level)
    }


def _levels(pipeline: Pipeline) -> tuple[Any, ...]:
    return pipeline.call.experts, unchecked(pipeline.call, experts=None), pipeline.stages


def _both(one: Change, other: Change) -> Change:
    def change(right: Pipeline) -> Pipeline:
        base, more = one(right), other(right)
        experts, call, stages = (
            unchecked(had, **fields_set(before, has))
            for before, had, has in zip(_levels(right), _levels(base), _levels(more), strict=True)
        )
        return replace(right, call=unchecked(call, experts=experts), stages=stages)

    return change


def _once(change: Change) -> Change:
    """Computed once for each pipeline that follows itself."""
    known: list[tuple[Pipeline, Pipeline]] = []

    def remembered(pipeline: Pipeline) -> Pipeline:
        if not known or known[0][0] is not pipeline:
            known[:] = [(pipeline, change(pipeline))]
        return known[0][1]

    return remembered
