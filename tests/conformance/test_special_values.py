"""Kernels that are right but for special values, in mode bounded: no other hypothesis is named, in no such case."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mxfp4ref.conformance import Options, run
from mxfp4ref.conformance.kernels.loading import load_kernel
from mxfp4ref.goldens import open_goldens

CASES = (
    "activation/non_finite_before_clamp",
    "formats/scale_bytes_0_and_255",
    "formats/scale_bytes_0_and_255_before_activation",
    "step_and_situ/swiglu_bias_alone",
)
CODES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def dequantised(codes: Tensor, scales: Tensor) -> Tensor:
    pairs = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    return CODES[pairs.long()] * torch.exp2(scales.float() - 127).repeat_interleave(32, -1)


def right(
    x: Tensor, ids: Tensor, weights: Tensor, w1: Tensor, s1: Tensor, w2: Tensor, s2: Tensor, **given: Any
) -> Tensor:
    """A mixture of SwiGLU experts in float32, whose scale byte 255 is Inf: times a code of 0 it is NaN."""
    limits = given.get("swiglu_limit")
    output = torch.zeros(len(x), w2.shape[1])
    for expert in range(len(w1)):
        tokens, slots = (ids == expert).nonzero(as_tuple=True)
        up, gate = (x[tokens].float() @ dequantised(w1[expert], s1[expert]).T).bfloat16().float().chunk(2, 1)
        limit = torch.tensor(torch.inf) if limits is None else limits[expert]
        if limits is not None or given.get("activation_type") == 5:
            gate, up = torch.fmin(gate, limit), torch.fmax(torch.fmin(up, limit), -limit)
        inner = (up * gate * gate.sigmoid()).bfloat16().float()
        rows = (inner @ dequantised(w2[expert], s2[expert]).T).bfloat16().float()
        output.index_add_(0, tokens, rows * weights[tokens, slots][:, None])
    return output.bfloat16()


@pytest.mark.parametrize("effort", ["quick", "full"])
def test_of_special_values_alone_nothing_else_is_named(effort: Any) -> None:
    kernel = load_kernel("plain:tests/conformance/test_special_values.py:right")
    goldens = open_goldens()
    report = run(
        kernel,
        [goldens.load(case) for case in CASES],
        Options(mode="bounded", repeat=False, diagnosis=effort),
    )
    for result in report.results:
        assert result.diagnosis is not None
        finding = result.diagnosis.finding
        assert finding.sentence.endswith(f"; to leave it out: --exclude {result.case}")
        assert finding.sentence.startswith("special values alone are wrong, all else lies within bounds")
        assert result.diagnosis.exact == finding.hypotheses == ()
    assert report.finding.sentence.startswith("special values alone are wrong")
    assert report.finding.sentence.removesuffix(".") in report.verdict
    assert report.finding.sentence.endswith(
        "; to leave them out:" + "".join(f" --exclude {case}" for case in CASES)
    )
