"""Rows with another token's sum in them, tables that are too short, rows beside, roundings inside the sigmoid."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward
from mxfp4ref.conformance import differing
from mxfp4ref.conformance.families.engine import prepared
from mxfp4ref.conformance.families.hypotheses.memory_readings import vector_readings
from mxfp4ref.conformance.families.hypotheses.more_activations import more_activations
from mxfp4ref.conformance.families.hypothesis import Hypothesis, local_of
from mxfp4ref.conformance.families.sampled import Sample, samples
from mxfp4ref.conformance.families.solved.added_rows import added_rows
from mxfp4ref.conformance.families.solved.gains import of_another_fc2_bias
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.fp32 import to_bf16
from mxfp4ref.sm90.swiglu import swiglu
from tests.held_out_kernels.by_hand import layer, with_experts
from tests.held_out_kernels.calls import captured

Wrong = Callable[[MoeCall], Tensor]


def added(distance: int, factor: float = 1.0, *, chained: bool = False) -> Tensor:
    """An output whose rows have those before them added, the right ones or (`chained`) the wrong ones."""
    want = fp32.widen(forward(captured("tensor_rank_1_of_2")))
    got = want.clone()
    for token in range(distance, len(got)):
        got[token] += factor * (got if chained else want)[token - distance]
    return to_bf16(got)


@pytest.mark.parametrize(
    ("got", "words"),
    [
        (added(5), "the right row of the token 5 before it"),
        (added(3, chained=True), "the row that the kernel gave for the token 3 before it"),
        (added(7, -0.5), "-0.5 times the right row of the token 7 before it"),
    ],
)
def test_the_row_that_was_added_is_told(got: Tensor, words: str) -> None:
    call = captured("tensor_rank_1_of_2")
    want = forward(call)
    found = added_rows(call, got, want, differing(got, want))
    assert found is not None
    assert words in found.sentence
    assert found.stages == ("finalize", "slots")


def test_a_factor_on_its_own_row_and_noise_are_no_other_rows() -> None:
    call = captured("tensor_rank_1_of_2")
    want = forward(call)
    noise = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    for got in (to_bf16(want.float() * 1.5), to_bf16(want.float() + noise)):
        assert added_rows(call, got, want, differing(got, want)) is None


def of(call: MoeCall, got: Tensor) -> list[Sample]:
    pipeline = prepared(call)
    return samples(pipeline, got, differing(got, forward(call)), local_of(pipeline))


def test_only_another_fc2_bias_is_taken_for_one() -> None:
    call = captured("tensor_rank_1_of_2")
    call = replace(call, tp_rank=0)
    biases, limit = call.experts.fc2_biases, call.experts.swiglu_limit
    assert biases is not None
    assert limit is not None
    other = with_experts(call, fc2_biases=biases.roll(3, 1))
    no_limit = with_experts(call, swiglu_limit=torch.zeros_like(limit))
    assert of_another_fc2_bias(of(call, forward(other)))
    assert not of_another_fc2_bias(of(call, forward(no_limit)))


def few_limits(call: MoeCall) -> Tensor:
    limit = call.experts.swiglu_limit
    assert limit is not None
    return forward(with_experts(call, swiglu_limit=torch.cat((limit[:4], 0 * limit[4:]))))


def bias_by_two_rows(call: MoeCall) -> Tensor:
    bias = call.experts.fc1_biases
    assert bias is not None
    return forward(with_experts(call, fc1_biases=torch.cat((bias[::2], 0 * bias[::2]))))


def saturated(call: MoeCall) -> Tensor:
    return layer(call, activation=lambda rows, a: to_bf16(a.clamp(-6.0, 6.0)))


def sigmoid_in_half(call: MoeCall) -> Tensor:
    def act(fc1: Tensor, *_: Tensor | None) -> Tensor:
        up, gate = fc1.float().chunk(2, -1)
        return gate / (1 + torch.exp(-gate)).half().float() * up

    return layer(call, swiglu=act)


def no_bias_and_up_free(call: MoeCall) -> Tensor:
    def act(fc1: Tensor, bias: Tensor, alpha: Tensor, beta: Tensor, limit: Tensor) -> Tensor:
        up, gate = fc1.float().chunk(2, -1)
        return swiglu(torch.cat((up, gate.minimum(limit)), -1), None, alpha, beta, None)

    return layer(call, swiglu=act)


@pytest.mark.parametrize(
    ("name", "wrong", "of_call", "words"),
    [
        ("gpt_oss", few_limits, more_activations, "limit is given for the first 4 experts only"),
        ("tensor_rank_1_of_2", bias_by_two_rows, vector_readings, "between experts of 512 instead of 256"),
        ("top_8", saturated, more_activations, "clamped to [-6, 6]"),
        ("top_8", sigmoid_in_half, more_activations, "1 + e^-x is rounded to float16 in the sigmoid"),
        ("gpt_oss", no_bias_and_up_free, more_activations, "bias is left out; and up is not clamped"),
    ],
)
def test_it_is_predicted_in_every_bit(
    name: str, wrong: Wrong, of_call: Callable[[MoeCall], Iterable[Hypothesis]], words: str
) -> None:
    call = captured(name)
    got, pipeline = wrong(call), prepared(call)
    assert differing(got, forward(call)).any()
    some = [h for h in of_call(call) if words in h.words]
    assert some
    outputs = [h.run(pipeline) for h in some]
    assert any(output is not None and not differing(output, got).any() for output in outputs)
