"""What arguments and options may be, by name. Nothing here needs torch, which takes seconds to import."""

from __future__ import annotations

from typing import Literal, get_args

__all__ = [
    "ACTIVATION_NAMES",
    "CONVENTIONS",
    "DIAGNOSES",
    "EFFORTS",
    "MODES",
    "NORMALIZE",
    "REDUCTIONS",
    "ROUNDINGS",
    "ROUTER_NAMES",
    "SCALE_RULES",
    "STORAGE",
    "STRATEGIES",
    "WEIGHT_LAYOUTS",
    "Convention",
    "Diagnosing",
    "Effort",
    "Mode",
    "Normalize",
    "Reduction",
    "Rounding",
    "RouterName",
    "ScaleRule",
    "Storage",
    "Strategy",
    "WeightLayout",
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

Effort = Literal["quick", "full"]
EFFORTS: tuple[Effort, ...] = get_args(Effort)

Convention = Literal["ocp", "sm90"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)

Reduction = Literal["float32", "bf16"]
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)

Normalize = Literal["sum", "softmax", "none"]
NORMALIZE: tuple[Normalize, ...] = get_args(Normalize)

Rounding = Literal["each_step", "once"]
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)

WeightLayout = Literal["sm90", "logical", "logical_weights_folded_scales"]
WEIGHT_LAYOUTS: tuple[WeightLayout, ...] = get_args(WeightLayout)

# The keys of `routing.PRESETS`, and the names of `sm90.activation.ACTIVATIONS` that have a gate, as checkpoints have.
RouterName = Literal["deepseek_v3", "deepseek_v4", "gpt_oss", "mixtral"]
ROUTER_NAMES: tuple[RouterName, ...] = get_args(RouterName)
ACTIVATION_NAMES = ("Swiglu", "Geglu", "SwigluBias", "SwigluStep", "GegluTanh", "Situ")
