"""The hypothesis that predicts nearly every bit: a change of which some detail is another."""

from __future__ import annotations

from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.families.distances import share
from mxfp4ref.conformance.families.hypothesis import Hypothesis, roughly
from mxfp4ref.conformance.families.search import MOSTLY, Match, Search

__all__ = ["nearly"]

_SPARED = 0.97  # of the right elements, which have to stay so


def nearly(search: Search) -> list[Match]:
    """The one of those that a search has tried, where none of another stage comes near; none without."""
    if bool(search.got[search.wrong].isnan().all()):  # which many mistakes give
        return []
    found: list[tuple[float, Hypothesis]] = []
    for hypothesis in {h.words: h for h in search.partly}.values():
        output = hypothesis.run(search.pipeline)
        if output is None or output.shape != search.got.shape or search.out_of_time():
            continue
        equal = ~differing(output, search.got)
        part = share(equal, search.wrong)
        if part >= MOSTLY and share(equal, ~search.wrong) >= _SPARED:
            found.append((part, hypothesis))
    if not found:
        return []
    part, best = max(found, key=lambda pair: pair[0])
    if any(1 - other < 2 * (1 - part) for other, h in found if not set(h.stages) & set(best.stages)):
        return []
    return [Match(roughly(best, "or nearly so", part), False)]
