"""What is said of an output holds for all of it, and is not what a correct evaluation or zeros would give too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mxfp4ref import forward
from mxfp4ref.conformance import Kernel, Options, diagnose, differing, run
from mxfp4ref.conformance.families.engine import prepared
from mxfp4ref.conformance.families.evidence import gather
from mxfp4ref.conformance.families.hypothesis import SlotRows, local_of
from mxfp4ref.conformance.families.slot_kinds import position_in_expert
from mxfp4ref.conformance.families.solved import second_gemm
from mxfp4ref.conformance.families.solved.weight_rules import weight_rules
from mxfp4ref.conformance.findings.finding import Evidence
from mxfp4ref.conformance.findings.stage_fit import reconcile
from mxfp4ref.conformance.kernels.adapters import whole_arguments
from mxfp4ref.conformance.looking import SECONDS
from mxfp4ref.defects import DEFECTS
from mxfp4ref.formats.mxfp4 import dequantize
from mxfp4ref.goldens import open_goldens
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import trace
from mxfp4ref.sm90 import fp32
from tests.held_out_kernels.calls import captured
from tests.held_out_kernels.second_draw_kernels import (
    second_activation_over_its_input,
    second_split_tiles_meet_in_bf16,
)
from tests.helpers import usual
from tests.helpers.usual import first

GOLDENS = open_goldens()


def call_of(case: str) -> MoeCall:
    return prepared(GOLDENS.load(case).call()).call


def weighed(call: MoeCall, weights: Tensor) -> Tensor:
    return forward(replace(call, token_final_scales=weights))


def one_weight_for_all_slots(call: MoeCall) -> Tensor:
    weights = call.token_final_scales
    return weighed(call, weights.flatten()[: len(weights), None].expand_as(weights).contiguous())


def evidence(call: MoeCall, got: Tensor) -> list[Evidence]:
    want = forward(call)
    return gather(prepared(call), got, want, differing(got, want))


@pytest.mark.parametrize(
    "case", ["finalize/padded_rows_not_finite", "finalize/padded_slots_beside_infinite_experts"]
)
def test_one_tokens_factor_is_not_everyones(case: str) -> None:
    call = call_of(case)
    got = one_weight_for_all_slots(call)
    assert "everything counts" not in str(evidence(call, got))
    assert reconcile(call, {"output": got}, differing(got, forward(call))).words.startswith("finalize: ")
    assert "as far as bf16 shows" in str(evidence(call, weighed(call, call.token_final_scales * 0.6)))


def test_of_an_activation_that_is_right_in_part_the_input_is_right() -> None:
    call = call_of("gemm/first_groups_underflow")
    found = evidence(call, second_activation_over_its_input(call))
    assert any(e.stages == ("fc1", "activation") and "read or overwrite others" in e.sentence for e in found)
    assert not any("input" in e.stages for e in found)


def test_roundings_in_some_columns_alone_are_not_spread_by_chance() -> None:
    call = captured("prefill")
    found = evidence(call, second_split_tiles_meet_in_bf16(call))
    assert [e.stages for e in found] == [("fc2", "finalize")]
    assert "all in columns 192 to 255 of 256" in found[0].sentence


def in_float32(call: MoeCall, inside: Callable[[Tensor], Tensor] = lambda h: h) -> Tensor:
    """One slot a token: GEMMs in torch's order, and what is done with GEMM1's output."""
    some = call.experts
    assert some.fc1_scales is not None
    assert some.fc2_scales is not None
    first = dequantize(some.fc1_weights, some.fc1_scales, convention="sm90", dtype=torch.float32)
    second = dequantize(some.fc2_weights, some.fc2_scales, convention="sm90", dtype=torch.float32)
    expert = call.token_selected_experts[:, 0].long()
    h = torch.einsum("mk,mrk->mr", call.input.float(), first[expert]).bfloat16().float()
    up, gate = inside(h).chunk(2, 1)
    activation = (up * gate / (1 + (-gate).exp())).bfloat16().float()
    y = torch.einsum("mi,mhi->mh", activation, second[expert]).bfloat16().float()
    return (y * call.token_final_scales).bfloat16()


def test_another_order_of_summation_is_no_other_formula() -> None:
    call = call_of("gemm/mirrored_hidden_1536")
    found = evidence(call, in_float32(call))
    assert [one.stages for one in found] == [()]
    assert "a correct kernel that sums in another order could give this" in found[0].sentence
    call = call_of("gemm/ordinary")
    one = {n: getattr(call, n)[:, :1].contiguous() for n in ("token_selected_experts", "token_final_scales")}
    call = replace(call, **one)
    found = evidence(call, in_float32(call, lambda h: 1.1 * h))
    assert found
    assert "another order" not in str(found)


@pytest.mark.parametrize(
    "case", usual.first(1, ["gemm/ordinary", "gemm/wide_exponents", "gemm/mirrored_hidden_384"])
)
def test_nothing_is_named_that_only_gives_zeros(case: str) -> None:
    call = call_of(case)
    want = forward(call)
    found = diagnose("moe", call, {"output": torch.zeros_like(want)}, {"output": want})
    assert (found.finding.exact, found.finding.hypotheses, found.predictions) == (False, (), ())
    assert "as by" not in found.finding.sentence
    assert "zero" in found.finding.sentence


CLAMP = "activation/non_finite_before_clamp"


@pytest.mark.slow
@pytest.mark.parametrize("bits", first(1, [0x7FFF, -1]))
def test_nan_everywhere_is_first_that_of_what_concerns_nan(bits: int) -> None:
    """Much else gives nothing but NaN there, as swapped rows do; a kernel's NaN may have other bits."""
    call = call_of(CLAMP)
    want, got = forward(call), DEFECTS["clamp_propagates_nan"].run(call)
    assert bool(got.isnan().all())
    got = torch.full_like(got.view(torch.int16), bits).view(torch.bfloat16)
    finding = diagnose("moe", call, {"output": got}, {"output": want}, diagnosis="quick").finding
    assert (finding.exact, finding.stages, finding.hedged) == (False, ("activation",), True)
    assert "; among what gives this: clamp_propagates_nan: " in finding.sentence
    assert "other mistakes of which none concerns NaN" in finding.sentence
    assert ("but for the bits of NaN" in finding.sentence) == (bits == -1)
    assert "all other rows" not in finding.sentence, "there are none"


