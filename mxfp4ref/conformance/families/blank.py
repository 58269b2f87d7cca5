"""What is told of an output of zeros or NaN: it shows little of where it comes from."""

from __future__ import annotations

import re
from itertools import chain, combinations

from mxfp4ref.conformance.families.search import Match
from mxfp4ref.conformance.findings.finding import STAGES, Evidence, Finding

__all__ = ["of_blank"]

_MOST_NAMED = 3
_ENDLESS = re.compile(r"\bnan\b|infinit|overflow", re.IGNORECASE)


def of_blank(blank: Evidence, matches: list[Match]) -> Finding:
    """Zeros or NaN, and what is known to give them there; that is no proof, since so would other mistakes."""
    stages, concerned = _covering(matches, blank) if blank.lost or blank.rounding else ((), [])
    firsts: dict[tuple[str, ...], Match] = {}  # of each stage, told before its others
    of_stages = [firsts.setdefault(m.hypothesis.stages, m) for m in concerned or matches]
    others = [m for m, first in zip(concerned or matches, of_stages, strict=True) if m is not first]
    names = [m.hypothesis.words for m in (*firsts.values(), *others)]
    more = f", or {len(names) - _MOST_NAMED} others that were tried" * (len(names) > _MOST_NAMED)
    way = "where" if blank.rounding else "by"
    told = f", or {way} ".join(names[:_MOST_NAMED])
    sentence = f"{blank.sentence}; as {way} {told}{more}" if names else blank.sentence
    if stages and len(matches) > len(concerned):
        sentence += f"; so would {len(matches) - len(concerned)} other mistakes that do not concern NaN"
    return Finding(stages or blank.stages, sentence, kind=blank.kind, hedged=bool(stages) or blank.hedged)


def _covering(matches: list[Match], blank: Evidence) -> tuple[tuple[str, ...], list[Match]]:
    """One or two stages in which all lies that predicts every element and concerns NaN or infinities, and that.

    Of zeros that may be the rest of a sum all that predicts them.
    """
    concerned = [m for m in matches if m.exact and (blank.zeros or _ENDLESS.search(m.hypothesis.words))]
    sets = [set(m.hypothesis.stages) for m in concerned]
    for way in chain(((stage,) for stage in STAGES), combinations(STAGES, 2)):
        if sets and all(set(way) & some for some in sets):
            return way, concerned
    return (), []
