"""Objects that hold tensors show shapes, in a line or a table that a person reads."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch

from mxfp4ref import MoeCall, Sm90Kernel, Stages, trace
from mxfp4ref._shown import Shown
from mxfp4ref.checkpoint import ReadOptions
from mxfp4ref.conformance import Options
from mxfp4ref.conformance.kernels.loading import load_kernel
from mxfp4ref.defects import DEFECTS
from mxfp4ref.engine import ReplayOptions
from mxfp4ref.goldens import open_goldens
from mxfp4ref.routing import PRESETS

GOLDENS = open_goldens()


@pytest.fixture(scope="module")
def call() -> MoeCall:
    return GOLDENS.load("activation/alpha_alone").call()


def test_a_call_shows_shapes_and_what_is_not_the_default(call: MoeCall) -> None:
    assert repr(call) == (
        "MoeCall(input=bfloat16[16, 256], token_selected_experts=int32[16, 1], token_final_scales=float32[16, 1], "
        "experts=Experts(fc1_weights=uint8[1, 256, 128], fc1_scales=uint8[1, 256, 8], fc2_weights=uint8[1, 256, 64], "
        "fc2_scales=uint8[1, 256, 4], swiglu_alpha=float32[1]))"
    )
    shown = repr(replace(call, strict=False, kernel=Sm90Kernel.of_tiles((256, 128))))
    assert ", strict=False)" in shown
    assert "tile=(64, 16, 256)" in shown


def test_a_table_has_a_row_for_each_field_that_is_shown(call: MoeCall) -> None:
    assert call._repr_html_().count("<tr>") == 4


@pytest.mark.parametrize(
    "name", ["activation/alpha_alone", "models/deepseek_v4_flash", "routing/gpt_oss_bf16_ties"]
)
def test_no_object_shows_numbers_of_tensors(name: str) -> None:
    case = GOLDENS.load(name)
    shown = repr(case)
    assert "tensor(" not in shown
    assert len(shown) < 1500
    assert case.why[:60] in shown


def test_a_trace_and_goldens(call: MoeCall) -> None:
    assert "fc1_output=bfloat16[16, 256]" in repr(trace(call))
    assert repr(Options(jobs=2)).startswith(
        "Options(mode='exact', storage='wider', confidence=None, timeout=None, "
    )
    assert repr(GOLDENS).endswith(f": {len(GOLDENS.names())} cases in {len(GOLDENS.suites)} suites)")


def test_functions_are_shown_by_name_and_options_whole() -> None:
    assert repr(Stages(activate=lambda *given: given[1])) == "Stages(activate=a function)"
    for shown in map(repr, (DEFECTS["limit_ignored"], PRESETS["mixtral"], load_kernel("oracle"))):
        assert " at 0x" not in shown
    assert "score=softmax" in repr(PRESETS["mixtral"])
    assert repr(ReadOptions()) == "ReadOptions(config={}, experts=None, quantize=None, format=None)"
    assert repr(ReplayOptions()).startswith("ReplayOptions(")
    assert "diagnosis='full'" in repr(ReplayOptions())


def test_long_values_and_markup() -> None:
    @dataclass(frozen=True, repr=False)
    class Some(Shown):
        text: str
        many: tuple[int, ...] = ()
        tensor: torch.Tensor = field(default_factory=lambda: torch.zeros(2))

    assert repr(Some("x", tuple(range(20)))) == (
        "Some(text='x', many=(0, 1, 2, 3, 4, ... (20 in all)), tensor=float32[2])"
    )
    assert len(repr(Some("x" * 10_000))) < 200
    assert "&lt;b&gt;" in Some("<b>")._repr_html_()
