"""Families of which the wrong places leave few members: offsets, tiles, the output's memory, misread tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mxfp4ref import forward
from mxfp4ref.conformance import differing
from mxfp4ref.conformance.families.by_place import hypotheses_by_place
from mxfp4ref.conformance.families.engine import prepared
from mxfp4ref.conformance.families.evidence import gather
from mxfp4ref.conformance.families.hypothesis import local_of
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.fp32 import to_bf16
from tests.held_out_kernels.by_hand import Rows, layer
from tests.held_out_kernels.calls import captured
from tests.helpers.usual import first


def predicting(call: MoeCall, got: Tensor, words: str = "") -> list[str]:
    """The words of those that predict every bit, among those that have some words in theirs."""
    pipeline, wrong = prepared(call), differing(got, forward(call))
    assert wrong.any()
    outputs = ((h.words, h.run(pipeline)) for h in hypotheses_by_place(call, wrong) if words in h.words)
    return [words for words, output in outputs if output is not None and not differing(output, got).any()]


def weighing(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[[MoeCall], Tensor]:
    return lambda call: layer(call, weights=change)


def lone_pairs(local: Tensor, weights: Tensor) -> Tensor:
    return torch.where((local >= 0).sum(1, keepdim=True) == 2, 1.0, weights)


def eight_apart(local: Tensor, weights: Tensor) -> Tensor:
    flat = torch.cat((weights.flatten(), weights.new_zeros(8 * len(weights))))
    return flat[: 8 * len(weights)].view(-1, 8)[:, : weights.shape[1]].contiguous()


def subtracted(call: MoeCall) -> Tensor:
    return layer(call, output=lambda sums: to_bf16(to_bf16(sums).float() - call.input.float()))


def first_row_kept(call: MoeCall) -> Tensor:
    none = (local_of(prepared(call)) < 0).all(1, keepdim=True)
    return layer(call, output=lambda sums: torch.where(none, to_bf16(sums[:1]), to_bf16(sums)))


def bias_of_half(call: MoeCall) -> Tensor:
    bias = call.experts.fc2_biases
    assert bias is not None
    read = bias.half().view(torch.bfloat16)
    return layer(call, finalize=lambda y, local, w, _: finalize(y, local, w, read))


def missing_take_the_last(call: MoeCall) -> Tensor:
    def sums(y: Tensor, local: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
        return finalize(y, torch.where(local < 0, len(bias) - 1, local), weights, bias)

    return layer(call, finalize=sums)


def carry_lost_after_8(call: MoeCall) -> Tensor:
    def x(rows: Rows, taken: Tensor) -> Tensor:
        row = torch.arange(len(taken))
        return taken[torch.where(rows.expert >= 8, row - int((rows.expert < 8).sum()), row)]

    return layer(call, x=x)


def inclusive_sum(call: MoeCall) -> Tensor:
    def x(rows: Rows, taken: Tensor) -> Tensor:
        ends = torch.bincount(rows.expert, minlength=call.experts.num_experts).cumsum(0)
        return taken[(ends[rows.expert] + rows.position).clamp(max=len(taken) - 1)]

    return layer(call, x=x)


def beyond_the_count_after(call: MoeCall) -> Tensor:
    def fc2(rows: Rows, acc: Tensor) -> Tensor:
        counts = torch.bincount(rows.expert, minlength=call.experts.num_experts)
        after = torch.cat((counts[1:], counts[-1:]))
        return to_bf16(acc).masked_fill((rows.position >= after[rows.expert])[:, None], 0.0)

    return layer(call, fc2=fc2)


def tiles_of(rows: Rows, acc: Tensor, height: int, width: int) -> list[tuple[int, int, int]]:
    """Where each tile begins and ends in the rows, and its first column; of an expert one row of tiles by one."""
    tiles = []
    for start in (rows.position == 0).nonzero()[:, 0].tolist():
        count = int((rows.expert == rows.expert[start]).sum())
        for row in range(start, start + count, height):
            end = min(row + height, start + count)
            tiles += [(row, end, column) for column in range(0, acc.shape[1], width)]
    return tiles


def every_seventh_tile(call: MoeCall) -> Tensor:
    def fc2(rows: Rows, acc: Tensor) -> Tensor:
        out = to_bf16(acc)
        for begin, end, column in tiles_of(rows, acc, 8, 128)[3::7]:
            out[begin:end, column : column + 128] = 0.0
        return out

    return layer(call, fc2=fc2)


def last_wave_of_7_twice(call: MoeCall) -> Tensor:
    def fc2(rows: Rows, acc: Tensor) -> Tensor:
        out, tiles = to_bf16(acc), tiles_of(rows, acc, 8, 128)
        for begin, end, column in tiles[len(tiles) // 7 * 7 :]:
            out[begin:end, column : column + 128] *= 2
        return out

    return layer(call, fc2=fc2)


@pytest.mark.parametrize(
    ("kernel", "name", "words"),
    first(5, [
        (weighing(lone_pairs), "expert_rank_2_of_4", "taken as 1) for tokens with 2 slots on this rank"),
        (weighing(eight_apart), "padded_slots", "read with 8 slots a token (top-k rounded up to a multiple of 8)"),
        (weighing(lambda _, w: w[torch.arange(len(w)) % 16]), "odd_tokens", "number modulo 16"),
        (subtracted, "top_8", "the output is subtracted from the input (hidden states), after the rounding"),
        (first_row_kept, "padded_slots", "keep the first row of the output, where zeros belong"),
        (bias_of_half, "expert_rank_2_of_4", "the fc2 biases are float16 in memory and read as bf16"),
        (missing_take_the_last, "expert_rank_2_of_4", "add the fc2 bias of this rank's last expert"),
        (carry_lost_after_8, "top_8", "for 8 experts at a time (a warp or block of them) without carry"),
        (inclusive_sum, "top_8", "those of the next expert (an inclusive prefix sum); GEMM1 reads"),
        (beyond_the_count_after, "top_8", "beyond the number of rows of the expert after it are not computed"),
        (every_seventh_tile, "equal_weights", "counted along the columns, every 7th from number 3"),
        (last_wave_of_7_twice, "equal_weights", "of 7 at once (CTAs), are added twice"),
    ]),
)  # fmt: skip
def test_what_predicts_every_bit(kernel: Callable[[MoeCall], Tensor], name: str, words: str) -> None:
    call = captured(name)
    assert predicting(call, kernel(call), words)


@pytest.mark.slow
def test_noise_leaves_none() -> None:
    call = captured("equal_weights")
    right = forward(call)
    random = torch.Generator().manual_seed(0)
    noise = torch.rand(right.shape, generator=random) < 0.05
    got = torch.where(noise, (right.view(torch.int16) ^ 1).view(torch.bfloat16), right)
    assert predicting(call, got) == []


def test_rows_of_the_input() -> None:
    call = captured("odd_tokens")
    right = forward(call)
    got = right.clone()
    got[[3, 20]] = call.input[[3, 20]]
    (found,) = gather(prepared(call), got, right, differing(got, right))
    assert (
        "rows of the output are rows of the input (hidden states), unchanged: 2 tokens (3, 20)"
        in found.sentence
    )
    got[[3, 20]] = call.input[[4, 21]]
    (found,) = gather(prepared(call), got, right, differing(got, right))
    assert "token 3 has token 4's, token 20 has token 21's" in found.sentence


def test_a_row_of_zeros_beside_a_slot_that_is_left_out() -> None:
    call = captured("equal_weights")
    weights = call.token_final_scales.clone()
    weights[::3, 1] = 0
    right = forward(call)
    got = forward(replace(call, token_final_scales=weights))
    found = gather(prepared(call), got, right, differing(got, right))[0]
    assert found.stages == ("slots", "fc2")
    assert "slots are left out, or GEMM2 gives zeros for their rows" in found.sentence