@pytest.mark.slow
def test_rows_of_nan_beside_rows_that_underflow() -> None:
    call = call_of("activation/plain_special_values")
    want = forward(call)
    h = trace(call)
    above = torch.zeros(call.num_tokens, dtype=torch.bool)
    above[h.token[(fp32.widen(h.fc1_output)[:, call.experts.intermediate_size :] > 89).any(1)]] = True
    got = want.clone()
    got[above] = torch.nan
    assert bool(above.any() & ~above.all())
    token = int((~above).nonzero()[0])
    got[token, 0] = 2.0**-130
    finding = diagnose("moe", call, {"output": got}, {"output": want}, diagnosis="quick").finding
    assert "came out NaN in every column" in finding.sentence
    assert "all other rows are right but for what underflows" in finding.sentence
    assert "each of these tokens, and no other, has a gate above 88.72" in finding.sentence
    beside = want.clone()
    beside[above] = torch.nan
    beside[token] += 1
    assert "came out NaN" not in str(evidence(call, beside))


@pytest.mark.slow
@pytest.mark.usefixtures("patient")
def test_zeros_are_predicted_by_what_another_case_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SECONDS, "quick", 2.0)  # nothing is found in the first case alone

    def dropped(kind: str, call: MoeCall) -> Tensor:
        return DEFECTS["last_slot_dropped"].run(call)

    names = ("gemm/wide_exponents", "finalize/slot_order")  # of one slot a token, and of several
    kernel = Kernel("it", ("moe",), whole_arguments, dropped)
    report = run(kernel, [GOLDENS.load(name) for name in names], Options(diagnosis="quick", repeat=False))
    assert "last_slot_dropped" in report.defects
    alone = run(kernel, [GOLDENS.load(names[0])], Options(diagnosis="quick", repeat=False))
    assert alone.defects == ()
    assert "last_slot_dropped" not in alone.verdict


