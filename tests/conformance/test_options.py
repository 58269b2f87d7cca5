"""Calls without routing weights, with all-to-all, or without a gate, through the kit."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from mxfp4ref.conformance import Options, run
from mxfp4ref.goldens import open_goldens
from mxfp4ref.model.flashinfer import torch_ref_cutlass_fused_moe

GOLDENS = open_goldens()
CASES = ("options/alltoall_foreign_tokens", "options/no_routing_weights", "ungated/relu2_layer")


def cutlass_fused_moe(**arguments: Any) -> list[Tensor]:
    return torch_ref_cutlass_fused_moe(**arguments)


def fills_foreign_rows(**arguments: Any) -> list[Tensor]:
    """As if all-to-all's receiver had nothing of its own in these rows."""
    output = arguments.pop("output")
    filled = torch_ref_cutlass_fused_moe(**arguments)[0]
    filled[(filled == 0).all(1)] = 1.0
    return [output.copy_(filled)]


@pytest.mark.parametrize("name", CASES)
def test_the_drop_in_conforms(name: str) -> None:
    report = run(cutlass_fused_moe, [GOLDENS.load(name)], isolate=False)
    assert [result.status for result in report.results] == ["equal"]


def test_rows_that_are_not_to_be_written_are_looked_at() -> None:
    options = Options(diagnosis="none")
    report = run(fills_foreign_rows, [GOLDENS.load(CASES[0])], options, isolate=False)
    (result,) = report.results
    assert (result.status, result.differing) == ("differs", 8 * 128)


def test_a_mistake_without_a_gate_is_diagnosed() -> None:
    """By defects and families that know of no halves of fc1."""

    def doubled(**arguments: Any) -> list[Tensor]:
        scales = arguments["token_final_scales"]
        return torch_ref_cutlass_fused_moe(**arguments | {"token_final_scales": scales * 2})

    (result,) = run(doubled, [GOLDENS.load(CASES[2])], Options(diagnosis="quick"), isolate=False).results
    assert result.status == "differs"
    assert result.diagnosis is not None
    assert "2" in str(result.diagnosis.finding)
