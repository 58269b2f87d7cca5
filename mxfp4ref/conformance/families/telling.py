"""What to tell of hypotheses that predict an output, or of the evidence where none does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mxfp4ref.conformance.families.hypothesis import Finding, Hypothesis, of_first_factor
from mxfp4ref.conformance.families.order_of_cases import different_experts
from mxfp4ref.conformance.families.search import Match
from mxfp4ref.conformance.families.solved.known_factors import factor_in_words, parameter_in_words
from mxfp4ref.conformance.families.solved.table_words import beside_a_table, by_table, table_and_rules
from mxfp4ref.conformance.findings.finding import Evidence, added, in_words
from mxfp4ref.formats.experts import Experts
from mxfp4ref.model.call import MoeCall

__all__ = ["told"]

_MOST = 2  # stages that are told
_PLACES = 2  # beside the likeliest, that are
_ALIKE = 0.6  # how much more a hypothesis may assume to be told beside the simplest
_NAMELESS = 1.0  # what the simplest without a name assume: to have a name makes none more likely


def told(matches: Sequence[Match], evidence: Iterable[Evidence], calls: Iterable[MoeCall]) -> Finding:
    """What to tell of calls: the simplest hypothesis, and those not told apart from it; without any, the evidence."""
    evidence, calls = list(evidence), list(calls)
    exact = {id(m.hypothesis): m.exact for m in matches}
    if found := of_first_factor(m.hypothesis for m in matches):
        best = found[0]
        table, given_by = table_and_rules(found)
        likely = [h for h in found[1:] if _as_simple(h, best) and h.words != best.words]
        near = beside_a_table(likely, best.kind, given_by)
        near.sort(key=lambda h: h.stages[:1] == best.stages[:1])  # first what is wrong elsewhere
        words = tuple(dict.fromkeys(h.words for h in (best, *near)))
        # Of each that holds in a part, one part.
        first_of = {_anywhere(h): h.words for h in reversed([best, *near])}
        others = [w for w in words[1:] if w in first_of.values()]
        # Of experts that are copies a table names any one, which may be another one than the rule says.
        if table and len(given_by) == 1 and any(_copies(call.experts) for call in calls):
            sentence = in_words((given_by[0], *others))
        else:
            sentence = in_words((by_table(table, given_by) if table else _in_places(best, near), *others))
        known = factor_in_words(best.factor, calls) if best.factor else parameter_in_words(best.words)
        if known:
            sentence = added(sentence, f". Note: {known}")
        sure = exact[id(best)]
        words = (words[0], *given_by[1:], *words[1:]) if table else words
        return Finding(
            _agreed_stages(found), sentence, sure, hypotheses=words, kind=best.kind, hedged=not sure
        )
    for one in evidence:
        if one.stages:
            return one.finding()
    return Finding((), evidence[0].sentence if evidence else "", False)


def _copies(experts: Experts) -> bool:
    """Whether some expert is another's copy."""
    return different_experts(experts) < experts.num_experts


def _anywhere(one: Hypothesis) -> str:
    return one.words.removesuffix(f", {one.place}") if one.place else one.words


def _in_places(best: Hypothesis, near: Iterable[Hypothesis]) -> str:
    """Its words, with the other places in which it may hold as well."""
    others = dict.fromkeys(h.place for h in near if h.place and _anywhere(h) == _anywhere(best))
    return best.words + (f" (or {', or '.join([*others][:_PLACES])})" if others else "")


def _as_simple(one: Hypothesis, best: Hypothesis) -> bool:
    return one.cost <= max(best.cost, _NAMELESS) + _ALIKE


def _agreed_stages(found: list[Hypothesis]) -> tuple[str, ...]:
    """Those of the simplest, and the one that others as simple add: of those first the likeliest of each.

    None where one of these may lie in more than two.
    """
    best, *others = found
    alike = [one.stages for one in others if _as_simple(one, best)]
    if not best.stages or any(len(stages) > _MOST for stages in (best.stages, *alike)):
        return ()
    stages = (*best.stages, *(s for one in alike for s in one[:1]), *(s for one in alike for s in one[1:]))
    return tuple(dict.fromkeys(stages))[:_MOST]
