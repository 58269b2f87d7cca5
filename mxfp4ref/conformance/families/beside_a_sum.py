"""Two changes, one before the weighted sum and one in it: the first is found whatever the second is.

The sum is linear in GEMM2's rows and in the fc2 biases. A change of these rows that leaves no more than roundings,
with whatever weights fit each token best, is one of the two; what is wrong in the sum is then searched for beside it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.families.batches import each, tried
from mxfp4ref.conformance.families.distances import last_place, share, surprise
from mxfp4ref.conformance.families.evidence import gather
from mxfp4ref.conformance.families.hypothesis import (
    Hypothesis,
    Pipeline,
    composed,
    local_of,
    roughly,
    slot_outputs,
)
from mxfp4ref.conformance.families.search import FEWEST_BITS, SURELY, Match, Search
from mxfp4ref.conformance.families.twos import either_of_two, with_a_second
from mxfp4ref.sm90 import fp32

__all__ = ["beside_a_sum"]

_BEFORE, _SUM = {"input", "fc1", "activation", "fc2"}, {"slots", "finalize"}
_A_ROUNDING, _FAR_OFF = 1.3, 6.0  # times the roundings: the most that is left, and the least before
_NOISE = 2.0**-6  # of the row, the most that its terms' roundings may be
_EQUATIONS = 8  # for each weight that is solved for
_TOKENS, _FEWEST = 6, 3  # that a first change is tried on
_MOST = 6  # first changes, of which the second is searched for


def beside_a_sum(search: Search, first: Iterable[Hypothesis]) -> list[Match]:
    """The two of them, or the first alone where no second one is known; empty if there is none.

    Args:
        search: of one output.
        first: hypotheses on what comes before the weighted sum; others are left out.
    """
    fits = [_Fit.of(search, token) for token in _tokens(search)]
    told = [fit for fit in fits if fit is not None and fit.left(fit.right) > _FAR_OFF]
    if len(told) < _FEWEST:
        return []
    one, *others = told
    found: list[Hypothesis] = []
    for hypothesis, _, y in each(one.part, (h for h in first if _BEFORE & set(h.stages)), _of_each):
        if search.out_of_time():
            break
        search.tried += 1
        if one.explained_by(_computed(one, hypothesis) if y is None else y) and all(
            fit.explained_by(_rows(fit, hypothesis)) for fit in others
        ):
            found.append(hypothesis)
            if len(found) <= _MOST and (matches := _with_a_second(search, hypothesis)) is not None:
                return matches
    found.sort(key=lambda h: h.cost)
    if found and all(fit.explained_by(_rows(fit, found[0]), asked=True) for fit in told):
        return _nearly(search, found[0])  # what is left may be another order of summation: no second change
    return [_alone(search, hypothesis) for hypothesis in found[:1]]


def _with_a_second(search: Search, first: Hypothesis) -> list[Match] | None:
    """With what is wrong in the sum, or the first change alone where that is nearly all; None if neither is known."""
    output = first.run(search.pipeline)
    if output is None or search.out_of_time():
        return None
    if surprise(search.got, output) < FEWEST_BITS:
        return _nearly(search, first)
    if not search.leaves_another(output):
        return None
    of_sum = (h for h in either_of_two(search.pipeline.call) if _SUM & set(h.stages))
    for second in with_a_second(search, first, of_sum):
        both = composed(first, second)
        if both.predicts(search.pipeline, search.got):
            return [Match(both, True)]
    return None


def _nearly(search: Search, first: Hypothesis) -> list[Match]:
    """The first change alone, if that predicts nearly all bits, but not all."""
    output = first.run(search.pipeline)
    part = 0.0 if output is None else share(~differing(output, search.got), search.wrong)
    return [Match(roughly(first, "up to roundings", part), False, first)] if SURELY <= part < 1 else []


def _alone(search: Search, first: Hypothesis) -> Match:
    """With what is solved of the sum beside it."""
    base, output = first.change(search.pipeline), first.run(search.pipeline)
    assert output is not None
    solved = gather(base, search.got, output, differing(search.got, output))
    other = next(
        (e.sentence for e in solved if _SUM & set(e.stages)),
        "other routing weights or fc2 biases are used in the sum",
    )
    words = f"two things: {first.words}; and {other.partition('; GEMM1')[0]}"
    stages = (first.stages[0], "finalize")
    return Match(replace(first, words=words, stages=stages, name="", cost=first.cost + 5), False)


def _tokens(search: Search) -> list[int]:
    """Wrong tokens of finite numbers, those with few slots and many wrong elements first."""
    finite = (search.got.isfinite() & search.want.isfinite()).all(1)
    slots, amount = (search.local >= 0).sum(1), search.wrong.sum(1)
    order = (slots * (1 << 20) - amount).argsort(stable=True)
    return [t for t in order.tolist() if finite[t] and amount[t] and slots[t]][:_TOKENS]


class _Fit:
    """One token's equations."""

    def __init__(self, part: Pipeline, got: Tensor, right: Tensor, biases: Tensor) -> None:
        self.part, self.right, self.biases = part, right, biases
        self.got = fp32.widen(got.contiguous()).double()
        self.weights = part.call.token_final_scales[0].double()
        here = local_of(part)[0] >= 0
        self.all_weights = torch.cat((self.weights, self.weights[here][: len(biases)]))
        self.rounding = last_place(self.got).square() / 12

    @classmethod
    def of(cls, search: Search, token: int) -> _Fit | None:
        """None of a token with too few output columns for its slots."""
        call = search.pipeline.call.select(torch.tensor([token], device=search.got.device))
        part = replace(search.pipeline, call=call)
        local = local_of(part)[0]
        biases = torch.zeros(0, len(search.got[token]), dtype=torch.float64)
        if call.experts.fc2_biases is not None and call.tp_rank == 0:
            biases = fp32.widen(call.experts.fc2_biases[local[local >= 0]]).double()
        if _EQUATIONS * (int((local >= 0).sum()) + len(biases)) > len(search.got[token]):
            return None
        return cls(part, search.got[token], slot_outputs(part), biases)

    def left(self, y: Tensor, *, asked: bool = False) -> float:
        """What is left of the kernel's row beside GEMM2's rows `[1, k, H]` and the biases, in roundings.

        With the weights that fit best, or with those asked for. Infinite where these would have to cancel, so that
        their roundings could be anything.
        """
        rows = fp32.widen(y[0].contiguous()).double()
        columns = torch.cat((rows, self.biases))
        used = columns.any(1)
        columns = columns[used].T
        if not bool(columns.isfinite().all() & self.got.isfinite().all()):
            return float("inf")
        units = last_place(rows)
        noise = ((units * self.weights[:, None]).square().sum(0) / 12 + self.rounding).sqrt() + 1e-300
        for _ in range(2):
            lengths = (columns / noise[:, None]).norm(dim=0)
            scaled, target = columns / noise[:, None] / lengths, self.got / noise
            solution = torch.linalg.lstsq(scaled, target[:, None], driver="gelsd").solution[:, 0]
            solution = self.all_weights[used] * lengths if asked else solution
            rest = target - scaled @ solution
            weights = torch.zeros(len(rows), dtype=torch.float64)
            weights[rows.any(1)] = (solution / lengths)[: int(rows.any(1).sum())]
            noise = ((units * weights[:, None]).square().sum(0) / 12 + self.rounding).sqrt() + 1e-300
        if float(noise.norm()) > _NOISE * float(self.got.norm()):
            return float("inf")
        return float(rest.norm() / max(len(rest) - columns.shape[1], 1) ** 0.5)

    def explained_by(self, y: Tensor | None, *, asked: bool = False) -> bool:
        if y is None or y.shape != self.right.shape:
            return False
        return self.left(y, asked=asked) < (_FAR_OFF if asked else _A_ROUNDING)


def _rows(fit: _Fit, hypothesis: Hypothesis) -> Tensor | None:
    ((_, _, y),) = each(fit.part, [hypothesis], _of_each)
    return _computed(fit, hypothesis) if y is None else y


def _of_each(rows: Tensor) -> list[Tensor]:
    return list(rows[:, None])


def _computed(fit: _Fit, hypothesis: Hypothesis) -> Tensor | None:
    return tried(lambda part: slot_outputs(hypothesis.change(part)), fit.part)
