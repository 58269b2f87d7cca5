"""Calls on which a defect changes nothing: there it has to give the kernel's bits, in every generation.

A defect that got more wrong than its summary says, say by leaving the generation out on its way, would fail here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from mxfp4ref.defects import DEFECTS, DequantizeCall, RoutingCall, dequantize_call, route
from mxfp4ref.formats.generations import BYTEWISE, GENERATIONS, Generation
from mxfp4ref.goldens.store import open_goldens
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward
from mxfp4ref.sm90.activation import GEGLU, GELU, IDENTITY, RELU, RELU2, SITU, SWIGLU_STEP
from mxfp4ref.sm90.tactics import Sm90Kernel
from tests.helpers import defect_calls, layers, usual
from tests.helpers.defect_outputs import as_bytes

Change = Callable[[MoeCall], MoeCall]
INF = float("inf")


def on(*names: str, change: Callable[[Tensor], Tensor]) -> Change:
    """Some tensors of the experts changed."""

    def changed(call: MoeCall) -> MoeCall:
        tensors = {name: change(getattr(call.experts, name)) for name in names}
        return replace(call, experts=replace(call.experts, **tensors))

    return changed


def filled(*names: str, value: float) -> Change:
    return on(*names, change=lambda tensor: torch.full_like(tensor, value))


def both(first: Change, second: Change) -> Change:
    return lambda call: second(first(call))


def unchanged(call: MoeCall) -> MoeCall:
    return call


def weights(value: float) -> Change:
    return lambda call: replace(call, token_final_scales=torch.full_like(call.token_final_scales, value))


def first_row(fc1: Tensor) -> Tensor:
    return fc1[:, :1].expand_as(fc1).clone()


def equal_halves(fc1: Tensor) -> Tensor:
    return torch.cat((fc1.chunk(2, dim=1)[0],) * 2, dim=1)


def equal_halves_of_each(fc1: Tensor) -> Tensor:
    """The halves of up, and those of gate."""
    return torch.cat([equal_halves(half) for half in fc1.chunk(2, dim=1)], dim=1)


def no_half(packed: Tensor) -> Tensor:
    """Codes that are 0.5 or -0.5 become 1 or -1."""
    low, high = packed & 0x0F, packed & 0xF0
    return torch.where(low & 7 == 1, low + 1, low) | torch.where(high & 0x70 == 0x10, high + 0x10, high)


def largest_in_each_group(packed: Tensor) -> Tensor:
    packed = packed.clone()
    packed[..., ::16] |= 7
    return packed


def last_slot_padded(call: MoeCall) -> MoeCall:
    ids = call.token_selected_experts.clone()
    ids[:, -1] = -1
    return replace(call, token_selected_experts=ids)


def tensor_rank_1(call: MoeCall) -> MoeCall:
    return filled("fc2_biases", value=0)(replace(call, tp_size=2, tp_rank=1))


def exact(call: MoeCall) -> MoeCall:
    """Every sum and product is a number of at most 8 bits, and each token has one expert with the weight 1.

    A few inputs of a row are 1, the gate is clamped to 32, whose sigmoid is 1, and fc2 picks from the activation.
    """
    generator = torch.Generator().manual_seed(31)
    call = on(
        "fc1_weights", "fc2_weights", "fc1_scales", "fc2_scales", "fc2_biases", change=torch.zeros_like
    )(call)
    experts, inner = call.experts, call.experts.intermediate_size
    x = torch.zeros_like(call.input)
    x[:, ::128] = 1
    picks = torch.zeros_like(experts.fc2_weights)
    picks[:, torch.arange(picks.shape[1]), torch.arange(picks.shape[1]) % picks.shape[2]] = 2  # the code of 1
    bias = torch.zeros_like(experts.fc1_biases)
    bias[:, inner:] = 1024
    experts = replace(
        experts,
        fc1_weights=torch.randint(0, 256, experts.fc1_weights.shape, generator=generator, dtype=torch.uint8),
        fc1_scales=torch.full_like(experts.fc1_scales, 127),
        fc1_biases=bias,
        fc2_weights=picks,
        fc2_scales=torch.full_like(experts.fc2_scales, 127),
        swiglu_alpha=torch.ones_like(experts.swiglu_alpha),
        swiglu_beta=torch.zeros_like(experts.swiglu_beta),
        swiglu_limit=torch.full_like(experts.swiglu_limit, 32),
    )
    ids = call.token_selected_experts.clone()
    ids[:, 1:] = -1
    return weights(1)(replace(call, input=x, experts=experts, token_selected_experts=ids))


FC1 = ("fc1_weights", "fc1_scales", "fc1_biases")
WEIGHTS, SCALES = ("fc1_weights", "fc2_weights"), ("fc1_scales", "fc2_scales")
NO_LIMIT = filled("swiglu_limit", value=INF)
NO_FC2_BIAS = filled("fc2_biases", value=0)

SWIGLU_PARAMETERS = ("swiglu_alpha", "swiglu_beta", "swiglu_limit")


def without(*names: str) -> Change:
    """Some tensors of the experts left out."""
    return lambda call: replace(call, experts=replace(call.experts, **dict.fromkeys(names)))


def step(limit: float | None, alpha: float = 1, beta: float = 0) -> Change:
    """SwigluStep, all experts alike."""
    values = {"swiglu_alpha": alpha, "swiglu_beta": beta, "swiglu_limit": limit}
    return of_type(SWIGLU_STEP, values)


def situ(beta: float | None, linear_beta: float | None) -> Change:
    """Situ, all experts alike."""
    return of_type(SITU, {"situ_beta": beta, "situ_linear_beta": linear_beta})


def of_type(activation_type: int, values: dict[str, float | None]) -> Change:
    def changed(call: MoeCall) -> MoeCall:
        size = (call.experts.num_experts,)
        tensors = {
            name: None if value is None else torch.full(size, float(value)) for name, value in values.items()
        }
        return replace(call, experts=replace(call.experts, **tensors), activation_type=activation_type)

    return changed


def large_gates(call: MoeCall) -> MoeCall:
    """Biases that make every gate 1024, of which the sigmoid is 1 and the tanh too."""
    bias = torch.zeros_like(call.experts.fc1_biases)
    bias[:, call.experts.intermediate_size :] = 1024
    return replace(call, experts=replace(call.experts, fc1_biases=bias))


def large_gates_and_ups(call: MoeCall) -> MoeCall:
    """The same for the ups, of either sign."""
    call = large_gates(call)
    bias = call.experts.fc1_biases.clone()
    inner = call.experts.intermediate_size
    bias[:, :inner] = 1024.0
    bias[:, : inner // 2] = -1024.0
    return replace(call, experts=replace(call.experts, fc1_biases=bias))


def no_gates(call: MoeCall) -> MoeCall:
    """Every gate what its bias is."""
    weights = call.experts.fc1_weights.clone()
    weights[:, call.experts.intermediate_size :] = 0
    return replace(call, experts=replace(call.experts, fc1_weights=weights))


def no_ups(call: MoeCall) -> MoeCall:
    """Every up 0."""
    changed = {}
    for name in ("fc1_weights", "fc1_biases"):
        changed[name] = getattr(call.experts, name).clone()
        changed[name][:, : call.experts.intermediate_size] = 0
    return replace(call, experts=replace(call.experts, **changed))


def small_sums(call: MoeCall) -> MoeCall:
    """Gates and ups far below 7."""
    return replace(call, input=call.input * 2.0**-4)


def ungated(activation_type: int, bias: Callable[[Tensor], Tensor] | None = None) -> Change:
    """Without a gate; if a function of the biases is given, they are all that the activation gets."""

    def changed(call: MoeCall) -> MoeCall:
        call = replace(call, experts=layers.without_gate(call.experts), activation_type=activation_type)
        if bias is None:
            return call
        return both(filled("fc1_weights", value=0), on("fc1_biases", change=bias))(call)

    return changed


def zeros_and_ones(biases: Tensor) -> Tensor:
    return (biases > 0).to(biases.dtype)


UNGATED: dict[str, Change] = {
    "ungated_halves_swapped": both(on(*FC1, change=equal_halves_of_each), ungated(GELU)),
    "ungated_given_as_both_halves": ungated(IDENTITY, zeros_and_ones),
    "relu2_not_squared": ungated(RELU2, zeros_and_ones),
    "relu2_not_rectified": ungated(RELU2, torch.abs),
    "relu_loses_nan": ungated(RELU),
}
STEP_AND_SITU: dict[str, Change] = {
    "activation_type_ignored": both(large_gates, step(INF)),
    "no_limit_by_default": both(step(None), small_sums),
    "step_limit_before_silu": step(INF),
    "step_gate_clamped_below": step(1.0),
    "step_limit_one_sided": step(INF),
    "step_reads_alpha_and_beta": step(2.0),
    "step_clamp_propagates_nan": step(2.0),
    "step_silu_bf16": both(large_gates, step(2.0)),
    "gelu_by_tanh": both(large_gates, of_type(GEGLU, {})),
    "gelu_bf16": both(large_gates, both(no_gates, of_type(GEGLU, {}))),
    "situ_beta_ignored": situ(4.0, 3.0),
    "situ_linear_beta_ignored": situ(3.0, 25.0),
    "situ_sigmoid_of_capped": both(large_gates, situ(128.0, 3.0)),
    "situ_betas_swapped": situ(3.0, 3.0),
    "situ_clamped": both(large_gates_and_ups, situ(2.0, 3.0)),
    "situ_up_uncapped": both(no_ups, situ(2.0, 3.0)),
    "situ_tanh_exact": both(large_gates_and_ups, situ(2.0, 3.0)),
    "situ_tanh_approx": both(large_gates_and_ups, situ(2.0, 3.0)),
    "situ_reciprocal_exact": situ(4.0, 25.0),
    "situ_divided": situ(4.0, 0.5),
    "situ_beta_first": situ(4.0, 3.0),
    "situ_gate_bf16": both(large_gates_and_ups, situ(2.0, 3.0)),
}

# Changes to `every_option`, which has biases and all parameters.
MOE: dict[str, Change] = {
    **{name: exact for name, d in DEFECTS.items() if d.target == "moe" and d.kind == "arithmetic"},
    "gate_up_swapped": on(*FC1, change=equal_halves),
    "gate_up_interleaved": on(*FC1, change=first_row),
    "nibble_order": on(*WEIGHTS, change=lambda packed: packed & 15 | packed << 4),
    "nibble_split": filled(*WEIGHTS, value=0x33),
    "weights_not_interleaved": filled(*WEIGHTS, value=0xFF),
    "weights_interleaved_twice": filled(*WEIGHTS, value=0xFF),
    "weights_interleaved_old": filled(*WEIGHTS, value=0xFF),
    "scales_not_folded": filled(*SCALES, value=120),
    "scales_folded_old": filled(*SCALES, value=120),
    "scales_folded_new": filled(*SCALES, value=120),
    "scales_not_swapped": on("fc1_scales", change=equal_halves),
    "biases_not_swapped": on("fc1_biases", change=equal_halves),
    "scale_truncated": on(*WEIGHTS, change=largest_in_each_group),
    "scale_ocp_ends": unchanged,
    "scale_off_by_one_group": filled(*SCALES, value=120),
    "scales_of_next_expert": on(*SCALES, change=lambda scales: scales[:1].expand_as(scales).clone()),
    "half_code_flushed": on(*WEIGHTS, change=no_half),
    "padding_end_of_fused": unchanged,
    "subnormal_input_flushed": unchanged,
    "limit_ignored": NO_LIMIT,
    "limit_one_sided": NO_LIMIT,
    "gate_clamped_below": NO_LIMIT,
    "clamp_after_silu": NO_LIMIT,
    "alpha_ignored": filled("swiglu_alpha", value=1),
    "alpha_on_gate": filled("swiglu_alpha", value=1),
    "beta_ignored": filled("swiglu_beta", value=0),
    "beta_after_product": filled("swiglu_beta", value=0),
    "all_or_none_params": unchanged,
    "params_by_global_id": unchanged,
    "params_of_first_expert": on(*SWIGLU_PARAMETERS, change=lambda p: p[:1].expand_as(p).clone()),
    "params_bf16": on(*SWIGLU_PARAMETERS, change=lambda p: p.to(torch.bfloat16).to(torch.float32)),
    "limit_7_by_default": both(without(*SWIGLU_PARAMETERS), small_sums),
    **STEP_AND_SITU,
    **UNGATED,
    "bias1_ignored": filled("fc1_biases", value=0),
    "bias2_ignored": NO_FC2_BIAS,
    "bias2_unweighted": NO_FC2_BIAS,
    "bias2_on_every_tp_rank": tensor_rank_1,
    "weights_bf16": weights(1),
    "weight_before_gemm2": both(weights(1), NO_FC2_BIAS),
    "weight_in_gemm2_epilogue": exact,
    "rsf_post_hoc": both(exact, weights(1.5)),
    "last_slot_dropped": last_slot_padded,
    "ep_double_mapping": unchanged,
    "ep_sentinel_aliases": unchanged,
    "ep_offset_dropped": unchanged,
    "ep_ids_modulo": unchanged,
    "gemm1_kept_fp32": exact,
    "act_kept_fp32": exact,
    "activation_fp16": exact,
    "scale_before_mma": exact,
    "bf16_finalize": exact,
    # Where nothing is NaN, Inf, subnormal or -0 these are the kernel on numbers of any length.
    "clamp_propagates_nan": unchanged,
    "nan_as_7fc0": unchanged,
    "nan_as_ffc0": unchanged,
    "bf16_saturates": unchanged,
    "minus_zero_kept": unchanged,
    "no_ftz_gemm": unchanged,
    "no_ftz_activation": unchanged,
    "no_ftz_finalize": unchanged,
    "flush_on_subnormal_grid": unchanged,
    "first_pair_reversed": unchanged,
    "bias1_bf16": filled("fc1_biases", value=0),
    "bias2_bf16": NO_FC2_BIAS,
    "finalize_by_expert": lambda call: replace(
        call, token_selected_experts=call.token_selected_experts.sort(dim=1).values
    ),
    "finalize_by_weight": lambda call: replace(
        call, token_final_scales=call.token_final_scales.sort(dim=1).values
    ),
    "beta_fused": filled("swiglu_beta", value=0),
    "alpha_in_constant": filled("swiglu_alpha", value=1),
}
ALWAYS_SHOW = {"scale_as_integer", "scale_bias_125", "codes_as_int4"}  # but on zeros


@cache
def base(generation: Generation) -> MoeCall:
    return replace(defect_calls.every_option().select(slice(4)), kernel=Sm90Kernel(generation=generation))


@pytest.mark.parametrize("generation", usual.first(1, GENERATIONS))
@pytest.mark.parametrize("name", MOE)
def test_moe(name: str, generation: Generation) -> None:
    call = MOE[name](base(generation))
    expected = forward(call)
    assert expected.isfinite().all()
    assert expected.unique().numel() > 20
    assert as_bytes(DEFECTS[name].run(call)) == as_bytes(expected)


def test_every_moe_defect_is_in_the_table() -> None:
    assert set(MOE) | ALWAYS_SHOW == {name for name, d in DEFECTS.items() if d.target == "moe"}
    assert not ALWAYS_SHOW & set(MOE)


@pytest.mark.parametrize("case", ["gemm/first_group_overflows", "gemm/first_groups_underflow"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_weight_before_gemm2_where_generations_differ(case: str, generation: Generation) -> None:
    """With weights of 1, on calls whose first groups leave float32's range."""
    call = weights(1)(open_goldens().load(case).call())
    call = replace(call, kernel=replace(call.kernel, generation=generation))
    assert as_bytes(DEFECTS["weight_before_gemm2"].run(call)) == as_bytes(forward(call))
    other = replace(call, kernel=replace(call.kernel, generation=BYTEWISE))
    if generation is not BYTEWISE:
        assert as_bytes(forward(other)) != as_bytes(forward(call)), "the case does not tell generations apart"


