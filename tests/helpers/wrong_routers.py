"""Routers in plain torch that are wrong in one way each, none of them a named defect, with words for a diagnosis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.routing.models import PRESETS
from tests.helpers.torch_routers import RIGHT, router

Outputs = dict[str, Tensor]
Wrong = Callable[..., Outputs]
_ALL = ("deepseek_v3", "deepseek_v4", "gpt_oss", "mixtral")


def _then(change: Callable[[Tensor, Tensor, dict[str, Any]], tuple[Tensor, Tensor]]) -> Wrong:
    """A right router whose ids and weights are changed afterwards; rows of padding stay."""

    def wrong(**inputs: Any) -> Outputs:
        right = RIGHT["float32 with stable ties"](**inputs)
        ids, scales = change(right["ids"], right["scales"], inputs)
        padded = right["ids"] < 0
        return {
            "ids": torch.where(padded, right["ids"], ids.to(torch.int32)),
            "scales": torch.where(padded, right["scales"], scales),
        }

    return wrong


def _with(**other: Any) -> Wrong:
    return lambda **inputs: router(**{**inputs, **other}, stable=True)


def _bias(change: Callable[[Tensor], Tensor]) -> Wrong:
    return lambda **inputs: router(
        **{**inputs, "correction_bias": change(inputs["correction_bias"])}, stable=True
    )


def _renormalised_over_all(**inputs: Any) -> Outputs:
    right = router(**inputs, stable=True)
    scores = inputs["logits"].double().sigmoid()
    ids = right["ids"].long()
    weights = scores.gather(1, ids) / scores.sum(1, keepdim=True) * inputs["routed_scaling_factor"]
    return {**right, "scales": weights.float()}


def _twice_as_many_groups(**inputs: Any) -> Outputs:
    return router(**{**inputs, "n_group": inputs["n_group"] * 2}, stable=True)


def _factor(inputs: dict[str, Any]) -> float:
    return float(inputs.get("routed_scaling_factor", 1.0))


def _by_order(inputs: dict[str, Any], order: Tensor) -> Outputs:
    """A right router that sees expert order[n] as expert n."""
    moved = {
        **inputs,
        "logits": inputs["logits"][:, order],
        "correction_bias": inputs["correction_bias"][order],
    }
    right = router(**moved, stable=True)
    return {**right, "ids": order[right["ids"].long()].to(torch.int32)}


def _interleaved_groups(**inputs: Any) -> Outputs:
    size = inputs["logits"].shape[1]
    return _by_order(inputs, torch.arange(size).view(-1, inputs["n_group"]).mT.flatten())


def _next_groups(**inputs: Any) -> Outputs:
    scores = inputs["logits"].double().sigmoid().float()
    biased = (scores + inputs["correction_bias"]).view(len(scores), inputs["n_group"], -1)
    best = biased.topk(2).values.sum(2).topk(inputs["topk_group"]).indices
    outside = torch.ones(biased.shape[:2], dtype=torch.bool).scatter_(
        1, (best + 1) % inputs["n_group"], False
    )
    ids = biased.masked_fill(outside[..., None], -torch.inf).flatten(1).topk(inputs["top_k"]).indices
    weights = scores.gather(1, ids)
    weights = weights / (weights.sum(1, keepdim=True) + 1e-20) * inputs["routed_scaling_factor"]
    return {"ids": ids.to(torch.int32), "scales": weights}


def _second_best(**inputs: Any) -> Outputs:
    top_k = inputs.get("top_k", PRESETS[inputs["preset"]].top_k)
    more = router(**{**inputs, "top_k": top_k + 1}, stable=True)
    ids = more["ids"][:, 1:].contiguous()
    weights = more["scales"][:, 1:].double()
    total = _factor(inputs) if inputs.get("routed_scaling", "in_weights") == "in_weights" else 1.0
    padded = ids < 0
    return {
        "ids": ids,
        "scales": (weights / weights.sum(1, keepdim=True) * total).float().masked_fill(padded, 0.0),
    }


# What is wrong, on which routers, and words that have to be said.
WRONG: dict[str, tuple[tuple[str, ...], Wrong, str]] = {
    "weights twice as large": (_ALL, _then(lambda i, w, a: (i, w * 2)), "all weights are 2x the right ones"),
    "weights an odd factor": (_ALL, _then(lambda i, w, a: (i, w * 1.2345)), "all weights are 1.23"),
    "divided by the factor": (
        ("deepseek_v3",),
        _then(lambda i, w, a: (i, w / _factor(a) ** 2)),
        "the weights are divided by the routed scaling factor",
    ),
    "softmax of the weights": (
        ("mixtral",),
        _then(lambda i, w, a: (i, w.softmax(1))),
        "weights are normalised over their sum and then by softmax",
    ),
    "softmax twice": (
        ("gpt_oss",),
        _then(lambda i, w, a: (i, w.softmax(1))),
        "weights are normalised by softmax twice",
    ),
    "over all experts": (
        ("deepseek_v3",),
        _renormalised_over_all,
        "weights are normalised over the sum of all experts",
    ),
    "weights in bf16": (
        _ALL,
        _then(lambda i, w, a: (i, w.bfloat16().float())),
        "weights are rounded to bf16",
    ),
    "ids one further": (_ALL, _then(lambda i, w, a: (i + 1, w)), "ids are renumbered: id n is id n + 1"),
    "ids of a rank": (_ALL, _then(lambda i, w, a: (i % 4, w)), "ids are renumbered: id n is id n modulo 4"),
    "ids from behind": (
        _ALL,
        _then(lambda i, w, a: (a["logits"].shape[1] - 1 - i, w)),
        "ids are renumbered: in reverse",
    ),
    "ascending scores": (
        _ALL,
        _then(lambda i, w, a: (i.flip(1), w.flip(1))),
        "each token has its right experts, in ascending order of scores",
    ),
    "rotated": (
        ("deepseek_v3", "deepseek_v4"),
        _then(lambda i, w, a: (i.roll(1, 1), w.roll(1, 1))),
        "rotated by 1 slots",
    ),
    "weights rotated": (("deepseek_v3",), _then(lambda i, w, a: (i.roll(1, 1), w)), "while the weights stay"),
    "the token before": (
        ("deepseek_v3", "gpt_oss"),
        _then(lambda i, w, a: (i.roll(1, 0), w.roll(1, 0))),
        "ids and weights are those of other tokens: token n is token n - 1, around the end",
    ),
    "bias subtracted": (
        ("deepseek_v3",),
        _bias(lambda b: -b),
        "the correction bias is subtracted in the selection",
    ),
    "bias of the next": (("deepseek_v3",), _bias(lambda b: b.roll(-1)), "is that of the expert 1 after it"),
    "one group more": (
        ("deepseek_v3",),
        lambda **inputs: router(**{**inputs, "topk_group": inputs["topk_group"] + 1}, stable=True),
        "groups take part instead of",
    ),
    "twice as many groups": (("deepseek_v3",), _twice_as_many_groups, "groups take part instead of"),
    "groups of every n-th expert": (
        ("deepseek_v3",),
        _interleaved_groups,
        "groups are made of every n-th expert",
    ),
    "the next groups": (
        ("deepseek_v3",),
        _next_groups,
        "the groups 1 after (shifted) take part instead of the best",
    ),
    "the best passed over": (
        ("deepseek_v4", "gpt_oss", "mixtral"),
        _second_best,
        "the best 1 of the experts are passed over",
    ),
    "the last tokens unscaled": (
        ("deepseek_v3",),
        _then(lambda i, w, a: (i, torch.cat((w[:8], w[8:] / _factor(a))))),
        "the routed scaling factor 2.5 is left out",
    ),
    "zeros": (_ALL, _then(lambda i, w, a: (i, w * 0)), "all weights are 0"),
    "last slot lost": (
        ("deepseek_v3", "deepseek_v4"),
        _then(lambda i, w, a: (torch.cat((i[:, :-1], i[:, -1:] * 0 - 1), 1), w)),
        "have id -1 instead of experts",
    ),
}

# Of another dtype or k, which the kit refuses before it comes to a diagnosis; `routing_finding` takes them.
OTHER_SHAPES: dict[str, tuple[tuple[str, ...], Wrong, str]] = {
    "int64": (
        _ALL,
        lambda **inputs: _as_int64(router(**inputs, stable=True)),
        "ids are int64 instead of int32",
    ),
    "another k": (
        _ALL,
        lambda **inputs: router(
            **{**inputs, "top_k": inputs.get("top_k", PRESETS[inputs["preset"]].top_k) - 1}, stable=True
        ),
        "is taken instead of top-",
    ),
}


def _as_int64(right: Outputs) -> Outputs:
    return {**right, "ids": right["ids"].long()}
