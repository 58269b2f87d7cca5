"""Weights, scales and parameters misread, parallelism misunderstood: the kernel on a changed call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref.call import PADDING_ID, MoeCall
from mxfp4ref.defects.defect import Applies, Defect, always, change_experts, given, on_call, on_stages
from mxfp4ref.experts import Experts
from mxfp4ref.layout import (
    deinterleave_weights_sm90,
    fold_scales_sm90,
    interleave_weights_sm90,
    interleaved_to_halves,
    swap_gate_up,
    unfold_scales_sm90,
)
from mxfp4ref.moe import Stages, select_local
from mxfp4ref.mxfp4 import GROUP_SIZE, pack_codes, unpack_codes
from mxfp4ref.sm90 import fp32

__all__ = ["INPUT_DEFECTS"]

_FC1 = ("fc1_weights", "fc1_scales", "fc1_biases")
_WEIGHTS = ("fc1_weights", "fc2_weights")
_SCALES = ("fc1_scales", "fc2_scales")
_PARAMETERS = ("swiglu_alpha", "swiglu_beta", "swiglu_limit")


def _each(*fields: str, change: Callable[[Tensor], Tensor]) -> Callable[[MoeCall], MoeCall]:
    """A change of these tensors of the experts, where they are given."""

    def changed(experts: Experts) -> dict[str, Tensor]:
        tensors = {field: getattr(experts, field) for field in fields}
        return {field: change(tensor) for field, tensor in tensors.items() if tensor is not None}

    return lambda call: change_experts(call, changed)


def _without(*fields: str) -> Callable[[MoeCall], MoeCall]:
    return lambda call: change_experts(call, lambda experts: dict.fromkeys(fields))


def _nibbles_of_halves(packed: Tensor) -> Tensor:
    """Low nibbles as the first 16 elements of each group, high nibbles as the others."""
    codes = unpack_codes(packed).view(*packed.shape[:-1], -1, GROUP_SIZE // 2, 2)
    return pack_codes(codes.transpose(-1, -2).flatten(-3))


def _without_half(packed: Tensor) -> Tensor:
    codes = unpack_codes(packed)
    return pack_codes(torch.where(codes & 7 == 1, codes & 8, codes))


def _unfolded(scales: Tensor) -> Tensor:
    experts, rows, groups = scales.shape
    return unfold_scales_sm90(scales.reshape(experts, rows // 64, groups // 4, 16, 16))


def _folded_for_the_other(generation: str) -> Callable[[Tensor], Tensor]:
    def change(scales: Tensor) -> Tensor:
        experts, rows, groups = scales.shape
        shapes = {
            "0.6.16": (experts, groups // 4, rows * 4),
            "0.6.9": (experts, rows // 64, groups // 4, 16, 16),
        }
        return unfold_scales_sm90(fold_scales_sm90(scales, generation).reshape(shapes[generation]))

    return change


def _requantized(packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """As if from float32 scales amax / 6, truncated to powers of two; what has become too large saturates."""
    codes = unpack_codes(packed).view(*scales.shape, GROUP_SIZE).to(torch.int64)
    # By the group's largest code: how far 2^floor(log2(amax / 6)) lies below the scale; 1.5, 3, 6 are exact.
    lower = torch.tensor([0, 4, 3, 2, 2, 1, 1, 0], device=packed.device)[(codes & 7).amax(-1)]
    lower = lower.minimum(scales.to(torch.int64))
    doubled = torch.tensor([0, 2, 4, 5, 6, 7, 7, 7], device=packed.device)  # 4 and 6 saturate
    magnitude = codes & 7
    for step in range(4):
        magnitude = torch.where((lower > step).unsqueeze(-1), doubled[magnitude], magnitude)
    codes = (codes & 8) | magnitude
    return pack_codes(codes.to(torch.uint8).flatten(-2)), (scales.to(torch.int64) - lower).to(torch.uint8)


def _requantize(call: MoeCall) -> MoeCall:
    def change(experts: Experts) -> dict[str, Tensor]:
        changed = {}
        for fc in ("fc1", "fc2"):
            one = zip(getattr(experts, f"{fc}_weights"), getattr(experts, f"{fc}_scales"), strict=True)
            pairs = [_requantized(weights, scales) for weights, scales in one]  # an expert at a time
            changed[f"{fc}_weights"], changed[f"{fc}_scales"] = (
                torch.stack(tensors) for tensors in zip(*pairs, strict=True)
            )
        return changed

    return change_experts(call, change)


def _scales_of_next_expert(call: MoeCall) -> MoeCall:
    def change(experts: Experts) -> dict[str, Tensor]:
        changed = {}
        for field, tile_k in zip(_SCALES, call.tile_k, strict=True):
            scales = getattr(experts, field).clone()
            last = slice(-tile_k // GROUP_SIZE, None)
            scales[:-1, :, last] = getattr(experts, field)[1:, :, last]
            changed[field] = scales
        return changed

    return change_experts(call, change)


def _all_or_none(call: MoeCall) -> MoeCall:
    complete = all(getattr(call.experts, field) is not None for field in _PARAMETERS)
    return call if complete else _without(*_PARAMETERS)(call)


def _by_global_id(call: MoeCall) -> MoeCall:
    # Beyond the end of the rank's own vector, as on every rank but the first, a checked gather stays at the last.
    def at_global_id(parameter: Tensor) -> Tensor:
        ids = torch.arange(len(parameter), device=parameter.device) + call.ep_rank * len(parameter)
        return parameter[ids.clamp(max=len(parameter) - 1)]

    return _each(*_PARAMETERS, change=at_global_id)(call)


def _num_padding_rows(experts: Experts) -> int:
    """How many rows at the end of both halves of fc1 are zero, as padding per half leaves them."""
    used = ((experts.fc1_weights & 0x77) != 0).any(-1).any(0)
    both = used.view(2, -1).any(0)
    return int((~both).flip(0).cumprod(0).sum())


def _pad_the_fused_tensor(call: MoeCall) -> MoeCall:
    padding = _num_padding_rows(call.experts)
    size = call.experts.intermediate_size - padding

    def change(fused: Tensor) -> Tensor:
        up, gate = fused.chunk(2, dim=1)
        return torch.cat((up[:, :size], gate[:, :size], up[:, size:], gate[:, size:]), dim=1)

    return _each(*_FC1, change=change)(call)


def _drop_last_slot(call: MoeCall) -> MoeCall:
    ids = call.token_selected_experts.clone()
    ids[:, -1] = PADDING_ID
    return replace(call, token_selected_experts=ids)


def _flush_subnormal_inputs(call: MoeCall) -> MoeCall:
    bits = call.input.view(torch.int16)
    flushed = torch.where(bits & 0x7F80 == 0, bits & ~0x7FFF, bits)
    return replace(call, input=flushed.view(torch.bfloat16))


def _bf16(values: Tensor) -> Tensor:
    return fp32.widen(fp32.to_bf16(values))


def _local_then_again(ids: Tensor, num_local: int, ep_size: int, ep_rank: int) -> Tensor:
    local = select_local(ids, num_local, ep_size, ep_rank)
    return select_local(local, num_local, ep_size, ep_rank)


def _sentinel_as_last(ids: Tensor, num_local: int, ep_size: int, ep_rank: int) -> Tensor:
    last = num_local * ep_size - 1
    return select_local(torch.where(ids == PADDING_ID, last, ids), num_local, ep_size, ep_rank)


def _without_offset(ids: Tensor, num_local: int, ep_size: int, ep_rank: int) -> Tensor:
    return select_local(ids, num_local, ep_size, 0)


def _modulo(ids: Tensor, num_local: int, ep_size: int, ep_rank: int) -> Tensor:
    return torch.where(ids < 0, -1, ids % num_local).to(torch.int64)


def _with_duplicates(ids: Tensor, num_local: int, ep_size: int, ep_rank: int) -> Tensor:
    local = ids.to(torch.int64) - ep_rank * num_local
    return torch.where((local < 0) | (local >= num_local), -1, local)


def _on_higher_rank(*fields: str) -> Applies:
    """A predicate: a rank other than 0 and, if fields are named, one of them given."""
    has = given(*fields) if fields else always
    return lambda call: call.ep_rank > 0 and has(call)


def _has_padding_id(call: MoeCall) -> bool:
    return bool((call.token_selected_experts == PADDING_ID).any())


_has_parameter = given(*_PARAMETERS)

INPUT_DEFECTS: tuple[Defect, ...] = (
    on_call(
        "gate_up_swapped",
        "fc1 rows read as [gate; up]",
        ("Megatron-LM#6045", "vllm#40082", "vllm#48303"),
        _each(*_FC1, change=swap_gate_up),
    ),
    on_call(
        "gate_up_interleaved",
        "fc1 rows read as gate0, up0, gate1, up1, ...",
        ("vllm#44893", "sglang#25580"),
        _each(*_FC1, change=interleaved_to_halves),
    ),
    on_call(
        "nibble_order",
        "high nibble taken as the even element",
        ("torchao#2939", "sglang#23908"),
        _each(*_WEIGHTS, change=lambda packed: packed << 4 | packed >> 4),
    ),
    on_call(
        "nibble_split",
        "first half of a group in the low nibbles, second half in the high ones (gguf's order)",
        ("imp#567",),
        _each(*_WEIGHTS, change=_nibbles_of_halves),
    ),
    on_call(
        "weights_not_interleaved",
        "SM90 layout step left out for the weights",
        ("flashinfer#3334", "vllm#46915"),
        _each(*_WEIGHTS, change=deinterleave_weights_sm90),
    ),
    on_call(
        "weights_interleaved_twice",
        "SM90 layout step applied again to weights that have had it, as on a second load",
        ("weight updates without a restart",),
        _each(*_WEIGHTS, change=interleave_weights_sm90),
    ),
    on_call(
        "scales_not_folded",
        "SM90 layout step left out for the scales",
        ("flashinfer#4087",),
        _each(*_SCALES, change=_unfolded),
    ),
    on_call(
        "scales_folded_old",
        "scales folded for flashinfer 0.6.9 .. 0.6.15, handed to 0.6.16 or later",
        ("upgrades across flashinfer 0.6.16",),
        _each(*_SCALES, change=_folded_for_the_other("0.6.9")),
    ),
    on_call(
        "scales_folded_new",
        "scales folded for flashinfer 0.6.16 or later, handed to 0.6.9 .. 0.6.15",
        ("downgrades across flashinfer 0.6.16",),
        _each(*_SCALES, change=_folded_for_the_other("0.6.16")),
    ),
    on_call(
        "scales_not_swapped",
        "weight halves reordered, scales not",
        ("sglang#24492 (discussion)",),
        _each("fc1_scales", change=swap_gate_up),
    ),
    on_call(
        "biases_not_swapped",
        "weight halves reordered, fc1 bias not",
        ("derived from scales_not_swapped",),
        _each("fc1_biases", change=swap_gate_up),
        applies=given("fc1_biases"),
    ),
    on_call(
        "scale_bias_125",
        "scale exponent bias 125 instead of 127, 4x off",
        ("compressed-tensors#538",),
        _each(*_SCALES, change=lambda scales: scales.clamp(max=253) + 2),
    ),
    on_call(
        "scale_truncated",
        "float32 scales amax / 6 that are no power of two truncated on conversion",
        ("pegainfer#658", "sglang#24492"),
        _requantize,
    ),
    on_call(
        "scale_off_by_one_group",
        "group g scaled by s[g + 1], the last group of a row by the next row's first",
        ("flashinfer#4093",),
        _each(*_SCALES, change=lambda scales: scales.flatten(1).roll(-1, 1).view_as(scales)),
    ),
    on_call(
        "scales_of_next_expert",
        "last K tile scaled by the next expert's scales (the race, frozen: in every row)",
        ("flashinfer#5438",),
        _scales_of_next_expert,
        applies=lambda call: call.experts.num_experts > 1,
    ),
    on_call(
        "half_code_flushed",
        "+-0.5 becomes 0, a subnormal flush in the conversion",
        ("derived from the conversion",),
        _each(*_WEIGHTS, change=_without_half),
    ),
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
        _without("swiglu_limit"),
        applies=given("swiglu_limit"),
    ),
    on_call(
        "alpha_ignored",
        "SwiGLU alpha dropped, 1 used",
        ("vllm#48303", "tokenspeed#992"),
        _without("swiglu_alpha"),
        applies=given("swiglu_alpha"),
    ),
    on_call(
        "beta_ignored",
        "SwiGLU beta dropped, 0 used",
        ("vllm#48303", "tokenspeed#992"),
        _without("swiglu_beta"),
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
        _each(*_PARAMETERS, change=lambda parameter: parameter[:1].expand_as(parameter)),
        applies=_has_parameter,
    ),
    on_call(
        "params_bf16",
        "SwiGLU parameters rounded to bf16 (1.702 becomes 1.703125)",
        ("modules cast as a whole",),
        _each(*_PARAMETERS, change=_bf16),
        applies=_has_parameter,
    ),
    on_call(
        "bias1_ignored",
        "fc1 bias dropped",
        ("flashinfer#3423",),
        _without("fc1_biases"),
        applies=given("fc1_biases"),
    ),
    on_call(
        "bias2_ignored",
        "fc2 bias dropped",
        ("flashinfer#3423",),
        _without("fc2_biases"),
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
        lambda call: replace(call, token_final_scales=_bf16(call.token_final_scales)),
    ),
    on_call(
        "last_slot_dropped",
        "k - 1 experts summed",
        ("vllm-exl3#2",),
        _drop_last_slot,
    ),
    on_call(
        "padding_end_of_fused",
        "padding at the end of the fused fc1 tensor instead of each half shifts the up/gate border",
        ("vllm#48624",),
        _pad_the_fused_tensor,
        applies=lambda call: _num_padding_rows(call.experts) > 0,
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
    on_stages(
        "duplicate_counted_twice",
        "an expert that a token names twice counted in both slots",
        ("every reference that loops over slots",),
        Stages(select_local=_with_duplicates),
        applies=lambda call: bool((call.token_selected_experts.sort(1).values.diff(dim=1) == 0).any()),
    ),
)
