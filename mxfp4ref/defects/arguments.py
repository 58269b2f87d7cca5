"""Parameters, biases, ids and routing weights misused."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref.defects.definition import change_tensors, defect, given, runs
from mxfp4ref.defects.variants.rounding import bf16
from mxfp4ref.formats.experts import PARAMETERS
from mxfp4ref.model.call import PADDING_ID, MoeCall
from mxfp4ref.model.forward import select_local
from mxfp4ref.sm90.activation import ACTIVATIONS, SWIGLU, SWIGLU_BIAS

_PARAMETERS = " ".join(PARAMETERS)
_has_parameter = given(*PARAMETERS)
_is_swiglu, _is_step = runs("Swiglu", "SwigluBias"), runs("SwigluStep")


@defect(
    "call",
    "conversions under flush-to-zero",
    applies=lambda call: bool(((call.input.abs() < 2.0**-126) & (call.input != 0)).any()),
)
def subnormal_input_flushed(call: MoeCall) -> MoeCall:
    """bf16 subnormals of the input taken as 0"""
    bits = call.input.view(torch.int16)
    flushed = torch.where(bits & 0x7F80 == 0, bits & ~0x7FFF, bits)
    return replace(call, input=flushed.view(torch.bfloat16))


@defect("swiglu_limit", "sglang#39920", "transformers#40197", "vllm#45836")
def limit_ignored(limit: Tensor) -> None:
    """SwiGLU limit dropped"""
    return None


@defect("swiglu_alpha", "vllm#48303", "tokenspeed#992")
def alpha_ignored(alpha: Tensor) -> None:
    """SwiGLU alpha dropped, 1 used"""
    return None


@defect("swiglu_beta", "vllm#48303", "tokenspeed#992")
def beta_ignored(beta: Tensor) -> None:
    """SwiGLU beta dropped, 0 used"""
    return None


@defect("call", "sglang#24492", applies=runs("SwigluBias"))
def all_or_none_params(call: MoeCall) -> MoeCall:
    """limit (or another parameter) alone given, so none is applied"""
    names = ACTIVATIONS[SWIGLU_BIAS].defaults
    if all(given(name)(call) for name in names):
        return call
    return change_tensors(call, *names, change=lambda parameter: None)


@defect("call", "sglang#24816", applies=lambda call: call.ep_rank > 0 and _has_parameter(call))
def params_by_global_id(call: MoeCall) -> MoeCall:
    # Beyond the end of the rank's own vector, as on every rank but the first, a checked gather stays at the last.
    """per-expert parameters indexed by global id under expert parallelism"""
    ids = torch.arange(call.experts.num_experts, device=call.input.device)
    ids = (ids + call.ep_rank * len(ids)).clamp(max=len(ids) - 1)
    return change_tensors(call, *PARAMETERS, change=lambda parameter: parameter[ids])


@defect(_PARAMETERS, "kernels that take scalars")
def params_of_first_expert(parameter: Tensor) -> Tensor:
    """the first expert's parameters used for all, as if they were scalars"""
    return parameter[:1].expand_as(parameter)


@defect(_PARAMETERS, "modules cast as a whole")
def params_bf16(parameter: Tensor) -> Tensor:
    """parameters of the activation rounded to bf16 (1.702 becomes 1.703125)"""
    return bf16(parameter)


@defect(
    "call",
    "callers that hand no activation_type over",
    applies=runs("Geglu", "GegluTanh", "SwigluStep", "Situ"),
)
def activation_type_ignored(call: MoeCall) -> MoeCall:
    """SwiGLU computed, with the parameters that it reads, whatever the activation"""
    return replace(call, activation_type=SWIGLU)


@defect(
    "call",
    "defaults of one activation used for all",
    applies=lambda call: _no_limit(call) and _is_swiglu(call),
)
def limit_7_by_default(call: MoeCall) -> MoeCall:
    """SwiGLU clamped at 7 where no limit is given"""
    return _limited(call, 7.0) if _is_swiglu(call) else call


