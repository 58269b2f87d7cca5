"""What a named defect is, and the one way to write one.

    @defect("swiglu.clamp", "gpt-oss ports", applies=given("swiglu_limit"))
    def gate_clamped_below(up: Tensor, gate: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
        '''gate clamped to [-L, L]'''
        up, gate = clamp_both(up, gate, limit)
        return up, fp32.maximum(gate, -limit)

The first argument says what the function stands for, and so what it takes and returns:

    "call"                      a `MoeCall` to the one that is run instead
    "fc1_scales fc2_scales"     each of these tensors of the experts, if given, to another one or None
    "round_fc1 round_fc2"       each of these `Stages`
    "stages"                    a `MoeCall` to the `Stages` that run it, for a change in several places
    "gemm.order"                a part of `GemmVariant`, in both GEMMs
    "swiglu.clamp"              a part of `SwigluVariant`
    "activation.Geglu Gelu"     the function of these entries of `sm90.activation.ACTIVATIONS`
    "finalize.step"             a part of `FinalizeVariant`
    "router.select"             a part of `rerouted`
    "routing"                   a `RoutingCall` to another one, or to a wrong `Routing`
    "dequantize"                a `DequantizeCall` to wrong values
    "w4a8"                      a `MoeCall` with `HummingExperts` to another one
    "w4a8.fc1_gemm fc2_gemm"    each of these `HummingStages`
    "w4a8.stages"               a `MoeCall` with `HummingExperts` to the `HummingStages` that run it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from mxfp4ref._shown import Shown
from mxfp4ref.defects.variants.finalize import FinalizeVariant
from mxfp4ref.defects.variants.gemm import GemmVariant
from mxfp4ref.defects.variants.router import RoutingCall, rerouted, route
from mxfp4ref.defects.variants.swiglu import SwigluVariant
from mxfp4ref.formats.experts import Experts, Sm90Experts
from mxfp4ref.formats.generations import GENERATIONS
from mxfp4ref.formats.humming_experts import HummingExperts, Sm90HummingExperts
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import KERNEL, Stages, forward
from mxfp4ref.model.humming import STAGES
from mxfp4ref.sm90.activation import Activation

__all__ = [
    "DEFINED",
    "Applies",
    "Defect",
    "activated_by",
    "change_tensors",
    "defect",
    "gated",
    "given",
    "logical",
    "runs",
]

Applies = Callable[[Any], bool]
Change = Callable[[MoeCall], tuple[MoeCall, Stages]]
_Target = Literal["moe", "routing", "dequantize", "w4a8"]
_Kind = Literal["defect", "arithmetic"]
_Change = TypeVar("_Change", bound=Callable[..., Any])


@dataclass(frozen=True, repr=False)
class Defect(Shown):
    """One way to be wrong, as a pipeline that differs from the kernel in exactly that.

    Attributes:
        name: a Python identifier.
        summary: what happens, in a line.
        seen_in: where: `repository#number` of a public thread, or in words.
        kind: "defect" for a mistake, "arithmetic" for a pipeline that means the same and rounds otherwise.
        target: what it is a wrong version of, and so what `run` takes and returns: "moe" a `MoeCall` and
            `[M, H] bf16` like `forward`, "routing" a `RoutingCall` and a `Routing` like `route`, "dequantize" a
            `DequantizeCall` and `[..., K] bf16` like `mxfp4.dequantize`, "w4a8" a `MoeCall` whose experts are
            `HummingExperts` and `[M, H] bf16`.
        run: the wrong pipeline.
        applies: False for a call on which the defect cannot show, and on which `run` may fail; True promises
            nothing.
        change: of target "moe", what `run` takes the output of: the call that is computed instead, and its stages.
    """

    name: str
    summary: str
    seen_in: tuple[str, ...]
    kind: _Kind
    target: _Target
    run: Callable[[Any], Any]
    applies: Applies
    change: Change | None = None


DEFINED: dict[str, Defect] = {}

_STAGES = {stage.name for stage in fields(Stages)}
_TENSORS = {tensor.name for tensor in fields(Experts)}
_VARIANTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "gemm": ("fc1_gemm fc2_gemm", GemmVariant),
    "swiglu": ("activate", SwigluVariant),
    "finalize": ("finalize", FinalizeVariant),
}


def defect(
    changes: str, *seen_in: str, kind: _Kind = "defect", applies: Applies | None = None
) -> Callable[[_Change], _Change]:
    """Register the decorated function as a defect under its own name; its docstring is the summary.

    The name of a generation in braces stands for its releases.

    Args:
        changes: what the function stands for, see above.
        seen_in, kind: as in `Defect`.
        applies: as in `Defect`; false anyway where the call has none of the tensors, or not the activation, that
            `changes` names.
    """

    def register(change: _Change) -> _Change:
        name = change.__name__
        if name in DEFINED:
            raise ValueError(f"{name}: defined twice")
        summary = " ".join((change.__doc__ or "").split())
        for generation in GENERATIONS:
            summary = summary.replace(f"{{{generation.name}}}", generation.spans)
        other = _elsewhere(changes, change)
        target, run, sensible, changed = other if other else _of_moe(changes, change)
        shows = (lambda call: sensible(call) and applies(call)) if applies else sensible
        if target == "moe":
            shows = _unless_prepared(shows)
        DEFINED[name] = Defect(name, summary, seen_in, kind, target, run, shows, changed)
        return change

    return register


def given(*tensors: str) -> Applies:
    """A predicate: the call's experts have one of these."""
    return lambda call: any(getattr(call.experts, name) is not None for name in tensors)


