"""What arguments and options may be, by name. Nothing here needs torch, which takes seconds to import."""

from __future__ import annotations

from typing import Literal, get_args

__all__ = [
    "ACTIVATION_NAMES",
    "DIAGNOSES",
    "MODES",
    "ROUTER_NAMES",
    "SCALE_RULES",
    "STORAGE",
    "STRATEGIES",
    "Diagnosing",
    "Mode",
    "ScaleRule",
    "Storage",
    "Strategy",
]

ScaleRule = Literal["floor", "ceil", "rceil", "even"]
SCALE_RULES: tuple[ScaleRule, ...] = get_args(ScaleRule)

Strategy = Literal["linear", "round_robin"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

Mode = Literal["exact", "bounded"]
MODES: tuple[Mode, ...] = get_args(Mode)

Storage = Literal["wider", "bf16"]
STORAGE: tuple[Storage, ...] = get_args(Storage)

Diagnosing = Literal["quick", "full", "none"]
DIAGNOSES: tuple[Diagnosing, ...] = get_args(Diagnosing)

# The keys of `routing.PRESETS`, and the names of `sm90.activation.ACTIVATIONS` that have a gate, as checkpoints have.
ROUTER_NAMES = ("deepseek_v3", "deepseek_v4", "gpt_oss", "mixtral")
ACTIVATION_NAMES = ("Swiglu", "Geglu", "SwigluBias", "SwigluStep", "GegluTanh", "Situ")
