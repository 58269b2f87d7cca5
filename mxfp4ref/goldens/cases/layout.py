"""Suite `layout`: where the bytes lie. Nothing is computed; a wrong position moves values."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref.formats.experts import Experts
from mxfp4ref.formats.generations import GENERATIONS, Generation
from mxfp4ref.formats.layout import (
    fold_scales_sm90,
    halves_to_interleaved,
    interleave_weights_sm90,
    interleaved_to_halves,
    pad_halves,
    swap_gate_up,
)
from mxfp4ref.goldens.cases.definition import Content, define
from mxfp4ref.goldens.cases.source import Source
from mxfp4ref.model.call import MoeCall


def _moved(operation: str, before: Tensor, after: Tensor, **parameters: int | str) -> Content:
    return Content({"before": before, "after": after}, {"operation": operation, **parameters})


@define("layout", unique_for="the layout alone, byte for byte")
def interleave_weights(source: Source) -> Content:
    """Weights into the byte and bit order of the SM90 kernel; random bytes, two experts, several 16-row
    blocks and 32-byte partitions.
    """
    before = source.bytes("weights", 2, 64, 96)
    return _moved("interleave_weights_sm90", before, interleave_weights_sm90(before))


@define("layout", unique_for="the bit permutation, readable")
def interleave_weights_bit_by_bit(source: Source) -> Content:
    """Expert i has only bit i set of the 32-bit word that is gathered from rows 0 and 8, bytes 0 and 4: the
    result is the table of bit positions.
    """
    before = torch.zeros(32, 16, 32, dtype=torch.uint8)
    for bit in range(32):
        before[bit, 8 * (bit // 8 % 2), 4 * (bit // 16)] = 1 << bit % 8
    return _moved("interleave_weights_sm90", before, interleave_weights_sm90(before))


for _generation in GENERATIONS:

    @define(
        "layout",
        why=f"Scales folded as flashinfer {_generation.recorded_as} expects them; every byte is different within an "
        "expert.",
        name=f"fold_scales_{_generation.recorded_as.replace('.', '_')}",
        unique_for="the layout alone, byte for byte",
    )
    def _(source: Source, generation: Generation = _generation) -> Content:
        before = torch.arange(2 * 128 * 8).reshape(2, 128, 8)
        before = (before % 251).to(torch.uint8)
        after = fold_scales_sm90(before, generation)
        return _moved("fold_scales_sm90", before, after, generation=generation.recorded_as)


@define("layout", unique_for="the layout alone, byte for byte")
def swap_halves(source: Source) -> Content:
    """Halves [w1(gate); w3(up)] of a DeepSeek checkpoint brought into the kernel's order, [up; gate]."""
    before = source.bytes("weights", 2, 64, 16)
    return _moved("swap_gate_up", before, swap_gate_up(before))


@define("layout", unique_for="the layout alone, byte for byte")
def interleaved_rows_to_halves(source: Source) -> Content:
    """Rows gate0, up0, gate1, up1, ... of a gpt-oss checkpoint brought into the kernel's order, [up; gate]."""
    before = source.bytes("weights", 2, 64, 16)
    return _moved("interleaved_to_halves", before, interleaved_to_halves(before))


@define("layout", unique_for="the layout alone, byte for byte")
def pad_each_half(source: Source) -> Content:
    """Gate and up padded to a multiple of 128 rows each on its own: 2 * 90 rows become 2 * 128."""
    before = source.bytes("weights", 2, 180, 16)
    return _moved("pad_halves", before, pad_halves(before, 128), multiple=128)


@define(
    catches="gate_up_swapped gate_up_interleaved weights_not_interleaved scales_not_swapped",
    unique_for="gate and up told apart",
)
def gate_and_up_unlike(source: Source) -> MoeCall:
    """Up rows are small, gate rows large, and rows of a pair differ: reading [gate; up] for [up; gate], or
    interleaved rows for halves, cannot go unseen. Weights differ in every 16-row block and 32-byte partition.
    """
    experts = source.experts(2, 256, 128)
    scales = experts.fc1_scales
    assert scales is not None
    up, gate = scales.chunk(2, dim=1)
    return MoeCall(
        source.normal("input", 8, 256),
        source.distinct("ids", 8, 1, 2),
        source.weights(8, 1),
        replace(experts, fc1_scales=torch.cat((up - 3, gate), dim=1)),
    )


def _padded(source: Source, inner: int, checkpoint: Experts) -> MoeCall:
    """A call for experts of `inner` rows a half, cut out of larger ones as a loader would see and pad them."""
    assert checkpoint.fc1_scales is not None
    assert checkpoint.fc2_scales is not None
    biases = checkpoint.fc1_biases

    def fc1(t: Tensor) -> Tensor:
        interleaved = halves_to_interleaved(t)[:, : 2 * inner]
        return pad_halves(interleaved_to_halves(interleaved), 128)

    fc2_weights, fc2_scales = checkpoint.fc2_weights.clone(), checkpoint.fc2_scales.clone()
    fc2_weights[:, :, inner // 2 :] = 0
    fc2_scales[:, :, inner // 32 :] = 0
    experts = replace(
        checkpoint,
        fc1_weights=fc1(checkpoint.fc1_weights),
        fc1_scales=fc1(checkpoint.fc1_scales),
        fc1_biases=None if biases is None else fc1(biases),
        fc2_weights=fc2_weights,
        fc2_scales=fc2_scales,
    )
    return MoeCall(
        source.normal("input", 8, 256), source.distinct("ids", 8, 1, 2), source.weights(8, 1), experts
    )


@define(
    catches="padding_end_of_fused gate_up_interleaved", unique_for="halves padded to 128 rows, with biases"
)
def padded_halves(source: Source) -> MoeCall:
    """A layer like gpt-oss's in small: 96 rows of gate and of up, interleaved in the checkpoint, brought into
    halves and padded to 128 rows each, with their biases and parameters. Padding at the end of the fused
    tensor moves the border.
    """
    return _padded(source, 96, source.experts(2, 256, 128, biases=True, alpha=1.702, beta=1.0, limit=7.0))


@define(catches="padding_end_of_fused", unique_for="halves padded to 128 rows, without biases")
def padded_halves_of_64(source: Source) -> MoeCall:
    """A layer with 64 rows of gate and of up, padded to 128 each, without biases and parameters. Padding at
    the end of the fused tensor moves the border between them.
    """
    return _padded(source, 64, source.experts(2, 256, 128))