def test_weight_before_gemm2_gives_each_row_its_own_weight() -> None:
    """Of many tokens, which the forward computes in several parts, as of each token alone."""
    call = base(BYTEWISE)
    index = torch.arange(600) % call.num_tokens
    scales = torch.rand(len(index), call.top_k, generator=torch.Generator().manual_seed(32))
    many = replace(
        call,
        input=call.input[index],
        token_selected_experts=call.token_selected_experts[index],
        token_final_scales=scales,
    )
    run = DEFECTS["weight_before_gemm2"].run
    output = run(many)
    for token in (0, 511, 512, 599):
        assert as_bytes(output[token]) == as_bytes(run(many.select(slice(token, token + 1)))[0])


# Routers and dequantisations.


def routing(builder: Callable[[], RoutingCall], **options: Any) -> RoutingCall:
    """A call of `defect_calls` with other options; None takes one away."""
    return builder().having(**options)


def distinct(builder: Callable[[], RoutingCall], **options: Any) -> RoutingCall:
    """Without ties."""
    call = routing(builder, **options)
    return replace(call, logits=torch.randn(call.logits.shape, generator=torch.Generator().manual_seed(33)))


def in_bf16(call: RoutingCall) -> RoutingCall:
    return replace(call, logits=call.logits.to(torch.bfloat16).to(torch.float32))


