"""What a factor is: a number of the call, or one that kernels are full of."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest
import torch

from mxfp4ref import MoeCall, forward
from mxfp4ref.conformance import diagnose
from mxfp4ref.conformance.families.hypothesis import Hypothesis
from mxfp4ref.conformance.families.search import Match
from mxfp4ref.conformance.families.solved.known_factors import factor_in_words, simple_between
from mxfp4ref.conformance.families.telling import told
from mxfp4ref.sm90.fp32 import to_bf16
from tests.held_out_kernels.by_hand import layer
from tests.held_out_kernels.calls import captured

TWICE = "what each token's routing weights add up to: as if the routed scaling factor were applied twice"


def weighted(total: float, *, top_k: int = 4) -> MoeCall:
    call = captured("prefill" if top_k == 4 else "odd_tokens")
    return replace(call, token_final_scales=call.token_final_scales * total)


@pytest.mark.parametrize("total", [2.5, 1.5, 2.827, 0.7])
def test_the_sum_of_the_weights(total: float) -> None:
    call = weighted(total)
    assert factor_in_words(total, [call]) == f"{total:.4g} is {TWICE}"
    left_out = factor_in_words(1 / total, [call])
    assert left_out.startswith(
        f"{1 / total:.4g} is 1 / what each token's routing weights add up to, {total:.3g}: "
    )
    assert "left out" in left_out
    assert TWICE not in factor_in_words(1.02 * total, [call])
    rounded = replace(call, token_final_scales=call.token_final_scales.bfloat16().float())
    assert TWICE in factor_in_words(total, [rounded])


def test_a_sum_that_is_not_one_number_says_nothing() -> None:
    call = weighted(2.827)
    uneven = call.token_final_scales.clone()
    uneven[3] *= 1.1
    assert (
        factor_in_words(2.827, [replace(call, token_final_scales=uneven)])
        == "2.827 is Kimi-K2's routed scaling factor"
    )
    padded = call.token_selected_experts.clone()
    padded[0, 1] = -1
    assert TWICE not in factor_in_words(2.827, [replace(call, token_selected_experts=padded)])
    assert TWICE not in factor_in_words(2.827, [call, weighted(1.5)])


def test_numbers_of_the_call() -> None:
    call = weighted(1.0)
    assert (
        factor_in_words(4.0, [call])
        == "4 is the number of experts per token (4), or what an exponent 2 too high gives"
    )
    assert factor_in_words(0.25, [call]).startswith("0.25 is 1 / the number of experts per token (4)")
    assert factor_in_words(4.0, [call, weighted(1.0, top_k=2)]) == "4 is what an exponent 2 too high gives"
    ranks = captured("tensor_rank_1_of_2")
    assert factor_in_words(2.0, [ranks]).startswith(
        "2 is the number of experts per token (2), or tp_size (2)"
    )


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (1 / math.log(2), "1.443 is log2(e)"),
        (-math.log(2), "0.6931 is ln 2"),
        (448.0, "448 is the largest E4M3 number"),
        (1 / 6, "0.1667 is 1 / the largest E2M1 number"),
        (2.0**-7, "0.007812 is what an exponent 7 too low gives"),
    ],
)
def test_constants(factor: float, words: str) -> None:
    call = weighted(1.0)
    assert factor_in_words(factor, [call]).startswith(words)
    size = abs(factor)
    assert size in simple_between(size * (1 - 2.0**-9), size * (1 + 2.0**-9))


@pytest.mark.parametrize("factor", [1.0, -1.0, 0.0, math.inf, math.nan, 1.1, 3.3])
def test_nothing_is_known_of_most(factor: float) -> None:
    assert factor_in_words(factor, [weighted(1.0)]) == ""


@pytest.mark.parametrize(
    ("words", "note"),
    [
        ("the SwiGLU alpha is hard-coded as 1.702", "1.702 is gpt-oss's, the alpha of quick GELU"),
        ("the SwiGLU limit is 7 for all experts", "7 is gpt-oss's"),
        ("the SwiGLU alpha is hard-coded as 1.5", ""),
        ("the SwiGLU limit is 7 times the right one", ""),
    ],
)
def test_parameters_of_models(words: str, note: str) -> None:
    hypothesis = Hypothesis("parameters", ("activation",), words, lambda p: None, 1.0)
    found = told([Match(hypothesis, True)], (), [])
    assert found.sentence == words + f". Note: {note}" * bool(note)


@pytest.mark.slow
def test_a_diagnosis_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = time.thread_time
    monkeypatch.setattr("time.thread_time", lambda: clock() / 6)  # quick, on a busy machine too
    call = captured("scaled_weights")
    again = layer(call, output=lambda sums: to_bf16(sums * 2.5))
    found = diagnose("moe", call, {"output": again}, {"output": forward(call)}, diagnosis="quick").finding
    assert found.exact
    assert found.sentence.startswith("a factor of 2.5 too many on ")
    assert f". Note: 2.5 is {TWICE}" in found.sentence
    about = to_bf16(
        again.float() * (1 + 2.0**-9 * torch.randn(again.shape, generator=torch.Generator().manual_seed(0)))
    )
    monkeypatch.setattr("time.thread_time", clock)
    noisy = diagnose("moe", call, {"output": about}, {"output": forward(call)}, diagnosis="quick").finding
    assert not noisy.exact
    assert noisy.stages == ()
    assert noisy.sentence.startswith("a factor of 2.5 too many on ")
    assert "or nearly so (" in noisy.sentence
    assert noisy.sentence.endswith(f"2.5 is {TWICE}")
