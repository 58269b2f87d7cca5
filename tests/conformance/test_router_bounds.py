"""Mode bounded for routers: every correct float32 evaluation passes, and what is wrong does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mxfp4ref.conformance import Kernel, Options, run
from mxfp4ref.conformance.bounds.router_bounds import routing_outside
from mxfp4ref.conformance.kernels.adapters import keyword_arguments
from mxfp4ref.conformance.kernels.stand_ins import defect_outputs
from mxfp4ref.defects import DEFECTS
from mxfp4ref.goldens import open_goldens
from mxfp4ref.goldens.runs import run_stage, runs
from tests.helpers import usual
from tests.helpers.torch_routers import RIGHT, router

GOLDENS = open_goldens()
CASES = [GOLDENS.load(name) for name in GOLDENS.names("routing")]
BOUNDED = Options(mode="bounded", repeat=False, diagnosis="none")

# What a correct float32 evaluation may do: break ties otherwise, or round otherwise.
CORRECT = {
    "tie_highest_id",
    "score_rounded_once",
    "softmax_of_other_set",
    "reciprocal_of_sum",
    "score_sum_float64",
    "factor_before_division",
}


@pytest.mark.parametrize("name", usual.first(1, RIGHT))
def test_plain_torch_routers_pass(name: str) -> None:
    kernel = Kernel(name, ("routing",), keyword_arguments, RIGHT[name])
    report = run(kernel, CASES, BOUNDED)
    assert [(r.case, r.status, r.message, r.outside) for r in report.results if not r.ok] == []
    assert "within bounds" in {r.status for r in report.results}
    assert not run(kernel, CASES, Options(repeat=False, diagnosis="none")).ok


@pytest.mark.parametrize(
    "name", usual.first(10, [name for name, d in DEFECTS.items() if d.target == "routing"])
)
def test_named_routing_defects_fail(name: str) -> None:
    failing = 0
    for case in CASES:
        (one,) = runs(case)
        outputs = defect_outputs(DEFECTS[name], one.inputs)
        failing += outputs is not None and routing_outside(one.inputs, outputs) > 0
    assert failing >= 2 if name not in CORRECT else failing == 0


@pytest.mark.parametrize("name", ["rsf_missing", "padding_routed"])
def test_defects_fail_a_run_in_mode_bounded(name: str) -> None:
    assert not run(f"defect:{name}", CASES, BOUNDED).ok


@given(
    st.integers(0, 2**32), st.sampled_from(["deepseek_v3", "deepseek_v4", "gpt_oss", "mixtral"]), st.data()
)
def test_random_logits(seed: int, preset: str, data: st.DataObject) -> None:
    """Of any size, with ties; all five routers are inside, and one wrong id or weight is outside."""
    generator = torch.Generator().manual_seed(seed)
    size = data.draw(st.sampled_from([0.1, 3.0, 30.0]))
    logits = torch.randn(8, 32, generator=generator) * size
    if data.draw(st.booleans()):
        logits = (logits / size * 4).round() * size / 4
    inputs: dict[str, Any] = {"preset": preset, "logits": logits, "top_k": 4}
    if preset.startswith("deepseek"):
        bias = torch.rand(32, generator=generator) * data.draw(st.sampled_from([0.0, 0.5, 8.0]))
        inputs |= {"correction_bias": bias, "routed_scaling_factor": 2.5, "routed_scaling": "in_weights"}
    if preset == "deepseek_v3":
        inputs |= {"n_group": 4, "topk_group": 2}
    expected = run_stage("routing", inputs)
    assert isinstance(expected, dict)
    assert routing_outside(inputs, expected) == 0
    for right in RIGHT.values():
        assert routing_outside(inputs, right(**inputs)) == 0
    token, slot = (data.draw(st.integers(0, most)) for most in (7, 3))
    for wrong in (-1, 32, int(expected["ids"][token, slot - 1])):
        ids = expected["ids"].clone()
        ids[token, slot] = wrong
        assert routing_outside(inputs, {**expected, "ids": ids}) > 0
    scales = expected["scales"].clone()
    # Far in its tail softplus is subnormal, and a weight of nearly nothing may be flushed.
    if float(scales[token, slot]) > 2.0**-40:
        scales[token, slot] *= 1 + 2.0**-16
        assert routing_outside(inputs, {**expected, "scales": scales}) == 1


def wrong_router(**inputs: Any) -> dict[str, Tensor]:
    found = router(**inputs)
    return {**found, "ids": found["ids"].flip(1), "scales": found["scales"].flip(1)}


def test_the_order_of_slots_counts() -> None:
    """The kernel adds in the order of the slots."""
    for case in CASES:
        (one,) = runs(case)
        assert "ties" in case.name or routing_outside(one.inputs, wrong_router(**one.inputs)), case.id
