"""The layer once more, row by row, with a place to go wrong at every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mxfp4ref import Experts, MoeCall
from mxfp4ref.formats.mxfp4 import dequantize
from mxfp4ref.goldens.runs import run_stage
from mxfp4ref.model.forward import select_local
from mxfp4ref.sm90.activation import SWIGLU, SWIGLU_BIAS, activate, clamp
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.fp32 import add, minimum, to_bf16, widen
from mxfp4ref.sm90.gemm.cpu import group_scaled_gemm
from mxfp4ref.sm90.swiglu import swiglu
from mxfp4ref.sm90.tactics import Tactic

__all__ = [
    "Rows",
    "groups_of",
    "layer",
    "local_experts",
    "plain_up_and_gate",
    "right_routing",
    "up_and_gate",
    "with_experts",
]

HOOKS = (
    *("local", "x", "expert1", "gemm1", "fc1", "parameters", "swiglu", "activation"),
    *("expert2", "gemm2", "fc2", "weights", "finalize", "output"),
)


@dataclass(frozen=True)
class Rows:
    """The routed rows, expert by expert: `[R] int64` each; `position` is that among the rows of the expert."""

    token: Tensor
    slot: Tensor
    expert: Tensor
    position: Tensor

    def tile(self, rows: int) -> Tensor:
        return self.position // rows


def with_experts(call: MoeCall, **changes: Tensor | None) -> MoeCall:
    """The call with other tensors of its experts."""
    changed: dict[str, Any] = changes
    return replace(call, experts=replace(call.experts, **changed))


def local_experts(call: MoeCall) -> Tensor:
    """`[M, k] int64`, -1 where a slot is skipped."""
    return select_local(call.token_selected_experts, call.experts.num_experts, call.ep_size, call.ep_rank)


def right_routing(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """What is right for the inputs of a routing case."""
    routed = run_stage("routing", inputs)
    assert isinstance(routed, dict)
    return routed


def up_and_gate(fc1: Tensor, bias: Tensor | None, limit: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """With their biases, clamped; as the kernel computes them."""
    value = widen(fc1)
    if bias is not None:
        value = add(value, widen(bias).expand_as(value))
    up, gate = value.chunk(2, dim=-1)
    if limit is None:
        return up, gate
    limit = limit.expand_as(up)
    return clamp(up, limit), minimum(gate, limit)


def plain_up_and_gate(fc1: Tensor, bias: Tensor | None, limit: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same by torch."""
    value = fc1.float() if bias is None else fc1.float() + bias.float()
    up, gate = value.chunk(2, -1)
    return (up, gate) if limit is None else (up.clamp(-limit, limit), gate.minimum(limit))


