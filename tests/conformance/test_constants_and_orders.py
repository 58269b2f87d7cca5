"""Constants of the activation that are solved, orders of sums over K, and what fails without ending a diagnosis."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward
from mxfp4ref.conformance import diagnose, differing
from mxfp4ref.conformance.families import engine
from mxfp4ref.conformance.families.engine import prepared
from mxfp4ref.conformance.families.hearing import Failure, Heard
from mxfp4ref.conformance.families.hypotheses.code_parts import scale_format_hypotheses
from mxfp4ref.conformance.families.hypotheses.orders_of_k import order_hypotheses, repeat_hypotheses
from mxfp4ref.conformance.families.hypothesis import Hypothesis, local_of
from mxfp4ref.conformance.families.order_of_cases import next_case, says_much
from mxfp4ref.conformance.families.sampled import samples
from mxfp4ref.conformance.families.search import Match
from mxfp4ref.conformance.families.solved.solved_constants import constant_hypotheses, solved_constant
from mxfp4ref.conformance.families.telling import told
from mxfp4ref.conformance.findings.guarded import guarded, listening
from mxfp4ref.conformance.findings.patterns import patterns
from mxfp4ref.goldens import open_goldens
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.activation import clamp, sigmoid
from tests.held_out_kernels.by_hand import layer, right_gemm, with_experts
from tests.held_out_kernels.calls import captured
from tests.held_out_kernels.definition import load_all
from tests.helpers.usual import first

KERNELS = load_all()
GOLDENS = open_goldens()


def predicting(hypotheses: Iterator[Hypothesis], call: MoeCall, got: Tensor) -> list[str]:
    """The words of those that predict every bit, the simplest first."""
    assert bool(differing(got, forward(call)).any())
    some = sorted(hypotheses, key=lambda h: h.cost)
    outputs = ((h.words, h.run(prepared(call))) for h in some)
    return [words for words, out in outputs if out is not None and not bool(differing(out, got).any())]


def test_log2_e_that_is_typed_wrong() -> None:
    call = captured("odd_tokens")
    got = KERNELS["log2e_typed_with_two_digits_swapped"].function(call)
    found = constant_hypotheses(prepared(call), got, differing(got, forward(call)))
    assert predicting(found, call, got)[0] == (
        "in the activation the sigmoid's argument is multiplied by 1.4472 in place of log2(e), 1.442695"
    )


def by_hand(alpha: float | None, more: float, limit: float | None) -> Callable[..., Tensor]:
    """The clamped form with constants."""

    def swiglu(fc1: Tensor, bias: Tensor, alphas: Tensor, beta: Tensor, limits: Tensor) -> Tensor:
        up, gate = fp32.add(fp32.widen(fc1), fp32.widen(bias)).chunk(2, -1)
        most = (limits if limit is None else torch.full_like(limits, limit)).expand_as(up)
        up, gate = clamp(up, most), fp32.minimum(gate, most)
        scaled = fp32.mul(gate, (alphas if alpha is None else torch.full_like(alphas, alpha)).expand_as(gate))
        up = fp32.add(fp32.add(up, beta.expand_as(up)), torch.full_like(up, more))
        return fp32.mul(fp32.mul(gate, sigmoid(scaled)), up)

    return swiglu


@pytest.mark.slow
@pytest.mark.parametrize(
    ("constants", "words"),
    first(
        1,
        [
            ((1.71, 0.0, None), "the SwiGLU alpha is 1.71 for all experts"),
            ((None, 0.013, None), "0.013 is added to up where it is multiplied, beside any beta"),
            ((None, 0.0, 3.3), "the SwiGLU limit is 3.3 for all experts"),
        ],
    ),
)
def test_constants_of_the_clamped_form(
    constants: tuple[float | None, float, float | None], words: str
) -> None:
    call = captured("tensor_rank_1_of_2")
    got = layer(call, swiglu=by_hand(*constants))
    wrong = differing(got, forward(call))
    found = constant_hypotheses(prepared(call), got, wrong)
    assert predicting(found, call, got)[0] == f"in the activation {words}"


@pytest.mark.slow
def test_a_constant_that_no_exact_arithmetic_gives() -> None:
    """The activation is rounded otherwise besides: it is still told what the errors show."""
    call = captured("tensor_rank_1_of_2")
    act = by_hand(None, 0.05, None)
    got = layer(call, swiglu=lambda *given: act(*given).half().float())
    wrong, pipeline = differing(got, forward(call)), prepared(call)
    found = solved_constant(call, samples(pipeline, got, wrong, local_of(pipeline)))
    assert found is not None
    assert found.stages == ("activation",)
    value, unsure = map(float, re.findall(r"(0\.\d+) \(\+- (0\.\d+)\)", found.sentence)[0])
    assert abs(value - 0.05) < 4 * unsure < 0.01
    assert "is added to up" in found.sentence


@pytest.mark.slow
def test_no_constant_of_another_mistake() -> None:
    call = captured("tensor_rank_1_of_2")
    got = layer(call, activation=lambda rows, a: fp32.to_bf16(a.roll(1, 1)))
    wrong, pipeline = differing(got, forward(call)), prepared(call)
    assert solved_constant(call, samples(pipeline, got, wrong, local_of(pipeline))) is None
    assert list(constant_hypotheses(pipeline, got, wrong)) == []


@pytest.mark.slow
def test_a_constant_beside_zero_is_zero() -> None:
    """The sigmoid of alpha 0, which numbers of about 1e-7 give as well."""
    call = captured("gpt_oss")
    pipeline = prepared(call)
    got = forward(with_experts(call, swiglu_alpha=torch.zeros(call.experts.num_experts)))
    wrong = differing(got, forward(call))
    words = [h.words for h in constant_hypotheses(pipeline, got, wrong)]
    assert "in the activation the SwiGLU alpha is 0 for all experts" in words
    found = solved_constant(call, samples(pipeline, got, wrong, local_of(pipeline)))
    assert found is not None
    assert "the SwiGLU alpha is 0 (+- " in found.sentence


def in_turns(count: int, size: int) -> Callable[..., Tensor]:
    """A GEMM of so many accumulators that take `size` K groups each in turn."""

    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: object) -> Tensor:
        turn = torch.arange(x.shape[1]) // 32 // size % count
        parts = [right_gemm(x * (turn == t), packed, scales, tactic) for t in range(count)]  # type: ignore[arg-type]
        total, *rest = parts
        for part in rest:
            total = fp32.add(total, part)
        return total

    return gemm


@pytest.mark.parametrize(("count", "size"), [(2, 1), (3, 1), (2, 4)])
def test_accumulators_that_take_turns(count: int, size: int) -> None:
    call = GOLDENS.load("gemm/mirrored_hidden_384").call()
    got = layer(call, gemm1=in_turns(count, size))
    asked = (h for h in order_hypotheses(call) if "in GEMM1" in h.words and "take turns" in h.words)
    found = predicting(asked, call, got)
    assert f"in GEMM1 K is summed by {count} accumulators that take turns" in found[0]


def test_some_of_k_counts_twice_whatever_k_is() -> None:
    """Told by a call with three tiles of K, the rule predicts one with a single tile, too."""
    kernel = KERNELS["odd_last_k_tile_multiplied_twice"].function
    three, one = captured("prefill"), captured("odd_tokens")
    asked = [h for h in repeat_hypotheses(three) if "the rest of K beyond whole tiles of 256" in h.words]
    words = "in GEMM2 the rest of K beyond whole tiles of 256 counts twice"
    for call in (three, one):
        assert any(one.startswith(words) for one in predicting(iter(asked), call, kernel(call)))


def failure(case: str, call: MoeCall, got: Tensor) -> Failure:
    return Failure(case, prepared(call), got, forward(call))


def test_zeros_say_little_of_a_case() -> None:
    call = captured("odd_tokens")
    right = forward(call)
    failures = [failure("zeros", call, torch.zeros_like(right)), failure("numbers", call, right * 2)]
    assert not says_much(failures, ["zeros"])
    assert says_much(failures, ["numbers"])
    assert next_case(failures, (), []).case == "zeros", "as they come"
    heard = Heard(Match(Hypothesis("", (), "", lambda p: p), True), ["zeros"], against=["numbers"])
    assert next_case(failures, (), [heard]).case == "numbers"


def test_patterns_of_more_tokens_than_a_float_counts() -> None:
    """Of 1200 tokens 600 differ: the ways to choose them are no float."""
    call = captured("tokens_600")
    twice = replace(
        call,
        input=call.input.repeat(2, 1),
        token_selected_experts=call.token_selected_experts.repeat(2, 1),
        token_final_scales=call.token_final_scales.repeat(2, 1),
    )
    want = torch.ones_like(twice.input)
    mask = torch.arange(1200)[:, None].expand(want.shape) < 600
    assert patterns(twice, want * 2, want, mask)


def test_what_fails_is_told_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(call: MoeCall) -> Iterator[Hypothesis]:
        raise OverflowError("int too large to convert to float")
        yield

    monkeypatch.setattr(engine, "named_hypotheses", fails)
    call = captured("odd_tokens")
    assert call.experts.fc2_scales is not None
    got = forward(with_experts(call, fc2_scales=call.experts.fc2_scales + 1))
    diagnosis = diagnose("moe", call, {"output": got}, {"output": forward(call)}, diagnosis="quick")
    (line,) = {p for p in diagnosis.patterns if "failed" in p}
    assert "OverflowError: int too large to convert to float" in line
    assert "factor of 2" in diagnosis.finding.sentence


def test_what_fails_raises_where_nobody_listens() -> None:
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: 1 // 0)
    failed: dict[str, None] = {}
    with listening(failed):
        assert guarded(lambda: 1 // 0) is None
    assert len(failed) == 1


def test_words_that_two_orders_share_are_told_once() -> None:
    one, *others = (
        Match(Hypothesis("", ("fc2",), words, lambda p: p), True) for words in ("a", "b", "b", "c")
    )
    assert told([one, *others], (), ()).hypotheses == ("a", "b", "c")


def test_what_gives_nan_by_infinite_scales_is_told_as_that() -> None:
    """Not as weights of FP8, which has no infinity: the NaN come of groups that are masked."""
    call = GOLDENS.load("step_and_situ/step_all_at_once").call()
    got = layer(call, gemm1=in_turns(2, 1))
    assert predicting(scale_format_hypotheses(call), call, got)[0] == (
        "GEMM1's sums are NaN wherever a scale in them is infinite (byte 255), as of 0 x Inf"
    )