V3, V4, TABLE = (
    defect_calls.deepseek_v3_groups,
    defect_calls.deepseek_v4_biased,
    defect_calls.deepseek_v4_table,
)
GPT_OSS, MIXTRAL = defect_calls.gpt_oss, defect_calls.mixtral
ONE_GROUP = {"n_group": 1, "topk_group": 1}
ROUTING: dict[str, RoutingCall] = {
    "rsf_missing": routing(V4, routed_scaling_factor=1.0),
    "rsf_twice": routing(V4, routed_scaling_factor=1.0),
    "factor_before_division": routing(V4, routed_scaling_factor=1.0),
    "gate_bias_weights": routing(V4, correction_bias=torch.zeros(32)),
    "selection_bias_ignored": routing(V4, correction_bias=torch.zeros(32)),
    "tie_highest_id": distinct(MIXTRAL),
    "groups_ignored": routing(V3, **ONE_GROUP),
    "group_score_best_one": routing(V3, **ONE_GROUP),
    "groups_masked_with_zero": routing(V3, **ONE_GROUP),
    "padding_routed": routing(V4, padded=None),
    "slots_by_id": routing(GPT_OSS, top_k=1),
    "ids_sorted_alone": routing(GPT_OSS, top_k=1),
    "logits_bf16": in_bf16(GPT_OSS()),
    "scores_bf16": in_bf16(GPT_OSS()),
    "renorm_missing": routing(GPT_OSS, top_k=32),
    "softmax_of_other_set": routing(GPT_OSS, top_k=1),
    "reciprocal_of_sum": replace(routing(V3, top_k=1), logits=torch.full((4, 32), 50.0)),
    "score_sum_float64": routing(MIXTRAL, top_k=1),
    "epsilon_missing": replace(V3(), logits=V3().logits.abs()),
}
DEQUANTIZE: dict[str, DequantizeCall] = {
    "minus_zero_lost": DequantizeCall(
        torch.tensor([[0x91] * 16], dtype=torch.uint8), torch.tensor([[9]]).byte()
    ),
    **{
        name: replace(call, packed=call.packed[2:255], scales=call.scales[2:255])
        for name in ("subnormal_weights_flushed", "other_convention", "byte_255_infinite")
        for call in [defect_calls.every_byte()]
    },
}


@pytest.mark.parametrize("name", ROUTING)
def test_routing(name: str) -> None:
    assert as_bytes(DEFECTS[name].run(ROUTING[name])) == as_bytes(route(ROUTING[name]))


@pytest.mark.parametrize("name", DEQUANTIZE)
def test_dequantize(name: str) -> None:
    assert as_bytes(DEFECTS[name].run(DEQUANTIZE[name])) == as_bytes(dequantize_call(DEQUANTIZE[name]))