def gated(call: MoeCall) -> bool:
    """A predicate: fc1 has rows of up and of gate."""
    return call.experts.gated


def runs(*activations: str) -> Applies:
    """A predicate: the call's activation is one of these."""
    return lambda call: call.activation.name in activations


def logical(call: MoeCall) -> MoeCall:
    """The same call with its experts in logical layout.

    Raises:
        ValueError: the experts are not MXFP4.
    """
    experts = call.experts
    if not experts.quantized:
        raise ValueError("experts: expected MXFP4 weights for a defect to act on, got bfloat16")
    if isinstance(experts, Sm90Experts | Sm90HummingExperts):
        return replace(call, experts=experts.select(torch.arange(experts.num_experts, device=experts.device)))
    return call


_Defined = tuple[_Target, Callable[[Any], Any], Applies, Change | None]


def _elsewhere(changes: str, change: Callable[..., Any]) -> _Defined | None:
    """Of a change of something else than a call: target, wrong pipeline, whether it can show on a call, no change."""
    whole, _, part = changes.partition(".")
    if whole == "dequantize":
        return "dequantize", change, _always, None
    if whole == "router":
        return "routing", lambda call: rerouted(call, **{part: change}), _always, None
    if whole == "routing":
        return "routing", lambda call: _routed(change(call)), _always, None
    if (whole, part) == ("w4a8", "stages"):
        return "w4a8", lambda call: forward(logical(call), change(logical(call))), _always, None
    if whole == "w4a8" and part:
        changed = dict.fromkeys(part.split(), change)

        def run_changed(call: MoeCall) -> Tensor:
            return forward(logical(call), replace(STAGES[call.input.dtype], **changed))

        return "w4a8", run_changed, _always, None
    if whole == "w4a8":
        return "w4a8", lambda call: forward(change(logical(call))), _always, None
    return None


def _of_moe(changes: str, change: Callable[..., Any]) -> _Defined:
    changed, sensible = _call_and_stages(changes, change)
    return "moe", lambda call: forward(*changed(logical(call))), sensible, changed


def _call_and_stages(changes: str, change: Callable[..., Any]) -> tuple[Change, Applies]:
    """What a call with logical experts is changed to, and whether that can show on it."""
    whole, _, part = changes.partition(".")
    if whole == "call":
        return lambda call: (change(call), KERNEL), _always
    if whole == "stages":
        return lambda call: (call, change(call)), _always
    if whole == "activation":
        is_part = runs(*part.split())
        return lambda call: (activated_by(call, change) if is_part(call) else call, KERNEL), is_part
    sensible: Applies = runs("Swiglu", "SwigluBias") if whole == "swiglu" else _always
    if part:
        whole, variant = _VARIANTS[whole]
        change = variant(**{part: change})
    names = whole.split()
    if set(names) <= _STAGES:
        stages = Stages(**dict.fromkeys(names, change))
        return lambda call: (call, stages), sensible
    if not set(names) <= _TENSORS:
        raise ValueError(
            f"changes: expected tensors of the experts, stages, or a part of one, got {changes!r}"
        )
    return lambda call: (change_tensors(call, *names, change=change), KERNEL), given(*names)


def change_tensors(call: MoeCall, *names: str, change: Callable[[Tensor], Tensor | None]) -> MoeCall:
    """The call with these tensors of its experts changed where they are given."""
    tensors: dict[str, Tensor | None] = {name: getattr(call.experts, name) for name in names}
    changed: dict[str, Any] = {name: change(tensor) for name, tensor in tensors.items() if tensor is not None}
    return replace(call, experts=replace(call.experts, **changed))


@dataclass(frozen=True)
class _OtherActivation(MoeCall):
    """A call whose activation is in no table."""

    other: Activation | None = None

    @property
    def activation(self) -> Activation:
        assert self.other is not None
        return self.other


def activated_by(
    call: MoeCall, function: Callable[..., Tensor], defaults: Mapping[str, float] | None = None
) -> MoeCall:
    """The call with another function of up, gate (if it has one) and parameters, by default those that it reads."""
    defaults = call.activation.defaults if defaults is None else defaults
    other = Activation("other", -1, function, defaults, gated=call.activation.gated)
    return _OtherActivation(**{f.name: getattr(call, f.name) for f in fields(MoeCall)}, other=other)


def _unless_prepared(shows: Applies) -> Applies:
    """False for the calls of W4A8, which has defects of its own."""
    return lambda call: not isinstance(call.experts, HummingExperts) and shows(call)


def _routed(result: Any) -> Any:
    return route(result) if isinstance(result, RoutingCall) else result


def _always(call: object) -> bool:
    return True
