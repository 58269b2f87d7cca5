"""Words for layouts, shards, tiles, tables and dtypes of weights and scales, each with random parameters."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from functools import cache

import pytest
import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward
from mxfp4ref.conformance.families.batches import one_thread
from mxfp4ref.conformance.families.engine import prepared
from mxfp4ref.conformance.families.hypotheses.decodings import decoding_hypotheses, table_hypotheses
from mxfp4ref.conformance.families.hypotheses.preparations import loading_hypotheses, preparation_hypotheses
from mxfp4ref.conformance.families.hypothesis import Hypothesis
from mxfp4ref.conformance.families.search import Search
from mxfp4ref.formats.layout import deinterleave_weights_sm90
from mxfp4ref.formats.mxfp4 import dequantize
from mxfp4ref.sm90 import fp32
from tests.held_out_kernels.by_hand import layer, with_experts
from tests.held_out_kernels.calls import captured

RANDOM = random.Random(31)
LONG = 10.0  # seconds, more than any search here takes


@cache
def call_and_output(name: str) -> tuple[MoeCall, Tensor]:
    call = captured(name)
    return call, forward(call)


def search(got: Tensor, name: str = "odd_tokens") -> Search:
    call, want = call_and_output(name)
    one = Search(prepared(call), got, want, 0.0)
    one.until = one.clock() + LONG
    return one


def predicting(hypotheses: Callable[[MoeCall], Iterable[Hypothesis]], got: Tensor) -> list[str]:
    with one_thread():
        found = search(got).run(hypotheses(captured("odd_tokens")))
    return [match.hypothesis.words for match in found]


@pytest.mark.slow
def test_scales_in_tiles() -> None:
    call, _ = call_and_output("odd_tokens")
    rows, groups = 32, 4
    scales = call.experts.fc1_scales
    assert scales is not None
    tiles = scales.view(len(scales), -1, rows, scales.shape[2] // groups, groups).transpose(2, 3)
    got = forward(with_experts(call, fc1_scales=tiles.reshape(scales.shape)))
    assert any("tiles of 32 rows x 4 K groups" in words for words in predicting(preparation_hypotheses, got))


@pytest.mark.slow
def test_shards_of_up_and_gate() -> None:
    call, _ = call_and_output("odd_tokens")
    parts = call.experts.fc1_weights.chunk(8, 1)
    joined = torch.cat([parts[i] for i in (0, 4, 1, 5, 2, 6, 3, 7)], 1)
    (words,) = predicting(preparation_hypotheses, forward(with_experts(call, fc1_weights=joined)))
    assert "joined shard by shard" in words
    assert "4 shards" in words


@pytest.mark.slow
def test_blocks_of_rows() -> None:
    call, _ = call_and_output("odd_tokens")
    scales = call.experts.fc2_scales
    assert scales is not None
    row = torch.arange(scales.shape[1]) | 32
    (words,) = predicting(preparation_hypotheses, forward(with_experts(call, fc2_scales=scales[:, row])))
    assert words == "GEMM2's scales are in the first 32 of each 64 rows those of the last 32"


@pytest.mark.slow
def test_tiles_of_k_that_are_stale() -> None:
    call, _ = call_and_output("odd_tokens")
    late = call.experts.fc1_weights.clone()
    late[:, :, 5 * 16 :] = late[:, :, 4 * 16 : 5 * 16].repeat(1, 1, 3)
    found = predicting(preparation_hypotheses, forward(with_experts(call, fc1_weights=late)))
    assert any("from K = 160 on those of the tile of 32 before it" in words for words in found)


def test_one_expert_that_is_not_interleaved() -> None:
    call, _ = call_and_output("odd_tokens")
    codes = call.experts.fc2_weights.clone()
    codes[2:3] = deinterleave_weights_sm90(codes[2:3])
    with one_thread():
        found = search(forward(with_experts(call, fc2_weights=codes))).run(loading_hypotheses(call))
    assert found[0].hypothesis.words == (
        "GEMM2's weights are not interleaved (raw, where a kernel of flashinfer from 0.6.16 on reads its layout), "
        "for slots of expert 2 only"
    )
    assert {m.hypothesis.words.partition(", for ")[0] for m in found} == {
        found[0].hypothesis.words.partition(", for ")[0]
    }


def test_an_entry_of_the_table_of_codes() -> None:
    code, other = RANDOM.sample([1, 2, 3, 5, 6, 7, 9, 12, 15], 2)
    words = [h for h in table_hypotheses(captured("odd_tokens")) if f"code {code} " in h.words]
    (chosen,) = [h for h in words if h.stages == ("fc1",) and h.words.endswith(f" {_VALUES[other]}")]
    call, _ = call_and_output("odd_tokens")
    got = chosen.run(prepared(call))
    assert got is not None
    some = [h for h in words if h.stages[0] == "fc1"]
    assert chosen.words in predicting(lambda _: some, got)


_VALUES = ("0", "0.5", "1", "1.5", "2", "3", "4", "6", "-0", "-0.5", "-1", "-1.5", "-2", "-3", "-4", "-6")


def _dense(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: object) -> Tensor:
        weights = change(dequantize(packed, scales, convention="sm90", dtype=torch.float32))
        return (fp32.widen(x).double() @ weights.double().T).float()

    return gemm


def test_weights_that_are_quantised_again() -> None:
    """Predicted up to roundings, since the order of the sums is another one."""
    call, _ = call_and_output("odd_tokens")

    def rounded(weights: Tensor) -> Tensor:
        scale = weights.abs().amax(1, keepdim=True) / 448
        return (weights / scale).to(torch.float8_e4m3fn).float() * scale

    got = layer(call, gemm1=_dense(rounded), gemm2=_dense(rounded))
    with one_thread():
        one = search(got)
        found = one.run(h for h in decoding_hypotheses(call) if "again" in h.words) or one.almost(least=0.95)
    (words,) = {m.hypothesis.words.split(", up to")[0] for m in found}
    assert words.startswith(
        "both GEMMs' weights are quantised again, to FP8 (float8_e4m3fn) with one scale for each row that is"
    )


def test_weights_with_noise_are_not_quantised_again() -> None:
    call, _ = call_and_output("odd_tokens")
    drawn = torch.Generator().manual_seed(3)

    def noisy(weights: Tensor) -> Tensor:
        return weights * (1 + 0.03 * torch.randn(weights.shape, generator=drawn))

    got = layer(call, gemm1=_dense(noisy), gemm2=_dense(noisy))
    with one_thread():
        one = search(got)
        assert not one.run(h for h in decoding_hypotheses(call) if "again" in h.words)
        assert not one.almost()
