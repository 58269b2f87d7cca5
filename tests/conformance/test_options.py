"""Calls without routing weights, with all-to-all, or without a gate, through the kit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mxfp4ref.conformance import Options, run
from mxfp4ref.goldens import open_goldens
from mxfp4ref.model.flashinfer import torch_ref_cutlass_fused_moe
from mxfp4ref.sm90.activation import ACTIVATIONS
from tests.helpers.usual import first

GOLDENS = open_goldens()
CASES = ("options/alltoall_foreign_tokens", "options/no_routing_weights", "ungated/relu2_layer")


def cutlass_fused_moe(**arguments: Any) -> list[Tensor]:
    return torch_ref_cutlass_fused_moe(**arguments)


def fills_foreign_rows(**arguments: Any) -> list[Tensor]:
    """With zeros, as if all-to-all's receiver had nothing of its own in these rows."""
    output = arguments.pop("output")
    return [output.copy_(torch_ref_cutlass_fused_moe(**arguments)[0])]


def leaves_garbage(*, enable_alltoall: bool = False, **arguments: Any) -> Tensor:
    """In rows of a tensor of its own that it does not write."""
    arguments.pop("output")
    garbage = torch.full_like(arguments["input"], 3.0)
    named = arguments | {"enable_alltoall": enable_alltoall, "output": garbage}
    return torch_ref_cutlass_fused_moe(**named)[0]


@pytest.mark.parametrize("name", CASES)
def test_the_drop_in_conforms(name: str) -> None:
    report = run(cutlass_fused_moe, [GOLDENS.load(name)], isolate=False)
    assert [result.status for result in report.results] == ["equal"]


def test_rows_that_are_not_to_be_written_are_looked_at() -> None:
    """They are those of an `output` that may hold anything; of a tensor of the kernel's own they are unset."""
    options = Options(diagnosis="none")
    (result,) = run(fills_foreign_rows, [GOLDENS.load(CASES[0])], options, isolate=False).results
    assert result.status == "input modified"
    assert "output at 8 tokens without an expert of this rank, the first of them 0" in result.message
    (result,) = run(leaves_garbage, [GOLDENS.load(CASES[0])], options, isolate=False).results
    assert result.status == "equal"


def test_a_mistake_without_a_gate_is_diagnosed() -> None:
    """By defects and families that know of no halves of fc1."""

    def doubled(**arguments: Any) -> list[Tensor]:
        scales = arguments["token_final_scales"]
        return torch_ref_cutlass_fused_moe(**arguments | {"token_final_scales": scales * 2})

    (result,) = run(doubled, [GOLDENS.load(CASES[2])], Options(diagnosis="quick"), isolate=False).results
    assert result.status == "differs"
    assert result.diagnosis is not None
    assert "2" in str(result.diagnosis.finding)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "other"),
    first(1, [("ungated/gelu_at_rounding_boundaries", "Silu"), ("ungated/identity_with_biases", "Relu")]),
)
def test_another_activation_without_a_gate_is_named(name: str, other: str) -> None:
    """Of one token's hypotheses some are computed at once: those that differ in no more than tensors."""
    (number,) = (id for id, activation in ACTIVATIONS.items() if activation.name == other)

    def kernel(**arguments: Any) -> list[Tensor]:
        return torch_ref_cutlass_fused_moe(**arguments | {"activation_type": number})

    (result,) = run(kernel, [GOLDENS.load(name)], Options(diagnosis="quick"), isolate=False).results
    assert result.diagnosis is not None
    assert f"the activation is {other}, where " in str(result.diagnosis.finding)
