"""W4A8 calls whose residuals are off by a power of two, in one GEMM or both."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import Tensor

from mxfp4ref import MoeCall, forward
from mxfp4ref.conformance import diagnose
from mxfp4ref.conformance.findings.finding import Finding
from mxfp4ref.formats.humming_experts import HummingExperts
from mxfp4ref.goldens import open_goldens
from mxfp4ref.goldens.runs import runs
from mxfp4ref.model.humming import call_of
from tests.helpers.usual import first

(ORDINARY,) = (run.inputs for run in runs(open_goldens().load("w4a8/ordinary")))
CALL = call_of(ORDINARY)
EXPECTED = forward(CALL)


def told(got: Tensor, *, by_name: bool = False) -> Finding:
    inputs, kind = (ORDINARY, "w4a8") if by_name else (CALL, "moe")
    return diagnose(kind, inputs, {"output": got}, {"output": EXPECTED}).finding


def scaled(call: MoeCall, **factors: float) -> Tensor:
    assert isinstance(call.experts, HummingExperts)
    changed = {name: getattr(call.experts, name) * factor for name, factor in factors.items()}
    return forward(replace(call, experts=replace(call.experts, **changed)))


@pytest.mark.parametrize("by_name", [False, True], ids=["a call", "a golden case"])
@pytest.mark.parametrize(
    ("factors", "words", "stages"),
    first(
        1,
        [
            (
                {"fc2_residual": 64},
                "fc2 are 64x what they should be: their factor of 64 is applied twice",
                ("fc2",),
            ),
            (
                {"fc1_residual": 1 / 64},
                "fc1 are 1/64 of what they should be: their factor of 64 is left out",
                ("fc1",),
            ),
            (
                {"fc1_residual": 2, "fc2_residual": 2},
                "fc1 and fc2 are 2x what they should be: an exponent 1 too high",
                ("fc1", "fc2"),
            ),
        ],
    ),
)
def test_residuals_off_by_a_power_of_two(
    factors: dict[str, float], words: str, stages: tuple[str, ...], by_name: bool
) -> None:
    found = told(scaled(CALL, **factors), by_name=by_name)
    assert (found.sentence, found.stages, found.exact) == (f"the residuals of {words}", stages, True)


def test_a_named_defect_keeps_its_name_and_other_factors_have_none() -> None:
    uncompensated = {"fc1_residual": 1 / 64, "fc2_residual": 1 / 64}
    assert told(scaled(CALL, **uncompensated)).sentence.startswith("fp8_residual_uncompensated")
    assert told(scaled(CALL, fc2_residual=1.5)) == Finding()
