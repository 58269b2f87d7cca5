"""A second change beside one that predicts every bit of some cases but not of all: the others show both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

from torch import Tensor

from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.families.distances import surprise
from mxfp4ref.conformance.families.hypotheses.slots import slot_hypotheses
from mxfp4ref.conformance.families.hypotheses.tensors import bias_hypotheses
from mxfp4ref.conformance.families.hypotheses.weighting import weight_hypotheses
from mxfp4ref.conformance.families.hypothesis import Hypothesis, Pipeline, composed
from mxfp4ref.conformance.families.named import named_hypotheses
from mxfp4ref.conformance.families.search import FEWEST_BITS, Search
from mxfp4ref.conformance.families.solved.weight_rules import weight_rules
from mxfp4ref.conformance.families.soon import quick
from mxfp4ref.model.call import MoeCall

__all__ = ["and_another"]

_SEARCHED = 2  # cases
_ENOUGH = 12  # second changes, tried on all cases
Case = tuple[Pipeline, Tensor, Tensor]  # the right one, the kernel's output and the right output


def and_another(
    first: Hypothesis, others: list[Case], *, clock: Callable[[], float], until: float
) -> list[Hypothesis]:
    """Both changes at once, that predict every bit of cases which the first one alone does not predict.

    Args:
        first: the one change.
        others: the cases.
        clock, until: what tells the time, and when to stop.
    """
    left, another = [], False
    for pipeline, got, want in others:
        output = first.run(pipeline)
        if output is None or output.shape != got.shape:
            return []
        left.append((surprise(got, output), pipeline, got, output))
        another |= bool((differing(output, got) & differing(want, got)).any())
    if not another or sum(bits for bits, *_ in left) < FEWEST_BITS:
        return []  # the first change predicts too much, or all
    left.sort(key=lambda one: -one[0])
    for _, pipeline, got, output in left[:_SEARCHED]:
        now = clock()
        if now > until:
            break
        search = Search(first.change(pipeline), got, output, now + (until - now) / 2)
        rules = weight_rules(search.rows, got, search.wrong)
        found = search.run(chain(rules, _second(pipeline.call)), enough=_ENOUGH)
        both = [composed(first, match.hypothesis) for match in found]
        if kept := [h for h in both if all(h.predicts(p, g) for _, p, g, _ in left)]:
            return kept
    return []


def _second(call: MoeCall) -> Iterator[Hypothesis]:
    named = (h for h in named_hypotheses(call) if not h.slow)
    yield from chain(
        named, weight_hypotheses(call), slot_hypotheses(call), bias_hypotheses(call), quick(call)
    )
