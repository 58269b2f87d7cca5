"""Families of words of codes, tiles of K, fragments and rows of several experts, with numbers of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

import pytest
import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward, quantize
from mxfp4ref.conformance import diagnose
from mxfp4ref.conformance.families.engine import prepared
from mxfp4ref.conformance.families.hypotheses.code_parts import code_part_hypotheses, scale_format_hypotheses
from mxfp4ref.conformance.families.hypotheses.fragment_maps import fragment_map_hypotheses, swizzled_weights
from mxfp4ref.conformance.families.hypothesis import Hypothesis
from mxfp4ref.conformance.families.search import Search
from mxfp4ref.conformance.families.solved.whose import whose_hypotheses
from mxfp4ref.formats.mxfp4 import pack_codes, unpack_codes
from mxfp4ref.sm90.fp32 import to_bf16
from tests.held_out_kernels.by_hand import Rows, layer, with_experts
from tests.held_out_kernels.calls import captured
from tests.helpers import usual


def magnitudes_reversed(call: MoeCall) -> Tensor:
    codes = unpack_codes(call.experts.fc1_weights).unflatten(2, (-1, 4))  # type: ignore[no-untyped-call]
    words = (codes & 8 | codes.flip(3) & 7).flatten(2)
    return forward(with_experts(call, fc1_weights=pack_codes(words.contiguous())))


def third_sign_lost(call: MoeCall) -> Tensor:
    codes = unpack_codes(call.experts.fc2_weights).clone()
    codes[..., 2::4] &= 7
    return forward(with_experts(call, fc2_weights=pack_codes(codes)))


def scales_in_e4m3(call: MoeCall) -> Tensor:
    scales = call.experts.fc2_scales
    assert scales is not None
    low = scales.view(torch.uint8).int() - 8  # of which many lie below 2^-9
    call = with_experts(call, fc2_scales=low.to(torch.uint8))
    kept = torch.where(low <= 127 - 10, 0, low).to(torch.uint8)
    return torch.stack((forward(call), forward(with_experts(call, fc2_scales=kept))))


def registers(call: MoeCall) -> Tensor:
    def fc2(rows: Rows, acc: Tensor) -> Tensor:
        row, column = rows.position[:, None], torch.arange(acc.shape[1])[None]
        differ = ((row & 2) != 0) ^ ((column & 4) != 0)
        source = torch.arange(len(acc))[:, None] + torch.where(differ, (row ^ 2) - row, 0)
        there = (source < len(acc)) & (rows.expert[source.clamp(max=len(acc) - 1)] == rows.expert[:, None])
        taken = acc[source.clamp(max=len(acc) - 1), torch.where(differ, column ^ 4, column)]
        return to_bf16(torch.where(there, taken, 0))

    return layer(call, fc2=fc2)


def unswizzled(call: MoeCall) -> Tensor:
    def x(rows: Rows, taken: Tensor) -> Tensor:
        column = torch.arange(taken.shape[1])[None]
        return taken.gather(1, column ^ (8 * (rows.position[:, None] // 4 % 2)))

    return layer(call, x=x)


def stale_activation(call: MoeCall) -> Tensor:
    def activation(rows: Rows, a: Tensor) -> Tensor:
        stale, late = to_bf16(a), (rows.position // 8 == 1).nonzero().flatten()
        stale[late, :32] = to_bf16(a)[late - 8, :32]
        return stale

    return layer(call, activation=activation)


def bytes_of_w2(call: MoeCall) -> Tensor:
    codes = call.experts.fc2_weights
    row, byte = torch.arange(codes.shape[1])[:, None], torch.arange(codes.shape[2])[None]
    return forward(with_experts(call, fc2_weights=codes[:, row, byte ^ 16 * (row // 2 % 4)]))


def everything(search: Search) -> Iterator[Hypothesis]:
    call, wrong = search.pipeline.call, search.wrong
    return chain(
        code_part_hypotheses(call),
        fragment_map_hypotheses(call, wrong),
        swizzled_weights(call),
    )


@pytest.mark.parametrize(
    ("wrong", "words"),
    usual.first(
        2,
        [
            (
                magnitudes_reversed,
                "GEMM1's weights have the magnitudes of the code at the other end of each word of 4",
            ),
            (third_sign_lost, "GEMM2's weights have no sign in every fourth code, from 2 on"),
            (registers, "each tile of 4 rows of an expert x 8 columns"),
            (
                unswizzled,
                "and is read with another, 32 bytes",
            ),
            (bytes_of_w2, "are read with another, 64 bytes and none: chunks of 32 codes"),
            (
                stale_activation,
                "the second tile of 8 rows of an expert has the tile before's numbers in the first 32",
            ),
        ],
    ),
)
def test_words_and_tiles_are_found_with_their_numbers(wrong: Callable[[MoeCall], Tensor], words: str) -> None:
    call = captured("prefill")
    got, want = wrong(call), forward(call)
    search = Search(prepared(call), got, want, torch.inf)
    every = everything(search)
    assert any(m.exact for m in search.run(h for h in every if words in h.words))


def test_scales_in_a_smaller_format() -> None:
    call = captured("padded_hidden")
    want, got = scales_in_e4m3(call)
    assert call.experts.fc2_scales is not None
    low = (call.experts.fc2_scales.view(torch.uint8).int() - 8).to(torch.uint8)
    pipeline = prepared(with_experts(call, fc2_scales=low))
    search = Search(pipeline, got, want, torch.inf)
    every = scale_format_hypotheses(pipeline.call)
    assert search.run(h for h in every if "GEMM2's scales are kept in FP8 (float8_e4m3fn)" in h.words)


@pytest.mark.slow
def test_none_of_them_is_noise() -> None:
    call = captured("prefill")
    want = forward(call)
    random = torch.Generator().manual_seed(1)
    got = torch.where(torch.rand(want.shape, generator=random) < 0.1, want * 1.5, want)
    search = Search(prepared(call), got, want, torch.inf)
    every = chain(
        everything(search),
        whose_hypotheses(search.pipeline, search.rows, got, search.wrong),
    )
    assert not search.run(every)


def test_another_numbering_of_codes() -> None:
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    packed, scales = quantize(values)
    codes = unpack_codes(packed).int()
    other = torch.where(codes >= 8, 23 - codes, codes).to(torch.uint8)
    inputs, right = {"values": values, "rule": "floor"}, {"packed": packed, "scales": scales}
    said = diagnose("quantize", inputs, {**right, "packed": pack_codes(other)}, right)
    assert "one's complement" in said.finding.sentence
