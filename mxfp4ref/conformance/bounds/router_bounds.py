"""Which ids and weights some correct float32 router can give (docs/arithmetic.md, section 7).

An interval for each score follows from the logits: exp and log1p are allowed 2 ulp, which is what CUDA documents and
more than any libm takes, every other operation its rounding. Selecting compares ends of intervals, weights are
intervals again. There is no tolerance to choose; what a wrong router does is thousands of times further away.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.routing import scoring
from mxfp4ref.routing.models import PRESETS, Preset

__all__ = ["given_factor", "preset_of", "routing_outside", "selectable"]

_UNIT = 2.0**-24  # half an ulp of 1: the relative error of one rounding
_FUNCTION = 4  # units: 2 ulp, of exp and of log1p
_DIVISION = 4  # units: 2 ulp, as of a reciprocal and a product
_FLUSHED = 2.0**-126  # what a subnormal result may lose
_FARTHEST = 300.0  # exp(-300) is far below any float32

_Ends = tuple[Tensor, Tensor]  # low and high, float64


def routing_outside(inputs: Mapping[str, Any], outputs: Mapping[str, Tensor]) -> int:
    """How many ids and weights no correct router gives for these logits.

    Ids count where no scores within their intervals select these experts in this order; weights where they lie
    outside their interval for the ids that came with them. Ties may be broken either way: `torch.topk` does.

    Args:
        inputs: of a golden case of kind "routing". Where the logits are not exactly those that the router had,
            `logit_errors` `[M, E] float64` is how far they may be apart.
        outputs: `ids [M, k] int32` and `scales [M, k] float32`.
    """
    preset = preset_of(inputs)
    logits = inputs["logits"].cpu().to(torch.float64)
    ids, weights = outputs["ids"].cpu().long(), outputs["scales"].cpu().to(torch.float64)
    padded = _given(inputs, "padded", torch.zeros(len(ids), dtype=torch.bool))
    count = int((ids[padded] != -1).sum()) + int((weights[padded] != 0).sum())
    errors = _given(inputs, "logit_errors", torch.zeros_like(logits))
    logits, ids, weights, errors = logits[~padded], ids[~padded], weights[~padded], errors[~padded]

    inside = (ids >= 0) & (ids < logits.shape[1])
    known = ids.clamp(0, logits.shape[1] - 1)
    scores = _scores(preset, logits, errors)
    if (table := inputs.get("tid2eid")) is not None:
        wrong = ids != table.cpu().long()[inputs["token_ids"].cpu().long()[~padded]]
    else:
        bias = _given(inputs, "correction_bias", torch.zeros(logits.shape[1])).to(torch.float64)
        wrong = ~_chosen(_added(scores, bias), ids, _groups(inputs, preset))[:, None].expand_as(ids)
    if preset.normalize == "softmax":
        scores = _widened(_exponentials(logits.gather(1, known)), errors.gather(1, known))
    else:
        scores = scores[0].gather(1, known), scores[1].gather(1, known)
    low, high = _weights(preset, scores, _factor(inputs, preset))
    return count + int(wrong.sum()) + int((~((low <= weights) & (weights <= high) & inside)).sum())


def selectable(preset: Preset, logits: Tensor, bias: Tensor, ids: Tensor, groups: tuple[int, int]) -> Tensor:
    """Whether some correct router selects these experts in this order, `[M] bool`.

    Args:
        preset: the router.
        logits, bias: `[M, E]` and `[E] float64`, zeros where there is no bias.
        ids: `[M, k] int64`, any numbers.
        groups: n_group and topk_group.
    """
    return _chosen(_added(_SCORES[preset.score](logits), bias), ids, groups)


def _chosen(scores: _Ends, ids: Tensor, groups: tuple[int, int]) -> Tensor:
    """Whether some scores within their intervals select these ids, which may be any numbers, in this order."""
    known = ids.clamp(0, scores[0].shape[1] - 1)
    chosen = _selectable(scores, known, *groups)
    return chosen & (known == ids).all(1) & (known.sort(1).values.diff(dim=1) != 0).all(1)


def _given(inputs: Mapping[str, Any], name: str, default: Tensor) -> Tensor:
    value = inputs.get(name)
    return default if value is None else value.cpu()


def _factor(inputs: Mapping[str, Any], preset: Preset) -> float:
    if inputs.get("routed_scaling", "in_weights") != "in_weights":
        return 1.0
    return given_factor(inputs, preset)


def preset_of(inputs: Mapping[str, Any]) -> Preset:
    """The router of a case, which goldens have by name, and a checkpoint's layer as a record of its own."""
    preset = inputs["preset"]
    return preset if isinstance(preset, Preset) else PRESETS[preset]


def given_factor(inputs: Mapping[str, Any], preset: Preset) -> float:
    """The routed scaling factor of a case, or the model's; models that have several always say which."""
    return float(inputs.get("routed_scaling_factor", preset.factor))


def _groups(inputs: Mapping[str, Any], preset: Preset) -> tuple[int, int]:
    return inputs.get("n_group", preset.n_group), inputs.get("topk_group", preset.topk_group)


