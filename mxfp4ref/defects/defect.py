"""What a named defect is, and the two usual ways of making one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from mxfp4ref.formats.experts import Experts, Sm90Experts
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import Stages, forward

__all__ = [
    "Applies",
    "Defect",
    "Kind",
    "always",
    "change_experts",
    "each",
    "given",
    "logical",
    "on_call",
    "on_stages",
    "without",
]

Applies = Callable[[Any], bool]
Kind = Literal["defect", "arithmetic"]


@dataclass(frozen=True)
class Defect:
    """One way to be wrong, as a pipeline that differs from the kernel in exactly that.

    Attributes:
        name: a Python identifier.
        summary: what happens, in a line.
        seen_in: where: `repository#number` of a public thread, or in words.
        kind: "defect" for a mistake, "arithmetic" for a pipeline that means the same and rounds otherwise.
        target: what it is a wrong version of, and so what `run` takes and returns: "moe" a `MoeCall` and
            `[M, H] bf16` like `forward`, "routing" a `RoutingCall` and a `Routing` like `route`, "dequantize" a
            `DequantizeCall` and `[..., K] bf16` like `mxfp4.dequantize`.
        run: the wrong pipeline.
        applies: False for a call on which the defect cannot show, and on which `run` may fail; True promises
            nothing.
        equivalent: names of defects that give the same output on every call.
    """

    name: str
    summary: str
    seen_in: tuple[str, ...]
    kind: Kind
    target: Literal["moe", "routing", "dequantize"]
    run: Callable[[Any], Any]
    applies: Applies
    equivalent: tuple[str, ...] = ()


def always(call: object) -> bool:
    return True


def given(*fields: str) -> Applies:
    """A predicate: the call's experts have one of these optional tensors."""
    return lambda call: any(getattr(call.experts, field) is not None for field in fields)


def logical(call: MoeCall) -> MoeCall:
    """The same call with its experts in logical layout.

    Raises:
        ValueError: the experts are not MXFP4.
    """
    experts = call.experts
    if not experts.quantized:
        raise ValueError("experts: expected MXFP4 weights for a defect to act on, got bfloat16")
    if isinstance(experts, Sm90Experts):
        return replace(call, experts=experts.select(torch.arange(experts.num_experts, device=experts.device)))
    return call


def on_call(
    name: str,
    summary: str,
    seen_in: tuple[str, ...],
    change: Callable[[MoeCall], MoeCall],
    *,
    applies: Applies = always,
    kind: Kind = "defect",
) -> Defect:
    """The kernel on a changed call."""
    return Defect(name, summary, seen_in, kind, "moe", lambda call: forward(change(logical(call))), applies)


def on_stages(
    name: str,
    summary: str,
    seen_in: tuple[str, ...],
    stages: Stages,
    *,
    applies: Applies = always,
    kind: Kind = "defect",
) -> Defect:
    """A call by other stages than the kernel's."""
    return Defect(name, summary, seen_in, kind, "moe", lambda call: forward(logical(call), stages), applies)


def change_experts(call: MoeCall, change: Callable[[Experts], dict[str, Any]]) -> MoeCall:
    """The call with some tensors of its experts replaced."""
    return replace(call, experts=replace(call.experts, **change(call.experts)))


def each(*fields: str, change: Callable[[Tensor], Tensor]) -> Callable[[MoeCall], MoeCall]:
    """A change of these tensors of the experts, where they are given."""

    def changed(experts: Experts) -> dict[str, Tensor]:
        tensors = {field: getattr(experts, field) for field in fields}
        return {field: change(tensor) for field, tensor in tensors.items() if tensor is not None}

    return lambda call: change_experts(call, changed)


def without(*fields: str) -> Callable[[MoeCall], MoeCall]:
    return lambda call: change_experts(call, lambda experts: dict.fromkeys(fields))
