"""What is told of an output of zeros or NaN: it shows little of where it comes from."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import chain, combinations

import torch
from torch import Tensor

from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.families.hypothesis import Pipeline, local_of
from mxfp4ref.conformance.families.places import named_columns, named_tokens
from mxfp4ref.conformance.families.search import Match
from mxfp4ref.conformance.findings.finding import STAGES, Evidence, Finding, counted
from mxfp4ref.conformance.findings.reach import is_spread
from mxfp4ref.conformance.findings.reduction import is_heavy
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import trace

__all__ = ["constant_alone", "numbers_alone", "of_blank", "of_constant", "wherever_from"]

_MOST_NAMED = 3
_MOST_STAGES = 2  # that a hypothesis may lie in
_TOKENS = 6  # that are looked at
_FEW = 12  # hypotheses, of which some are told
_MANY = 16  # elements, that are one number by no chance
_ENDLESS = re.compile(r"\bnan\b|infinit|overflow", re.IGNORECASE)


def of_blank(blank: Evidence, matches: list[Match], *, numbers: bool = False) -> Finding:
    """Zeros or NaN, and what is known to give them there; that is no proof, since so would other mistakes.

    With `numbers` all on the way to NaN should be numbers, any of which may have been lost.
    """
    stages, concerned = _covering(matches, blank) if blank.lost or blank.rounding else ((), [])
    sentence = blank.sentence + _named(concerned or matches)
    stages = () if numbers else stages
    if stages and len(matches) > len(concerned):
        others = counted(len(matches) - len(concerned), "other mistake")
        sentence += f"; so would {others} of which none concerns NaN"
    return Finding(stages or blank.stages, sentence, kind=blank.kind, hedged=bool(stages) or blank.hedged)


def constant_alone(got: Tensor, want: Tensor) -> str:
    """What came wherever an output differs, in words: zero, NaN, or another number in many places; "" if several."""
    values = got[differing(got, want)]
    if not bool(values.any()):
        return "zero"
    if bool(values.isnan().all()):
        return "NaN"
    return f"{float(values[0]):.4g}" if len(values) >= _MANY and bool((values == values[0]).all()) else ""


def wherever_from(matches: list[Match]) -> list[Match]:
    """Of what predicts zeros, that which says no more than that rows are zero, in any stage; all if nothing does."""
    return [m for m in matches if len(m.hypothesis.stages) > _MOST_STAGES] or matches


def of_constant(pipeline: Pipeline, got: Tensor, want: Tensor, matches: list[Match]) -> Finding | None:
    """A constant that mistakes of more than two stages give alike, or that fills rows and columns; None of others.

    Args:
        pipeline: the right one.
        got, want: `[M, H] bf16`.
        matches: what predicts every bit, the simplest first.
    """
    of = [m.hypothesis.stages for m in matches]
    what = constant_alone(got, want)
    if not what:
        return None
    wrong = differing(got, want)
    may_differ = differing(got[wrong][0].expand_as(want), want)
    rows, columns = wrong.any(1), wrong.any(0)
    filled = bool((wrong == (may_differ & rows[:, None] & columns)).all())
    some = rows.nonzero().flatten().tolist()[:_TOKENS]
    anywhere = filled and not is_spread(pipeline.call, got, want, wrong, some)
    wherever = any(len(one) > _MOST_STAGES for one in of)
    if not anywhere and (wherever or _shared(of) or what == "NaN"):
        return None
    if what == "NaN" and not numbers_alone(pipeline.call):
        return None
    kind = f"every element that differs is {what}"
    where = [kind]
    may_be_there = may_differ.any(0)
    if (named := named_columns(columns, may_be_there)) is not None and not torch.equal(columns, may_be_there):
        where.append(named[0])
    if not bool((rows == may_differ.any(1)).all()):
        of_rows = named_tokens(pipeline.call, local_of(pipeline), rows, may_differ.any(1))
        where += [words for words, _ in of_rows][:1]
    stages = [stage for stage in STAGES if any(stage in one for one in of)]
    whence = "any stage" if anywhere else f"{', '.join(stages[:-1])} or {stages[-1]}"
    told = _named([m for m in matches if m.hypothesis.stages and not m.hypothesis.name])
    told = told if len(matches) <= _FEW else f"; so do {len(matches)} of the mistakes that were tried"
    return Finding((), f"{', '.join(where)}: {whence} may leave that{told}", kind=kind)


def numbers_alone(call: MoeCall) -> bool:
    """Whether all that goes into a call, and comes out of its GEMMs and its activation, are numbers."""
    if is_heavy(call):
        return False
    experts, slots = call.experts, trace(call)
    given = (experts.fc1_biases, experts.fc2_biases, call.token_final_scales)
    tensors = (call.input, slots.fc1_output, slots.activation, slots.fc2_output, *given)
    return all(t is None or bool(t.isfinite().all()) for t in tensors)


def _named(matches: list[Match]) -> str:
    """The simplest of what gives it, of each stage, and how many others there are; "" if nothing does."""
    firsts: dict[tuple[str, ...], Match] = {}
    of_stages = [firsts.setdefault(m.hypothesis.stages, m) for m in matches]
    others = [m for m, first in zip(matches, of_stages, strict=True) if m is not first]
    names = [m.hypothesis.words for m in (*firsts.values(), *others)]
    more = f"; and {len(names) - _MOST_NAMED} more that were tried" * (len(names) > _MOST_NAMED)
    return f"; among what gives this: {'; or '.join(names[:_MOST_NAMED])}{more}" if names else ""


def _shared(of: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """One or two stages of which each of these has one; () if there are none."""
    sets = [set(stages) for stages in of]
    ways = chain(((stage,) for stage in STAGES), combinations(STAGES, 2))
    return next((way for way in ways if sets and all(set(way) & some for some in sets)), ())


def _covering(matches: list[Match], blank: Evidence) -> tuple[tuple[str, ...], list[Match]]:
    """One or two stages in which all lies that predicts every element and concerns NaN or infinities, and that.

    Of zeros that may be the rest of a sum all that predicts them.
    """
    concerned = [m for m in matches if m.exact and (blank.zeros or _ENDLESS.search(m.hypothesis.words))]
    way = _shared(m.hypothesis.stages for m in concerned)
    return (way, concerned) if way else ((), [])
