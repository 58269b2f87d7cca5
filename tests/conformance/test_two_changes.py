"""Two changes at once, one of them in the weighted sum: in one call, and over several cases."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import islice

import pytest
import torch

from mxfp4ref import Experts, MoeCall
from mxfp4ref.conformance import differing
from mxfp4ref.conformance.families.beside_a_sum import beside_a_sum
from mxfp4ref.conformance.families.engine import prepared
from mxfp4ref.conformance.families.hypotheses.activations import activation_hypotheses
from mxfp4ref.conformance.families.hypotheses.roundings import rounding_hypotheses
from mxfp4ref.conformance.families.hypotheses.slots import slot_hypotheses
from mxfp4ref.conformance.families.hypotheses.weighting import weight_hypotheses
from mxfp4ref.conformance.families.hypothesis import (
    Hypothesis,
    SlotRows,
    composed,
    of_output,
    of_slots,
    of_sum,
)
from mxfp4ref.conformance.families.likely_pairs import likely_pairs
from mxfp4ref.conformance.families.named import named_hypotheses
from mxfp4ref.conformance.families.search import Match, Search
from mxfp4ref.conformance.families.twos import in_other_cases, nearest_of_two
from mxfp4ref.defects import finalize
from mxfp4ref.defects.variants.finalize import FinalizeVariant
from mxfp4ref.defects.variants.swiglu import SwigluVariant
from mxfp4ref.sm90.fp32 import to_bf16
from tests.conformance.test_activation_steps import call

CALL = call(parameters=True)


def found(got_of: MoeCall, right: MoeCall) -> list[Match]:
    """Where the kernel clamps neither up nor gate, beside what else is wrong in the call that it computes."""
    pipeline = prepared(right)
    unclamped = SwigluVariant(clamp=lambda up, gate, limit: (up, gate))
    got = prepared(got_of).staging(activate=unclamped).run()
    search = Search(pipeline, got, pipeline.run(), time.thread_time() + 60)
    return beside_a_sum(search, some(right))


def some(right: MoeCall) -> list[Hypothesis]:
    return [h for h in activation_hypotheses(right) if h.cost <= 1.0]


def test_a_clamp_and_another_use_of_the_weights() -> None:
    (match,) = found(replace(CALL, token_final_scales=CALL.token_final_scales**2), CALL)
    assert match.exact
    assert (
        "in the activation neither is clamped; and the routing weights are applied twice"
        in match.hypothesis.words
    )


@pytest.mark.slow
def test_a_clamp_and_weights_of_no_rule() -> None:
    scales = torch.rand(8, 2, generator=torch.Generator().manual_seed(5)) + 0.1
    (match,) = found(replace(CALL, token_final_scales=scales), CALL)
    assert not match.exact
    assert match.hypothesis.stages == ("activation", "finalize")
    words = match.hypothesis.words
    assert "neither is clamped; and the routing weights used are others" in words
    assert "right" not in words


def test_a_slot_less_and_weights_in_bf16() -> None:
    pipeline = prepared(CALL)
    ids, scales = CALL.token_selected_experts.clone(), to_bf16(CALL.token_final_scales).float()
    ids[:, -1] = -1
    got = prepared(replace(CALL, token_selected_experts=ids, token_final_scales=scales)).run()
    search = Search(pipeline, got, pipeline.run(), time.thread_time() + 60)
    assert not search.run(h for h in slot_hypotheses(CALL) if h.of_rows)
    (match,) = nearest_of_two(search, lambda: weight_hypotheses(CALL))
    assert match.hypothesis.stages == ("slots", "finalize")
    assert "the slots of the last place of a token are left out" in match.hypothesis.words
    assert "the routing weights are rounded to bf16" in match.hypothesis.words


def test_one_change_is_not_told_as_two() -> None:
    assert not found(CALL, CALL)


@pytest.mark.slow
def test_roundings_that_are_left_are_no_second_change() -> None:
    pipeline = prepared(CALL)
    base = pipeline.staging(activate=SwigluVariant(clamp=lambda up, gate, limit: (up, gate)))
    words = "GEMM2's output is rounded to float16 on the way"
    rounded = next(h for h in rounding_hypotheses(CALL) if h.words == words).run(base)
    assert rounded is not None
    got = torch.where(torch.arange(rounded.shape[1]) % 2 == 0, rounded, base.run())
    search = Search(pipeline, got, pipeline.run(), time.thread_time() + 60)
    (match,) = beside_a_sum(search, some(CALL))
    assert match.hypothesis.words.startswith("in the activation neither is clamped, up to roundings (9")
    assert "finalize" not in match.hypothesis.stages
    assert not match.exact


def test_noise_is_not_two_changes() -> None:
    pipeline = prepared(CALL)
    want = pipeline.run()
    noise = torch.randn(want.shape, generator=torch.Generator().manual_seed(6)) * want.float().std()
    search = Search(pipeline, to_bf16(want.float() + noise), want, time.thread_time() + 60)
    assert not beside_a_sum(search, some(CALL))


def test_huge_rows_do_not_make_noise_a_rounding() -> None:
    pipeline = prepared(CALL)
    want = pipeline.run()
    noise = torch.randn(want.shape, generator=torch.Generator().manual_seed(7)) * want.float().std() / 8
    search = Search(pipeline, to_bf16(want.float() + noise), want, time.thread_time() + 60)
    scaled = replace(
        next(iter(some(CALL))),
        change=lambda p: p.having(fc2_scales=p.call.experts.fc2_scales + 9),  # times 512
    )
    assert not beside_a_sum(search, [scaled])


@pytest.mark.slow
def test_an_order_of_slots_shows_in_some_cases() -> None:
    one = call(parameters=False)
    words = "GEMM1's output is cut to bf16 instead of rounded"
    cut = next(h for h in rounding_hypotheses(one) if h.words == words)
    e = one.experts
    alike = [
        t[:1].expand_as(t).contiguous() for t in (e.fc1_weights, e.fc1_scales, e.fc2_weights, e.fc2_scales)
    ]
    scales = torch.tensor([1 / 3, -1 / 3 - 2.0**-20]).expand(8, 2).contiguous()  # so that their sum cancels
    one = replace(one, experts=Experts(*alike), token_final_scales=scales)
    pipeline = prepared(one)
    got = cut.change(pipeline).staging(finalize=FinalizeVariant(order=finalize.finalize_slots_reversed)).run()
    alone = cut.run(pipeline)
    assert alone is not None
    assert differing(alone, got).any()
    until = time.thread_time() + 1.0  # orders of the sum are tried first
    (both, *_) = in_other_cases(cut, [(pipeline, got, pipeline.run())], clock=time.thread_time, until=until)
    assert (
        both.words
        == f"two things: {words}; and finalize_slots_reversed: slots summed from the last to the first"
    )
    assert not in_other_cases(cut, [(pipeline, alone, pipeline.run())], clock=time.thread_time, until=until)


def halved(rows: SlotRows) -> SlotRows:
    return replace(rows, weights=rows.weights * 0.5)


def without_first(rows: SlotRows) -> SlotRows:
    return replace(rows, local=torch.cat((rows.local[:, :1] * 0 - 1, rows.local[:, 1:]), 1))


def test_changes_of_rows_and_of_stages_are_composed_in_either_order() -> None:
    """None erases what the other changes: a second change that did would undo a first that is false."""
    half = of_slots("", ("finalize",), "half", halved, 1)
    fewer = of_slots("", ("slots",), "fewer", without_first, 1)
    reverse = of_sum("", ("finalize",), "reverse", FinalizeVariant(order=finalize.finalize_slots_reversed), 1)
    unclamped = next(h for h in some(CALL) if "neither is clamped" in h.words)
    rest = replace(
        CALL,
        token_selected_experts=torch.cat(
            (CALL.token_selected_experts[:, :1] * 0 - 1, CALL.token_selected_experts[:, 1:]), 1
        ),
    )
    halves = replace(CALL, token_final_scales=CALL.token_final_scales * 0.5)
    both = replace(rest, token_final_scales=halves.token_final_scales)
    for one, other, wanted in (
        (half, fewer, prepared(both).run()),
        (half, unclamped, unclamped.run(prepared(halves))),
        (half, reverse, reverse.run(prepared(halves))),
    ):
        for pair in (composed(one, other), composed(other, one)):
            output = pair.run(prepared(CALL))
            assert output is not None
            assert wanted is not None
            assert not differing(output, wanted).any(), pair.words


def test_two_changes_lie_where_each_is_likeliest() -> None:
    both = of_slots("", ("fc1", "fc2"), "one", halved, 1), of_slots("", ("finalize",), "other", halved, 1)
    assert composed(*both).stages == ("fc1", "finalize")


def test_nothing_is_changed_inside_of_what_is_computed_as_a_whole() -> None:
    whole = prepared(CALL).computing(lambda inside: -inside.run())
    half = of_slots("", ("finalize",), "half", halved, 1)
    assert half.run(whole) is None
    assert all(h.run(whole) is None for h in islice(named_hypotheses(CALL), 3))


def test_a_change_that_is_wrong_only_where_the_kernel_is_right_leaves_no_other() -> None:
    pipeline = prepared(CALL)
    want = pipeline.run()
    got = torch.cat((-want[:4], want[4:]))
    search = Search(pipeline, got, want, time.thread_time() + 60)
    assert not search.leaves_another(-want)
    assert search.leaves_another(torch.cat((want[:4], -want[4:])))
    negative = of_output("", ("finalize",), "negative", torch.neg, 1)
    assert not in_other_cases(
        negative, [(pipeline, got, want)], clock=time.thread_time, until=time.thread_time() + 9
    )


def test_two_changes_before_the_sum_neither_of_which_shows_alone() -> None:
    pipeline = prepared(CALL)
    one, other = (
        next(h for h in named_hypotheses(CALL) if h.name == name)
        for name in ("gate_up_swapped", "limit_ignored")
    )
    got = composed(one, other).run(pipeline)
    assert got is not None
    search = Search(pipeline, got, pipeline.run(), time.thread_time() + 60)
    (match,) = search.run(likely_pairs(search.part), enough=1)
    assert match.exact
    assert sorted(match.hypothesis.words.removeprefix("two things: ").split("; and ")) == [
        one.words,
        other.words,
    ]
    assert not search.near
