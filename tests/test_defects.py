"""Every named defect differs from the kernel, and from every other defect, on calls small enough to look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import defect_calls
import pytest
import torch
from torch import Tensor

from mxfp4ref import defects
from mxfp4ref.call import MoeCall
from mxfp4ref.defects import DEFECTS, DequantizeCall, RoutingCall, dequantize_call, get_defect, route
from mxfp4ref.defects.activations import SwigluVariant
from mxfp4ref.defects.defect import logical
from mxfp4ref.defects.gemm_variant import GemmVariant, tensor_core_sum
from mxfp4ref.defects.router_variant import rerouted
from mxfp4ref.experts import Sm90Experts
from mxfp4ref.layout import fold_scales_sm90, interleave_weights_sm90
from mxfp4ref.moe import Stages, forward

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

BUILDERS: dict[str, dict[str, Callable[[], Any]]] = {
    "moe": defect_calls.MOE_CALLS,
    "routing": defect_calls.ROUTING_CALLS,
    "dequantize": defect_calls.DEQUANTIZE_CALLS,
}
REFERENCES: dict[str, Callable[[Any], Any]] = {
    "moe": forward,
    "routing": route,
    "dequantize": dequantize_call,
}


@cache
def build(target: str, call_name: str) -> Any:
    return BUILDERS[target][call_name]()


def as_bytes(output: Any) -> bytes:
    """The bits of an output: of a Routing those that reach the kernel."""
    tensors = [output] if isinstance(output, Tensor) else [output.ids, output.scales]
    return b"".join(tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors)


@cache
def reference_bytes(target: str, call_name: str) -> bytes:
    return as_bytes(REFERENCES[target](build(target, call_name)))


@cache
def defect_bytes(name: str, call_name: str) -> bytes:
    """What a defect gives on a call; where it says that it cannot show, what the kernel gives."""
    defect = DEFECTS[name]
    call = build(defect.target, call_name)
    return as_bytes(defect.run(call)) if defect.applies(call) else reference_bytes(defect.target, call_name)


def differs(name: str, call_name: str) -> bool:
    return defect_bytes(name, call_name) != reference_bytes(DEFECTS[name].target, call_name)


def test_every_listed_name_is_there() -> None:
    assert set(LISTED) <= set(DEFECTS)
    assert all(DEFECTS[name].kind == "defect" for name in LISTED)
    assert sum(defect.kind == "arithmetic" for defect in DEFECTS.values()) >= 40
    assert len(DEFECTS) >= 60


def test_names_are_unique() -> None:
    assert len(DEFECTS) == len(defects._ALL)


@pytest.mark.parametrize("name", DEFECTS)
def test_description(name: str) -> None:
    defect = DEFECTS[name]
    assert defect.name == name
    assert name.isidentifier()
    assert 10 < len(defect.summary) < 110
    assert not defect.summary.endswith(".")
    assert defect.seen_in
    assert all(source.strip() for source in defect.seen_in)
    assert defect.kind in ("defect", "arithmetic")
    assert defect.target in BUILDERS
    for other in defect.equivalent:
        assert name in DEFECTS[other].equivalent, "equivalence is mutual"


@pytest.mark.parametrize("name", DEFECTS)
def test_differs_from_the_kernel(name: str) -> None:
    calls = BUILDERS[DEFECTS[name].target]
    assert any(differs(name, call_name) for call_name in calls), "no call exposes this defect"


@pytest.mark.parametrize("target", BUILDERS)
def test_differ_from_each_other(target: str) -> None:
    """Sets of defects that no call so far tells apart, split call by call until each stands alone."""
    alike = [[name for name, defect in DEFECTS.items() if defect.target == target]]
    for call_name in BUILDERS[target]:
        split = []
        for names in alike:
            by_output: dict[bytes, list[str]] = {}
            for name in names:
                by_output.setdefault(defect_bytes(name, call_name), []).append(name)
            split += [some for some in by_output.values() if len(some) > 1]
        alike = split
    for names in alike:
        for name in names:
            assert set(names) - {name} <= set(DEFECTS[name].equivalent), f"not told apart: {names}"


@pytest.mark.parametrize("name", DEFECTS)
def test_applies_is_right_where_it_says_no(name: str) -> None:
    """On a few calls, since most defects apply anyway."""
    defect = DEFECTS[name]
    few = (
        ("every_option", "expert_named_twice", "limit_alone")
        if defect.target == "moe"
        else BUILDERS[defect.target]
    )
    for call_name in few:
        call = build(defect.target, call_name)
        if not defect.applies(call) and defect.target != "routing":
            assert as_bytes(defect.run(call)) == reference_bytes(defect.target, call_name)


def test_every_call_is_needed() -> None:
    """A call has to expose something that none of the calls before it does."""
    for target, calls in BUILDERS.items():
        missing = {name for name, defect in DEFECTS.items() if defect.target == target}
        for call_name in calls:
            exposed = {name for name in missing if differs(name, call_name)}
            missing -= exposed
        assert not missing


# The variants without a change are the kernel, so that a defect is the one thing that its definition changes.


@pytest.mark.parametrize("group_sum", [None, tensor_core_sum])
@pytest.mark.parametrize("call_name", defect_calls.MOE_CALLS)
def test_unchanged_stages_are_the_kernel(call_name: str, group_sum: Any) -> None:
    gemm = GemmVariant(group_sum=group_sum)
    stages = Stages(fc1_gemm=gemm, fc2_gemm=gemm, swiglu=SwigluVariant())
    assert as_bytes(forward(build("moe", call_name), stages)) == reference_bytes("moe", call_name)


@pytest.mark.parametrize("tile_k", [(128, 128), (256, 512)])
@pytest.mark.parametrize("tile_n", [16, 64])
def test_unchanged_gemm_follows_the_tactic(tile_k: tuple[int, int], tile_n: int) -> None:
    for call_name in ("cancelling_gemm2", "underflow"):
        call = build("moe", call_name)
        fitting = tuple(
            min(tile, depth)
            for tile, depth in zip(
                tile_k, (call.experts.hidden_size, call.experts.intermediate_size), strict=True
            )
        )
        call = replace(call, tile_k=fitting, tile_n=(tile_n, tile_n))
        gemm = GemmVariant()
        assert as_bytes(forward(call, Stages(fc1_gemm=gemm, fc2_gemm=gemm))) == as_bytes(forward(call))


@pytest.mark.parametrize("call_name", defect_calls.ROUTING_CALLS)
def test_unchanged_router_is_the_preset(call_name: str) -> None:
    call = build("routing", call_name)
    assert as_bytes(rerouted(call)) == reference_bytes("routing", call_name)


def test_takes_sm90_layouts() -> None:
    call: MoeCall = build("moe", "every_option")
    tensors = {field: getattr(call.experts, field) for field in call.experts.__dataclass_fields__}
    for fc in ("fc1", "fc2"):
        tensors[f"{fc}_weights"] = interleave_weights_sm90(tensors[f"{fc}_weights"])
        tensors[f"{fc}_scales"] = fold_scales_sm90(tensors[f"{fc}_scales"]).view(torch.int32)
    folded = replace(call, experts=Sm90Experts(**tensors))
    assert as_bytes(DEFECTS["nibble_order"].run(folded)) == defect_bytes("nibble_order", "every_option")


def test_refuses_bf16_experts() -> None:
    call: MoeCall = build("moe", "limit_alone")
    dense = replace(
        call.experts,
        fc1_weights=torch.zeros(4, 256, 512, dtype=torch.bfloat16),
        fc1_scales=None,
        fc2_weights=torch.zeros(4, 512, 128, dtype=torch.bfloat16),
        fc2_scales=None,
    )
    with pytest.raises(ValueError, match="experts: expected MXFP4"):
        logical(replace(call, experts=dense))


def test_does_not_modify_the_call() -> None:
    call: MoeCall = build("moe", "padded_halves")
    tensors = [value for value in vars(call).values() if isinstance(value, Tensor)]
    tensors += [value for value in vars(call.experts).values() if value is not None]
    before = [tensor.clone() for tensor in tensors]
    for defect in DEFECTS.values():
        if defect.target == "moe":
            defect.run(call)
    assert all(torch.equal(old, new) for old, new in zip(before, tensors, strict=True))


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


def test_known_bits() -> None:
    """A few defects by hand, so that an error common to a defect and the calls above would show."""
    call = DequantizeCall(
        torch.tensor([[0x98] * 16], dtype=torch.uint8), torch.tensor([[127]], dtype=torch.uint8)
    )
    assert as_bytes(dequantize_call(call))[:4] == bytes([0x00, 0x80, 0x00, 0xBF])  # -0, -0.5
    assert as_bytes(DEFECTS["minus_zero_lost"].run(call))[:4] == bytes([0x00, 0x00, 0x00, 0xBF])