@pytest.mark.slow
def test_zeros_name_nothing() -> None:
    """`last_slot_dropped` gives zeros too where tokens have one slot: what it predicts of zeros is no proof of it."""
    names = ("finalize/flush_boundary_of_products", "ungated/relu_special_values")
    kernel = Kernel("it", ("moe",), whole_arguments, lambda kind, call: torch.zeros_like(forward(call)))
    report = run(kernel, [GOLDENS.load(name) for name in names], Options(diagnosis="quick", repeat=False))
    told = [result.diagnosis for result in report.results if result.diagnosis is not None]
    assert [(one.exact, one.finding.exact) for one in told] == [((), False)] * 2


def test_weights_that_nothing_tells_are_not_refuted() -> None:
    """Some rows are zero, as weights of zero give, and of the others the experts' outputs are too much alike."""
    call = call_of("finalize/slot_order")
    got = one_weight_for_all_slots(call)
    assert reconcile(call, {"output": got}, differing(got, forward(call))).words.startswith("unknown: ")


def test_a_weight_read_at_the_tokens_number() -> None:
    call = call_of("gemm/uneven_experts")
    got, pipeline = one_weight_for_all_slots(call), prepared(call)
    rules = list(weight_rules(SlotRows.of(pipeline), got, differing(got, forward(call))))
    exact = [h.words for h in rules if (out := h.run(pipeline)) is not None and torch.equal(out, got)]
    assert any("read by the token's number from a list of all" in words for words in exact), exact


def partial_blocks_of_the_next_expert(call: MoeCall, whole: int = 16) -> Tensor:
    """The rows of an expert beyond the last whole block are computed by the next expert that has rows.

    Not where the token has that expert too, if it has more than two.
    """
    local = local_of(prepared(call))
    position, rows = position_in_expert(local)
    used = sorted(set(local[local >= 0].tolist()))
    after = torch.tensor([*used[1:], used[-1]])[torch.searchsorted(torch.tensor(used), local.clamp(min=0))]
    moved = (rows > whole) & (position >= rows // whole * whole) & (local >= 0)
    if call.top_k > 2:
        moved &= ~(after[:, :, None] == local[:, None]).any(2)
    ids = torch.where(moved, after, local).to(torch.int32)
    return forward(replace(call, token_selected_experts=ids, ep_size=1, ep_rank=0))


@pytest.mark.slow
def test_the_slots_themselves_are_told_and_not_all_of_their_tokens() -> None:
    call = call_of("gemm/uneven_experts")
    want, got = forward(call), partial_blocks_of_the_next_expert(call)
    finding = diagnose("moe", call, {"output": got}, {"output": want}).finding
    assert finding.exact
    # In this call the tiles of 16 rows are those of all sorted rows, too.
    of_slots = "slots are computed by the next expert" in finding.sentence
    assert of_slots or "its last row's expert" in finding.sentence
    assert (
        not of_slots or "for slots that are rows beyond the first 16 of their expert only" in finding.sentence
    )
    assert "for tokens with slots" not in finding.sentence


def test_an_expert_is_not_said_to_be_another_in_all_of_its_rows() -> None:
    call = captured("prefill")
    got, want = partial_blocks_of_the_next_expert(call), forward(call)
    found = evidence(call, got)
    assert bool(differing(got, want).any())
    assert "slots are computed by other experts" in found[0].sentence
    assert ", not in all of their rows" in found[0].sentence or "on of an expert only" in found[0].sentence


def test_numbers_that_are_a_little_wrong_are_not_in_other_places() -> None:
    torch.manual_seed(1)
    right = torch.randn(3, 64, dtype=torch.float64)
    unsure = torch.full_like(right, 0.02)
    assert second_gemm._permuted(right, right.roll(1, 1) + 0.001 * torch.randn_like(right), unsure)
    assert not second_gemm._permuted(right, right + 0.02 * torch.randn_like(right), unsure)
