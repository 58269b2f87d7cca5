"""Wrong experts, weights prepared otherwise, uses of gate, sums by owner, columns that repeat, NaN of other bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward
from mxfp4ref.conformance import Kernel, Options, diagnose, differing, run
from mxfp4ref.conformance.families.engine import prepared
from mxfp4ref.conformance.families.hypotheses.activation_steps import step_hypotheses
from mxfp4ref.conformance.families.hypotheses.prepared_weights import prepared_weight_hypotheses
from mxfp4ref.conformance.families.hypotheses.weighting import weight_hypotheses
from mxfp4ref.conformance.families.hypothesis import Hypothesis, SlotRows, local_of
from mxfp4ref.conformance.families.places import residue_in_words
from mxfp4ref.conformance.families.sampled import samples
from mxfp4ref.conformance.families.solved.row_sources import taken_evidence
from mxfp4ref.conformance.families.solved.slot_sums import slot_sum_hypotheses
from mxfp4ref.conformance.families.solved.whose import whose_hypotheses
from mxfp4ref.conformance.families.solved.wrong_experts import wrong_experts
from mxfp4ref.conformance.findings.finding import in_words
from mxfp4ref.conformance.kernels.adapters import whole_arguments
from mxfp4ref.conformance.routers.routing_words import routing_finding
from mxfp4ref.goldens import open_goldens
from mxfp4ref.goldens.runs import runs
from tests.held_out_kernels.by_hand import with_experts
from tests.held_out_kernels.calls import captured
from tests.held_out_kernels.definition import load_all, run_on
from tests.helpers import usual

GOLDENS = open_goldens()


@cache
def right(name: str) -> Tensor:
    return forward(captured(name))


def of(kernel: str, name: str) -> Tensor:
    return run_on(load_all()[kernel], captured(name))["output"]


def predicting(hypotheses: Callable[[MoeCall], object], got: Tensor, name: str, of: str) -> list[str]:
    """In words, those that hold `of` and predict every bit."""
    pipeline = prepared(captured(name))
    some = [h for h in hypotheses(pipeline.call) if isinstance(h, Hypothesis) and of in h.words]  # type: ignore[attr-defined]
    return [
        h.words for h in some if (out := h.run(pipeline)) is not None and not bool(differing(out, got).any())
    ]


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (
            "w2_pruned_to_two_of_four",
            "GEMM2's weights are pruned to 2 of 4: of every 4 along K the 2",
        ),
        (
            "fc2_scales_in_two_bits_above_the_least",
            "GEMM2's scales are cut to 2^3 times the least of their row",
        ),
        (
            "w13_requantised_in_blocks_of_128",
            "GEMM1's weights are quantised once more: scales are one for each 128",
        ),
        (
            "w13_scales_merged_by_their_maximum",
            "GEMM1's scales of up and of gate are each the largest of both",
        ),
    ],
)
def test_weights_that_a_loader_made_others_of(kernel: str, words: str) -> None:
    found = predicting(prepared_weight_hypotheses, of(kernel, "odd_tokens"), "odd_tokens", words[:20])
    assert [w for w in found if w.startswith(words)] == found != []


@pytest.mark.slow
def test_uses_of_gate() -> None:
    for kernel, words in {
        "sigmoid_of_the_column_before": "the sigmoid takes gate of the column before it in blocks of 8",
        "sigmoid_of_the_gate_without_its_bias": "the sigmoid takes gate without the fc1 bias",
        "swiglu_sigmoid_taken_ahead_of_the_clamp": "the sigmoid takes gate without the clamp",
    }.items():
        call = "tensor_rank_1_of_2"
        found = predicting(step_hypotheses, of(kernel, call), call, words[:23])
        assert [w for w in found if words in w] == found != []


def test_sums_by_owner_and_weights_in_a_byte() -> None:
    got = of("owners_send_their_sums_in_bf16", "odd_tokens")
    found = predicting(
        lambda call: slot_sum_hypotheses(call.experts.num_experts), got, "odd_tokens", "owners"
    )
    assert any(
        "each of 2 owners of 4 experts sums its own slots, the sums are rounded to bf16" in w for w in found
    )
    got = of("weights_travel_as_a_byte", "odd_tokens")
    assert predicting(weight_hypotheses, got, "odd_tokens", "ths") == [
        "the routing weights are rounded to whole 255ths, as a byte holds them"
    ]


@pytest.mark.parametrize("kernel", ["update_leaves_w2_of_odd_experts", "w2_pruned_to_two_of_four"])
def test_experts_that_are_off(kernel: str) -> None:
    pipeline, got = prepared(captured("prefill")), of(kernel, "prefill")
    some = samples(pipeline, got, differing(got, right("prefill")), local_of(pipeline))
    odd = kernel.endswith("odd_experts")
    assert wrong_experts(pipeline.call, some) == "experts 1, 3, 5, 7 (the odd ones)" * odd
    beyond = [replace(one, error=torch.full_like(one.error, 1e200)) for one in some]
    assert wrong_experts(pipeline.call, beyond) == "", "their squares overflow"


def test_rows_beside_them_at_the_end_of_experts() -> None:
    pipeline, got = prepared(captured("prefill")), of("gather_clamps_one_row_too_early", "prefill")
    found = taken_evidence(pipeline, SlotRows.of(pipeline), got, differing(got, right("prefill")))
    assert found is not None
    assert "(always the row 1 before it among those sorted by expert)" in found.sentence
    assert "each of these is the last row of its expert" in found.sentence


@pytest.mark.slow
def test_the_plain_rule_of_a_table_of_experts_is_told_first() -> None:
    call = captured("odd_tokens")
    scales = call.experts.fc2_scales
    assert scales is not None
    got = forward(with_experts(call, fc2_scales=scales.roll(-1, 0)))
    pipeline = prepared(call)
    found = whose_hypotheses(pipeline, SlotRows.of(pipeline), got, differing(got, right("odd_tokens")))
    assert (
        next(h.words for h in found if "scales" in h.words) == "GEMM2's scales are those of the next expert"
    )


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (lambda at: at % 64 >= 60, "in columns 60 to 63 of every 64"),
        (lambda at: at % 32 == 5, "in column 5 of every 32"),
        (lambda at: at % 4 == 1, "in every fourth column, from 1 on"),
        (lambda at: at < 8, ""),
        (lambda at: (at % 64 == 1) | (at % 64 == 9), ""),
    ],
)
def test_columns_that_repeat(columns: Callable[[Tensor], Tensor], words: str) -> None:
    assert residue_in_words(columns(torch.arange(256))) == words


def test_what_is_the_same_in_other_words_is_no_alternative() -> None:
    named = "silu_bf16: silu(gate) rounded to bf16 before up"
    assert in_words([named, "in the activation silu(gate) is rounded to bf16"]) == named
    other = "GEMM2's scales are those of the previous expert"
    assert "The same bits would come from: " in in_words(
        ["GEMM2's scales are those of the next expert", other]
    )


@pytest.mark.parametrize("numbers", usual.first(1, [False, True]))
def test_nan_of_other_bits(numbers: bool) -> None:
    """By itself it is told as that; beside cases with wrong numbers it says nothing of them."""

    def kernel(kind: str, call: MoeCall) -> Tensor:
        output = forward(call)
        output = output.view(torch.int16).masked_fill(output.isnan(), -1).view(torch.bfloat16)
        return output * 2 if numbers and bool(output.isfinite().all()) else output

    names = ("gemm/ordinary", "ungated/relu_non_finite")
    cases = [GOLDENS.load(name) for name in names]
    report = run(
        Kernel("it", ("moe",), whole_arguments, kernel), cases, Options(diagnosis="quick", repeat=False)
    )
    of_nan = report.results[1].diagnosis
    assert of_nan is not None
    assert "NaN is written as 0xFFFF, not as the SM90 kernel's 0x7FFF" in of_nan.finding.sentence
    assert ("factor of 2" in report.finding.sentence) == numbers
    assert ("in 1 case NaN alone has other bits" in report.finding.sentence) == numbers
    assert (report.within_bounds, report.finding.exact) == (int(numbers), not numbers)


def test_named_bits_of_nan_keep_their_name() -> None:
    call = runs(GOLDENS.load("ungated/relu_non_finite"))[0]
    want = call.expected["output"]
    got = want.view(torch.int16).masked_fill(want.isnan(), 0x7FC0).view(torch.bfloat16)
    found = diagnose("moe", call.inputs, {"output": got}, {"output": want}, diagnosis="quick")
    assert found.exact == ("nan_as_7fc0",)


@pytest.mark.slow
def test_routers_with_a_sink_another_tokens_row_or_sum() -> None:
    for case, kernel, words in (
        ("gpt_oss_bf16_ties", "expert_softmax_with_a_sink", "one logit more in its sum, 0 in every token"),
        (
            "deepseek_v4_hash_layer",
            "hash_layer_with_the_draft_layers_tokens",
            "the next token's: shifted by 1",
        ),
        (
            "deepseek_v3_groups",
            "weights_divided_by_the_biased_sum",
            "divided by the sum of the scores with the corr",
        ),
        ("deepseek_v4_flash", "weights_over_the_sum_of_the_first_four", "divided by the sum of the first 4"),
    ):
        one = runs(GOLDENS.load(f"routing/{case}"))[0]
        got = run_on(load_all()[kernel], one.inputs)
        assert words in routing_finding(one.inputs, got, one.expected).sentence


@pytest.mark.slow
def test_scales_of_other_groups() -> None:
    for kernel, case, words in (
        ("scales_expanded_by_repeat", "every_packed_byte", "repeated, not interleaved"),
        (
            "groups_of_sixteen",
            "every_code_every_scale_ocp_bfloat16",
            "groups are taken to have 16 elements, not 32",
        ),
    ):
        one = runs(GOLDENS.load(f"formats/{case}"))[0]
        got = run_on(load_all()[kernel], one.inputs)
        assert words in diagnose("dequantize", one.inputs, got, one.expected).finding.sentence


def test_a_verdict_says_why_nothing_was_compared() -> None:
    def kernel(kind: str, call: MoeCall) -> Tensor:
        raise RuntimeError("no such layout")

    report = run(
        Kernel("it", ("moe",), whole_arguments, kernel),
        [GOLDENS.load("gemm/ordinary")],
        Options(repeat=False),
    )
    assert "gemm/ordinary: raised: RuntimeError: no such layout" in report.verdict
