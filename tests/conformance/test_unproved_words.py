"""What is said of an output holds for all of it, and is not what a correct evaluation or zeros would give too."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mxfp4ref import forward
from mxfp4ref.conformance import differing
from mxfp4ref.conformance.families.engine import prepared
from mxfp4ref.conformance.families.evidence import gather
from mxfp4ref.conformance.families.weighting import weight_hypotheses
from mxfp4ref.conformance.finding import Evidence
from mxfp4ref.conformance.stage_fit import reconcile
from mxfp4ref.goldens import open_goldens
from mxfp4ref.model.call import MoeCall

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


def test_weights_that_nothing_tells_are_not_refuted() -> None:
    """Some rows are zero, as weights of zero give, and of the others the experts' outputs are too much alike."""
    call = call_of("finalize/slot_order")
    got = one_weight_for_all_slots(call)
    assert reconcile(call, {"output": got}, differing(got, forward(call))).words.startswith("unknown: ")


def test_a_weight_read_at_the_tokens_number() -> None:
    call = call_of("gemm/uneven_experts")
    got, pipeline = one_weight_for_all_slots(call), prepared(call)
    (found,) = (
        h for h in weight_hypotheses(call) if (out := h.run(pipeline)) is not None and torch.equal(out, got)
    )
    assert "one for all slots of a token, read at its number" in found.words
