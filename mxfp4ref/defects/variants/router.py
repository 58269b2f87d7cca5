"""The presets of `mxfp4ref.routing.presets` in replaceable parts, and a call of one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mxfp4ref._validate import check_choice
from mxfp4ref.routing import scoring
from mxfp4ref.routing.models import PRESETS
from mxfp4ref.routing.presets import ROUTERS, RoutedScaling, Routing, routing_weights
from mxfp4ref.routing.selection import select_experts

__all__ = ["RoutingCall", "Selecting", "rerouted", "route", "score_by_preset", "select", "unpadded_logits"]


@dataclass(frozen=True)
class RoutingCall:
    """A preset of `mxfp4ref.routing.presets` and its arguments.

    Attributes:
        preset: a name in `PRESETS`.
        logits: `[M, E]` float32 or bf16.
        options: the preset's other arguments by name: correction_bias, top_k, routed_scaling_factor, ...
    """

    preset: str
    logits: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("preset", self.preset, tuple(PRESETS))

    @property
    def epsilon(self) -> float:
        """What is added to the sum of the scores."""
        return PRESETS[self.preset].epsilon

    def having(self, **options: Any) -> RoutingCall:
        """The same call with other options; None takes one away."""
        options = {**self.options, **options}
        return replace(self, options={name: value for name, value in options.items() if value is not None})


def route(call: RoutingCall) -> Routing:
    """What the preset decides."""
    return ROUTERS[call.preset](call.logits, **call.options)


@dataclass(frozen=True)
class Selecting:
    """What a selection chooses by: scores `[M, E]`, a bias `[E]` or None, k, n_group and topk_group."""

    scores: Tensor
    bias: Tensor | None
    top_k: int
    groups: dict[str, int]


def unpadded_logits(call: RoutingCall) -> Tensor:
    """float32 logits, zero in padded rows, whose own may be anything."""
    padded = call.options.get("padded")
    logits = call.logits if padded is None else call.logits.masked_fill(padded[:, None], 0.0)
    return scoring.raw_logits(logits)


def score_by_preset(logits: Tensor, call: RoutingCall) -> Tensor:
    return PRESETS[call.preset].score(logits)


def select(by: Selecting) -> Tensor:
    return select_experts(by.scores, by.top_k, correction_bias=by.bias, **by.groups).ids


def _weigh_by_preset(scores: Tensor, ids: Tensor, call: RoutingCall) -> Tensor:
    return routing_weights(scores, ids, normalize=PRESETS[call.preset].normalize, epsilon=call.epsilon)


def rerouted(
    call: RoutingCall,
    *,
    score: Callable[[Tensor, RoutingCall], Tensor] = score_by_preset,
    select: Callable[[Selecting], Tensor] = select,
    weigh: Callable[[Tensor, Tensor, RoutingCall], Tensor] = _weigh_by_preset,
) -> Routing:
    """`route` with another score function (of float32 logits), selection or weights (before the factor)."""
    base, preset = route(call), PRESETS[call.preset]
    scores = score(unpadded_logits(call), call)
    options, ids = call.options, base.ids.clamp(min=0)
    if options.get("tid2eid") is None:
        groups = {name: options.get(name, getattr(preset, name)) for name in ("n_group", "topk_group")}
        top_k = options.get("top_k", preset.top_k)
        ids = select(Selecting(scores, options.get("correction_bias"), top_k, groups))
    weights = weigh(scores, ids, call)
    if base.routed_scaling is RoutedScaling.IN_WEIGHTS:
        weights = weights * torch.tensor(base.routed_scaling_factor, dtype=torch.float32, device=ids.device)
    padded = base.ids < 0
    return replace(base, ids=ids.masked_fill(padded, -1), scales=weights.masked_fill(padded, 0.0))
