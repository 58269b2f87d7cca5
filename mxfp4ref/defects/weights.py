"""Weights, scales and fc1 rows misread."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref.defects.definition import change_tensors, defect, gated, logical
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

_FC1 = "fc1_weights fc1_scales fc1_biases"
_WEIGHTS = "fc1_weights fc2_weights"
_SCALES = "fc1_scales fc2_scales"


@defect(_FC1, "Megatron-LM#6045", "vllm#40082", "vllm#48303", applies=gated)
def gate_up_swapped(fc1: Tensor) -> Tensor:
    """fc1 rows read as [gate; up]"""
    return swap_gate_up(fc1)


@defect(_FC1, "vllm#44893", "sglang#25580", applies=gated)
def gate_up_interleaved(fc1: Tensor) -> Tensor:
    """fc1 rows read as gate0, up0, gate1, up1 and so on"""
    return interleaved_to_halves(fc1)


@defect(_WEIGHTS, "torchao#2939", "sglang#23908")
def nibble_order(packed: Tensor) -> Tensor:
    """high nibble taken as the even element"""
    return packed << 4 | packed >> 4


@defect(_WEIGHTS, "imp#567")
def nibble_split(packed: Tensor) -> Tensor:
    """first half of a group in the low nibbles, second half in the high ones (gguf's order)"""
    groups = packed.view(*packed.shape[:-1], -1, GROUP_SIZE // 2)
    halves = (nibbles[..., ::2] | nibbles[..., 1::2] << 4 for nibbles in (groups & 15, groups >> 4))
    return torch.cat(tuple(halves), -1).view_as(packed)


@defect(_WEIGHTS, "flashinfer#3334", "vllm#46915")
def weights_not_interleaved(packed: Tensor) -> Tensor:
    """SM90 layout step left out for the weights"""
    return deinterleave_weights_sm90(packed)


@defect(_WEIGHTS, "weight updates without a restart")
def weights_interleaved_twice(packed: Tensor) -> Tensor:
    """SM90 layout step applied again to weights that have had it, as on a second load"""
    return interleave_weights_sm90(packed)


@defect(_WEIGHTS, "upgrades of flashinfer to 0.6.16, or to 0.6.18 and newer")
def weights_interleaved_old(packed: Tensor) -> Tensor:
    """weights interleaved for the bytewise kernel (flashinfer {bytewise}), handed to the wordwise one"""
    return deinterleave_weights_sm90(interleave_weights_sm90(packed, BYTEWISE))


def _unfolded(folded: Tensor, scales: Tensor, generation: Generation) -> Tensor:
    """The bytes of `folded` as this generation's kernel reads them, for the scales `[E, R, G]`."""
    return unfold_scales_sm90(folded.reshape(generation.layout.folded_shape(*scales.shape)), generation)


@defect(_SCALES, "flashinfer#4087")
def scales_not_folded(scales: Tensor) -> Tensor:
    """SM90 layout step left out for the scales"""
    return _unfolded(scales, scales, WORDWISE)


@defect(_SCALES, "upgrades of flashinfer to 0.6.16, or to 0.6.18 and newer")
def scales_folded_old(scales: Tensor) -> Tensor:
    """scales folded for the bytewise kernel (flashinfer {bytewise}), handed to the wordwise one"""
    return _unfolded(fold_scales_sm90(scales, BYTEWISE), scales, WORDWISE)


@defect(_SCALES, "changes of flashinfer from 0.6.16 to 0.6.16.post3, or from 0.6.18 back")
def scales_folded_new(scales: Tensor) -> Tensor:
    """scales folded for the wordwise kernel (flashinfer {wordwise}), handed to the bytewise one"""
    return _unfolded(fold_scales_sm90(scales, WORDWISE), scales, BYTEWISE)


@defect("fc1_scales", "sglang#24492 (discussion)", applies=gated)
def scales_not_swapped(scales: Tensor) -> Tensor:
    """weight halves reordered, scales not"""
    return swap_gate_up(scales)


@defect("fc1_biases", "derived from scales_not_swapped", applies=gated)
def biases_not_swapped(biases: Tensor) -> Tensor:
    """weight halves reordered, fc1 bias not"""
    return swap_gate_up(biases)


@defect(_SCALES, "compressed-tensors#538")
def scale_bias_125(scales: Tensor) -> Tensor:
    """scale exponent bias 125 instead of 127, 4x off"""
    return scales.clamp(max=253) + 2


@defect("call", "pegainfer#658", "sglang#24492")
def scale_truncated(call: MoeCall) -> MoeCall:
    """float32 scales amax / 6 that are no power of two truncated on conversion"""
    tensors: dict[str, Tensor] = {}
    for fc in ("fc1", "fc2"):
        by_expert = zip(
            getattr(call.experts, f"{fc}_weights"), getattr(call.experts, f"{fc}_scales"), strict=True
        )
        pairs = zip(*(requantized(weights, scales) for weights, scales in by_expert), strict=True)
        tensors[f"{fc}_weights"], tensors[f"{fc}_scales"] = map(torch.stack, pairs)
    return replace(call, experts=replace(call.experts, **tensors))


def requantized(packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """As if from float32 scales amax / 6, truncated to powers of two; what has become too large saturates."""
    codes = unpack_codes(torch.arange(256, dtype=torch.uint8, device=packed.device)[:, None]).to(torch.int64)
    of_groups = packed.view(*scales.shape, GROUP_SIZE // 2)
    largest = _of_bytes((codes & 7).amax(-1).to(torch.uint8), of_groups).amax(-1)
    # By the group's largest code: how far 2^floor(log2(amax / 6)) lies below the scale; 1.5, 3, 6 are exact.
    lower = torch.tensor([0, 4, 3, 2, 2, 1, 1, 0], dtype=torch.uint8, device=packed.device)
    lower = _of_bytes(lower, largest).minimum(scales)
    doubled = torch.tensor([0, 2, 4, 5, 6, 7, 7, 7], device=packed.device)  # 4 and 6 saturate
    changed = [pack_codes(codes.to(torch.uint8)).flatten()]
    for _ in range(4):
        codes = (codes & 8) | doubled[codes & 7]
        changed.append(pack_codes(codes.to(torch.uint8)).flatten())
    index = of_groups.to(torch.int32) + 256 * lower.to(torch.int32).unsqueeze(-1)
    result = torch.cat(changed).index_select(0, index.flatten())
    return result.view_as(packed), scales - lower


def _of_bytes(table: Tensor, index: Tensor) -> Tensor:
    """`table[index]`, for uint8 indices."""
    return table.index_select(0, index.flatten().to(torch.int32)).view(index.shape)


@defect(_SCALES, "flashinfer#4093")
def scale_off_by_one_group(scales: Tensor) -> Tensor:
    """group g scaled by s[g + 1], the last group of a row by the next row's first"""
    return scales.flatten(1).roll(-1, 1).view_as(scales)


@defect("call", "flashinfer#5438", applies=lambda call: call.experts.num_experts > 1)
def scales_of_next_expert(call: MoeCall) -> MoeCall:
    """last K tile scaled by the next expert's scales (the race, frozen: in every row)"""
    tensors = {}
    for name, tile_k in zip(_SCALES.split(), call.kernel.tile_k, strict=True):
        scales, last = getattr(call.experts, name), slice(-tile_k // GROUP_SIZE, None)
        tensors[name] = scales.clone()
        tensors[name][:-1, :, last] = scales[1:, :, last]
    return replace(call, experts=replace(call.experts, **tensors))


@defect(_WEIGHTS, "derived from the conversion")
def half_code_flushed(packed: Tensor) -> Tensor:
    """+-0.5 becomes 0, a subnormal flush in the conversion"""
    codes = unpack_codes(torch.arange(256, dtype=torch.uint8, device=packed.device)[:, None])
    return _of_bytes(pack_codes(torch.where(codes & 7 == 1, codes & 8, codes)).flatten(), packed)


def _num_padding_rows(call: MoeCall) -> int:
    """How many rows at the end of both halves of fc1 are zero, as padding per half leaves them."""
    used = ((logical(call).experts.fc1_weights & 0x77) != 0).any(-1).any(0)
    return int((~used.view(2, -1).any(0)).flip(0).cumprod(0).sum())


@defect("call", "vllm#48624", applies=lambda call: gated(call) and _num_padding_rows(call) > 0)
def padding_end_of_fused(call: MoeCall) -> MoeCall:
    """padding at the end of the fused fc1 tensor instead of each half shifts the up/gate border"""
    size = call.experts.intermediate_size - _num_padding_rows(call)

    def change(fused: Tensor) -> Tensor:
        up, gate = fused.chunk(2, dim=1)
        return torch.cat((up[:, :size], gate[:, :size], up[:, size:], gate[:, size:]), dim=1)

    return change_tensors(call, *_FC1.split(), change=change)