@defect(
    "call",
    "defaults that are not passed on",
    applies=lambda call: _no_limit(call) and _is_step(call),
)
def no_limit_by_default(call: MoeCall) -> MoeCall:
    """SwigluStep not clamped where no limit is given, instead of at 7"""
    return _limited(call, torch.inf) if _is_step(call) else call


def _no_limit(call: MoeCall) -> bool:
    return call.experts.swiglu_limit is None


def _limited(call: MoeCall, limit: float) -> MoeCall:
    if not _no_limit(call):
        return call
    limits = torch.full((call.experts.num_experts,), limit, dtype=torch.float32, device=call.input.device)
    return replace(call, experts=replace(call.experts, swiglu_limit=limits))


@defect("situ_beta", "constants of another model")
def situ_beta_ignored(beta: Tensor) -> None:
    """SiTU's beta dropped, 4 used"""
    return None


@defect("situ_linear_beta", "constants of another model")
def situ_linear_beta_ignored(linear_beta: Tensor) -> None:
    """SiTU's linear beta dropped, 25 used"""
    return None


@defect("fc1_biases", "flashinfer#3423")
def bias1_ignored(biases: Tensor) -> None:
    """fc1 bias dropped"""
    return None


@defect("fc2_biases", "flashinfer#3423")
def bias2_ignored(biases: Tensor) -> None:
    """fc2 bias dropped"""
    return None


@defect(
    "call",
    "row-parallel layers that keep their bias",
    applies=lambda call: call.tp_rank > 0 and call.experts.fc2_biases is not None,
)
def bias2_on_every_tp_rank(call: MoeCall) -> MoeCall:
    """fc2 bias added on tensor-parallel ranks above 0 as well, so that it counts tp_size times"""
    return replace(call, tp_rank=0)


@defect("call", "sglang#33608")
def weights_bf16(call: MoeCall) -> MoeCall:
    """routing weights rounded to bf16"""
    return replace(call, token_final_scales=bf16(call.token_final_scales))


@defect("call", "vllm-exl3#2")
def last_slot_dropped(call: MoeCall) -> MoeCall:
    """k - 1 experts summed"""
    ids = call.token_selected_experts.clone()
    ids[:, -1] = PADDING_ID
    return replace(call, token_selected_experts=ids)


@defect("select_local", "sglang#24492", applies=lambda call: call.ep_rank > 0)
def ep_double_mapping(ids: Tensor, num_local: int, ep_size: int, ep_rank: int) -> Tensor:
    """local ids and -1 handed over as if they were global"""
    local = select_local(ids, num_local, ep_size, ep_rank)
    return select_local(local, num_local, ep_size, ep_rank)


def _sentinels_on_last_rank(call: MoeCall) -> bool:
    return bool((call.token_selected_experts == PADDING_ID).any()) and call.ep_rank == call.ep_size - 1


@defect("select_local", "vllm#42034", applies=_sentinels_on_last_rank)
def ep_sentinel_aliases(ids: Tensor, num_local: int, ep_size: int, ep_rank: int) -> Tensor:
    """-1 taken as the last expert, as an index from the end"""
    last = num_local * ep_size - 1
    return select_local(torch.where(ids == PADDING_ID, last, ids), num_local, ep_size, ep_rank)


@defect("select_local", "flashinfer#3066", applies=lambda call: call.ep_rank > 0)
def ep_offset_dropped(ids: Tensor, num_local: int, ep_size: int, ep_rank: int) -> Tensor:
    """the rank's offset ignored: every rank takes rank 0's ids for its own"""
    return select_local(ids, num_local, ep_size, 0)


@defect("select_local", "derived from ep_offset_dropped", applies=lambda call: call.ep_size > 1)
def ep_ids_modulo(ids: Tensor, num_local: int, ep_size: int, ep_rank: int) -> Tensor:
    """global ids taken modulo the number of local experts, so that other ranks' slots count too"""
    once = select_local(ids, num_local * ep_size, 1, 0)
    return torch.where(once < 0, -1, once % num_local)
