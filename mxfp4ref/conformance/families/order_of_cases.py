"""In which order the cases that fail are looked at."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor

from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.families.distances import surprise
from mxfp4ref.conformance.families.hearing import Failure, Heard
from mxfp4ref.conformance.families.search import FEWEST_BITS
from mxfp4ref.formats.experts import Experts

__all__ = ["different", "different_experts", "next_case", "numbers_told", "plain_one", "says_much", "telling"]

_ROWS = 4


def telling(failure: Failure) -> tuple[float, ...]:
    """How much a case tells: many wrong numbers, several experts, and equations that can be solved."""
    call = failure.pipeline.call
    finite = failure.got.isfinite() & failure.want.isfinite()
    amount = float(numbers_told(failure).sum().clamp(max=512)) / 512
    several = min(different_experts(call.experts), 4) / 4
    solvable = call.experts.hidden_size >= 2 * call.experts.intermediate_size
    blank = 2.0 * (amount == 0)
    return (
        amount - blank + several + 0.3 * solvable + 0.2 * (call.top_k > 1) - 0.5 * float((~finite).any()),
    )


def different_experts(experts: Experts) -> int:
    """How many there are that are no other's copy, or its negative, as far as a few rows show."""
    rows = experts.fc2_weights[:, :_ROWS]
    return len(torch.unique((rows & 0x77 if rows.dtype == torch.uint8 else rows.abs()).flatten(1), dim=0))


def numbers_told(failure: Failure) -> Tensor:
    """Where a wrong number came out, `[M, H] bool`: not zero or NaN, which much gives, so that they tell little."""
    got, want = failure.got, failure.want
    return differing(got, want) & got.isfinite() & want.isfinite() & (got != 0)


def different(failures: list[Failure]) -> Iterator[Failure]:
    """The most telling of each kind first: with and without parameters, biases, ranks."""
    kinds: set[tuple[object, ...]] = set()
    later = []
    for failure in failures:
        call, experts = failure.pipeline.call, failure.pipeline.call.experts
        kind = (
            experts.swiglu_limit is None,
            experts.fc1_biases is None,
            call.ep_size,
            call.experts.num_experts > 1,
        )
        if kind in kinds:
            later.append(failure)
        else:
            kinds.add(kind)
            yield failure
    yield from later


def next_case(failures: list[Failure], known: Collection[str], heard: list[Heard]) -> Failure:
    """The most telling case that is not known yet: of those that nothing explains, first what is against the best."""
    left = [f for f in different(failures) if f.case not in known]
    best = max(heard, key=lambda one: len(one.cases), default=None)
    explained = {case for one in heard for case in one.cases}
    against = [f for f in left if best is not None and f.case in best.against]
    return next((f for f in (*against, *left) if f.case not in explained), left[0])


def says_much(failures: list[Failure], cases: Collection[str]) -> bool:
    """Whether predicting these cases tells anything: not zeros, or what is no number, which much gives."""
    some = [f for f in failures if f.case in cases]
    return sum(surprise(torch.where(numbers_told(f), f.got, f.want), f.want) for f in some) >= FEWEST_BITS


def plain_one(failures: Iterable[Failure]) -> Failure | None:
    """Of cases with one expert, wrong in fewer than half of their elements, the one with most; None without any.

    Such a case shows little of all that may be wrong: of several mistakes perhaps one alone.
    """
    found = []
    for failure in failures:
        call, wrong = failure.pipeline.call, differing(failure.got, failure.want)
        count = int(wrong.sum())
        if call.top_k == call.experts.num_experts == 1 and 2 * count < wrong.numel():
            found.append((count, failure))
    return max(found, key=lambda pair: pair[0], default=(0, None))[1]
