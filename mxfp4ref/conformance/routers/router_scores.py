"""Logits that were changed by one number before they became scores, which is solved for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref.conformance.routers.routing_hypotheses import Selection, View, near
from mxfp4ref.conformance.routers.routing_weighings import Weighing
from mxfp4ref.routing import scoring

__all__ = ["changed_logits"]

_Change = Callable[[Tensor, float], Tensor]
_TOKENS = 8  # on which the number is searched
_CLOSE = 2.0**-16  # of weights, to within which a solved number fits
_UNEQUAL = 2.0**-10
_FURTHER = 4  # times as large a number that gives the same, as a limit that nothing reaches, leaves it open
_GOLDEN = (5**0.5 - 1) / 2


def _of_beta(x: Tensor, c: float) -> Tensor:
    """The logits whose softplus is that of these with a beta, log(1 + e^(c x)) / c."""
    plus = torch.nn.functional.softplus(x * c, threshold=scoring.SOFTPLUS_THRESHOLD) / c
    return torch.where(plus > scoring.SOFTPLUS_THRESHOLD, plus, plus.expm1().log())


_BETA = "softplus has a beta, log(1 + e^(c x)) / c"
_CHANGES: dict[str, _Change] = {
    _BETA: _of_beta,
    "logits are multiplied by a number": lambda x, c: x * c,
    "logits are capped smoothly, at c tanh(logit / c)": lambda x, c: c * (x / c).tanh(),
    "a number is added to all logits": lambda x, c: x + c,
    "a number is taken from all logits": lambda x, c: x - c,
    "logits are clamped to a largest magnitude": lambda x, c: x.clamp(-c, c),
}


def changed_logits(view: View, got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> str:
    """Which change of the logits accounts for all ids and weights, and its number; "" if none does."""
    ids, weights = got
    size = view.logits.shape[1]
    right = bool(((ids >= 0) & (ids < size)).all()) and bool((weights > 0).all())
    if not right or not bool(view.logits.isfinite().all()) or ids.shape[1] < 2:
        return ""
    far = (weights / weights.sum(1, keepdim=True) - 1 / ids.shape[1]).abs().amax(1)
    if int((far > _UNEQUAL).sum()) < _TOKENS // 2:
        return ""  # equal weights say nothing of logits
    some = far.topk(min(_TOKENS, len(ids))).indices  # whose weights tell most
    part, their_ids, their_weights = view.take(some), ids[some], weights[some]
    for words, change in _CHANGES.items():
        if words == _BETA:
            if "softplus" not in view.right_score:
                continue
            if not view.biased:  # then a factor of the scores does not show
                words = f"{_BETA}, or logits are multiplied by a number"
        number = _solved(part, their_ids, their_weights, change)
        if number is None:
            continue
        for one in (float(f"{number:.2g}"), float(f"{number:.3g}"), number):
            changed = _with(view, change, one)
            made = Weighing().weights(changed, ids) * view.factor
            if not bool(near(weights, made, _CLOSE).all()) or bool(
                near(weights, _plain(view, ids), _CLOSE).all()
            ):
                continue
            further = _with(view, change, _FURTHER * one)
            flat = bool(near(Weighing().weights(further, ids) * view.factor, made, _CLOSE).all())
            told = f"{one:.5g}{' or more' * flat}"
            if view.table is None and not bool(Selection().agrees(changed, ids).all()):
                if not torch.equal(ids, want[0]):
                    continue
                return f"ids are right; for the weights {words}: {told}"
            return f"{words}: {told}, which explains ids and weights"
    return ""


def _plain(view: View, ids: Tensor) -> Tensor:
    return Weighing().weights(view, ids) * view.factor


def _with(view: View, change: _Change, number: float) -> View:
    return replace(view, logits=change(view.logits, number).to(torch.float32).to(torch.float64))


def _solved(view: View, ids: Tensor, weights: Tensor, change: _Change) -> float | None:
    """The number with the least error of the weights, if that is small."""

    def error(power: float) -> float:
        made = Weighing().weights(_with(view, change, 2.0**power), ids) * view.factor
        return float(((made - weights).abs() / weights).nan_to_num(1e9, 1e9, 1e9).amax(1).median())

    powers = [n / 4 for n in range(-16, 25)]
    errors = [error(power) for power in powers]
    least = min(range(len(powers)), key=errors.__getitem__)
    low, high = powers[max(0, least - 1)], powers[min(len(powers) - 1, least + 1)]
    for _ in range(40):
        inner = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        if error(inner[0]) <= error(inner[1]):
            high = inner[1]
        else:
            low = inner[0]
    power = (low + high) / 2
    return 2.0**power if error(power) < 4 * _CLOSE else None
