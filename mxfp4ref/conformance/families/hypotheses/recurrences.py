"""Hypotheses on the weighted sum as a loop: what a slot makes of the sum so far, and weights that build up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypothesis import Hypothesis, SlotRows, of_slots, of_sum
from mxfp4ref.sm90 import fp32

__all__ = ["recurrences"]

_F = ("finalize",)
_add, _fma, _mul = fp32.add, fp32.fma, fp32.mul
# Of the sum so far, the slot's weight and its row with its bias.
_Step = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Loop:
    """A weighted sum in which each slot makes another sum of the one so far.

    Attributes:
        step: of a slot.
        first: of a token's first slot; None for the same.
    """

    step: _Step
    first: _Step | None = None

    def __call__(self, y: Tensor, local: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        total = torch.zeros_like(fp32.widen(y[:, 0].contiguous()))
        before = torch.zeros_like(local[:, 0], dtype=torch.bool)
        for slot in range(local.shape[1]):
            row, here = fp32.widen(y[:, slot].contiguous()), local[:, slot] >= 0
            if bias is not None:
                row = _add(row, fp32.widen(bias[local[:, slot].clamp(min=0)]))
            weight = weights[:, slot, None].expand_as(row).contiguous()
            later = self.step(total, weight, row)
            if self.first is not None:
                later = torch.where(before[:, None], later, self.first(total, weight, row))
            total, before = torch.where(here[:, None], later, total), before | here
        return total


def _steps() -> Iterator[tuple[str, _Loop, float]]:
    one = torch.ones_like
    yield (
        "a slot's weight multiplies the sum so far, and the slot's own row is added without it (operands of the "
        "multiply-add exchanged)",
        _Loop(lambda a, w, y: _fma(a, w, y)),
        1.1,
    )
    yield (
        "a slot's row is added first and its weight multiplies the sum with it: the rows of earlier slots, too",
        _Loop(lambda a, w, y: _mul(_add(a, y), w)),
        1.2,
    )
    yield (
        "a slot's weight multiplies its row and the sum so far, too",
        _Loop(lambda a, w, y: _fma(w, y, _mul(a, w))),
        1.3,
    )
    yield (
        "the sum so far is multiplied by 1 - the slot's weight (a running mean)",
        _Loop(lambda a, w, y: _fma(w, y, _mul(a, _add(one(w), -w)))),
        1.3,
    )
    yield (
        "the slot's weight multiplies its row less the sum so far (a running mean)",
        _Loop(lambda a, w, y: _fma(w, _add(y, -a), a)),
        1.3,
    )
    yield (
        "the sum so far is added to itself with each slot",
        _Loop(lambda a, w, y: _fma(w, y, _add(a, a))),
        1.4,
    )
    yield (
        "a token's first slot starts the sum without its weight",
        _Loop(lambda a, w, y: _fma(w, y, a), lambda a, w, y: y),
        1.1,
    )
    yield (
        "slots after a token's first are added without their weights",
        _Loop(lambda a, w, y: _add(a, y), lambda a, w, y: _mul(w, y)),
        1.2,
    )


def _weights() -> Iterator[tuple[str, Callable[[Tensor], Tensor], float]]:
    """Of weights that are 0 where there is no slot here."""
    yield "added up from slot to slot (running sums)", lambda w: w.cumsum(1), 1.3
    yield "added up from the last slot on", lambda w: w.flip(1).cumsum(1).flip(1), 1.4
    yield "the right ones less those of earlier slots", lambda w: 2 * w - w.cumsum(1), 1.5


def recurrences() -> Iterator[Hypothesis]:
    """All of them."""
    for words, loop, cost in _steps():
        yield of_sum("sum of slots", _F, f"in the weighted sum {words}", loop, cost)
    for words, change, cost in _weights():

        def on(rows: SlotRows, change: Callable[[Tensor], Tensor] = change) -> SlotRows:
            return replace(rows, weights=change(rows.weights.masked_fill(rows.local < 0, 0.0)))

        yield of_slots("routing weights", _F, f"the routing weights are {words}", on, cost)
