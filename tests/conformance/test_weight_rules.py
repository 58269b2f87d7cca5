"""Weights, rows and orders of the weighted sum are solved: the rule is told, or the table; what is none is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward
from mxfp4ref.conformance import differing
from mxfp4ref.conformance.families.engine import prepared
from mxfp4ref.conformance.families.evidence import gather, look_closer
from mxfp4ref.conformance.families.hypothesis import Hypothesis, SlotRows, local_of
from mxfp4ref.conformance.families.sampled import samples
from mxfp4ref.conformance.families.solved.gains import of_one_row
from mxfp4ref.conformance.families.solved.pursuit import Rows
from mxfp4ref.conformance.families.solved.skipped_slots import of_skipped_slots, skipped_hypotheses
from mxfp4ref.conformance.families.solved.slot_sums import slot_sum_hypotheses
from mxfp4ref.conformance.families.solved.weight_rules import weight_rules
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.finalize import finalize
from tests.held_out_kernels.by_hand import layer, with_experts
from tests.held_out_kernels.calls import captured
from tests.helpers import usual

Maybe = Tensor | None
Weights = Callable[[Tensor], Tensor]


def weighted(call: MoeCall, weights: Weights) -> Tensor:
    return forward(replace(call, token_final_scales=weights(call.token_final_scales).contiguous()))


def solved(call: MoeCall, got: Tensor) -> tuple[SlotRows, Tensor, Tensor]:
    return SlotRows.of(prepared(call)), got, differing(got, forward(call))


def exact(call: MoeCall, got: Tensor, hypotheses: list[Hypothesis]) -> list[str]:
    """The words of those that predict every bit."""
    pipeline, found = prepared(call), []
    rows = SlotRows.of(pipeline)
    for h in hypotheses:
        output = rows.output(h.change(pipeline)) if h.of_rows is None else h.of_rows(rows).output(pipeline)
        found += [h.words] if not differing(output, got).any() else []
    return found


def scaled(weights: Tensor, slot: int, factor: float) -> Tensor:
    return weights * torch.where(torch.arange(weights.shape[1]) == slot, factor, 1.0)


@pytest.mark.parametrize(("times", "number", "expert"), [(False, 1.0, -1), (True, 0.25, 0)])
def test_the_weight_of_one_expert(times: bool, number: float, expert: int) -> None:
    call = captured("prefill")
    expert %= call.experts.num_experts
    weights = call.token_final_scales
    wrong = torch.where(call.token_selected_experts == expert, weights * number if times else number, weights)
    got, pipeline = forward(replace(call, token_final_scales=wrong)), prepared(call)
    rules = weight_rules(SlotRows.of(pipeline), got, differing(got, forward(call)))
    words = next(
        h.words for h in sorted(rules, key=lambda h: h.cost) if not differing(h.run(pipeline), got).any()
    )
    whose = "the last expert's" if expert else "expert 0's"
    assert (
        words == f"{whose} routing weight is {number:g}{' times its own' * times}, in every token that has it"
    )


@pytest.mark.parametrize(
    ("sign", "words", "also"),
    [(1.0, ["below 0.2"], ["of magnitude below 0.2"]), (-1.0, ["of magnitude below 0.2"], [])],
)
def test_a_threshold_below_which_weights_are_lost(sign: float, words: list[str], also: list[str]) -> None:
    """Also where the largest of a token, of either sign, is far above it."""
    call = captured("prefill")
    weights = torch.rand(call.token_final_scales.shape, generator=torch.Generator().manual_seed(3)) + 0.01
    weights[:, 0] *= sign
    call = replace(call, token_final_scales=weights)
    got = weighted(call, lambda w: torch.where(w.abs() < 0.2, 0.0, w))
    left_out = [h for h in weight_rules(*solved(call, got)) if h.family == "dropped slots"]
    told = [f"the slots with a weight {one} are left out of the sum" for one in (*words, *also)]
    assert exact(call, got, left_out) == told[: len(words)]
    assert exact(call, got, [v for h in left_out for v in h.variants]) == told[len(words) :]


@pytest.mark.parametrize("name", usual.first(1, ["prefill", "expert_rank_2_of_4", "top_8"]))
@pytest.mark.parametrize(
    ("weights", "words"),
    usual.first(4, [
        (lambda w: torch.cat((w[:, :1], w[:, :1] + w[:, 2:].sum(1, True), w[:, 2:]), 1), "sum of the other slots'"),
        (lambda w: torch.cat((w[:, :1] * 0 + 0.3, w[:, 1:]), 1), "slot 0's routing weight is 0.3"),
        (lambda w: scaled(w, 1, 0.75), "slot 1's routing weight is 0.75 times its own"),
        (lambda w: w.roll(-1, 1), "are those of the next slot"),
        (lambda w: w.cumsum(1), "are accumulated over the slots"),
        (lambda w: w.amax(1, True).expand_as(w), "of all slots of a token is the slot with the largest weight's"),
        (lambda w: w.sort(1).values, "the weights are sorted, the ids are not"),
        (lambda w: w.roll(3, 0), "those of other tokens: token n is token n - 3, around the end"),
        (lambda w: w[torch.arange(len(w)) // 2 * 2], "token n is the first token of each 2"),
        (lambda w: w.flatten().roll(-5).view(w.shape), "5 places on"),
        (lambda w: w.t().reshape(w.shape), "in which they lie as [k, M]"),
    ]),
)  # fmt: skip
def test_the_rule_of_weights_is_solved(name: str, weights: Weights, words: str) -> None:
    call = captured(name)
    got = weighted(call, weights)
    told = exact(call, got, list(weight_rules(*solved(call, got))))
    assert any(words in one for one in told), told


def test_ids_that_are_sorted_without_their_weights_are_no_other_sum() -> None:
    call = captured("prefill")
    got = forward(replace(call, token_selected_experts=call.token_selected_experts.sort(1).values))
    told = exact(call, got, list(weight_rules(*solved(call, got))))
    assert any("the ids are sorted, the weights are not" in words for words in told)
    pipeline, wrong = prepared(call), differing(got, forward(call))
    first = look_closer(pipeline, got, wrong, gather(pipeline, got, forward(call), wrong))[0]
    assert first.stages == ("finalize", "slots"), "or no hypothesis on ids is tried"


def test_a_rule_holds_for_calls_with_other_numbers_of_slots() -> None:
    """The last slot of four, and of eight."""

    def shared(call: MoeCall) -> Tensor:
        return weighted(call, lambda w: torch.cat((w[:, :-1], w[:, :-1].sum(1, True)), 1))

    call, other = captured("prefill"), captured("top_8")
    rules = [h for h in weight_rules(*solved(call, shared(call))) if "sum of the other slots'" in h.words]
    assert exact(call, shared(call), rules) == [
        "slot 3's routing weight is the sum of the other slots' weights",
        "the last slot's routing weight is the sum of the other slots' weights",
    ]
    assert exact(other, shared(other), rules) == [
        "the last slot's routing weight is the sum of the other slots' weights"
    ]


def test_no_rule_is_made_of_random_weights_or_of_what_is_no_sum_of_right_rows() -> None:
    call = captured("prefill")
    random = torch.Generator().manual_seed(3)
    got = weighted(call, lambda w: torch.rand(w.shape, generator=random))
    assert not list(weight_rules(*solved(call, got)))
    limit = with_experts(call, swiglu_limit=torch.full((8,), 1.0))
    assert not list(weight_rules(*solved(call, forward(limit))))


def test_weights_normalised_over_the_rank_are_no_slots_of_others() -> None:
    """Where a token has one expert here, its weight grows by those of the other slots."""
    call = captured("expert_rank_2_of_4")
    here = call.token_final_scales.masked_fill(local_of(prepared(call)) < 0, 0.0)
    got = weighted(call, lambda w: torch.where(here > 0, here / here.sum(1, keepdim=True), w))
    wrong, pipeline = differing(got, forward(call)), prepared(call)
    (first,) = gather(pipeline, got, forward(call), wrong)
    assert "finalize" in first.stages


def adding(call: MoeCall, row: Callable[[Tensor, int], Tensor], weight: float | None = None) -> Tensor:
    """Slots to be skipped add the row of all sorted ones that their number says."""
    local = local_of(prepared(call))
    flat = Rows.of(local).flat
    skipped = (local < 0).flatten().nonzero().flatten()
    source = flat[row(skipped, len(flat))]

    def sums(y: Tensor, local: Tensor, weights: Tensor, bias: Maybe) -> Tensor:
        rows, ids, given = y.flatten(0, 1).clone(), local.flatten().clone(), weights.flatten().clone()
        rows[skipped], ids[skipped] = rows[source], ids[source]
        given[skipped] = given[skipped] if weight is None else weight
        return finalize(rows.view_as(y), ids.view_as(local), given.view_as(weights), bias)

    return layer(call, finalize=sums)


@pytest.mark.parametrize("name", usual.first(1, ["expert_rank_2_of_4", "padded_slots"]))
@pytest.mark.parametrize(
    ("row", "weight", "words"),
    [
        (lambda n, rows: n * 0, None, "row 0 of all rows, sorted by expert (the first one), with their"),
        (lambda n, rows: n * 0 + 5, 1.0, "row 5 of all rows, sorted by expert, without a weight"),
        (lambda n, rows: n * 0 + rows - 1, None, "the last of all rows"),
        (lambda n, rows: n % 7, None, "(row n is row n modulo 7)"),
    ],
)  # fmt: skip
def test_what_skipped_slots_added_is_solved(
    name: str, row: Callable[[Tensor, int], Tensor], weight: float | None, words: str
) -> None:
    call = captured(name)
    got = adding(call, row, weight)
    assert any(words in one for one in exact(call, got, list(skipped_hypotheses(*solved(call, got)))))


def test_rows_without_a_rule_are_told_one_by_one() -> None:
    call = captured("expert_rank_2_of_4")
    random = torch.Generator().manual_seed(1)
    got = adding(call, lambda n, rows: torch.randint(0, rows, n.shape, generator=random))
    found = of_skipped_slots(*solved(call, got))
    assert found is not None
    assert found.stages == ("slots", "finalize")
    assert "slot 0 of token 2 0.586 x sorted row 21, token 14's of expert 10" in found.sentence


def test_another_experts_row_of_the_same_token_is_no_other_slots() -> None:
    call = captured("expert_rank_2_of_4")
    local = local_of(prepared(call))
    got = layer(call, local=lambda _: torch.where(local < 0, 0, local))
    assert of_skipped_slots(*solved(call, got)) is None


def test_one_row_in_tokens_that_share_no_expert_is_no_bias_before_gemm2() -> None:
    """It was told as another fc1 bias: a row is a sum of columns of its own expert's weights."""
    call = captured("expert_rank_2_of_4")
    pipeline = prepared(call)
    bias = call.experts.fc1_biases
    assert bias is not None
    for got, one_row in (
        (adding(call, lambda n, rows: n * 0), True),
        (forward(with_experts(call, fc1_biases=bias.roll(1, 0))), False),
    ):
        wrong = differing(got, forward(call))
        assert of_one_row(samples(pipeline, got, wrong, local_of(pipeline))) == one_row


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "words"),
    usual.first(
        1,
        [
            (lambda local: local.argsort(dim=1, descending=True), "in descending order of their ids"),
            (lambda local: local.argsort(dim=1), "in ascending order of their ids"),
        ],
    ),
)
@pytest.mark.parametrize(
    ("dtype", "name"), usual.first(1, [(torch.bfloat16, "bf16"), (torch.float16, "float16")])
)
def test_sums_in_other_orders_and_types_are_told(
    order: Callable[[Tensor], Tensor], words: str, dtype: torch.dtype, name: str
) -> None:
    call = captured("prefill")

    def sums(y: Tensor, local: Tensor, weights: Tensor, bias: Maybe) -> Tensor:
        total = torch.zeros_like(y[:, 0])
        for slot in order(local).unbind(1):
            term = fp32.mul(
                weights.gather(1, slot[:, None]).expand_as(total), y[torch.arange(len(y)), slot].float()
            )
            total = (total.float() + term.to(dtype).float()).to(dtype)
        return total.float()

    got = layer(call, finalize=sums)
    (told,) = exact(call, got, list(slot_sum_hypotheses(call.experts.num_experts)))
    assert f"kept in {name}" in told
    assert words in told
    assert f"weighted rows that are rounded to {name} first, as by atomic additions" in told
