"""Weights, scales and fc1 rows misread: the kernel on a changed call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mxfp4ref.defects.defect import Defect, change_experts, each, given, logical, on_call
from mxfp4ref.formats.experts import Experts
from mxfp4ref.formats.generations import BYTEWISE, WORDWISE, Generation
from mxfp4ref.formats.layout import (
    deinterleave_weights_sm90,
    fold_scales_sm90,
    interleave_weights_sm90,
    interleaved_to_halves,
    swap_gate_up,
    unfold_scales_sm90,
)
from mxfp4ref.formats.mxfp4 import GROUP_SIZE, pack_codes, unpack_codes
from mxfp4ref.model.call import MoeCall

__all__ = ["WEIGHT_DEFECTS"]

_FC1 = ("fc1_weights", "fc1_scales", "fc1_biases")
_WEIGHTS = ("fc1_weights", "fc2_weights")
_SCALES = ("fc1_scales", "fc2_scales")


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


def _folded_for_the_other(generation: Generation) -> Callable[[Tensor], Tensor]:
    def change(scales: Tensor) -> Tensor:
        experts, rows, groups = scales.shape
        shapes = {
            WORDWISE.name: (experts, groups // 4, rows * 4),
            BYTEWISE.name: (experts, rows // 64, groups // 4, 16, 16),
        }
        return unfold_scales_sm90(fold_scales_sm90(scales, generation).reshape(shapes[generation.name]))

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
        for field, tile_k in zip(_SCALES, call.kernel.tile_k, strict=True):
            scales = getattr(experts, field).clone()
            last = slice(-tile_k // GROUP_SIZE, None)
            scales[:-1, :, last] = getattr(experts, field)[1:, :, last]
            changed[field] = scales
        return changed

    return change_experts(call, change)


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

    return each(*_FC1, change=change)(call)


WEIGHT_DEFECTS: tuple[Defect, ...] = (
    on_call(
        "gate_up_swapped",
        "fc1 rows read as [gate; up]",
        ("Megatron-LM#6045", "vllm#40082", "vllm#48303"),
        each(*_FC1, change=swap_gate_up),
    ),
    on_call(
        "gate_up_interleaved",
        "fc1 rows read as gate0, up0, gate1, up1 and so on",
        ("vllm#44893", "sglang#25580"),
        each(*_FC1, change=interleaved_to_halves),
    ),
    on_call(
        "nibble_order",
        "high nibble taken as the even element",
        ("torchao#2939", "sglang#23908"),
        each(*_WEIGHTS, change=lambda packed: packed << 4 | packed >> 4),
    ),
    on_call(
        "nibble_split",
        "first half of a group in the low nibbles, second half in the high ones (gguf's order)",
        ("imp#567",),
        each(*_WEIGHTS, change=_nibbles_of_halves),
    ),
    on_call(
        "weights_not_interleaved",
        "SM90 layout step left out for the weights",
        ("flashinfer#3334", "vllm#46915"),
        each(*_WEIGHTS, change=deinterleave_weights_sm90),
    ),
    on_call(
        "weights_interleaved_twice",
        "SM90 layout step applied again to weights that have had it, as on a second load",
        ("weight updates without a restart",),
        each(*_WEIGHTS, change=interleave_weights_sm90),
    ),
    on_call(
        "weights_interleaved_old",
        "weights interleaved for the bytewise kernel (flashinfer 0.6.10 to 0.6.15), handed to the wordwise one",
        ("upgrades across flashinfer 0.6.16",),
        each(*_WEIGHTS, change=lambda w: deinterleave_weights_sm90(interleave_weights_sm90(w, BYTEWISE))),
    ),
    on_call(
        "scales_not_folded",
        "SM90 layout step left out for the scales",
        ("flashinfer#4087",),
        each(*_SCALES, change=_unfolded),
    ),
    on_call(
        "scales_folded_old",
        "scales folded for the bytewise kernel (flashinfer 0.6.10 to 0.6.15), handed to the wordwise one",
        ("upgrades across flashinfer 0.6.16",),
        each(*_SCALES, change=_folded_for_the_other(BYTEWISE)),
    ),
    on_call(
        "scales_folded_new",
        "scales folded for the wordwise kernel (flashinfer 0.6.18 and later), handed to the bytewise one",
        ("downgrades across flashinfer 0.6.16",),
        each(*_SCALES, change=_folded_for_the_other(WORDWISE)),
    ),
    on_call(
        "scales_not_swapped",
        "weight halves reordered, scales not",
        ("sglang#24492 (discussion)",),
        each("fc1_scales", change=swap_gate_up),
    ),
    on_call(
        "biases_not_swapped",
        "weight halves reordered, fc1 bias not",
        ("derived from scales_not_swapped",),
        each("fc1_biases", change=swap_gate_up),
        applies=given("fc1_biases"),
    ),
    on_call(
        "scale_bias_125",
        "scale exponent bias 125 instead of 127, 4x off",
        ("compressed-tensors#538",),
        each(*_SCALES, change=lambda scales: scales.clamp(max=253) + 2),
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
        each(*_SCALES, change=lambda scales: scales.flatten(1).roll(-1, 1).view_as(scales)),
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
        each(*_WEIGHTS, change=_without_half),
    ),
    on_call(
        "padding_end_of_fused",
        "padding at the end of the fused fc1 tensor instead of each half shifts the up/gate border",
        ("vllm#48624",),
        _pad_the_fused_tensor,
        applies=lambda call: _num_padding_rows(logical(call).experts) > 0,
    ),
)
