"""Kernels written to judge the finished diagnosis, by somebody who had not read it: mostly arithmetic gone wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward
from mxfp4ref.formats.mxfp4 import decode_ue8m0, dequantize, pack_codes, unpack_codes
from mxfp4ref.formats.quantize import quantize, step_tables
from mxfp4ref.routing.models import PRESETS
from mxfp4ref.routing.presets import RoutedScaling, routing_weights
from mxfp4ref.sm90 import fp32, mufu
from mxfp4ref.sm90.activation import SWIGLU, SWIGLU_BIAS, sigmoid
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.gemm import compiled
from mxfp4ref.sm90.gemm.order import first_pair_swapped, group_order
from mxfp4ref.sm90.tactics import Tactic
from tests.held_out_kernels.by_hand import Rows, layer, right_gemm, right_routing, up_and_gate, with_experts
from tests.held_out_kernels.definition import wrong

GROUP = 32
MIDDLES = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))


# GEMMs


@wrong(
    stage="fc2",
    says=(r"fp16|float16|half.precision", r"group|partial|accumulat|tensor.?core|product|sums?\b"),
    story="GEMM2's MMA is the one with fp16 accumulators: the product of every 32-wide K group leaves the tensor "
    "core rounded to fp16, and is scaled and added in float32 afterwards",
)
def fc2_mma_instantiated_with_half_accumulators(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        factors = decode_ue8m0(scales, "sm90")
        acc = None
        for g in group_order(scales.shape[1], tactic.tile_k):
            codes = packed[:, g * 16 : (g + 1) * 16].contiguous()
            one = torch.full((len(packed), 1), 127, dtype=torch.uint8)
            part = right_gemm(x[:, g * GROUP : (g + 1) * GROUP].contiguous(), codes, one, tactic)
            part, factor = fp32.widen(fp32.to_fp16(part)), factors[:, g].expand(len(x), -1)
            acc = fp32.mul(part, factor) if acc is None else fp32.fma(part, factor, acc)
        assert acc is not None
        return fp32.add(acc, torch.zeros_like(acc))

    return layer(call, gemm2=gemm)


@wrong(
    stage="fc1",
    says=(
        r"order|descend|revers|backward|last .*first|from the (last|end)",
        r"tile|group|\bK\b|sum|accumulat|add",
    ),
    story="GEMM1's mainloop counts its K tiles down, so that the last tile of K is accumulated first",
)
def fc1_k_tiles_counted_down(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        per_tile = tactic.tile_k // GROUP
        order = group_order(scales.shape[1], tactic.tile_k)
        order = [g for start in range(0, len(order), per_tile)[::-1] for g in order[start : start + per_tile]]
        swapped = first_pair_swapped(x[None], None, tactic, call.kernel.generation)
        return compiled.gemm(x[None], packed[None], scales[None], order, swapped)[0]

    return layer(call, gemm1=gemm)


@wrong(
    stage="fc1",
    says=(r"split|half|halves|partial|slices?", r"bf16|bfloat16"),
    story="GEMM1 is split in two along K and its workspace is of the output's dtype: each half's sum is rounded to "
    "bf16 before the two are added",
)
def fc1_split_k_workspace_of_the_output_dtype(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        tiles = x.shape[1] // tactic.tile_k
        if tiles < 2:
            return right_gemm(x, packed, scales, tactic)
        cut = (tiles + 1) // 2 * tactic.tile_k
        parts = []
        for k in (slice(0, cut), slice(cut, x.shape[1])):
            codes = packed[:, k.start // 2 : k.stop // 2].contiguous()
            bytes_ = scales[:, k.start // GROUP : k.stop // GROUP].contiguous()
            parts.append(right_gemm(x[:, k].contiguous(), codes, bytes_, tactic))
        first, second = (fp32.widen(fp32.to_bf16(part)) for part in parts)
        return fp32.add(first, second)

    return layer(call, gemm1=gemm)


@wrong(
    stage="fc2",
    says=(r"scale", r"last|tail|final|previous|preceding|before|earlier|stale"),
    story="the loop that prefetches GEMM2's scales ends one K tile early: the last tile is multiplied with the "
    "scales of the tile before it, which still lie in registers",
)
def fc2_scale_prefetch_ends_a_tile_early(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        per_tile = tactic.tile_k // GROUP
        if scales.shape[1] > per_tile:
            scales = scales.clone()
            scales[:, -per_tile:] = scales[:, -2 * per_tile : -per_tile].clone()
        return right_gemm(x, packed, scales, tactic)

    return layer(call, gemm2=gemm)


@wrong(
    stage="fc1",
    says=(r"scale", r"\bmax|larger|largest|greater|bigger|higher of"),
    story="the loader merges the scales of w1 and w3 as it merges per-tensor ones, by their maximum, row by row and "
    "group by group, and leaves the codes as they are",
)
def w13_scales_merged_by_their_maximum(call: MoeCall) -> Tensor:
    scales = call.experts.fc1_scales
    if scales is None or not call.activation.gated:
        return forward(call)
    merged = torch.maximum(*scales.view(torch.uint8).chunk(2, dim=1))
    return forward(with_experts(call, fc1_scales=torch.cat((merged, merged), dim=1).view(scales.dtype)))


@wrong(
    stage=("fc1", "activation"),
    says=(r"bias", r"before|accumulator|fused|unrounded|float32|fp32|round|epilogue"),
    story="the fc1 bias is added in GEMM1's epilogue, to its accumulators, and only the sum is rounded to bf16",
)
def fc1_bias_fused_into_the_epilogue(call: MoeCall) -> Tensor:
    bias = call.experts.fc1_biases
    if bias is None or call.activation.id not in (SWIGLU, SWIGLU_BIAS):
        return forward(call)
    return layer(
        call,
        fc1=lambda rows, acc: fp32.to_bf16(fp32.add(acc, fp32.widen(bias[rows.expert]))),
        parameters=lambda rows, given: [None, *given[1:]],
    )


# Input


@wrong(
    stage="input",
    says=(
        r"fp8|e4m3|8.?bit|3 (fraction|mantissa) bits|4 significant bits",
        r"input|hidden|dispatch|\bx\b|activations?",
    ),
    story="the all-to-all dispatches tokens in FP8, e4m3 with a float32 scale for each 128 elements, and hands the "
    "experts what it makes bf16 of again",
)
def tokens_dispatched_in_fp8(call: MoeCall) -> Tensor:
    def sent(x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448
        return (x / scale).to(torch.float8_e4m3fn).float() * scale

    def received(rows: Rows, x: Tensor) -> Tensor:
        return fp32.to_bf16(torch.cat([sent(block) for block in x.float().split(128, dim=-1)], dim=-1))

    return layer(call, x=received)


# Activation


def _glu(up: Tensor, gate: Tensor, logistic: Tensor, beta: Tensor | None) -> Tensor:
    linear = up if beta is None else fp32.add(up, beta.expand_as(up))
    return fp32.mul(fp32.mul(gate, logistic), linear)


def _times_alpha(gate: Tensor, alpha: Tensor | None) -> Tensor:
    return gate if alpha is None else fp32.mul(gate, alpha.expand_as(gate))


Parameter = Tensor | None


@wrong(
    stage="activation",
    says=(r"tanh", r"sigmoid|silu|swiglu|activation|logistic"),
    story="the sigmoid is made of one tanh.approx, 0.5 tanh(z / 2) + 0.5, which saves the reciprocal",
)
def logistic_function_by_one_tanh_instruction(call: MoeCall) -> Tensor:
    def swiglu(fc1: Tensor, bias: Parameter, alpha: Parameter, beta: Parameter, limit: Parameter) -> Tensor:
        up, gate = up_and_gate(fc1, bias, limit)
        half = torch.full_like(gate, 0.5)
        logistic = fp32.fma(mufu.tanh(fp32.mul(_times_alpha(gate, alpha), half)), half, half)
        return _glu(up, gate, logistic, beta)

    return layer(call, swiglu=swiglu)


@wrong(
    stage="activation",
    says=(r"alpha", r"twice|also|outside|again|product|multipl|factor|times"),
    story="the gate is multiplied by alpha in place, so that alpha gate, not gate, is multiplied with the sigmoid",
)
def gate_times_alpha_kept_in_its_register(call: MoeCall) -> Tensor:
    def swiglu(fc1: Tensor, bias: Parameter, alpha: Parameter, beta: Parameter, limit: Parameter) -> Tensor:
        up, gate = up_and_gate(fc1, bias, limit)
        gate = _times_alpha(gate, alpha)
        return _glu(up, gate, sigmoid(gate), beta)

    return layer(call, swiglu=swiglu)


@wrong(
    stage="activation",
    says=(r"bf16|bfloat16", r"\bup\b(?! to)|linear|beta"),
    story="the linear half is kept in the input's dtype: up + beta, clamp and bias included, is rounded to bf16 "
    "before it is multiplied with the gate",
)
def linear_half_plus_beta_in_the_input_dtype(call: MoeCall) -> Tensor:
    def swiglu(fc1: Tensor, bias: Parameter, alpha: Parameter, beta: Parameter, limit: Parameter) -> Tensor:
        up, gate = up_and_gate(fc1, bias, limit)
        linear = up if beta is None else fp32.add(up, beta.expand_as(up))
        linear = fp32.widen(fp32.to_bf16(linear))
        return _glu(linear, gate, sigmoid(_times_alpha(gate, alpha)), None)

    return layer(call, swiglu=swiglu)


@wrong(
    stage="activation",
    says=(
        r"alpha|beta|limit|parameter",
        r"another|other|neighbou?r|previous|preceding|wrong expert|first row|block|tile|expert before|next",
    ),
    story="the activation's blocks take 16 rows of the sorted buffer and load alpha, beta and limit once, for the "
    "expert of their first row, also where a block reaches into the rows of the next expert",
)
def swiglu_parameters_loaded_once_for_16_rows(call: MoeCall) -> Tensor:
    def parameters(rows: Rows, given: list[Parameter]) -> list[Parameter]:
        first = torch.arange(len(rows.expert)) // 16 * 16
        return [given[0], *(None if p is None else p[first] for p in given[1:])]

    return layer(call, parameters=parameters)


# Finalize


@wrong(
    stage="finalize",
    says=(r"tf32|\b10 .{0,20}bits|\b13 .{0,20}bits|\b19 bits|\b11 significant", r"weight|scale"),
    story="finalize is a small GEMM of TF32: the routing weights lose their 13 low bits, cut off; the terms do not",
)
def combine_matrix_in_tf32(call: MoeCall) -> Tensor:
    def weights(local: Tensor, given: Tensor) -> Tensor:
        return (given.view(torch.int32) & ~0x1FFF).view(torch.float32)

    return layer(call, weights=weights)


@wrong(
    stage="finalize",
    says=(
        r"input|hidden|residual|\bx\b",
        r"\badd|accumul|plus|start|zero|on top|\bsum|initial",
    ),
    story="the layer runs in place: finalize accumulates into the buffer of the hidden states, which nobody set to "
    "zero, so that each token's sum starts at its input",
)
def in_place_sums_start_at_the_hidden_states(call: MoeCall) -> Tensor:
    def sums(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        acc = fp32.widen(call.input)
        for slot in range(local.shape[1]):
            tokens = (local[:, slot] >= 0).nonzero().flatten()
            y = fp32.widen(by_slot[tokens, slot])
            if bias is not None:
                y = fp32.add(y, fp32.widen(bias[local[tokens, slot]]))
            acc[tokens] = fp32.fma(weights[tokens, slot, None], y, acc[tokens])
        return acc

    return layer(call, finalize=sums)


@wrong(
    stage="finalize",
    says=(r"\bmean|averag|divid|number of|count|\bk ?\+ ?1|1/|0\.2\b|fifth",),
    story="the combine is index_reduce_ with 'mean', which counts the zero that it starts from: each token's sum is "
    "divided by the number of its experts here and one more",
)
def combine_reduces_by_mean_and_counts_the_zero(call: MoeCall) -> Tensor:
    def mean(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        return finalize(by_slot, local, weights, bias) / ((local >= 0).sum(1, keepdim=True) + 1)

    return layer(call, finalize=mean)


# Routers


@wrong(
    stage="routing",
    kind="routing",
    says=(r"bias", r"bf16|bfloat16"),
    story="the model is loaded with dtype bf16 and the correction bias with it: scores get a rounded bias",
)
def correction_bias_cast_with_the_model(**inputs: Any) -> dict[str, Tensor]:
    bias = inputs.get("correction_bias")
    if bias is None:
        return right_routing(inputs)
    return right_routing({**inputs, "correction_bias": fp32.widen(fp32.to_bf16(bias))})


@wrong(
    stage="routing",
    kind="routing",
    says=(r"bias", r"subtract|minus|recover|round|precision|digits|\bbits\b|coarse|grid|cancel"),
    story="the kernel keeps only biased scores and subtracts the bias from the selected ones to weigh them: the low "
    "bits that the addition rounded away are lost",
)
def unbiased_scores_recovered_by_subtraction(**inputs: Any) -> dict[str, Tensor]:
    right = right_routing(inputs)
    bias = inputs.get("correction_bias")
    if bias is None:
        return right
    preset, logits = PRESETS[inputs["preset"]], inputs["logits"]
    padded = inputs.get("padded", torch.zeros(len(logits), dtype=torch.bool))
    biased = preset.score(logits.masked_fill(padded[:, None], 0.0)) + bias
    placed = RoutedScaling(inputs.get("routed_scaling", RoutedScaling.IN_WEIGHTS))
    scales = routing_weights(
        biased - bias,
        right["ids"].clamp(min=0),
        normalize=preset.normalize,
        epsilon=preset.epsilon,
        factor=inputs["routed_scaling_factor"] if placed is RoutedScaling.IN_WEIGHTS else 1.0,
    )
    return {"ids": right["ids"], "scales": scales.masked_fill(padded[:, None], 0.0)}


# Quantisers


def _codes_of(quotients: Tensor) -> Tensor:
    magnitude = quotients.abs()
    codes = torch.signbit(quotients).to(torch.uint8) << 3
    for middle, tie_goes_up in MIDDLES:
        codes += magnitude >= middle if tie_goes_up else magnitude > middle
    return codes


def _quotients(values: Tensor, scales: Tensor) -> Tensor:
    factors = decode_ue8m0(scales, "ocp", torch.float64).unsqueeze(-1)
    return values.double().unflatten(-1, (-1, GROUP)) / factors


def _packed(codes: Tensor, scales: Tensor) -> dict[str, Tensor]:
    codes = codes.masked_fill((scales == 255).unsqueeze(-1), 0)
    return {"packed": pack_codes(codes.flatten(-2)), "scales": scales}


@wrong(
    stage="quantize",
    kind="quantize",
    says=(r"\bamax|largest|maxim|magnitude|\bmax\b", r"bf16|bfloat16"),
    story="the largest magnitude of a group is reduced in the input's dtype, bf16: rounded to nearest before its "
    "exponent is taken, it may cross the step to another scale; elements are rounded from what they were",
)
def group_amax_reduced_in_bf16(values: Tensor, rule: str) -> dict[str, Tensor]:
    groups = fp32.widen(values).unflatten(-1, (-1, GROUP))
    bits = fp32.widen(fp32.to_bf16(groups.abs().amax(-1))).view(torch.int32)
    scales = torch.bucketize(bits, step_tables(rule)[0], right=True).to(torch.uint8)
    return _packed(_codes_of(_quotients(fp32.widen(values), scales)), scales)


@wrong(
    stage="quantize",
    kind="quantize",
    says=(
        r"fp8|e4m3|twice|double|two roundings|3 (fraction|mantissa) bits|intermediate",
        r"round|convert|via|through",
    ),
    story="scaled elements are staged as FP8, e4m3, before they become E2M1: they are rounded twice, and what lies "
    "just beside the middle of two codes is taken for a tie",
)
def elements_staged_as_e4m3(values: Tensor, rule: Any) -> dict[str, Tensor]:
    scales = quantize(values, rule=rule)[1]
    staged = _quotients(fp32.widen(values), scales).float().to(torch.float8_e4m3fn).float()
    return _packed(_codes_of(staged), scales)


# Dequantise


def _dequantized(
    packed: Tensor, scales: Tensor, convention: Any, dtype: str, change: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    kind = getattr(torch, dtype)
    right = dequantize(packed, scales, convention=convention, dtype=kind)
    return {"values": torch.where(right.isnan(), right, change(right.float()).to(kind))}


@wrong(
    stage="dequantize",
    kind="dequantize",
    says=(r"fp16|float16|half.precision|65504|65536|2\^-2[45]",),
    story="values are made in fp16 and widened: from 2^16 on they are Inf, and below 2^-24 they are rounded away",
)
def values_made_in_half_and_widened(
    packed: Tensor, scales: Tensor, convention: str, dtype: str
) -> dict[str, Tensor]:
    return _dequantized(packed, scales, convention, dtype, lambda values: fp32.widen(fp32.to_fp16(values)))


@wrong(
    stage="dequantize",
    kind="dequantize",
    says=(
        r"\b0?\.5\b|\bhalf\b|subnormal|denormal|codes? 1\b|code 9",
        r"0\.75|1\.5|implicit|hidden|normal|leading",
    ),
    story="the code's bits are moved into the float's exponent and fraction and rebiased, zero apart; E2M1's one "
    "subnormal gets the implicit leading 1 as well, so that 0.5 becomes 0.75",
)
def subnormal_code_given_a_leading_one(
    packed: Tensor, scales: Tensor, convention: str, dtype: str
) -> dict[str, Tensor]:
    subnormal = (unpack_codes(packed) & 7) == 1
    return _dequantized(
        packed, scales, convention, dtype, lambda values: torch.where(subnormal, values * 1.5, values)
    )
