"""The list of named defects: complete, described, and found by name."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import mxfp4ref.defects
from mxfp4ref.defects import DEFECTS, RoutingCall, get_defect
from mxfp4ref.defects.definition import DEFINED, defect
from tests.helpers.defect_outputs import BUILDERS

# The names that the list of known mistakes asks for.
LISTED = [
    "gate_up_swapped",
    "gate_up_interleaved",
    "nibble_order",
    "nibble_split",
    "weights_not_interleaved",
    "scales_not_folded",
    "scales_not_swapped",
    "scale_as_integer",
    "scale_bias_125",
    "scale_truncated",
    "scale_ocp_ends",
    "scale_off_by_one_group",
    "half_code_flushed",
    "minus_zero_lost",
    "scale_before_mma",
    "gemm1_kept_fp32",
    "act_kept_fp32",
    "limit_ignored",
    "limit_one_sided",
    "gate_clamped_below",
    "clamp_after_silu",
    "alpha_ignored",
    "beta_ignored",
    "all_or_none_params",
    "params_by_global_id",
    "bias1_ignored",
    "bias2_ignored",
    "bias2_unweighted",
    "rsf_missing",
    "rsf_twice",
    "rsf_post_hoc",
    "weights_bf16",
    "weight_before_gemm2",
    "renorm_missing",
    "ep_double_mapping",
    "ep_sentinel_aliases",
    "ep_offset_dropped",
    "bf16_finalize",
    "last_slot_dropped",
    "gate_bias_weights",
    "softplus_as_sigmoid",
    "tie_highest_id",
    "padding_end_of_fused",
]


def test_every_listed_name_is_there() -> None:
    assert set(LISTED) <= set(DEFECTS)
    assert all(DEFECTS[name].kind == "defect" for name in LISTED)
    assert sum(defect.kind == "arithmetic" for defect in DEFECTS.values()) >= 40
    assert len(DEFECTS) >= 139  # as many as there have been


def test_every_definition_is_in_the_list() -> None:
    """By the sources, in which a family that nobody imports or a name used twice would show."""
    defined = [
        node.name
        for path in Path(mxfp4ref.defects.__file__).parent.glob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(decorator).startswith("defect(") for decorator in node.decorator_list)
    ]
    assert sorted(defined) == sorted(DEFECTS) == sorted(DEFINED)


def test_a_name_cannot_be_defined_twice() -> None:
    with pytest.raises(ValueError, match="nibble_order: defined twice"):

        @defect("fc1_weights", "nowhere")
        def nibble_order(packed: torch.Tensor) -> torch.Tensor:
            return packed


@pytest.mark.parametrize("changes", ["round_fc3", "gemm.colour", "swiglu_gamma", "fc1_weights fc1_gemm"])
def test_what_it_changes_has_to_exist(changes: str) -> None:
    with pytest.raises((TypeError, ValueError)):
        defect(changes, "nowhere")(lambda x: x)
    assert "<lambda>" not in DEFINED


@pytest.mark.parametrize("name", DEFECTS)
def test_description(name: str) -> None:
    defect = DEFECTS[name]
    assert defect.name == name
    assert name.isidentifier()
    assert 10 < len(defect.summary) < 140
    assert not defect.summary.endswith(".")
    assert defect.seen_in
    assert all(source.strip() for source in defect.seen_in)
    assert defect.kind in ("defect", "arithmetic")
    assert defect.target in BUILDERS


def test_get_defect() -> None:
    assert get_defect("nibble_order") is DEFECTS["nibble_order"]
    with pytest.raises(
        ValueError, match=r"name: expected one of the \d+ defects, got 'nibble_oder'.*nibble_order"
    ):
        get_defect("nibble_oder")
    with pytest.raises(ValueError, match=r"got 'zzzzzz'$"):
        get_defect("zzzzzz")


def test_routing_call_refuses_unknown_presets() -> None:
    with pytest.raises(ValueError, match="preset: expected one of 'deepseek_v3'"):
        RoutingCall("deepseek_v2", torch.zeros(1, 4))
