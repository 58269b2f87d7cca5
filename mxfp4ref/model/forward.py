"""The mixture-of-experts forward: the kernel's stages in order, every intermediate on request."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mxfp4ref._compiled import as_numpy
from mxfp4ref._compiler import uncompiled
from mxfp4ref._shown import Shown
from mxfp4ref._spans import spans
from mxfp4ref._threads import in_parallel
from mxfp4ref._validate import check_ids, check_instance, check_tensor
from mxfp4ref.formats.humming_experts import HummingExperts
from mxfp4ref.model import cpu, gpu
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.dense import dense_gemm
from mxfp4ref.model.rows import Rows, route, select_local
from mxfp4ref.sm90.activation import Activation
from mxfp4ref.sm90.elementwise import activate, finalize, to_bf16
from mxfp4ref.sm90.gemm.compiled import compiled_loops
from mxfp4ref.sm90.gemm.cpu import group_scaled_gemm

__all__ = [
    "DENSE",
    "KERNEL",
    "AnyStages",
    "MoeTrace",
    "Stages",
    "activate_rows",
    "check_stage",
    "forward",
    "gemm_rows",
    "select_local",
    "trace",
]

_ROWS_AT_ONCE_ON_GPU = 4096  # of the activation; a GPU is paced by launches


@dataclass(frozen=True, repr=False)
class AnyStages(Shown):
    """What the stages of all kinds of experts have."""

    select_local: Callable[[Tensor, int, int, int], Tensor] = select_local


@dataclass(frozen=True, repr=False)
class Stages(AnyStages):
    """The computation as replaceable stages: `replace(KERNEL, activate=...)` is a kernel with another one.

    The GEMMs take `(x [B, M, K], weights [B, N, ...], scales [B, N, K/32] or None, *, tactic,
    generation, positions [B, M])` and return `[B, M, N] float32`; the rounding stages take the float32 result of the
    stage before; the others have the signatures of the functions that are their defaults.

    Tokens come 512 at a time. Of these a GEMM stage gets each expert's rows in one call: B is 1, M the number of rows
    that chose the expert, in the order of the tokens, `weights` and `scales` those of that expert in logical layout,
    and `positions` the numbers of the rows among all of the expert's rows in the whole MoeCall. Experts that no token
    chose are left out, unless none was chosen: then there is one call, of expert 0 with M = 0. The calls begin in the
    order of the experts; on a CPU threads may make several at once, so that a stage must not count on their order.
    No argument says which expert it is. The default GEMM's compiled loops take all experts in one call instead.
    """

    fc1_gemm: Callable[..., Tensor] = group_scaled_gemm
    round_fc1: Callable[[Tensor], Tensor] = to_bf16
    activate: Callable[[Activation, Tensor, Tensor | None, Sequence[Tensor | None]], Tensor] = activate
    round_activation: Callable[[Tensor], Tensor] = to_bf16
    fc2_gemm: Callable[..., Tensor] = group_scaled_gemm
    round_fc2: Callable[[Tensor], Tensor] = to_bf16
    finalize: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor] = finalize
    round_output: Callable[[Tensor], Tensor] = to_bf16


KERNEL = Stages()
DENSE = Stages(fc1_gemm=dense_gemm, fc2_gemm=dense_gemm)


@dataclass(frozen=True, repr=False)
class MoeTrace(Shown):
    """Every intermediate of a forward. R routed rows, by expert and within an expert by token.

    Attributes:
        token, slot, expert: `[R] int64`, where the row comes from; the expert is this rank's index.
        fc1_accumulators: `[R, 2I] float32`; `[R, I]` where the activation has no gate.
        fc1_output: `[R, 2I] bf16`, up in the first half and gate in the second, before the bias; likewise.
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


@uncompiled
def forward(call: MoeCall, stages: AnyStages | None = None) -> Tensor:
    """The output `[M, H]` of a call, of the input's dtype, by the kernel's stages unless others are given.

    Experts that are `HummingExperts` are computed with FP8 activations, as `model.humming` says.
    """
    outputs = [output for output, _ in _forward_in_parts(call, stages, keep=False)]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


@uncompiled
def trace(call: MoeCall, stages: AnyStages | None = None) -> MoeTrace:
    """A forward with every intermediate of every routed row."""
    outputs, parts = zip(*_forward_in_parts(call, stages, keep=True), strict=True)
    rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    order = torch.argsort(rows["expert"] * call.num_tokens + rows["token"])
    _, _, kind = _path(call)
    return kind(output=torch.cat(outputs), **{name: value[order] for name, value in rows.items()})


