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

__all__ = [
    "EPSILON",
    "PRESETS",
    "SCORES",
    "RoutingCall",
    "Select",
    "Weigh",
    "rerouted",
    "route",
    "select_by_preset",
    "unpadded_logits",
    "weigh_by_preset",
]


@dataclass(frozen=True)
class RoutingCall:
    """A preset of `mxfp4ref.routing.presets` and its arguments.

    Attributes:
        preset: one of `PRESETS`.
        logits: `[M, E]` float32 or bf16.
        options: the preset's other arguments by name: correction_bias, top_k, routed_scaling_factor, ...
    """

    preset: str
    logits: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("preset", self.preset, tuple(PRESETS))


def route(call: RoutingCall) -> Routing:
    """What the preset decides."""
    return ROUTERS[call.preset](call.logits, **call.options)


SCORES = {name: preset.score for name, preset in PRESETS.items()}
EPSILON = {name: preset.epsilon for name, preset in PRESETS.items()}

# (scores, ids) -> weights before the factor; (scores, bias, k, groups) -> ids.
Weigh = Callable[[Tensor, Tensor], Tensor]
Select = Callable[[Tensor, Tensor | None, int, dict[str, int]], Tensor]


def unpadded_logits(call: RoutingCall) -> Tensor:
    """float32 logits, zero in padded rows, whose own may be anything."""
    padded = call.options.get("padded")
    logits = call.logits if padded is None else call.logits.masked_fill(padded[:, None], 0.0)
    return scoring.raw_logits(logits)


def select_by_preset(scores: Tensor, bias: Tensor | None, top_k: int, groups: dict[str, int]) -> Tensor:
    return select_experts(scores, top_k, correction_bias=bias, **groups).ids


def rerouted(
    call: RoutingCall,
    *,
    score: Callable[[Tensor], Tensor] | None = None,
    select: Select | None = None,
    weigh: Callable[[RoutingCall], Weigh] | None = None,
) -> Routing:
    """`route` with another score function, selection or weights."""
    base, preset = route(call), PRESETS[call.preset]
    scores = (score or preset.score)(unpadded_logits(call))
    options, ids = call.options, base.ids.clamp(min=0)
    if options.get("tid2eid") is None:
        groups = {name: options.get(name, getattr(preset, name)) for name in ("n_group", "topk_group")}
        top_k = options.get("top_k", preset.top_k)
        ids = (select or select_by_preset)(scores, options.get("correction_bias"), top_k, groups)
    weights = (weigh or weigh_by_preset)(call)(scores, ids)
    if base.routed_scaling is RoutedScaling.IN_WEIGHTS:
        weights = weights * torch.tensor(base.routed_scaling_factor, dtype=torch.float32, device=ids.device)
    padded = base.ids < 0
    return replace(base, ids=ids.masked_fill(padded, -1), scales=weights.masked_fill(padded, 0.0))


def weigh_by_preset(call: RoutingCall) -> Weigh:
    preset = PRESETS[call.preset]
    return lambda scores, ids: routing_weights(
        scores, ids, normalize=preset.normalize, epsilon=preset.epsilon
    )
