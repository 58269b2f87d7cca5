"""Every named defect differs from the kernel, and from every other defect, on calls small enough to look at."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import cache
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mxfp4ref import defects
from mxfp4ref.defects import (
    DEFECTS,
    DequantizeCall,
    RoutingCall,
    dequantize_call,
    get_defect,
    route,
)
from mxfp4ref.defects.defect import logical
from mxfp4ref.defects.ieee import ieee_fma, ieee_mul
from mxfp4ref.defects.variants import swiglu as swiglu_variant
from mxfp4ref.defects.variants.gemm import GemmVariant, tensor_core_sum
from mxfp4ref.defects.variants.router import rerouted
from mxfp4ref.defects.variants.swiglu import SwigluVariant
from mxfp4ref.defects.weights import _requantized
from mxfp4ref.formats.experts import Sm90Experts
from mxfp4ref.formats.generations import BYTEWISE
from mxfp4ref.formats.layout import (
    fold_scales_sm90,
    halves_to_interleaved,
    interleave_weights_sm90,
    swap_gate_up,
)
from mxfp4ref.formats.mxfp4 import decode_ue8m0, dequantize
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import Stages, forward
from mxfp4ref.sm90 import tensor_core
from mxfp4ref.sm90.swiglu import swiglu
from mxfp4ref.sm90.tactics import TILE_K, Sm90Kernel
from tests.helpers import defect_calls, exact

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

# What a call exposes and every_option, which most mistakes change, does not.
DESIGNED_FOR = {
    "limit_alone": "all_or_none_params",
    "cancelling_gemm1": """groups_ascending groups_descending groups_float64 swap_in_first_tile swap_in_last_tile
        swap_in_every_tile swap_at_tile_start tile_k_64 split_k tile_sums float32_gemm float64_gemm
        scale_before_mma""",
    "cancelling_gemm2": """groups_ascending swap_in_first_tile swap_in_last_tile step_rounds_to_nearest
        four_8_wide_steps fraction_bits_24""",
    "wide_exponents": "fraction_bits_24 fraction_bits_26 fraction_bits_unlimited four_8_wide_steps",
    "cancelling_experts": """finalize_by_expert finalize_by_weight finalize_float64 finalize_pairwise
        finalize_slots_reversed finalize_unfused""",
    "activation_near_ties": "rcp_exact sigmoid_exact sigmoid_libm sigmoid_tanh silu_divided up_weighted_first",
    "activation_near_ties_with_parameters": """alpha_in_constant beta_fused ex2_exact rcp_exact gate_up_first
        product_unrounded sigmoid_exact sigmoid_libm silu_divided""",
    "special_values": "clamp_propagates_nan no_ftz_activation all_or_none_params",
    "special_values_unlimited": "bf16_saturates nan_as_7fc0 nan_as_ffc0",
    "tiny_activations": "no_ftz_activation",
    "tiny_products": "flush_on_subnormal_grid no_ftz_finalize",
    "underflow": "first_pair_reversed minus_zero_kept no_ftz_gemm scale_ocp_ends unfused_multiply_add",
    "extreme_scales": "subnormal_input_flushed scale_ocp_ends no_ftz_gemm",
    "expert_parallel": """ep_double_mapping ep_ids_modulo ep_offset_dropped ep_sentinel_aliases
        params_by_global_id""",
    "tensor_parallel": "bias2_on_every_tp_rank",
    "padded_halves": "padding_end_of_fused",
    "deepseek_v4_biased": "tie_highest_id padding_routed gate_bias_weights slots_by_id score_rounded_once",
    "deepseek_v4_table": "table_ignored softplus_as_sigmoid sqrt_missing ids_sorted_alone",
    "deepseek_v3_groups": "epsilon_missing group_score_best_one groups_ignored groups_masked_with_zero",
    "gpt_oss": "softmax_of_other_set renorm_missing",
    "mixtral": "softmax_of_other_set renorm_missing reciprocal_of_sum score_sum_float64",
    "every_byte": "minus_zero_lost subnormal_weights_flushed other_convention byte_255_infinite",
    "every_byte_sm90": "other_convention",
}

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
def legitimate_bytes(target: str, call_name: str) -> set[bytes]:
    """The outputs of every tactic: K tiles that divide K, and their group orders."""
    if target != "moe":
        return {reference_bytes(target, call_name)}
    call: MoeCall = build(target, call_name)
    depths = call.experts.hidden_size, call.experts.intermediate_size
    fitting = ([tile for tile in TILE_K if depth % tile == 0] for depth in depths)
    return {as_bytes(forward(replace(call, kernel=Sm90Kernel.of_tiles(pair)))) for pair in product(*fitting)}


@cache
def defect_bytes(name: str, call_name: str) -> bytes:
    """What a defect gives on a call; where it says that it cannot show, what the kernel gives."""
    defect = DEFECTS[name]
    call = build(defect.target, call_name)
    return as_bytes(defect.run(call)) if defect.applies(call) else reference_bytes(defect.target, call_name)


def differs(name: str, call_name: str) -> bool:
    """Whether no tactic of the kernel gives what the defect gives."""
    return defect_bytes(name, call_name) not in legitimate_bytes(DEFECTS[name].target, call_name)


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
    few = ("every_option", "limit_alone") if defect.target == "moe" else BUILDERS[defect.target]
    for call_name in few:
        call = build(defect.target, call_name)
        if not defect.applies(call) and defect.target != "routing":
            assert as_bytes(defect.run(call)) == reference_bytes(defect.target, call_name)


@pytest.mark.parametrize("call_name", DESIGNED_FOR)
def test_calls_expose_what_they_are_designed_for(call_name: str) -> None:
    for name in DESIGNED_FOR[call_name].split():
        assert differs(name, call_name), name


# The variants without a change are the kernel, so that a defect is the one thing that its definition changes.


@pytest.mark.parametrize("group_sum", [None, tensor_core_sum])
@pytest.mark.parametrize("call_name", defect_calls.MOE_CALLS)
def test_unchanged_stages_are_the_kernel(call_name: str, group_sum: Any) -> None:
    gemm = GemmVariant(group_sum=group_sum)
    stages = Stages(fc1_gemm=gemm, fc2_gemm=gemm, swiglu=SwigluVariant())
    assert as_bytes(forward(build("moe", call_name), stages)) == reference_bytes("moe", call_name)


@pytest.mark.parametrize("names", [names for n in range(4) for names in combinations("abl", n)])
def test_unchanged_swiglu_is_the_kernels(names: tuple[str, ...]) -> None:
    """With any of alpha, beta and limit, for NaN, Inf and zeros as well."""
    values = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -5.0, 90.0, 2.0**-126, 2.0**127])
    pairs = torch.cartesian_prod(values, values).to(torch.bfloat16)
    given = {"a": torch.tensor([1.702]), "b": torch.tensor([0.3]), "l": torch.tensor([7.0])}
    parameters = [given[name] if name in names else None for name in "abl"]
    bias = torch.tensor([0.25, -0.0]).to(torch.bfloat16)
    for arguments in ((pairs, None, *parameters), (pairs, bias, *parameters)):
        assert as_bytes(SwigluVariant()(*arguments)) == as_bytes(swiglu(*arguments))


@pytest.mark.parametrize("tile_k", [(128, 128), (256, 512)])
@pytest.mark.parametrize("tile_n", [16, 64])
def test_unchanged_gemm_follows_the_tactic(tile_k: tuple[int, int], tile_n: int) -> None:
    for call_name in ("cancelling_gemm2", "underflow"):
        call = build("moe", call_name)
        fitting = tuple(
            tile if depth % tile == 0 else 128
            for tile, depth in zip(
                tile_k, (call.experts.hidden_size, call.experts.intermediate_size), strict=True
            )
        )
        call = replace(call, kernel=Sm90Kernel.of_tiles(fitting, (tile_n, tile_n)))
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


def test_calls_are_not_modified() -> None:
    """After all of the above: what was built once and used throughout is still what the builder gives."""
    for name, defect in DEFECTS.items():
        defect_bytes(name, next(iter(BUILDERS[defect.target])))
    for target, calls in BUILDERS.items():
        for call_name, builder in calls.items():
            assert tensors_of(build(target, call_name)) == tensors_of(builder())


def tensors_of(value: Any) -> list[bytes]:
    if isinstance(value, Tensor):
        return [value.contiguous().view(torch.uint8).numpy().tobytes()]
    fields = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    return [tensor for name in sorted(fields) for tensor in tensors_of(fields[name])]


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


# Some defects made in another way than theirs, so that they are what their summary says.


def changed(call: MoeCall, **fields: Tensor) -> MoeCall:
    return replace(call, experts=replace(call.experts, **fields))


def on_fc1(call: MoeCall, change: Callable[[Tensor], Tensor]) -> MoeCall:
    fields = ("fc1_weights", "fc1_scales", "fc1_biases")
    return changed(call, **{field: change(getattr(call.experts, field)) for field in fields})


@pytest.mark.parametrize(
    ("name", "stored"),
    [("gate_up_interleaved", halves_to_interleaved), ("gate_up_swapped", swap_gate_up)],
)
def test_wrong_row_order_suits_rows_in_that_order(name: str, stored: Callable[[Tensor], Tensor]) -> None:
    call = build("moe", "every_option")
    assert as_bytes(DEFECTS[name].run(on_fc1(call, stored))) == reference_bytes("moe", "every_option")


def interleaved_twice(weights: Tensor) -> Tensor:
    return interleave_weights_sm90(interleave_weights_sm90(weights))


@pytest.mark.parametrize(
    ("name", "interleave", "fold"),
    [
        ("weights_not_interleaved", lambda w: w, fold_scales_sm90),
        (
            "weights_interleaved_twice",
            lambda w: interleave_weights_sm90(interleave_weights_sm90(w)),
            fold_scales_sm90,
        ),
        ("weights_interleaved_old", lambda w: interleave_weights_sm90(w, BYTEWISE), fold_scales_sm90),
        ("scales_not_folded", interleave_weights_sm90, lambda s: s.view(fold_scales_sm90(s).shape)),
        (
            "scales_folded_old",
            interleave_weights_sm90,
            lambda s: fold_scales_sm90(s, BYTEWISE).view(fold_scales_sm90(s).shape),
        ),
        (
            "scales_folded_new",
            lambda w: interleave_weights_sm90(w, BYTEWISE),
            lambda s: fold_scales_sm90(s).view(fold_scales_sm90(s, BYTEWISE).shape),
        ),
    ],
)
def test_wrong_layout_is_what_the_real_call_would_read(
    name: str, interleave: Callable[[Tensor], Tensor], fold: Callable[[Tensor], Tensor]
) -> None:
    call = build("moe", "every_option")
    tensors = {field: getattr(call.experts, field) for field in call.experts.__dataclass_fields__}
    for fc in ("fc1", "fc2"):
        tensors[f"{fc}_weights"] = interleave(tensors[f"{fc}_weights"])
        tensors[f"{fc}_scales"] = fold(tensors[f"{fc}_scales"])
    given = replace(call, experts=Sm90Experts(**tensors))
    assert as_bytes(forward(given)) == defect_bytes(name, "every_option")


def test_padding_at_the_end_of_the_fused_tensor() -> None:
    call = build("moe", "padded_halves")

    def pad_at_the_end(fc1: Tensor) -> Tensor:
        used = torch.cat((fc1[:, :96], fc1[:, 128:224]), 1)
        return torch.cat((used, torch.zeros_like(fc1[:, :64])), 1)

    expected = forward(on_fc1(call, pad_at_the_end))
    assert as_bytes(expected) == defect_bytes("padding_end_of_fused", "padded_halves")


def test_scale_truncated_requantises() -> None:
    """Against the values: scales 2^floor(log2(amax / 6)), elements saturated at 6 scales."""
    call = build("moe", "every_option")
    packed, scales = call.experts.fc2_weights, call.experts.fc2_scales
    values = dequantize(packed, scales, dtype=torch.float64).view(*scales.shape, 32)
    largest = values.abs().amax(-1)
    truncated = 2.0 ** (largest / 6).log2().floor()
    truncated = torch.where(2 * truncated * 6 <= largest, 2 * truncated, truncated)  # 6 * 2^n exactly
    wanted = values.clamp(-6 * truncated[..., None], 6 * truncated[..., None])
    codes, bytes_ = _requantized(packed, scales)
    assert torch.equal(dequantize(codes, bytes_, dtype=torch.float64).view(wanted.shape), wanted)
    assert torch.equal(decode_ue8m0(bytes_, dtype=torch.float64), truncated)


def test_weight_before_gemm2_with_weights_of_one_is_the_kernel() -> None:
    call: MoeCall = build("moe", "every_option")
    call = replace(call, token_final_scales=torch.ones_like(call.token_final_scales))
    call = replace(call, experts=replace(call.experts, fc2_biases=None))
    assert as_bytes(DEFECTS["weight_before_gemm2"].run(call)) == as_bytes(forward(call))


@pytest.mark.parametrize("fraction_bits", [23, 24, 25, 26, 27])
def test_tensor_core_sum_is_the_obvious_step(fraction_bits: int) -> None:
    generator = torch.Generator().manual_seed(fraction_bits)
    exponents = torch.randint(-12, 13, (1, 40, 32), generator=generator)
    x = (torch.randn(1, 40, 32, generator=generator) * 2.0**exponents).to(torch.bfloat16)
    weights = torch.randint(-6, 7, (1, 24, 32), generator=generator).to(torch.bfloat16)
    expected = torch.zeros(1, 40, 24)
    for half in (slice(0, 16), slice(16, 32)):
        factors = x[:, :, None, half], weights[:, None, :, half]
        expected = tensor_core.step(*factors, expected, fraction_bits=fraction_bits)
    got = tensor_core_sum(x.double(), weights.double(), fraction_bits=fraction_bits).to(torch.float32)
    assert torch.equal(got, expected)


def test_ieee_operations_keep_subnormals_and_round_once() -> None:
    generator = np.random.default_rng(0)
    exponents = generator.integers(80, 130, (3, 2000))
    exponents[2] = generator.integers(0, 30, 2000)  # of the addend: near and among the subnormals
    bits = (
        generator.integers(0, 1 << 23, (3, 2000))
        | exponents << 23
        | generator.integers(0, 2, (3, 2000)) << 31
    )
    bits[0] -= 63 << 23
    a, b, c = torch.from_numpy(bits.astype(np.uint32).view(np.float32))
    for got, x, y, z in zip(ieee_fma(a, b, c).tolist(), a.tolist(), b.tolist(), c.tolist(), strict=True):
        assert Fraction(got) == nearest_fp32(Fraction(x) * Fraction(y) + Fraction(z))
    tiny = 2.0**-100 * b
    for got, x, y in zip(ieee_mul(a, tiny).tolist(), a.tolist(), tiny.tolist(), strict=True):
        assert Fraction(got) == nearest_fp32(Fraction(x) * Fraction(y))


def nearest_fp32(value: Fraction) -> Fraction:
    exponent = exact.floor_log2(abs(value)) if value else -126
    unit = exact.two_to(max(exponent, -126) - 23)
    return round(value / unit) * unit


def test_sigmoids_approximate_the_sigmoid() -> None:
    z = torch.linspace(-30, 30, 4001)
    expected = torch.sigmoid(z.double())
    for name in ("exact", "libm", "exact_ex2", "exact_rcp"):
        got = getattr(swiglu_variant, f"sigmoid_{name}")(z).double()
        # The argument of EX2 is rounded to 24 bits: up to 2^-19 of 43 there, a little less in the result.
        assert ((got - expected).abs() <= 2.0**-17 * expected).all(), name
    # Near 0 the tanh form has an absolute error only.
    assert ((swiglu_variant.sigmoid_tanh(z).double() - expected).abs() <= 2.0**-23).all()


def test_known_bits() -> None:
    """A few defects by hand, so that an error common to a defect and the calls above would show."""
    call = DequantizeCall(
        torch.tensor([[0x98] * 16], dtype=torch.uint8), torch.tensor([[127]], dtype=torch.uint8)
    )
    assert as_bytes(dequantize_call(call))[:4] == bytes([0x00, 0x80, 0x00, 0xBF])  # -0, -0.5
    assert as_bytes(DEFECTS["minus_zero_lost"].run(call))[:4] == bytes([0x00, 0x00, 0x00, 0xBF])
