"""Tensors of other experts, solved as a table by experts or blocks of rows, and the rules that give it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward
from mxfp4ref.conformance import differing
from mxfp4ref.conformance.families.engine import prepared
from mxfp4ref.conformance.families.evidence import look_closer
from mxfp4ref.conformance.families.hearing import Failure
from mxfp4ref.conformance.families.hypothesis import Hypothesis, SlotRows
from mxfp4ref.conformance.families.jury import judge
from mxfp4ref.conformance.families.search import Match
from mxfp4ref.conformance.families.solved.whose import whose_hypotheses
from mxfp4ref.conformance.families.telling import told
from tests.held_out_kernels.by_hand import Rows, layer, with_experts
from tests.held_out_kernels.calls import captured
from tests.held_out_kernels.definition import load_all
from tests.helpers import usual

Kernel = Callable[[MoeCall], Tensor]
ODD = torch.tensor([3, 0, 7, 1, 4, 6, 2, 5])  # an order of 8 experts that no rule gives


def predicting(call: MoeCall, got: Tensor) -> list[Hypothesis]:
    """Those that predict every bit, the simplest first."""
    pipeline, wrong = prepared(call), differing(got, forward(call))
    assert wrong.any()
    found = whose_hypotheses(pipeline, SlotRows.of(pipeline), got, wrong)
    outputs = ((h, h.run(pipeline)) for h in found)
    exact = [h for h, out in outputs if out is not None and not differing(out, got).any()]
    return sorted(exact, key=lambda h: h.cost)


def by(name: str) -> Kernel:
    return load_all()[name].function


def having(*names: str) -> Kernel:
    return lambda c: layer(with_experts(c, **{name: getattr(c.experts, name)[ODD] for name in names}))


def multiplied(whose: Callable[[Rows], Tensor]) -> Kernel:
    return lambda call: layer(call, expert2=whose)


def last_rows_expert(rows: Rows) -> Tensor:
    row = torch.arange(len(rows.expert))
    return rows.expert[(row // 32 * 32 + 31).clamp(max=len(row) - 1)]


def second_tile(rows: Rows) -> Tensor:
    return torch.where(rows.tile(8) == 1, ODD[rows.expert], rows.expert)


BY_NAME = "expert n is replaced by the n-th in the order of their names sorted as strings"
TABLE = (
    "those of other experts: expert 0 has those of expert 3, 1 of 0, 2 of 7, 3 of 1, 5 of 6, 6 of 2, 7 of 5"
)


@pytest.mark.parametrize(
    ("kernel", "name", "words"),
    usual.first(1, [
        (having("fc1_scales"), "prefill", f"GEMM1's scales are {TABLE}"),
        (having("fc1_biases", "swiglu_beta"), "gpt_oss", ""),
        (multiplied(last_rows_expert), "prefill", "each tile of 32 sorted rows, which may hold rows of several"),
        (by("experts_stacked_by_sorted_names"), "many_experts", BY_NAME),
        (having("fc1_weights"), "equal_weights", f"GEMM1's weights (codes without the scales) are {TABLE}"),
        (having("fc2_weights", "fc2_scales"), "prefill", f"GEMM2's weights with their scales are {TABLE}"),
        (having("fc2_biases"), "gpt_oss", f"the fc2 biases are {TABLE}"),
        (having("swiglu_alpha"), "gpt_oss", f"the SwiGLU alpha are {TABLE}"),
        (multiplied(second_tile), "prefill", "in its rows 8 to 15 expert 0 has those of expert 3, 1 of 0"),
        (by("expert_ids_of_another_block_size"), "prefill", "padded to blocks of 16, and a row has those of"),
        (by("alpha_by_slot"), "gpt_oss", "the SwiGLU alpha are those of other experts: they are indexed by the"),
        (by("experts_beyond_eight_are_the_first"), "many_experts", "expert 8 is replaced by expert 0, 9 by 0, 10 b"),
    ]),
)  # fmt: skip
def test_whose_tensors_are_solved(kernel: Kernel, name: str, words: str) -> None:
    call = captured(name)
    found = [h.words for h in predicting(call, kernel(call))]
    assert bool(found) == bool(words), found
    assert not words or any(words in one for one in found), found


def test_rules_are_told_after_the_table_that_they_give() -> None:
    call = captured("idle_experts")
    got = by("fc2_scales_by_number_among_active_experts")(call)
    sentence = told([Match(h, True) for h in predicting(call, got)], (), [call]).sentence
    assert sentence.startswith(
        "GEMM2's scales are those of other experts: expert 1 has those of expert 0, 4 of 1, 7 of 2 (rules that give "
        "this: the n-th expert that has rows has those of expert n (idle ones are not counted); or the n-th "
    )


@pytest.mark.slow
def test_what_is_all_that_an_expert_has_is_told_of_slots_and_of_weights() -> None:
    """Without biases and parameters another expert for a slot gives the same as the weights of another one."""
    call = captured("idle_experts")
    got = by("problem_sizes_compacted_pointers_not")(call)
    finding = told([Match(h, True) for h in predicting(call, got)], (), [call])
    assert finding.stages == ("slots", "fc1")
    slots, weights = finding.sentence.split(". The same bits would come from: ", 1)
    assert slots.startswith(
        "slots are computed by other experts: expert 1 is replaced by expert 0, 4 by 1, 7 by 2"
    )
    assert weights.startswith(
        "(1) the weights of both GEMMs, with their scales, are those of other experts: "
    )


@pytest.mark.slow
def test_the_only_rule_is_told_before_its_table() -> None:
    call = captured("gpt_oss")
    sentence = told(
        [Match(h, True) for h in predicting(call, by("fc1_bias_fetched_one_tile_late")(call))], (), [call]
    ).sentence
    assert "the first tile of 16 rows of each expert has those of the expert with rows before it" in sentence
    assert sentence.endswith("in its rows 0 to 15 expert 1 has those of expert 0, 2 of 1, 3 of 2, 4 of 3, "
                             "5 of 4, 6 of 5, 7 of 6")  # fmt: skip


@pytest.mark.slow
def test_a_table_up_to_roundings_is_evidence() -> None:
    call = captured("prefill")
    want, got = forward(call), having("fc2_scales")(call)
    last = torch.where(torch.arange(got.shape[1]) % 7 == 0, 1, 0).to(torch.int16)
    got = (got.view(torch.int16) ^ last).view(torch.bfloat16)
    assert not predicting(call, got)
    (found, *_) = look_closer(prepared(call), got, differing(got, want), [])
    assert found.stages == ("fc2",)
    assert f"GEMM2's scales are {TABLE}; all else of the tokens solved is right" == found.sentence


@pytest.mark.slow
def test_a_rule_of_one_case_that_another_refutes_is_withdrawn() -> None:
    """In both calls experts have those of others, in one of them by chance those of the one before."""
    one, other = captured("prefill"), captured("equal_weights")
    scales = one.experts.fc2_scales
    assert scales is not None
    outputs = (forward(with_experts(one, fc2_scales=scales.roll(1, 0))), having("fc2_scales")(other))
    failures = [
        Failure(name, prepared(call), got, forward(call))
        for name, call, got in zip(("a", "b"), (one, other), outputs, strict=True)
    ]
    finding = judge(failures, lambda: (), seconds=2).finding
    assert finding.stages == ("fc2",)
    assert finding.sentence.startswith("GEMM2's scales are those of other experts: in ")
    assert "previous" not in finding.sentence
    assert finding.exact


@pytest.mark.slow
def test_a_table_by_experts_is_one_of_other_calls_too() -> None:
    """By the experts' numbers on their rank, on which the second call has experts 8 to 11."""
    calls = [captured("idle_experts"), captured("expert_rank_2_of_4")]
    kernel = by("first_two_experts_swapped")
    table = next(h for h in predicting(calls[1], kernel(calls[1])) if h.table)
    assert "experts 8 and 9 are exchanged, expert 8 is replaced by expert 9, 9 by 8" in table.words
    assert table.words.endswith("(expert 8 is the rank's first)")
    assert not bool(differing(table.change(prepared(calls[0])).run(), kernel(calls[0])).any())


