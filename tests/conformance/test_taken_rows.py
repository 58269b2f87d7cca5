"""Rows of a layer that have other rows' results, or none: solved, and told as one map."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward
from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.families.engine import prepared
from mxfp4ref.conformance.families.evidence import gather
from mxfp4ref.conformance.families.hypotheses.slots import slot_hypotheses
from mxfp4ref.conformance.families.hypothesis import SlotRows, local_of
from mxfp4ref.conformance.families.solved.row_sources import taken_evidence
from mxfp4ref.conformance.families.solved.taken_rows import taken_hypotheses
from mxfp4ref.sm90.fp32 import to_bf16
from tests.held_out_kernels.by_hand import Rows, layer
from tests.held_out_kernels.calls import captured
from tests.held_out_kernels.second_draw_kernels import second_last_odd_row_is_the_one_before
from tests.helpers.usual import first

Source = Callable[[Rows], Tensor]


def predicting(call: MoeCall, got: Tensor) -> dict[str, tuple[str, ...]]:
    """The sentences of those that predict every bit, with their stages."""
    pipeline, wrong = prepared(call), differing(got, forward(call))
    assert wrong.any()
    found = taken_hypotheses(pipeline, SlotRows.of(pipeline), got, wrong)
    outputs = ((h, h.run(pipeline)) for h in found)
    return {h.words: h.stages for h, out in outputs if out is not None and not differing(out, got).any()}


def result_of(source: Source) -> Callable[[MoeCall], Tensor]:
    return lambda call: layer(call, fc2=lambda rows, acc: to_bf16(acc)[source(rows)])


def without(lost: Source) -> Callable[[MoeCall], Tensor]:
    return lambda call: layer(call, fc2=lambda rows, acc: to_bf16(acc).masked_fill(lost(rows)[:, None], 0.0))


def here(rows: Rows) -> Tensor:
    return torch.arange(len(rows.token))


def counts(rows: Rows) -> Tensor:
    return torch.bincount(rows.expert)[rows.expert]


def tokens_in_turn(call: MoeCall) -> Tensor:
    return layer(call, x=lambda r, x: call.input[(r.token * call.top_k + r.slot) % call.num_tokens])


def shifted_tokens(call: MoeCall) -> Tensor:
    return layer(call, x=lambda rows, x: call.input[(rows.token + 5) % call.num_tokens])


SAME, ANY, ZERO = ("input", "fc2"), ("finalize", "fc2"), ("fc2", "activation")
MODULO = "row n is row n modulo 24"
IN_TURN = "slot n has token n modulo the number of tokens among the slots of all tokens (token by token)"
AROUND = "sorted row n is sorted row n + 3, around the end"
LAST = "the last 8 rows of each expert that has a multiple of 8 rows are left out, or zero: not computed"
BEYOND = "of all rows, sorted by expert, those from number 64 on are left out, or zero: not computed"
FIRST = "the first 2 rows of each expert whose number of rows is no multiple of 4 are left out, but for the fc2 bias"


@pytest.mark.parametrize(
    ("kernel", "name", "words", "stages"),
    first(2, [
        (result_of(lambda r: here(r) - r.position // 24 * 24), "tokens_150", MODULO, SAME),
        (result_of(lambda r: here(r) % 192), "tokens_150", "is sorted row n modulo 192", ANY),
        (result_of(lambda r: (here(r) + 3) % len(r.token)), "gpt_oss", AROUND, ANY),
        (tokens_in_turn, "gpt_oss", IN_TURN, ("input", "slots")),
        (shifted_tokens, "gpt_oss", "token n is token n + 5, around the end", ("input", "slots")),
        (without(lambda r: (counts(r) % 8 == 0) & (r.position >= counts(r) - 8)), "prefill", LAST, ("fc1", "fc2")),
        (without(lambda r: torch.arange(len(r.position)) >= 64), "prefill", BEYOND, ("fc1", "fc2")),
        (without(lambda r: (counts(r) % 4 != 0) & (r.position < 2)), "gpt_oss", FIRST, ZERO),
    ]),
)  # fmt: skip
def test_a_map_is_solved(
    kernel: Callable[[MoeCall], Tensor], name: str, words: str, stages: tuple[str, ...]
) -> None:
    call = captured(name)
    found = predicting(call, kernel(call))
    assert stages in [s for told, s in found.items() if words in told], found


def test_a_row_at_the_end_of_an_expert_may_be_another_at_any_stage() -> None:
    call = captured("prefill")
    got, want = second_last_odd_row_is_the_one_before(call), forward(call)
    found = taken_evidence(prepared(call), SlotRows.of(prepared(call)), got, differing(got, want))
    assert found is not None
    assert found.stages == SAME
    assert "each of these is the last row of its expert" in found.sentence


def test_what_is_no_sum_of_right_rows_gives_none() -> None:
    call = captured("prefill")
    assert predicting(call, layer(call, fc2=lambda rows, acc: to_bf16(acc * 1.5))) == {}


def test_foreign_slots_that_were_added_are_told() -> None:
    call = captured("expert_rank_2_of_4")
    ids = call.token_selected_experts.long()

    def local(right: Tensor) -> Tensor:
        return torch.where((ids % 5 == 0) & (right < 0), 1, right)

    got, want = layer(call, local=local), forward(call)
    first = gather(prepared(call), got, want, differing(got, want))[0]
    assert first.stages == ("slots",)
    assert "slots that are another rank's, or padded, are computed and added: id" in first.sentence
    assert "by expert 9" in first.sentence
    assert all(int(number) % 5 == 0 for number in re.findall(r"ids? (\d+)", first.sentence))


def test_weights_normalised_over_a_rank_s_slots_are_no_foreign_slots() -> None:
    """Of a token's only slot both look alike, and both are said then."""
    call = captured("expert_rank_2_of_4")
    own = local_of(prepared(call)) >= 0
    call = call.select((own.sum(1) == 1).nonzero().flatten())
    weights, own = call.token_final_scales, local_of(prepared(call)) >= 0
    over_own = weights / (weights * own).sum(1, keepdim=True) * weights.sum(1, keepdim=True)
    got = forward(replace(call, token_final_scales=over_own))
    want = forward(call)
    first = gather(prepared(call), got, want, differing(got, want))[0]
    assert "as if normalised over this rank's slots" in first.sentence
    assert set(first.stages) == {"finalize", "slots"}


def test_the_first_id_of_the_next_rank_has_words() -> None:
    call = captured("expert_rank_2_of_4")
    ids = call.token_selected_experts
    pipeline = prepared(call)
    got = layer(call, local=lambda right: torch.where(ids == 12, 0, right))
    asked = (h for h in slot_hypotheses(call) if "first id" in h.words)
    named = [h for h in asked if not differing(h.run(pipeline), got).any()]
    assert (
        "slots with the first id of the next rank, to be skipped, are computed by the rank's first expert"
        in [h.words for h in named]
    )
