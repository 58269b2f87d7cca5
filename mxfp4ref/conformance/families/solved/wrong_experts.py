"""In which experts' slots a change lies, from how large the errors of tokens are: solved, and on two halves of them.

A token's error has the size of its wrong slots' errors, which add up by their squares as they are independent. So
the squares are a sum over the experts of what each is off by, in parts of its own rows, and that is solved for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mxfp4ref._words import shortened
from mxfp4ref.conformance.families.sampled import Sample
from mxfp4ref.model.call import MoeCall

__all__ = ["wrong_experts"]

_EACH = 3  # tokens of an expert, in each half, for which something is said of it
_NONE, _SOME = 0.1, 0.4  # of the middle one of those that are off
_LISTED = 8


def wrong_experts(call: MoeCall, some: Sequence[Sample]) -> str:
    """ "experts 1, 3, 5 and 7 (the odd ones)", if others are right as far as sizes tell; else "".

    Args:
        call: the right one.
        some: tokens that are wrong.
    """
    halves = [_sizes(some[::2]), _sizes(some[1::2])]
    found = []
    for size in halves:
        off = {e: s for e, s in size.items() if s > 0}
        if not off:
            return ""
        middle = sorted(off.values())[len(off) // 2]
        if any(_NONE < s / middle < _SOME for s in size.values()):
            return ""
        found.append(({e for e, s in size.items() if s >= _SOME * middle}, set(size)))
    (wrong, seen), (other, also) = found
    if wrong != other or seen != also or wrong == seen:
        return ""
    first = call.ep_rank * call.experts.num_experts
    return _in_words(sorted(e + first for e in wrong), sorted(e + first for e in seen))


def _sizes(some: Sequence[Sample]) -> dict[int, float]:
    """By expert the mean square that it is off by, relative to its rows; of experts of which there are enough."""
    ids = sorted({e for s in some for e in s.experts.tolist()})
    squares = torch.tensor([float((s.rest.square() - s.noise).sum().clamp(min=0)) for s in some]).double()
    shares = torch.zeros(len(some), len(ids), dtype=torch.float64)
    for row, sample in zip(shares, some, strict=True):
        for expert, weight, y in zip(sample.experts.tolist(), sample.weights, sample.y, strict=True):
            row[ids.index(expert)] += (weight * y.norm()).square()
    unit = shares.sum(1, keepdim=True).clamp(min=1e-300)
    shares, squares = shares / unit, squares / unit[:, 0]
    finite = squares.isfinite() & shares.isfinite().all(1)  # not where a row is zero, or overflows
    sizes = _not_negative(shares[finite], squares[finite])
    enough = (shares[finite] > 0).sum(0) >= _EACH
    return {e: float(s) for e, s, told in zip(ids, sizes, enough.tolist(), strict=True) if told}


def _not_negative(shares: Tensor, squares: Tensor) -> Tensor:
    """The least squares solution of which no part is negative: one after another those that would be are left out."""
    kept = (shares > 0).any(0)
    found = torch.zeros(shares.shape[1], dtype=torch.float64)
    while bool(kept.any()):
        solution = torch.linalg.lstsq(shares[:, kept], squares[:, None], driver="gelsd").solution[:, 0]
        right = solution >= 0
        if bool(right.all()):
            found[kept] = solution
            break
        kept[kept.clone()] = right  # fewer each time, whatever the solution is
    return found


def _in_words(wrong: list[int], seen: list[int]) -> str:
    listed = f"expert{'s' * (len(wrong) > 1)} {shortened(map(str, wrong), _LISTED)}"
    for odd, words in enumerate(("even", "odd")):
        if len(wrong) > 1 and wrong == [e for e in seen if e % 2 == odd]:
            return f"{listed} (the {words} ones)"
    if len(wrong) > 1 and wrong == seen[-len(wrong) :]:
        return f"{listed} (from {wrong[0]} on)"
    if len(wrong) > 1 and wrong == seen[: len(wrong)]:
        return f"{listed} (up to {wrong[-1]})"
    return listed