@pytest.mark.slow
def test_equal_tensors_are_no_others() -> None:
    """Experts with one alpha: which of them it is does not show, and a rule that moves only these is none."""
    call = captured("gpt_oss")
    assert call.experts.swiglu_alpha is not None
    call = with_experts(call, swiglu_alpha=torch.full_like(call.experts.swiglu_alpha, 1.5))
    got = layer(call, x=lambda rows, x: x + 1)
    assert not predicting(replace(call), got)


@pytest.mark.parametrize("copies", [False, True])
def test_a_table_of_experts_is_not_told_beside_a_rule_where_they_are_copies(copies: bool) -> None:
    """Of two copies it names either: "the next expert" and "expert 0 by 3" would be told of one mistake."""
    call = prepared(captured("prefill")).call
    experts = torch.arange(call.experts.num_experts) % (2 if copies else call.experts.num_experts)
    call = replace(call, experts=call.experts.select(experts))
    kind = "slots are computed by other experts"
    table = Hypothesis("ids", ("slots",), f"{kind}: expert 0 by 3", lambda p: p, 1.0, kind=kind, table=True)
    rule = Hypothesis("ids", ("slots",), "slots are computed by the next expert", lambda p: p, 1.1, kind=kind)
    sentence = told([Match(table, True), Match(rule, True)], (), [call]).sentence
    assert sentence == rule.words + "; expert 0 by 3" * (not copies)