def layer(call: MoeCall, **hooks: Callable[..., Any]) -> Tensor:
    """The output `[M, H] bf16`. A hook gets the rows and what the layer has there, and returns what it goes on with.

    local(local)                     which expert a slot goes to, -1 for none
    x(rows, x)                       GEMM1's input
    expert1(rows), expert2(rows)     whose weights each row is multiplied with
    gemm1, gemm2(x, packed, scales, tactic)    the accumulators of one expert's rows, `[R, N] float32`
    fc1, fc2(rows, accumulators)     GEMM1's and GEMM2's output, by default rounded to bf16
    parameters(rows, parameters)     the activation's bias, alpha, beta and limit by row
    swiglu(fc1, bias, alpha, beta, limit)
    activation(rows, activation)     GEMM2's input, by default rounded to bf16
    weights(local, weights)          the routing weights
    finalize(by_slot, local, weights, bias)
    output(sums)                     the output, by default rounded to bf16
    """
    if unknown := set(hooks) - set(HOOKS):
        raise ValueError(f"hooks: expected some of {', '.join(HOOKS)}, got {', '.join(unknown)}")

    def hook(name: str, *values: Any, default: Any) -> Any:
        return hooks[name](*values) if name in hooks else default()

    experts = call.experts
    right = local_experts(call)
    local = hook("local", right, default=lambda: right)
    rows = _rows(local)
    taken = call.input[rows.token]
    x = hook("x", rows, taken, default=lambda: taken)
    acc = _gemm(call, 0, x, rows, hooks)
    fc1 = hook("fc1", rows, acc, default=lambda: to_bf16(acc))
    if call.activation.id in (SWIGLU, SWIGLU_BIAS):
        limit = experts.swiglu_limit
        if call.activation.id == SWIGLU_BIAS and limit is None:  # which clamps a NaN, at Inf
            limit = torch.full((experts.num_experts,), torch.inf)
        named = [experts.fc1_biases, experts.swiglu_alpha, experts.swiglu_beta, limit]
        given = [_of_rows(p, rows) for p in named]
        given = hook("parameters", rows, given, default=lambda: given)
        activated = hook("swiglu", fc1, *given, default=lambda: swiglu(fc1, *given))
    else:  # which the mistakes do not concern
        named = [getattr(experts, name) for name in call.activation.defaults]
        activated = activate(
            call.activation, fc1, _of_rows(experts.fc1_biases, rows), [_of_rows(p, rows) for p in named]
        )
    a = hook("activation", rows, activated, default=lambda: to_bf16(activated))
    acc2 = _gemm(call, 1, a, rows, hooks)
    fc2 = hook("fc2", rows, acc2, default=lambda: to_bf16(acc2))
    by_slot = fc2.new_zeros(*local.shape, experts.hidden_size)
    by_slot[rows.token, rows.slot] = fc2
    weights = hook("weights", local, call.token_final_scales, default=lambda: call.token_final_scales)
    bias = experts.fc2_biases if call.tp_rank == 0 else None
    sums = hook(
        "finalize", by_slot, local, weights, bias, default=lambda: finalize(by_slot, local, weights, bias)
    )
    output: Tensor = hook("output", sums, default=lambda: to_bf16(sums))
    return output


def groups_of(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """Each K group's contribution alone, `[G, R, N] float32`, in float64 until then."""
    values = dequantize(packed, scales, convention="sm90", dtype=torch.float32).double()
    parts = zip(x.double().split(32, dim=-1), values.split(32, dim=-1), strict=True)
    return torch.stack([(a @ w.T).float() for a, w in parts])


def _of_rows(parameter: Tensor | None, rows: Rows) -> Tensor | None:
    return None if parameter is None else parameter.reshape(len(parameter), -1)[rows.expert]


def _rows(local: Tensor) -> Rows:
    token, slot = (local >= 0).nonzero(as_tuple=True)
    expert = local[token, slot]
    order = torch.argsort(expert, stable=True)
    token, slot, expert = token[order], slot[order], expert[order]
    first = torch.searchsorted(expert, expert)
    return Rows(token, slot, expert, torch.arange(len(expert)) - first)


def _gemm(call: MoeCall, which: int, x: Tensor, rows: Rows, hooks: dict[str, Callable[..., Any]]) -> Tensor:
    gemm = hooks.get(f"gemm{which + 1}", right_gemm)
    whose = hooks[f"expert{which + 1}"](rows) if f"expert{which + 1}" in hooks else rows.expert
    weights, scales = _weights(call.experts, which)
    out = torch.zeros(len(x), weights.shape[1])
    for expert in whose.unique().tolist():
        mine = whose == expert
        out[mine] = gemm(x[mine], weights[expert], scales[expert], call.kernel.tactics[which])
    return out


def right_gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
    return group_scaled_gemm(x[None], packed[None], scales[None], tactic=tactic)[0]


def _weights(experts: Experts, which: int) -> tuple[Tensor, Tensor]:
    scales = (experts.fc1_scales, experts.fc2_scales)[which]
    assert scales is not None
    return (experts.fc1_weights, experts.fc2_weights)[which], scales
