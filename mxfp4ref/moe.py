"""The mixture-of-experts forward: the kernel's stages in order, every intermediate on request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor

from mxfp4ref.call import MoeCall
from mxfp4ref.dense import dense_gemm
from mxfp4ref.experts import Experts
from mxfp4ref.layout import GENERATIONS
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.gemm import group_scaled_gemm
from mxfp4ref.sm90.swiglu import swiglu

__all__ = ["DENSE", "KERNEL", "MoeTrace", "Stages", "forward", "moe_forward", "select_local", "trace"]

_F = TypeVar("_F", bound=Callable[..., object])

_TOKENS_AT_ONCE = 512  # bounds the memory of the per-slot outputs; tokens do not influence each other
_EXPERTS_AT_ONCE = 16  # on a GPU, so that its launches do not set the pace


def _uncompiled(function: _F) -> _F:
    """Keep a caller's torch.compile out: fused arithmetic would round otherwise."""
    return cast(_F, torch.compiler.disable(function))  # type: ignore[no-untyped-call]


def select_local(ids: Tensor, num_local: int, ep_size: int, ep_rank: int) -> Tensor:
    """This rank's index of each slot's expert, `[M, k] int64`; -1 where the slot is not this rank's.

    The rank owns the global ids `[ep_rank * num_local, (ep_rank + 1) * num_local)`. Where a token names an
    expert twice only the first slot counts (the specification, section 5).
    """
    local = ids.to(torch.int64) - ep_rank * num_local
    local = torch.where((local < 0) | (local >= num_local), -1, local)
    for slot in range(1, ids.shape[1]):
        repeated = (local[:, :slot] == local[:, slot, None]).any(1)
        local[:, slot] = torch.where(repeated, -1, local[:, slot])
    return local


@dataclass(frozen=True)
class Stages:
    """The computation as replaceable stages: `replace(KERNEL, swiglu=...)` is a kernel with another one.

    The GEMMs take `(x [B, M, K], weights [B, N, ...], scales [B, N, K/32] or None, *, tile_k, tile_n,
    positions [B, M], generation)` and return `[B, M, N] float32`; the rounding stages take the float32 result of the
    stage before; the others have the signatures of the functions that are their defaults.
    """

    select_local: Callable[[Tensor, int, int, int], Tensor] = select_local
    fc1_gemm: Callable[..., Tensor] = group_scaled_gemm
    round_fc1: Callable[[Tensor], Tensor] = fp32.to_bf16
    swiglu: Callable[..., Tensor] = swiglu
    round_activation: Callable[[Tensor], Tensor] = fp32.to_bf16
    fc2_gemm: Callable[..., Tensor] = group_scaled_gemm
    round_fc2: Callable[[Tensor], Tensor] = fp32.to_bf16
    finalize: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor] = finalize
    round_output: Callable[[Tensor], Tensor] = fp32.to_bf16


KERNEL = Stages()
DENSE = Stages(fc1_gemm=dense_gemm, fc2_gemm=dense_gemm)


@dataclass(frozen=True)
class MoeTrace:
    """Every intermediate of a forward. R routed rows, by expert and within an expert by token.

    Attributes:
        token, slot, expert: `[R] int64`, where the row comes from; the expert is this rank's index.
        fc1_accumulators: `[R, 2I] float32`.
        fc1_output: `[R, 2I] bf16`, up in the first half and gate in the second, before the bias.
        activation: `[R, I] bf16`, the input of GEMM2.
        fc2_accumulators: `[R, H] float32`.
        fc2_output: `[R, H] bf16`, before bias and routing weight.
        output: `[M, H] bf16`.
    """

    token: Tensor
    slot: Tensor
    expert: Tensor
    fc1_accumulators: Tensor
    fc1_output: Tensor
    activation: Tensor
    fc2_accumulators: Tensor
    fc2_output: Tensor
    output: Tensor


def moe_forward(
    input: Tensor,
    token_selected_experts: Tensor,
    token_final_scales: Tensor,
    experts: Experts,
    *,
    ep_size: int = 1,
    ep_rank: int = 0,
    tp_size: int = 1,
    tp_rank: int = 0,
    tile_k: tuple[int, int] = (128, 128),
    tile_n: tuple[int, int] = (16, 16),
    generation: str = GENERATIONS[-1],
    strict: bool = True,
    stages: Stages | None = None,
) -> Tensor:
    """The layer's output as an H100 computes it, bit for bit: `forward` of a `MoeCall` of these arguments.

    Returns:
        `[M, H] bf16`; NaN is 0x7FFF.

    Raises:
        TypeError, ValueError: as `MoeCall` says.
    """
    call = MoeCall(
        input=input,
        token_selected_experts=token_selected_experts,
        token_final_scales=token_final_scales,
        experts=experts,
        ep_size=ep_size,
        ep_rank=ep_rank,
        tp_size=tp_size,
        tp_rank=tp_rank,
        tile_k=tile_k,
        tile_n=tile_n,
        generation=generation,
        strict=strict,
    )
    return forward(call, stages)


@_uncompiled
def forward(call: MoeCall, stages: Stages | None = None) -> Tensor:
    """The output `[M, H] bf16` of a call, by the kernel's stages unless others are given."""
    return torch.cat([output for output, _ in _forward_in_parts(call, stages, keep=False)])