def _spread(value: Tensor, units: float | Tensor) -> _Ends:
    """A number that is 0 or more with a relative error, and what a subnormal result may lose."""
    reach = torch.where(value > 0, value * units * _UNIT + _FLUSHED, 0.0)
    return (value - reach).clamp_min(0.0), value + reach


def _sigmoid(x: Tensor) -> _Ends:
    """1 / (1 + exp(-x)): the error of exp counts at most once, and there are a sum and a quotient."""
    return _spread(torch.sigmoid(x), _FUNCTION + 1 + _DIVISION)


def _sqrt_softplus(x: Tensor) -> _Ends:
    """log1p(exp(x)) has at most the relative error of exp and its own; a root halves it."""
    softplus = torch.nn.functional.softplus(x, threshold=scoring.SOFTPLUS_THRESHOLD)
    low, high = _spread(softplus, 2 * _FUNCTION + 1)
    return _spread(low.sqrt(), 2)[0], _spread(high.sqrt(), 2)[1]


def _exponentials(x: Tensor) -> _Ends:
    """exp(x - max), which softmax divides by their sum: the rounding of a difference, and of its product with
    log2(e), is a relative error of |x - max| units each.
    """
    distance = (x - x.amax(-1, keepdim=True)).clamp_min(-_FARTHEST)
    powers = torch.where(torch.isinf(x), 0.0, distance.exp())
    return _spread(powers, _FUNCTION + _DIVISION + 2 * distance.abs())


_SCORES: dict[Callable[..., Tensor], Callable[[Tensor], _Ends]] = {
    scoring.raw_logits: lambda x: (x, x),
    scoring.sigmoid: _sigmoid,
    scoring.softmax: _exponentials,
    scoring.sqrt_softplus: _sqrt_softplus,
}


def _scores(preset: Preset, logits: Tensor, errors: Tensor) -> _Ends:
    """The scores of logits that may be so far off; scores grow with their logit."""
    score = _SCORES[preset.score]
    if preset.score is scoring.softmax:
        return _widened(score(logits), errors)
    return score(logits - errors)[0], score(logits + errors)[1]


def _widened(powers: _Ends, errors: Tensor) -> _Ends:
    """Exponentials of logits that may be so far off, each against the largest, which may be, too."""
    reach = 2 * errors.amax(1, keepdim=True)
    return powers[0] * (-reach).exp(), powers[1] * reach.exp()


def _added(ends: _Ends, addend: Tensor) -> _Ends:
    """After one addition. A sum with 0 is exact."""
    low, high = (end + addend for end in ends)
    rounding = (addend != 0) * _UNIT
    return low - low.abs().nan_to_num(posinf=0) * rounding, high + high.abs().nan_to_num(posinf=0) * rounding


def _selectable(scores: _Ends, ids: Tensor, n_group: int, topk_group: int) -> Tensor:
    """Whether some scores within their intervals select these experts in this order, `[M] bool`."""
    if n_group == 1:
        return _in_order(scores, ids)
    low, high = (end.view(len(ids), n_group, -1) for end in scores)
    best = tuple(end.topk(2).values.sum(2) for end in (low, high))
    group_low, group_high = best[0] - best[0].abs() * _UNIT, best[1] + best[1].abs() * _UNIT
    found = torch.zeros(len(ids), dtype=torch.bool)
    for chosen in itertools.combinations(range(n_group), topk_group):
        among = torch.zeros(n_group, dtype=torch.bool)
        among[list(chosen)] = True
        others = group_low.masked_fill(among, -math.inf).amax(1)
        possible = group_high.masked_fill(~among, math.inf).amin(1) >= others
        if bool(possible.any()):
            limited = low.masked_fill(~among[:, None], -math.inf), high.masked_fill(~among[:, None], math.nan)
            found |= possible & _in_order((limited[0].flatten(1), limited[1].flatten(1)), ids)
    return found


def _in_order(scores: _Ends, ids: Tensor) -> Tensor:
    """Whether each slot's expert can be the best of those that are left."""
    left, high = scores[0].clone(), scores[1]
    possible = torch.ones(len(ids), dtype=torch.bool)
    for slot in ids[:, :, None].unbind(1):
        possible &= (high.gather(1, slot) >= left.amax(1, keepdim=True)).flatten()
        left.scatter_(1, slot, -math.inf)
    return possible


def _weights(preset: Preset, scores: _Ends, factor: float) -> _Ends:
    """The final scales of experts of these scores: each over the sum, which contains it too, times the factor."""
    low, high = scores
    top_k = low.shape[1]
    least = low / (low + (high.sum(1, keepdim=True) - high) + preset.epsilon).clamp_min(_FLUSHED)
    most = high / (high + (low.sum(1, keepdim=True) - low) + preset.epsilon).clamp_min(_FLUSHED)
    reach = (top_k + _DIVISION + 3) * _UNIT  # the sum in any order, the quotient, two constants, a product
    ends = torch.stack((least * (1 - reach) - _FLUSHED, most * (1 + reach) + _FLUSHED)) * factor
    return ends.amin(0), ends.amax(0)
