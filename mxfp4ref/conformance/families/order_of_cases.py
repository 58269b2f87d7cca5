"""In which order the cases that fail are looked at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from mxfp4ref.conformance.comparison import differing

if TYPE_CHECKING:
    from mxfp4ref.conformance.families.jury import Failure

__all__ = ["different", "plain_one", "telling"]


def telling(failure: Failure) -> tuple[float, ...]:
    """How much a case tells: many wrong numbers, several experts, and equations that can be solved."""
    call = failure.pipeline.call
    wrong = differing(failure.got, failure.want)
    finite = failure.got.isfinite() & failure.want.isfinite()
    amount = float((wrong & finite).sum().clamp(max=512)) / 512
    several = min(call.experts.num_experts, 4) / 4
    solvable = call.experts.hidden_size >= 2 * call.experts.intermediate_size
    return (amount + several + 0.3 * solvable + 0.2 * (call.top_k > 1) - 0.5 * float((~finite).any()),)


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
