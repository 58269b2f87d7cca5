"""Mistakes of tiles, fragments, sums and underflow, which have sentences of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward
from mxfp4ref.conformance import differing
from mxfp4ref.conformance.diagnosis import diagnose
from mxfp4ref.conformance.families.blank import of_blank
from mxfp4ref.conformance.families.engine import prepared
from mxfp4ref.conformance.families.evidence import gather
from mxfp4ref.conformance.families.hypotheses.activation_steps import step_hypotheses
from mxfp4ref.conformance.families.hypotheses.code_parts import small_weight_hypotheses
from mxfp4ref.conformance.families.hypotheses.formula_parts import formula_part_hypotheses
from mxfp4ref.conformance.families.hypotheses.fragments import fragment_hypotheses
from mxfp4ref.conformance.families.hypotheses.lane_scales import lane_scale_hypotheses
from mxfp4ref.conformance.families.hypotheses.orders_of_k import order_hypotheses
from mxfp4ref.conformance.families.hypotheses.outputs import inner_hypotheses, output_hypotheses
from mxfp4ref.conformance.families.hypotheses.overlapping_blocks import overlapping_block_hypotheses
from mxfp4ref.conformance.families.hypotheses.promotions import promotion_hypotheses
from mxfp4ref.conformance.families.hypotheses.regions import k_hypotheses
from mxfp4ref.conformance.families.hypotheses.roundings import rounding_hypotheses
from mxfp4ref.conformance.families.hypotheses.slots import slot_hypotheses
from mxfp4ref.conformance.families.hypotheses.tensors import bias_hypotheses
from mxfp4ref.conformance.families.hypotheses.weighting import weight_hypotheses
from mxfp4ref.conformance.families.hypothesis import Hypothesis, local_of
from mxfp4ref.conformance.families.places import named_columns, named_tokens
from mxfp4ref.conformance.families.sampled import samples
from mxfp4ref.conformance.families.search import Match, Search
from mxfp4ref.conformance.families.solved.error_space import Space
from mxfp4ref.conformance.families.solved.mixed_rows import mixed_row_hypotheses
from mxfp4ref.conformance.families.solved.uniform_factors import clamps
from mxfp4ref.conformance.findings.finding import Evidence
from mxfp4ref.conformance.findings.stage_fit import reconcile
from mxfp4ref.goldens import open_goldens
from mxfp4ref.goldens.runs import runs
from mxfp4ref.sm90.fp32 import to_bf16
from tests.held_out_kernels.by_hand import Rows, layer
from tests.held_out_kernels.calls import captured
from tests.held_out_kernels.definition import load_all
from tests.helpers.usual import first

KERNELS = load_all()


def evidence(call: MoeCall, got: Tensor) -> list[tuple[tuple[str, ...], str]]:
    want = forward(call)
    return [(e.stages, e.sentence) for e in gather(prepared(call), got, want, differing(got, want))]


@pytest.mark.parametrize(
    ("kernel", "call", "generator", "words"),
    first(
        13,
        [
            (
                "third_four_biases_for_eight_columns",
                "gpt_oss",
                bias_hypotheses,
                "the first 4 rows of each 8, twice",
            ),
            (
                "third_scale_row_by_lane_modulo_eight",
                "odd_tokens",
                lane_scale_hypotheses,
                "rows of weights along the lanes of a fragment): of each 8 rows of weights that of row lane % 8",
            ),
            (
                "third_zero_beyond_the_limit",
                "gpt_oss",
                formula_part_hypotheses,
                "up becomes zero beyond the limit, on either side, instead of the limit and gate becomes zero above",
            ),
            (
                "third_stable_sigmoid_without_its_negative_branch",
                "odd_tokens",
                formula_part_hypotheses,
                "the sigmoid of a negative argument is that of its magnitude",
            ),
            (
                "third_weight_multiplies_the_sum_so_far",
                "odd_tokens",
                weight_hypotheses,
                "a slot's weight multiplies the sum so far",
            ),
            (
                "third_overlapping_last_block_activates_twice",
                "prefill",
                overlapping_block_hypotheses,
                "columns 128 to 255, which the last block of 256",
            ),
            (
                "third_promoted_in_the_middle_of_a_group",
                "odd_tokens",
                promotion_hypotheses,
                "the last 16 of each 32 get the scale of the group after",
            ),
            (
                "third_exponent_of_a_zero_sum_shifted",
                "odd_tokens",
                promotion_hypotheses,
                "a sum of zero becomes a power of two",
            ),
            (
                "activation_blocks_transposed",
                "odd_tokens",
                fragment_hypotheses,
                "activation (rows x columns) are transposed",
            ),
            (
                "fc1_code_blocks_transposed",
                "odd_tokens",
                fragment_hypotheses,
                "GEMM1's weights (codes without the scales)",
            ),
            (
                "last_row_tile_added_twice",
                "odd_tokens",
                slot_hypotheses,
                "the last, unfilled 8 rows of their expert are added",
            ),
            (
                "fc1_scales_exchanged_in_the_last_tile",
                "odd_tokens",
                k_hypotheses,
                "the other K group of their pair",
            ),
            ("fc1_last_codes_of_the_next_row", "odd_tokens", k_hypotheses, "the codes of the row after"),
            (
                "small_weights_lost_in_fp16",
                "odd_tokens",
                small_weight_hypotheses,
                "both GEMMs' small weights are lost",
            ),
            ("exp2_by_a_cubic_polynomial", "gpt_oss", step_hypotheses, "is a polynomial of degree 3"),
            (
                "accumulators_through_tf32",
                "odd_tokens",
                rounding_hypotheses,
                "ties away from zero) on the way",
            ),
            ("down_projection_in_two_k_slices", "tiny_values", order_hypotheses, "split in 2 slices"),
            (
                "k_unrolled_by_256_without_a_rest",
                "padded_hidden",
                output_hypotheses,
                "the last 128 of K are left",
            ),
        ],
    ),
)
def test_a_hypothesis_predicts_it(
    kernel: str, call: str, generator: Callable[[MoeCall], list[Hypothesis]], words: str
) -> None:
    held, pipeline = KERNELS[kernel], prepared(captured(call))
    got = held.function(pipeline.call)
    assert bool(differing(got, forward(pipeline.call)).any())
    asked = [h for h in generator(pipeline.call) if words in h.words]
    exact = [h for h in asked if (out := h.run(pipeline)) is not None and not bool(differing(out, got).any())]
    assert exact
    assert all(set(h.stages) & set(held.stages) for h in exact)


def test_a_part_of_k_from_another_row() -> None:
    call = captured("prefill")
    got = KERNELS["third_row_indices_refilled_at_half_of_k"].function(call)
    search = Search(prepared(call), got, forward(call), 1e300)
    found = search.run(mixed_row_hypotheses(search.pipeline, search.rows, got, search.wrong))
    assert [match.exact for match in found] == [True]
    assert (
        "the second half of K is that of another row of the expert, 16 rows further"
        in found[0].hypothesis.words
    )


def test_accumulators_that_are_not_cleared() -> None:
    def chained(rows: Rows, acc: Tensor) -> Tensor:
        tiles = acc.unflatten(1, (-1, 64))
        return to_bf16(
            torch.stack(
                [
                    tiles[:, 0],
                    tiles[:, 1] + tiles[:, 0],
                    tiles[:, 2] + tiles[:, 1],
                    tiles[:, 3] + tiles[:, 2],
                ],
                1,
            ).flatten(1)
        )

    pipeline = prepared(captured("odd_tokens"))
    got = layer(pipeline.call, fc2=chained)
    asked = [h for h in inner_hypotheses(pipeline.call) if "not cleared: a tile of 64 columns" in h.words]
    assert [h.words.rsplit("of ", 1)[1] for h in asked if torch.equal(h.run(pipeline), got)] == [
        "the tile before"
    ]


def test_what_is_near_underflow_proves_nothing() -> None:
    call, want = captured("tiny_values"), forward(captured("tiny_values"))
    last_bit_of_zero = torch.where(want == 0, 1, want.view(torch.int16)).to(torch.int16).view(torch.bfloat16)
    assert bool(differing(last_bit_of_zero, want).any())
    for got in (KERNELS["fc2_split_k_in_fp32"].function(call), last_bit_of_zero):
        ((stages, words),) = evidence(call, got)
        assert stages == ()
        assert "differ by no more than 2^-125, where numbers underflow" in words


def test_subnormal_numbers_are_a_sum_that_keeps_them() -> None:
    call = captured("tiny_values")
    ((stages, words),) = evidence(call, KERNELS["sum_keeps_subnormals"].function(call))
    assert stages == ("finalize",)
    assert "that differ are subnormal, as where the weighted sum keeps subnormal numbers" in words


def test_a_sum_that_cancels_is_not_left_out() -> None:
    call = open_goldens().load("gemm/mirrored_inner_384").call()
    assert "are zero" not in str(evidence(call, torch.zeros_like(forward(call))))
    ordinary = captured("odd_tokens")
    assert "are zero: nothing was added up" in str(evidence(ordinary, torch.zeros_like(forward(ordinary))))


@pytest.mark.slow
def test_zeros_of_sums_that_cancel_are_predicted_by_named_defects() -> None:
    one = runs(open_goldens().load("finalize/biases_cancel"))[0]
    zeros = {"output": torch.zeros_like(one.expected["output"])}
    found = diagnose("moe", one.inputs, zeros, one.expected, diagnosis="quick")
    assert "weights_bf16" in found.exact
    assert "among what gives this: weights_bf16: " in found.finding.sentence
    assert not found.finding.exact  # zeros may be other mistakes'
    assert "nothing was added up" not in str(found)
    assert reconcile(one.inputs, zeros, found.mask).reach == "rounding"


def zeros_in(call: MoeCall, tokens: Tensor) -> tuple[str, ...]:
    ((stages, words),) = evidence(call, forward(call).index_fill(0, tokens, 0))
    assert "are zero: nothing was added up" in words
    assert ("all its slots were left out, or its row of the input" in words) == bool(stages)
    return stages


def test_rows_of_zeros_are_left_out_where_their_experts_are_right_in_others() -> None:
    call = captured("odd_tokens")
    ids, weights, size = call.token_selected_experts, call.token_final_scales, forward(call).abs().amax(1)
    assert zeros_in(call, torch.arange(1, call.num_tokens, 2)) == ("slots", "finalize")
    of_expert = (ids == 3).any(1).nonzero().flatten()
    assert zeros_in(call, of_expert) == ()  # whose weights may be zero, and the others' rows moved
    assert zeros_in(call, size.argsort()[:3]) == ()  # which may underflow
    assert zeros_in(call, size.argsort()[-3:]) == ()  # or overflow
    alone = replace(call, token_final_scales=torch.stack((weights[:, 0], weights[:, 1] * 0), 1))
    assert zeros_in(alone, torch.arange(1, call.num_tokens, 2)) == ()  # rows of GEMM2 may be missing


@pytest.mark.slow
def test_an_activation_that_moved_is_not_called_a_wrong_gemm1() -> None:
    pipeline = prepared(captured("prefill"))

    def placed(kernel: str) -> tuple[str, ...]:
        got = KERNELS[kernel].function(pipeline.call)
        some = samples(pipeline, got, differing(got, forward(pipeline.call)), local_of(pipeline))
        space = Space.of(some)
        assert space is not None
        where = space.placed(biased=False, function=False)
        assert where is not None
        return where.stages

    assert placed("activation_blocks_transposed") == ("fc1", "activation")
    assert placed("input_tail_of_the_next_token") == ("fc1", "activation")


def test_columns_of_which_some_are_right_by_chance() -> None:
    column = torch.arange(256)
    named = named_columns((column // 16 % 4 == 1) & (column % 8 > 0))
    assert named is not None
    assert named[0] == "in every fourth block of 16 columns, from 16 on"
    assert torch.equal(named[1](256), column // 16 % 4 == 1)
    assert named_columns((column // 16 % 4 == 1) & (column % 2 > 0)) is None


def test_columns_of_garbage() -> None:
    call = captured("prefill")
    got = KERNELS["a_column_block_of_garbage"].function(call)
    ((stages, words),) = evidence(call, got)
    assert stages == ("fc2", "finalize")
    assert words.endswith("of all magnitudes, as in memory that was not written")
    sign = forward(call)
    sign[:, 48:64] = -3 * sign[:, 48:64]
    assert "magnitudes" not in str(evidence(call, sign))


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (slice(1, None, 2), "for tokens with an odd number"),
        (slice(3, None), "for tokens from 3 on"),
        (slice(0, 1), "for token 0"),
    ],
)
def test_tokens_are_told_as_tokens(step: slice, words: str) -> None:
    call = captured("odd_tokens")
    chosen = torch.zeros(call.num_tokens, dtype=torch.bool)
    chosen[step] = True
    local = local_of(prepared(call))
    (named, where), *_ = named_tokens(call, local, chosen, torch.ones_like(chosen))
    assert named == words
    assert torch.equal(where(call, local), chosen)


def test_zeros_of_the_smallest_numbers_may_have_underflowed() -> None:
    """Weights of 1e-21 applied twice: everything was added up, and is less than the least number."""
    call = open_goldens().load("finalize/underflowing_products").call()
    first, *_ = evidence(call, forward(replace(call, token_final_scales=call.token_final_scales.square())))
    assert first == (
        (),
        "the rows of all tokens are zero: nothing was added up for them, or nothing written, or their products "
        "underflowed: all that is expected lies below 2^-100",
    )
    ordinary = open_goldens().load("gemm/ordinary").call()
    assert "underflowed" not in evidence(ordinary, torch.zeros_like(forward(ordinary)))[0][1]


@pytest.mark.parametrize(
    ("others", "stages"),
    [
        ([("fc1", "nan of scales"), ("finalize", "any other mistake")], ("fc1", "activation")),
        ([("fc1", "scales are infinite"), ("fc2", "scales are infinite")], ()),
        ([("finalize", "any other mistake")], ("activation",)),
    ],
)
def test_nan_everywhere_is_told_by_what_concerns_nan(
    others: list[tuple[str, str]], stages: tuple[str, ...]
) -> None:
    blank = Evidence((), "all rows are NaN", 1, lost=True)
    said = [("activation", "the clamp keeps NaN"), *others]
    found = [Match(Hypothesis("values", (stage,), words, lambda p: p), True) for stage, words in said]
    finding = of_blank(blank, found)
    assert (finding.stages, finding.hedged) == (stages, bool(stages))


@pytest.mark.slow
def test_elements_of_one_magnitude_are_a_clamp() -> None:
    one = runs(open_goldens().load("finalize/slot_order"))[0]
    want = one.expected["output"]
    largest = float(want.abs().flatten().sort().values[-20])
    got = want.clamp(-largest, largest)
    found = diagnose("moe", one.inputs, {"output": got}, one.expected, diagnosis="quick").finding
    assert (
        found.sentence == f"the output, or a stage just before it, is clamped to -{largest:g} ... {largest:g}"
    )
    assert (found.stages, found.exact) == (("finalize", "fc2"), True)
    wrong = differing(got, want)
    assert not list(clamps(want, got, wrong)), "larger than expected"
    assert not list(clamps(got, want, torch.zeros_like(wrong)))
