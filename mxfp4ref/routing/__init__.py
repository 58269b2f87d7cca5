"""From router logits to expert ids and final scales."""

from mxfp4ref.routing.models import PRESETS, Preset
from mxfp4ref.routing.presets import (
    ROUTERS,
    deepseek_v3,
    deepseek_v4,
    gpt_oss,
    mixtral,
    pack_top_k,
    unpack_top_k,
)
from mxfp4ref.routing.route import Gate, RoutedScaling, Routing, Tokens, route, routing_weights
from mxfp4ref.routing.selection import hash_experts, select_experts

__all__ = [
    "PRESETS",
    "ROUTERS",
    "Gate",
    "Preset",
    "RoutedScaling",
    "Routing",
    "Tokens",
    "deepseek_v3",
    "deepseek_v4",
    "gpt_oss",
    "hash_experts",
    "mixtral",
    "pack_top_k",
    "route",
    "routing_weights",
    "select_experts",
    "unpack_top_k",
]
