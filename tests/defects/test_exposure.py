"""Every named defect differs from the kernel, and from every other defect, on calls small enough to look at."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from mxfp4ref.defects import DEFECTS
from tests.helpers.defect_outputs import BUILDERS, as_bytes, build, defect_bytes, differs, reference_bytes

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
    "activation_near_ties": """limit_7_by_default rcp_exact sigmoid_exact sigmoid_libm sigmoid_tanh silu_divided
        up_weighted_first""",
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
    "situ_near_ties": "situ_tanh_approx situ_tanh_exact situ_divided",
    "situ_near_ties_with_parameters": "situ_tanh_exact situ_divided situ_reciprocal_exact situ_beta_first",
    "situ_by_expert": """situ_sigmoid_of_capped situ_betas_swapped situ_up_uncapped situ_clamped situ_gate_bf16
        situ_beta_ignored situ_linear_beta_ignored activation_type_ignored params_of_first_expert""",
    "step_by_expert": """step_limit_before_silu step_gate_clamped_below step_limit_one_sided step_silu_bf16
        step_reads_alpha_and_beta limit_ignored""",
    "geglu_by_expert": "gelu_by_tanh gelu_bf16 activation_type_ignored",
    "step_by_default": "no_limit_by_default activation_type_ignored",
    "step_special_values": "step_clamp_propagates_nan",
    "ungated_gelu": "gelu_by_tanh ungated_given_as_both_halves ungated_halves_swapped",
    "ungated_relu2": "relu2_not_squared relu2_not_rectified ungated_halves_swapped",
    "ungated_special_values": "relu_loses_nan",
    "deepseek_v4_biased": "tie_highest_id padding_routed gate_bias_weights slots_by_id score_rounded_once",
    "deepseek_v4_table": "table_ignored softplus_as_sigmoid sqrt_missing ids_sorted_alone",
    "deepseek_v3_groups": "epsilon_missing group_score_best_one groups_ignored groups_masked_with_zero",
    "gpt_oss": "softmax_of_other_set renorm_missing",
    "mixtral": "softmax_of_other_set renorm_missing reciprocal_of_sum score_sum_float64",
    "every_byte": "minus_zero_lost subnormal_weights_flushed other_convention byte_255_infinite",
    "every_byte_sm90": "other_convention",
    "w4a8_every_option": "fp8_residual_ignored fp8_residual_of_the_other_gemm fp8_rounded_before_factor",
    "w4a8_rows_of_any_size": "fp8_scale_of_all_rows fp8_quotient_exact fp8_factor_exact",
    "w4a8_cancelling": "fp8_accumulator_exact fp8_accumulator_float32 fp8_accumulator_promoted fp8_k_descending",
    "w4a8_fp16": "fp8_output_through_bf16",
}


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
    assert alike == []


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
    fields = value if isinstance(value, dict) else vars(value) if is_dataclass(value) else {}
    return [tensor for name in sorted(fields) for tensor in tensors_of(fields[name])]
