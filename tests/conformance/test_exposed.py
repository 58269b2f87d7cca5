"""Intermediates that a kernel returns show the stage by themselves, in all cases together too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mxfp4ref import MoeCall, trace
from mxfp4ref.conformance import Kernel, Options, run
from mxfp4ref.conformance.bounds.bounded import all_within
from mxfp4ref.conformance.bounds.call_bounds import intermediates_within
from mxfp4ref.conformance.families.engine import prepared
from mxfp4ref.conformance.kernels.adapters import whole_arguments
from mxfp4ref.goldens import open_goldens
from mxfp4ref.goldens.runs import Run, runs

NAMES = ("fc1_output", "activation", "fc2_output")
GOLDENS = open_goldens()
CANCELLING = "finalize/biases_cancel"  # whose bounds are so wide that nothing shows in the output


def exposing(call: MoeCall) -> tuple[Tensor, dict[str, Tensor]]:
    steps = trace(call)
    return steps.output, {name: getattr(steps, name) for name in NAMES}


def neighbours_scales(call: MoeCall) -> tuple[Tensor, dict[str, Tensor]]:
    """Of the upper 8 rows of each 16, in the last four groups."""
    scales = call.experts.fc1_scales
    assert scales is not None
    scales, last = scales.clone(), torch.arange(scales.shape[2] - 4, scales.shape[2])
    upper = torch.arange(scales.shape[1]) % 16 >= 8
    scales[:, :, last] = torch.where(upper[:, None], scales[:, :, last ^ 1], scales[:, :, last])
    return exposing(replace(call, experts=replace(call.experts, fc1_scales=scales)))


def kernel(function: Any) -> Kernel:
    return Kernel("exposing", ("moe",), whole_arguments, lambda kind, call: function(prepared(call).call))


@pytest.mark.parametrize(
    "name", ["gemm/ordinary", "gemm/overflow", "ungated/relu2_layer", "gpt_oss/many_experts_padded"]
)
def test_the_right_ones_lie_within_their_bounds_and_a_scale_elsewhere_does_not(name: str) -> None:
    call = prepared(runs(GOLDENS.load(name))[0].inputs).call
    right = exposing(call)[1]
    assert intermediates_within(call, right)
    for stage in NAMES:
        rows = right[stage].clone()
        rows[1, 1] = 3 * rows[1, 1] + 0.7
        assert intermediates_within(call, {stage: rows}) == (not rows[1, 1].isfinite())
    assert not intermediates_within(call, {"activation": right["activation"][1:]})


def test_what_shows_in_an_intermediate_alone_is_no_other_order() -> None:
    one: Run = runs(GOLDENS.load(CANCELLING))[0]
    output, shown = neighbours_scales(prepared(one.inputs).call)
    assert all_within("moe", [(one, {"output": output})])
    assert not all_within("moe", [(one, {"output": output, **shown})])


@pytest.mark.slow
def test_the_verdict_is_what_intermediates_show() -> None:
    cases = [GOLDENS.load(name) for name in (CANCELLING, "gemm/ordinary", "gemm/overflow")]
    report = run(kernel(neighbours_scales), cases, Options(diagnosis="quick", repeat=False))
    assert report.finding.stages == ("fc1",)
    assert (
        "fc1_output is the first stage that differs in 3 of 3 cases, in columns 8 to 15 of every 16 only"
        in report.verdict
    )
    alone = run(kernel(neighbours_scales), cases[:1], Options(diagnosis="quick", repeat=False))
    assert "in columns 8 to 15 of every 16 only; at [0, 8]" in alone.verdict
    assert "mode bounded" not in alone.verdict
