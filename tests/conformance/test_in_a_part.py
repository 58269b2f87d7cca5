"""Changes that hold for some tokens, slots or experts: which ones is told by a rule that all cases have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward
from mxfp4ref.conformance import Kernel, Options, run
from mxfp4ref.conformance.families.concerned import FREE, kinds_concerned, slots_concerned
from mxfp4ref.conformance.families.engine import prepared
from mxfp4ref.conformance.families.hypothesis import SlotRows, finalized
from mxfp4ref.conformance.families.places import named_experts
from mxfp4ref.goldens import open_goldens
from tests.held_out_kernels.calls import captured
from tests.held_out_kernels.in_a_part import (
    fc2_scales_transposed_but_the_first,
    first_eight_tokens_twice,
    rows_of_the_second_tile_twice,
)

_CASES = (
    "gemm/uneven_experts",
    "gemm/experts_between_empty_ones",
    "finalize/missing_experts",
    "gemm/single_group",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "words"),
    [
        (first_eight_tokens_twice, ", for the first 8 tokens"),
        (
            fc2_scales_transposed_but_the_first,
            "(transposed), for slots of all experts but the first expert",
        ),
        (rows_of_the_second_tile_twice, "rows beyond the first 8 of their expert"),
    ],
)
def test_one_rule_for_all_cases(function: Callable[[MoeCall], Tensor], words: str) -> None:
    """Some cases are wrong everywhere and some nowhere; the first rule that fits one case fits no other."""
    kernel = Kernel("wrong", ("moe",), lambda kind, call: ((call,), {}), function, True)
    goldens = open_goldens()
    finding = run(kernel, [goldens.load(case) for case in _CASES], Options(repeat=False)).finding
    assert words in finding.sentence.partition(". ")[0]
    assert finding.exact


def _changed(call: MoeCall, chosen: Tensor) -> tuple[SlotRows, Tensor, Tensor, Tensor]:
    """The right rows, those with other scales, the right output, and that where `chosen [M, k]` have these."""
    pipeline = prepared(call)
    rows = SlotRows.of(pipeline)
    scales = call.experts.fc2_scales
    assert scales is not None
    other = SlotRows.of(pipeline.having(fc2_scales=scales.roll(1, 1))).y
    got = finalized(pipeline, torch.where(chosen[..., None], other, rows.y), rows.local, rows.weights)
    return rows, other, forward(call), got


def test_the_slots_that_a_change_concerns_are_solved() -> None:
    call = prepared(captured("odd_tokens")).call
    chosen = torch.rand(call.token_selected_experts.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    rows, other, want, got = _changed(call, chosen)
    concerned, fits = slots_concerned(prepared(call), rows, other, want, got)
    assert bool(fits.all())
    shown = concerned != FREE
    assert bool(shown[rows.local >= 0].all())
    assert torch.equal(concerned[shown] == 1, chosen[shown])
    got[0, 0] = -got[0, 0]
    assert not bool(slots_concerned(prepared(call), rows, other, want, got)[1][0])


def test_a_row_that_cannot_show_is_neither() -> None:
    call = prepared(captured("odd_tokens")).call
    call = replace(call, token_final_scales=call.token_final_scales.clone())
    call.token_final_scales[:, 0] = 1e-30
    rows, other, want, got = _changed(call, torch.ones_like(call.token_final_scales, dtype=torch.bool))
    concerned, fits = slots_concerned(prepared(call), rows, other, want, got)
    assert bool(fits.all())
    assert bool((concerned[:, 0] == FREE).all())


@pytest.mark.parametrize(
    ("some", "words", "of_six"),
    [
        ({1, 2, 3}, "all experts but the first expert", [1, 2, 3, 4, 5]),
        ({0, 1, 3}, "all experts but expert 2", [0, 1, 3, 4, 5]),
        ({0, 1}, "the lower half of the experts", [0, 1, 2]),
        ({3}, "the last expert", [5]),
        ({2}, "expert 2", [2]),
    ],
)
def test_rules_of_experts_hold_in_other_calls(some: set[int], words: str, of_six: list[int]) -> None:
    call = open_goldens().load("finalize/missing_experts").call()
    assert call.experts.num_experts == 4
    named = named_experts(call, some, set(range(4)) - some)
    assert named is not None
    assert (named.words, sorted(named.of_any(6))) == (words, of_six)
    local = torch.arange(4).expand(call.token_final_scales.shape)
    concerned = torch.isin(local, torch.tensor(sorted(some)))
    (first, where), *_ = kinds_concerned(call, local, concerned.long())
    assert first == f"of {words}"
    assert torch.equal(where(call, local), concerned)
