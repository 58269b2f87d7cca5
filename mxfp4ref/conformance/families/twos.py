"""Two changes at once: a first one that explains a part, and a second one that explains the rest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import chain

from torch import Tensor

from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.families.distances import surprise
from mxfp4ref.conformance.families.hypotheses.activations import activation_hypotheses, other_activations
from mxfp4ref.conformance.families.hypotheses.roundings import rounding_hypotheses
from mxfp4ref.conformance.families.hypotheses.slots import slot_hypotheses
from mxfp4ref.conformance.families.hypotheses.tensors import (
    bias_hypotheses,
    constants,
    expert_hypotheses,
    value_hypotheses,
)
from mxfp4ref.conformance.families.hypotheses.weighting import weight_hypotheses
from mxfp4ref.conformance.families.hypothesis import Hypothesis, Pipeline, composed, of_first_factor
from mxfp4ref.conformance.families.named import named_hypotheses
from mxfp4ref.conformance.families.search import FEWEST_BITS, Match, Search
from mxfp4ref.conformance.families.solved.weight_rules import weight_rules
from mxfp4ref.model.call import MoeCall

__all__ = [
    "SIMPLE",
    "either_of_two",
    "in_other_cases",
    "nearest_of_two",
    "second_of_two",
    "with_a_second",
]

_TOLD = 8  # first changes that leave an output at the same distance, by their words
_SEARCHED = 2  # cases
_TELLING = 20 * FEWEST_BITS  # of a case, from which the smallest is searched
_ENOUGH = 12  # second changes, tried on all cases
Case = tuple[Pipeline, Tensor, Tensor]  # the right one, the kernel's output and the right output
# Of slots, weights, whole tensors, values and formulas.
SIMPLE = (
    other_activations,
    slot_hypotheses,
    weight_hypotheses,
    expert_hypotheses,
    value_hypotheses,
    constants,
    activation_hypotheses,
    bias_hypotheses,
)


def either_of_two(call: MoeCall) -> Iterator[Hypothesis]:
    """That may be one of two."""
    named = (h for h in named_hypotheses(call) if not h.slow)
    return chain(named, *(generator(call) for generator in (*SIMPLE, rounding_hypotheses)))


def second_of_two(call: MoeCall) -> Iterator[Hypothesis]:
    """Those that take little beside a first change."""
    return chain(weight_hypotheses(call), slot_hypotheses(call), rounding_hypotheses(call))


def with_a_second(
    search: Search, first: Hypothesis, seconds: Iterable[Hypothesis], *, enough: int = 1
) -> list[Hypothesis]:
    """What predicts every bit once the first change is made: other weights of the sum, or one of these."""
    output = first.run(search.pipeline)
    if output is None or search.out_of_time():
        return []
    inner = Search(_having(first, search), search.got, output, search.until)
    found = inner.run(chain(weight_rules(inner.rows, inner.got, inner.wrong), seconds), enough=enough)
    search.tried += inner.tried
    return [match.hypothesis for match in found]


def _having(first: Hypothesis, search: Search) -> Pipeline:
    """The pipeline with a change; that of routing weights alone as a call's, of which one token can be tried."""
    pipeline = search.pipeline
    if first.of_rows is not None and pipeline.rows is None and pipeline.run_call is None:
        rows = first.of_rows(search.rows)
        if rows.y is search.rows.y and rows.local is search.rows.local:
            return pipeline.calling(token_final_scales=rows.weights.contiguous())
    return first.change(pipeline)


def nearest_of_two(
    search: Search, seconds: Callable[[], Iterable[Hypothesis]], *, most: int = 5
) -> list[Match]:
    """The changes that came nearest, each with a second one; told by all words of the first that give the same."""
    kept = {id(h) for h in of_first_factor(h for _, h in search.near)}
    near = [pair for pair in search.near if id(pair[1]) in kept]
    starts: dict[float, list[Hypothesis]] = {}
    for distance, first in sorted(near, key=lambda pair: pair[0] + 0.02 * pair[1].cost):
        if not first.name:
            starts.setdefault(round(distance, 2), []).append(first)
    for firsts in list(starts.values())[:most]:
        output = firsts[0].run(search.pipeline)
        if output is None or search.out_of_time() or not search.leaves_another(output):
            continue
        for second in with_a_second(search, firsts[0], seconds()):
            both = (composed(first, second) for first in firsts[:_TOLD])
            if found := [Match(h, True) for h in both if h.predicts(search.pipeline, search.got)]:
                return found
    return []


def _size(call: MoeCall) -> int:
    """Multiplications, about."""
    experts = call.experts
    return call.num_tokens * call.top_k * experts.hidden_size * experts.intermediate_size


def in_other_cases(
    first: Hypothesis,
    others: list[Case],
    stages: Collection[str] = (),
    *,
    clock: Callable[[], float],
    until: float,
) -> list[Hypothesis]:
    """Both changes at once, that predict every bit of cases which the first one alone does not predict.

    Args:
        first: the one change.
        others: the cases.
        stages: in which evidence says that the second one lies; those that are not the first one's are tried first.
        clock, until: what tells the time, and when to stop.
    """
    own, left, another = set(first.stages), list[tuple[float, Pipeline, Tensor, Tensor]](), False

    def likely(second: Hypothesis) -> bool:
        elsewhere = set(stages) - own
        return bool(elsewhere & set(second.stages)) if elsewhere else not own & set(second.stages)

    for pipeline, got, want in others:
        output = first.run(pipeline)
        if output is None:
            return []
        left.append((surprise(got, output), pipeline, got, want))
        another |= bool((differing(output, got) & differing(want, got)).any())
    if not another or sum(bits for bits, *_ in left) < FEWEST_BITS:
        return []  # the first change predicts too much, or all
    # One that tells enough and takes little; of several the one that tells most.
    left.sort(key=lambda one: (one[0] < _TELLING, _size(one[1].call) if one[0] >= _TELLING else 0, -one[0]))
    for _, pipeline, got, want in left[:_SEARCHED]:
        now = clock()
        search = Search(pipeline, got, want, now + (until - now) / 2)
        seconds = sorted(either_of_two(pipeline.call), key=lambda h: (not likely(h), h.cost))
        found = with_a_second(search, first, seconds, enough=_ENOUGH)
        both = [composed(first, second) for second in found]
        if kept := [h for h in both if all(h.predicts(p, g) for _, p, g, _ in left)]:
            return kept
    return []
