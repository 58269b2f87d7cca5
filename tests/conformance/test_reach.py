"""Right elements are evidence where they could have differed only: GEMM2's weights may be zeros, or one in a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward
from mxfp4ref.conformance import diagnose, differing
from mxfp4ref.conformance.families.engine import prepared
from mxfp4ref.conformance.families.evidence import gather
from mxfp4ref.conformance.findings.attribution import attribution
from mxfp4ref.conformance.findings.patterns import patterns
from mxfp4ref.conformance.findings.reach import is_spread, reached
from mxfp4ref.conformance.kernels.stand_ins import defect_outputs
from mxfp4ref.defects import DEFECTS
from mxfp4ref.defects.variants.swiglu import SwigluVariant
from mxfp4ref.goldens import open_goldens
from mxfp4ref.model.forward import KERNEL, Stages
from mxfp4ref.sm90 import fp32
from tests.helpers import usual

GOLDENS = open_goldens()
ONE_HOT = (
    *("alpha_alone", "alpha_beta_at_rounding_boundaries", "beta_alone", "bias_before_clamp"),
    *("gate_clamp_saturates", "gpt_oss_special_values", "limit_special_values"),
)


def of_even_columns(activation: Any, h: Tensor, bias: Tensor | None, parameters: Any) -> Tensor:
    """With each odd column's gate that of the even one before it."""

    def paired(t: Tensor) -> Tensor:
        t = t.clone()
        t[..., t.shape[-1] // 2 + 1 :: 2] = t[..., t.shape[-1] // 2 :: 2]
        return t

    return KERNEL.activate(activation, paired(h), None if bias is None else paired(bias), parameters)


ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "gate clamped on both sides": SwigluVariant(
        clamp=lambda up, gate, limit: (
            fp32.maximum(fp32.minimum(up, limit), -limit),
            fp32.maximum(fp32.minimum(gate, limit), -limit),
        )
    ),
    "the even column's gate": of_even_columns,
}


def sparse(name: str) -> MoeCall:
    return prepared(GOLDENS.load(f"activation/{name}").call()).call


@pytest.mark.parametrize("name", usual.first(1, ONE_HOT))
@pytest.mark.parametrize("change", ACTIVATIONS)
def test_a_wrong_activation_is_not_said_to_be_right(name: str, change: str) -> None:
    call = sparse(name)
    got, want = forward(call, Stages(activate=ACTIVATIONS[change])), forward(call)
    wrong = differing(got, want)
    if bool(wrong.any()):
        said = [e for e in gather(prepared(call), got, want, wrong) if e.strength > 1]
        assert not any(word in e.sentence for e in said for word in ("are right", "damaged", "in columns"))
        assert not any(e.stages and "activation" not in e.stages for e in said)


@pytest.mark.parametrize("change", ACTIVATIONS)
def test_columns_of_zeros_are_part_of_no_pattern(change: str) -> None:
    call = sparse("gpt_oss_special_values" if "gate clamped" in change else "gate_clamp_saturates")
    got, want = forward(call, Stages(activate=ACTIVATIONS[change])), forward(call)
    mask = differing(got, want)
    could = reached(call, want, mask)
    assert bool(could[:, :128].any(0).all())
    assert not bool(could[:, 128:].any())
    found = [pattern.words for pattern in patterns(call, got, want, mask, could)]
    assert not any("block" in words for words in found)
    every_second = "exactly every second column differs, from 1 on, of those that could"
    assert (every_second in found) == (change == "the even column's gate")
    assert not any(row.by.startswith("column") for row in attribution(call, mask, could))
    assert any(row.by.startswith("column") for row in attribution(call, mask))


def test_columns_in_blocks_of_several_sizes_are_told_once() -> None:
    call = sparse("gate_clamp_saturates")
    columns = torch.arange(call.experts.hidden_size)
    for wrong, by in ((columns < 128, "column, by 128"), (columns % 64 < 16, "column, by 16")):
        rows = attribution(call, wrong.expand(call.num_tokens, -1))
        assert {row.by for row in rows if row.by.startswith("column")} == {by}


def test_tokens_and_experts_that_could_not_differ_are_part_of_no_pattern() -> None:
    call = prepared(GOLDENS.load("gemm/uneven_experts").call()).call
    weights = call.experts.fc2_weights.clone()
    weights[:3] = 0
    call = replace(call, experts=replace(call.experts, fc2_weights=weights))
    want = forward(call)
    nothing = torch.zeros_like(want, dtype=torch.bool)
    could = reached(call, want, nothing)
    mine = (call.token_selected_experts == 3).any(1)
    assert torch.equal(could.any(1), mine)
    assert not bool(mine.all())
    found = [pattern.words for pattern in patterns(call, want + 1, want, could, could)]
    assert not any(words.startswith("only tokens") for words in found)
    assert "every token differs somewhere, of those that could" in found


def test_one_element_is_damaged_where_its_activation_would_show_elsewhere_too() -> None:
    for call, told in ((sparse("alpha_alone"), False), (GOLDENS.load("gemm/ordinary").call(), True)):
        want = forward(call)
        got = want.clone()
        got.view(torch.int16)[0, 3] ^= 1 << 6
        mask = differing(got, want)
        assert is_spread(call, got, want, mask, [0]) == told
        assert any("damaged" in pattern.words for pattern in patterns(call, got, want, mask)) == told
        said = gather(prepared(call), got, want, mask)
        assert any("damaged" in e.sentence for e in said) == told
        assert not any("is right" in e.sentence for e in said)


def test_what_is_wrong_within_bounds_is_no_evidence_that_it_is_right() -> None:
    call = prepared(GOLDENS.load("gemm/ordinary").call()).call
    want = forward(call)
    outside = torch.rand(want.shape, generator=torch.Generator().manual_seed(4)) < 0.02
    for within, told in ((1.0, True), (1.1, False)):
        got = (want * torch.where(outside, 2.0, within)).to(torch.bfloat16)
        assert is_spread(call, got, want, outside, [0]) == told
        said = gather(prepared(call), got, want, outside, outside)
        assert any("elements were overwritten" in e.sentence for e in said) == told


def test_single_elements_in_every_second_column_have_a_pattern() -> None:
    call = GOLDENS.load("gemm/ordinary").call()
    want = forward(call)
    chosen = torch.rand(want.shape, generator=torch.Generator().manual_seed(3)) < 0.05
    chosen[:, 1::2] = False
    got = want.clone()
    got.view(torch.int16)[chosen] ^= 1 << 6
    (found,) = gather(prepared(call), got, want, chosen)
    assert found.stages == ("fc2", "finalize")
    assert "all of them in every second column, from 0 on" in found.sentence


def test_numbers_of_all_magnitudes_are_no_garbage_where_they_are_expected() -> None:
    call = GOLDENS.load("gemm/ordinary").call()
    want = forward(call)
    garbage = torch.linspace(-60, 60, want[:, :32].numel(), dtype=torch.float64).exp2().view(-1, 32)
    got = want.clone()
    got[:, :32] = garbage.to(torch.bfloat16)
    said = [e.sentence for e in gather(prepared(call), got, want, differing(got, want))]
    assert any("as in memory that was not written" in words for words in said)


@pytest.mark.slow
def test_a_pattern_does_not_contradict_a_finding_that_predicts_every_bit() -> None:
    call = sparse("limit_special_values")
    predicted = defect_outputs(DEFECTS["gate_up_first"], call)
    assert predicted is not None
    found = diagnose("moe", call, predicted, {"output": forward(call)}, diagnosis="quick")
    assert found.finding.exact
    assert not any("single elements" in words or "GEMM" in words for words in found.patterns)