def _forward_in_parts(
    call: MoeCall, stages: AnyStages | None, *, keep: bool
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Outputs and, if they are to be kept, the intermediates by name, for some tokens at a time."""
    check_instance("call", call, MoeCall)
    forward_rows, defaults, _ = _path(call)
    if stages is None:
        for fast in (gpu, cpu):
            if fast.usable(call):
                yield from fast.forward_in_parts(call, keep=keep)
                return
        stages = defaults
    check_instance("stages", stages, type(defaults))
    device, num_experts = call.input.device, call.experts.num_experts
    before = np.zeros(num_experts, np.int64)
    for tokens in spans(max(call.num_tokens, 1), cpu.TOKENS_AT_ONCE):
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            part = call if call.num_tokens <= cpu.TOKENS_AT_ONCE else call.select(tokens)
            ids = part.token_selected_experts
            local = stages.select_local(ids, num_experts, call.ep_size, call.ep_rank)
            check_stage("select_local", local, ids.shape, torch.int64)
            check_ids("stages.select_local", local, minimum=-1, maximum=num_experts - 1)
            rows = route(local.cpu().numpy(), before).on(device)
            output, kept = forward_rows(part, local, rows, stages, keep)
            check_stage("round_output", output, part.input.shape)
        if keep:
            kept["token"] += tokens.start
        yield output, kept


def _path(call: MoeCall) -> tuple[Callable[..., tuple[Tensor, dict[str, Tensor]]], Any, type[MoeTrace]]:
    """How rows of a call are computed: the function, its stages by default, and what holds intermediates."""
    if isinstance(call.experts, HummingExperts):
        from mxfp4ref.model import humming  # which needs this module

        return humming.forward_rows, humming.STAGES[call.input.dtype], humming.HummingTrace
    return _forward, KERNEL if call.experts.quantized else DENSE, MoeTrace


def _forward(
    call: MoeCall, local: Tensor, rows: Rows, stages: Stages, keep: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The stages in order."""
    experts = call.experts
    x = call.input.index_select(0, rows.token)
    fc1_accumulators, fc1_output = gemm_rows(call, 0, x, rows, stages.fc1_gemm, stages.round_fc1, keep)
    check_stage("round_fc1", fc1_output, (len(x), experts.gemm_shapes[0][0]))
    at_once = cpu.ROWS_AT_ONCE if x.device.type == "cpu" else _ROWS_AT_ONCE_ON_GPU
    activation = torch.cat(
        [
            stages.round_activation(activate_rows(call, fc1_output[some], rows.expert[some], stages.activate))
            for some in spans(max(len(x), 1), at_once)
        ]
    )
    check_stage("round_activation", activation, (len(x), experts.intermediate_size))
    fc2_accumulators, fc2_output = gemm_rows(
        call, 1, activation, rows, stages.fc2_gemm, stages.round_fc2, keep
    )
    check_stage("round_fc2", fc2_output, (len(x), experts.hidden_size))
    by_slot = fc2_output.new_zeros(*local.shape, experts.hidden_size)
    by_slot.view(-1, experts.hidden_size).index_copy_(0, rows.token * call.top_k + rows.slot, fc2_output)
    bias = experts.fc2_biases if call.tp_rank == 0 else None
    output = stages.round_output(stages.finalize(by_slot, local, call.token_final_scales, bias))
    kept = {
        "token": rows.token,
        "slot": rows.slot,
        "expert": rows.expert,
        "fc1_accumulators": fc1_accumulators,
        "fc1_output": fc1_output,
        "activation": activation,
        "fc2_accumulators": fc2_accumulators,
        "fc2_output": fc2_output,
    }
    return output, kept if keep else {}


def gemm_rows(
    call: MoeCall,
    which: int,
    x: Tensor,
    rows: Rows,
    gemm: Callable[..., Tensor],
    rounding: Callable[[Tensor], Tensor],
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """GEMM1 (`which` 0) or GEMM2 (1) of all rows: accumulators, if they are to be kept, and rounded output."""
    num_columns, depth = call.experts.gemm_shapes[which]
    if gemm is group_scaled_gemm and x.device.type == "cpu" and compiled_loops() is not None:
        check_tensor("x", x, dtype=torch.bfloat16, shape=("R", depth))
        result = torch.from_numpy(cpu.gemm(call, which, as_numpy(x, np.int16), rows).view(np.float32))
        return result if keep else result[:0], rounding(result)
    how = {"tactic": call.kernel.tactics[which], "generation": call.kernel.generation}

    def of_expert(piece: tuple[int, slice]) -> tuple[Tensor, Tensor]:
        expert, some = piece
        weights = call.experts.weights(("fc1", "fc2")[which], expert)
        result = gemm(x[None, some], *weights, **how, positions=rows.position[None, some])[0]
        return result if keep else result[:0], rounding(result)

    results = in_parallel(of_expert, rows.by_expert, x.device, depth * num_columns)
    accumulators, outputs = zip(*results, strict=True)
    return torch.cat(accumulators), torch.cat(outputs)


def check_stage(name: str, result: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> None:
    """Raise unless what a stage gave has the shape that the next one takes."""
    check_tensor(f"stages.{name}", result, dtype=dtype, shape=tuple(shape))


def activate_rows(call: MoeCall, fc1_output: Tensor, expert: Tensor, stage: Callable[..., Tensor]) -> Tensor:
    """The activation of routed rows by its stage, with the bias and the parameters of each row's expert."""
    # Indexing with a tensor would wait for all of torch's threads, however little there is to do.
    bias, activation = call.experts.fc1_biases, call.activation
    given = [getattr(call.experts, name) for name in activation.defaults]
    parameters = [None if p is None else p.index_select(0, expert).unsqueeze(1) for p in given]
    bias = None if bias is None else bias.index_select(0, expert)
    result = stage(activation, fc1_output, bias, parameters)
    check_stage("activate", result, (len(fc1_output), call.experts.intermediate_size))
    return result
