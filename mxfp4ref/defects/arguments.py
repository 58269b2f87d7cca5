"""Parameters, biases, ids and routing weights misused: the kernel on a changed call or with other slots."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref.defects.defect import Applies, Defect, always, each, given, on_call, on_stages, without
from mxfp4ref.defects.rounding import bf16
from mxfp4ref.model.call import PADDING_ID, MoeCall
from mxfp4ref.model.forward import Stages, select_local

__all__ = ["ARGUMENT_DEFECTS"]

_PARAMETERS = ("swiglu_alpha", "swiglu_beta", "swiglu_limit")


def _all_or_none(call: MoeCall) -> MoeCall:
    complete = all(getattr(call.experts, field) is not None for field in _PARAMETERS)
    return call if complete else without(*_PARAMETERS)(call)


def _by_global_id(call: MoeCall) -> MoeCall:
    # Beyond the end of the rank's own vector, as on every rank but the first, a checked gather stays at the last.
    def at_global_id(parameter: Tensor) -> Tensor:
        ids = torch.arange(len(parameter), device=parameter.device) + call.ep_rank * len(parameter)
        return parameter[ids.clamp(max=len(parameter) - 1)]

    return each(*_PARAMETERS, change=at_global_id)(call)


def _drop_last_slot(call: MoeCall) -> MoeCall:
    ids = call.token_selected_experts.clone()
    ids[:, -1] = PADDING_ID
    return replace(call, token_selected_experts=ids)


def _flush_subnormal_inputs(call: MoeCall) -> MoeCall:
    bits = call.input.view(torch.int16)
    flushed = torch.where(bits & 0x7F80 == 0, bits & ~0x7FFF, bits)
    return replace(call, input=flushed.view(torch.bfloat16))


def _local_then_again(ids: Tensor, num_local: int, ep_size: int, ep_rank: int) -> Tensor:
    local = select_local(ids, num_local, ep_size, ep_rank)
    return select_local(local, num_local, ep_size, ep_rank)


def _sentinel_as_last(ids: Tensor, num_local: int, ep_size: int, ep_rank: int) -> Tensor:
    last = num_local * ep_size - 1
    return select_local(torch.where(ids == PADDING_ID, last, ids), num_local, ep_size, ep_rank)


def _without_offset(ids: Tensor, num_local: int, ep_size: int, ep_rank: int) -> Tensor:
    return select_local(ids, num_local, ep_size, 0)


def _modulo(ids: Tensor, num_local: int, ep_size: int, ep_rank: int) -> Tensor:
    once = select_local(ids, num_local * ep_size, 1, 0)
    return torch.where(once < 0, -1, once % num_local)


def _on_higher_rank(*fields: str) -> Applies:
    """A predicate: a rank other than 0 and, if fields are named, one of them given."""
    has = given(*fields) if fields else always
    return lambda call: call.ep_rank > 0 and has(call)


def _has_padding_id(call: MoeCall) -> bool:
    return bool((call.token_selected_experts == PADDING_ID).any())


_has_parameter = given(*_PARAMETERS)

ARGUMENT_DEFECTS: tuple[Defect, ...] = (
    on_call(
        "subnormal_input_flushed",
        "bf16 subnormals of the input taken as 0",
        ("conversions under flush-to-zero",),
        _flush_subnormal_inputs,
        applies=lambda call: bool(((call.input.abs() < 2.0**-126) & (call.input != 0)).any()),
    ),
    on_call(
        "limit_ignored",
        "SwiGLU limit dropped",
        ("sglang#39920", "transformers#40197", "vllm#45836"),
        without("swiglu_limit"),
        applies=given("swiglu_limit"),
    ),
    on_call(
        "alpha_ignored",
        "SwiGLU alpha dropped, 1 used",
        ("vllm#48303", "tokenspeed#992"),
        without("swiglu_alpha"),
        applies=given("swiglu_alpha"),
    ),
    on_call(
        "beta_ignored",
        "SwiGLU beta dropped, 0 used",
        ("vllm#48303", "tokenspeed#992"),
        without("swiglu_beta"),
        applies=given("swiglu_beta"),
    ),
    on_call(
        "all_or_none_params",
        "limit (or another parameter) alone given, so none is applied",
        ("sglang#24492",),
        _all_or_none,
        applies=_has_parameter,
    ),
    on_call(
        "params_by_global_id",
        "per-expert SwiGLU vectors indexed by global id under expert parallelism",
        ("sglang#24816",),
        _by_global_id,
        applies=_on_higher_rank(*_PARAMETERS),
    ),
    on_call(
        "params_of_first_expert",
        "the first expert's SwiGLU parameters used for all, as if they were scalars",
        ("kernels that take scalars",),
        each(*_PARAMETERS, change=lambda parameter: parameter[:1].expand_as(parameter)),
        applies=_has_parameter,
    ),
    on_call(
        "params_bf16",
        "SwiGLU parameters rounded to bf16 (1.702 becomes 1.703125)",
        ("modules cast as a whole",),
        each(*_PARAMETERS, change=bf16),
        applies=_has_parameter,
    ),
    on_call(
        "bias1_ignored",
        "fc1 bias dropped",
        ("flashinfer#3423",),
        without("fc1_biases"),
        applies=given("fc1_biases"),
    ),
    on_call(
        "bias2_ignored",
        "fc2 bias dropped",
        ("flashinfer#3423",),
        without("fc2_biases"),
        applies=given("fc2_biases"),
    ),
    on_call(
        "bias2_on_every_tp_rank",
        "fc2 bias added on tensor-parallel ranks above 0 as well, so that it counts tp_size times",
        ("row-parallel layers that keep their bias",),
        lambda call: replace(call, tp_rank=0),
        applies=lambda call: call.tp_rank > 0 and call.experts.fc2_biases is not None,
    ),
    on_call(
        "weights_bf16",
        "routing weights rounded to bf16",
        ("sglang#33608",),
        lambda call: replace(call, token_final_scales=bf16(call.token_final_scales)),
    ),
    on_call(
        "last_slot_dropped",
        "k - 1 experts summed",
        ("vllm-exl3#2",),
        _drop_last_slot,
    ),
    on_stages(
        "ep_double_mapping",
        "local ids and -1 handed over as if they were global",
        ("sglang#24492",),
        Stages(select_local=_local_then_again),
        applies=_on_higher_rank(),
    ),
    on_stages(
        "ep_sentinel_aliases",
        "-1 taken as the last expert, as an index from the end",
        ("vllm#42034",),
        Stages(select_local=_sentinel_as_last),
        applies=lambda call: _has_padding_id(call) and call.ep_rank == call.ep_size - 1,
    ),
    on_stages(
        "ep_offset_dropped",
        "the rank's offset ignored: every rank takes rank 0's ids for its own",
        ("flashinfer#3066",),
        Stages(select_local=_without_offset),
        applies=_on_higher_rank(),
    ),
    on_stages(
        "ep_ids_modulo",
        "global ids taken modulo the number of local experts, so that other ranks' slots count too",
        ("derived from ep_offset_dropped",),
        Stages(select_local=_modulo),
        applies=lambda call: call.ep_size > 1,
    ),
)