@_uncompiled
def trace(call: MoeCall, stages: Stages | None = None) -> MoeTrace:
    """A forward with every intermediate of every routed row."""
    parts = list(_forward_in_parts(call, stages, keep=True))
    rows = [batch for _, kept in parts for batch in kept]
    joined = {name: torch.cat([batch[name] for batch in rows]) for name in rows[0]}
    order = torch.argsort(joined["expert"] * call.num_tokens + joined["token"])
    joined = {name: value[order] for name, value in joined.items()}
    return MoeTrace(output=torch.cat([output for output, _ in parts]), **joined)


def _forward_in_parts(
    call: MoeCall, stages: Stages | None, *, keep: bool
) -> Iterator[tuple[Tensor, list[dict[str, Tensor]]]]:
    """Outputs and, if they are to be kept, the intermediates by name, for some tokens at a time."""
    if stages is None:
        stages = KERNEL if call.experts.quantized else DENSE
    rows_before = torch.zeros(call.experts.num_experts, dtype=torch.int64, device=call.input.device)
    for start in range(0, max(call.num_tokens, 1), _TOKENS_AT_ONCE):
        with torch.no_grad(), torch.autocast(call.input.device.type, enabled=False):
            part = call.select(slice(start, start + _TOKENS_AT_ONCE))
            local = stages.select_local(
                call.token_selected_experts[start : start + _TOKENS_AT_ONCE],
                call.experts.num_experts,
                call.ep_size,
                call.ep_rank,
            )
            output, kept = _forward(part, local, rows_before, stages, keep)
            rows_before += torch.bincount(local[local >= 0], minlength=call.experts.num_experts)
        for batch in kept:
            batch["token"] += start
        yield output, kept


def _forward(
    call: MoeCall, local: Tensor, rows_before: Tensor, stages: Stages, keep: bool
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """The stages in order. `rows_before[e]` rows of expert e belong to tokens before these."""
    experts = call.experts
    y = torch.zeros(*local.shape, experts.hidden_size, dtype=torch.float32, device=local.device)
    kept = []
    for batch in _batches(local, rows_before):
        some = experts.select(batch.expert)
        alpha, beta, limit = (
            None if p is None else p[:, None, None]
            for p in (some.swiglu_alpha, some.swiglu_beta, some.swiglu_limit)
        )
        bias = None if some.fc1_biases is None else some.fc1_biases[:, None]
        gemm1, gemm2 = (
            {"tile_k": k, "tile_n": n, "positions": batch.position, "generation": call.generation}
            for k, n in zip(call.tile_k, call.tile_n, strict=True)
        )

        x = call.input[batch.token]
        fc1_accumulators = stages.fc1_gemm(x, some.fc1_weights, some.fc1_scales, **gemm1)
        fc1_output = stages.round_fc1(fc1_accumulators)
        activation = stages.round_activation(stages.swiglu(fc1_output, bias, alpha, beta, limit))
        fc2_accumulators = stages.fc2_gemm(activation, some.fc2_weights, some.fc2_scales, **gemm2)
        fc2_output = stages.round_fc2(fc2_accumulators)

        used = batch.used
        y[batch.token[used], batch.slot[used]] = fp32.widen(fc2_output[used])
        if keep:
            kept.append(
                {
                    "token": batch.token[used],
                    "slot": batch.slot[used],
                    "expert": batch.expert[:, None].expand_as(used)[used],
                    "fc1_accumulators": fc1_accumulators[used],
                    "fc1_output": fc1_output[used],
                    "activation": activation[used],
                    "fc2_accumulators": fc2_accumulators[used],
                    "fc2_output": fc2_output[used],
                }
            )
    bias = experts.fc2_biases if call.tp_rank == 0 else None
    return stages.round_output(stages.finalize(y, local, call.token_final_scales, bias)), kept


@dataclass(frozen=True)
class _Batch:
    """Some experts and their routed rows in token order, padded to the longest; B experts, N rows each."""

    expert: Tensor  # [B]
    token: Tensor  # [B, N]
    slot: Tensor  # [B, N]
    position: Tensor  # [B, N], the row's position among all rows of its expert
    used: Tensor  # [B, N] bool, False for padding, which repeats some other row


def _batches(local: Tensor, rows_before: Tensor) -> Iterator[_Batch]:
    """The routed rows by expert: one expert at a time on a CPU, experts of similar length together on a GPU."""
    flat = local.flatten()
    by_expert = torch.argsort(flat, stable=True)[int((flat < 0).sum()) :]
    num_rows = torch.bincount(flat[by_expert], minlength=len(rows_before))
    first = num_rows.cumsum(0) - num_rows
    busy = torch.argsort(num_rows, stable=True)[int((num_rows == 0).sum()) :]
    if len(busy) == 0:
        busy = torch.zeros(1, dtype=torch.int64, device=local.device)  # an empty batch keeps every shape
    for expert in torch.split(busy, 1 if local.device.type == "cpu" else _EXPERTS_AT_ONCE):
        row = torch.arange(int(num_rows[expert].max()), device=local.device)
        used = row < num_rows[expert, None]
        routed = by_expert[(first[expert, None] + row).clamp(max=max(len(by_expert) - 1, 0))]
        top_k = local.shape[1]
        yield _Batch(expert, routed // top_k, routed % top_k, rows_before[expert, None] + row, used)
