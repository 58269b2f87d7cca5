"""Two changes at once, of which the first one is told by each of the words that give the same."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref import forward
from mxfp4ref.conformance.families.engine import prepared
from mxfp4ref.conformance.families.hypotheses.outputs import factor_hypotheses
from mxfp4ref.conformance.families.hypotheses.roundings import rounding_hypotheses
from mxfp4ref.conformance.families.search import Search
from mxfp4ref.conformance.families.telling import told
from mxfp4ref.conformance.families.twos import nearest_of_two
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import Stages
from mxfp4ref.sm90.fp32 import mul, to_bf16
from tests.held_out_kernels.calls import captured
from tests.held_out_kernels.definition import load_all


def doubled_and_cut(x: Tensor) -> Tensor:
    return (mul(x, torch.full_like(x, 2.0)).view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


def test_a_factor_and_a_rounding_are_told_with_all_places_of_the_factor() -> None:
    call: MoeCall = captured("odd_tokens")
    pipeline, got = prepared(call), forward(call, Stages(round_output=doubled_and_cut))
    search = Search(pipeline, got, forward(call), 1e300)
    assert search.run(factor_hypotheses(2.0)) == []
    found = nearest_of_two(search, lambda: rounding_hypotheses(call), most=2)
    words = [match.hypothesis.words for match in found]
    assert all("the output is cut to bf16 instead of rounded" in one for one in words)
    for place in ("on the sum", "on the routing weights", "on GEMM2's result", "on the activation"):
        assert any(f"a factor of 2 too many {place}" in one for one in words)
    finding = told(found, [], [call])
    assert finding.exact
    assert "finalize" in finding.stages


def test_a_factor_that_is_rounded_nowhere_else_lies_in_the_sum() -> None:
    """Elsewhere it gives three quarters of the bits at most."""
    call: MoeCall = captured("odd_tokens")
    got = load_all()["third_factor_folded_into_w2"].function(call)
    search = Search(prepared(call), got, forward(call), 1e300)
    assert search.run(factor_hypotheses(4 / 3)) == []
    assert told(search.almost(), [], [call]).stages == ("finalize",)
    in_gemm2 = forward(call, Stages(round_fc2=lambda x: to_bf16(mul(x, torch.full_like(x, 4 / 3)))))
    search = Search(prepared(call), in_gemm2, forward(call), 1e300)
    elsewhere = [h for h in factor_hypotheses(4 / 3) if h.stages == ("finalize",)]
    assert search.run(elsewhere) == []
    assert told(search.almost(), [], [call]).stages == ()
