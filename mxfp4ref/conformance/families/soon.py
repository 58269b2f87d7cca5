"""What is tried before the long lists: changes of a few experts alone, and two changes of which one is in the sum."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import chain, islice

from mxfp4ref.conformance.comparison import ulp_distance
from mxfp4ref.conformance.families.beside_a_sum import beside_a_sum
from mxfp4ref.conformance.families.hypotheses.orders_of_k import order_hypotheses
from mxfp4ref.conformance.families.hypotheses.roundings import rounding_hypotheses
from mxfp4ref.conformance.families.hypothesis import Hypothesis
from mxfp4ref.conformance.families.likely_pairs import BEFORE_THE_SUM, likely_pairs
from mxfp4ref.conformance.families.search import Match, Search
from mxfp4ref.conformance.families.twos import either_of_two, nearest_of_two
from mxfp4ref.sm90 import fp32

__all__ = ["for_a_share", "is_gross", "is_small", "soon"]

_PAIRS = 4  # that are told
_GROSS = 0.25  # of the right row: four times what FP8 makes of operands
_TRIED, _FAR = 4, 8.0  # of the roundings, and of the orders; times what they make
_NEARLY = 0.15  # of how far off the right output is, that one change leaves


def soon(search: Search, only: set[str]) -> list[Match]:
    """Two changes that take little and are likely: one of them is in the sum, or explains nearly all.

    Args:
        search: of one output.
        only: the stages that the evidence leaves; empty where it leaves all.
    """
    if search.few:
        return []
    every = partial(either_of_two, search.pipeline.call)
    with search.share(0.3):
        if found := beside_a_sum(search, (h for h in every() if not only or only & set(h.stages))):
            return found
    if not only or only & BEFORE_THE_SUM:
        with search.share(0.15):
            if found := search.run(likely_pairs(search.part), enough=_PAIRS):
                return found
    if min((distance for distance, _ in search.near), default=1.0) > _NEARLY:
        return []
    with search.share(0.3):
        return nearest_of_two(search, every, most=1)


def for_a_share(search: Search, hypotheses: Iterator[Hypothesis], part: float) -> Iterator[Hypothesis]:
    """The first of these, as many as a part of the time that is left allows; the others stay where they are."""
    until = search.clock() + part * (search.until - search.clock())
    for one in hypotheses:
        yield one
        if search.clock() > until:
            break


def is_gross(search: Search) -> bool:
    """Whether what is wrong is far more than a rounding, or another order of a sum, makes: some are tried."""
    want, got = (fp32.widen(t.contiguous()) for t in (search.part_want, search.part_got))
    off = (got - want).square().mean().sqrt()
    if not bool(off.isfinite() & (off > _GROSS * want.square().mean().sqrt())):
        return False
    every = chain(islice(rounding_hypotheses(search.part.call), _TRIED), order_hypotheses(search.part.call))
    outputs = (h.run(search.part) for h in islice(every, 2 * _TRIED))
    made = (fp32.widen(out.contiguous()) - want for out in outputs if out is not None)
    return all(bool(off > _FAR * change.square().mean().sqrt()) for change in made)


def is_small(search: Search) -> bool:
    """Whether what is wrong is in the last bits."""
    mask = ~search.part_right
    far = ulp_distance(search.part_got, search.part_want)[mask]
    if not len(far) or bool((far > 1 << 30).any()):
        return False
    want, got = (fp32.widen(t.contiguous()) for t in (search.part_want, search.part_got))
    scale = want.abs().nan_to_num(0, 0, 0).mean(1, keepdim=True)
    return (
        bool(((got - want).abs() <= 2.0**-5 * scale).nan_to_num().all())
        or float((far <= 4).float().mean()) > 0.9
    )
