"""The presets of `mxfp4ref.routing.presets` in replaceable parts, and a call of one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mxfp4ref._validate import check_choice
from mxfp4ref.routing import presets as routing
from mxfp4ref.routing import scoring
from mxfp4ref.routing.presets import RoutedScaling, Routing, routing_weights
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

PRESETS = ("deepseek_v3", "deepseek_v4", "gpt_oss", "mixtral")


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
        check_choice("preset", self.preset, PRESETS)


def route(call: RoutingCall) -> Routing:
    """What the preset decides."""
    preset: Callable[..., Routing] = getattr(routing, call.preset)
    return preset(call.logits, **call.options)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "deepseek_v3": scoring.sigmoid,
    "deepseek_v4": scoring.sqrt_softplus,
    "gpt_oss": scoring.raw_logits,
    "mixtral": scoring.softmax,
}
EPSILON = {"deepseek_v3": 1e-20}
_TOP_K = {"deepseek_v3": 8, "deepseek_v4": 6, "gpt_oss": 4, "mixtral": 2}

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
    base = route(call)
    score = score or SCORES[call.preset]
    scores = score(unpadded_logits(call))
    options, ids = call.options, base.ids.clamp(min=0)
    if options.get("tid2eid") is None:
        groups = {"n_group": 8, "topk_group": 4} if call.preset == "deepseek_v3" else {}
        groups = {name: options.get(name, default) for name, default in groups.items()}
        top_k = options.get("top_k", _TOP_K[call.preset])
        ids = (select or select_by_preset)(scores, options.get("correction_bias"), top_k, groups)
    weights = (weigh or weigh_by_preset)(call)(scores, ids)
    if base.routed_scaling is RoutedScaling.IN_WEIGHTS:
        weights = weights * torch.tensor(base.routed_scaling_factor, dtype=torch.float32, device=ids.device)
    padded = base.ids < 0
    return replace(base, ids=ids.masked_fill(padded, -1), scales=weights.masked_fill(padded, 0.0))


def weigh_by_preset(call: RoutingCall) -> Weigh:
    normalize = "softmax" if call.preset == "gpt_oss" else "sum"
    epsilon = EPSILON.get(call.preset, 0.0)
    return lambda scores, ids: routing_weights(scores, ids, normalize=normalize, epsilon=epsilon)
