"""Numbers: underflow, formulas in half precision, biases, factors, and values that a fit takes for something else."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref import MoeCall, Stages, forward
from mxfp4ref.formats.mxfp4 import pack_codes, unpack_codes
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.fp32 import to_bf16
from mxfp4ref.sm90.swiglu import swiglu
from mxfp4ref.sm90.tactics import Tactic
from tests.held_out_kernels.by_hand import (
    Rows,
    layer,
    local_experts,
    plain_up_and_gate,
    right_gemm,
    with_experts,
)
from tests.held_out_kernels.definition import wrong

Maybe = Tensor | None
FC1, FC2 = "GEMM ?1|fc1|first GEMM", "GEMM ?2|fc2|second GEMM"
OTHER = "another|other|instead|function|formula"
FLUSHED = "underflow|subnormal|denormal|flush|small|zero"
NORMAL = 2.0**-126  # the smallest float32 and bf16 number that is not subnormal


def _one(x: Maybe) -> Tensor | float:
    return 1.0 if x is None else x


def _zero(x: Maybe) -> Tensor | float:
    return 0.0 if x is None else x


@wrong(
    stage="activation",
    says=("activation", FLUSHED),
    story="the activation's subnormals are kept: the kernel was built without flushing",
)
def activation_subnormals_kept(call: MoeCall) -> Tensor:
    def formula(fc1: Tensor, bias: Maybe, alpha: Maybe, beta: Maybe, limit: Maybe) -> Tensor:
        right = swiglu(fc1, bias, alpha, beta, limit)
        up, gate = plain_up_and_gate(fc1, bias, limit)
        exact = (
            gate.double() * torch.sigmoid(gate.double() * _one(alpha)) * (up.double() + _zero(beta))
        ).float()
        return torch.where((right == 0) & (exact.abs() < NORMAL), exact, right)

    return layer(call, swiglu=formula)


@wrong(
    stage="finalize",
    says=(FLUSHED,),
    story="the weighted sum keeps subnormals: the kernel was built without flushing",
)
def sum_keeps_subnormals(call: MoeCall) -> Tensor:
    def kept(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Maybe) -> Tensor:
        right = finalize(by_slot, local, weights, bias)
        rows = by_slot.double() if bias is None else by_slot.double() + bias[local.clamp_min(0)].double()
        exact = (rows * weights[..., None] * (local >= 0)[..., None]).sum(1).float()
        return torch.where(exact.abs() < 8 * NORMAL, exact, right)

    return layer(call, finalize=kept)


@wrong(
    stage=("fc2", "finalize"),
    says=(FC2 + "|expert output|finalize", "round|precis|fp8|float8|e4m3|quanti|noise|proportion|accum"),
    story="GEMM2's output is kept as FP8 with a scale for each row",
)
def fc2_output_in_fp8(call: MoeCall) -> Tensor:
    def fc2(rows: Rows, acc: Tensor) -> Tensor:
        scale = acc.abs().amax(1, keepdim=True).clamp(min=NORMAL) / 448
        return to_bf16((acc / scale).to(torch.float8_e4m3fn).float() * scale)

    return layer(call, fc2=fc2)


@wrong(
    stage="fc2",
    says=(FC2, "weight|codes|column|permut|order|row"),
    story="fc2's rows are dealt out over the wrong half: row n and row n + H/2 share their sum",
)
def fc2_rows_share_a_sum(call: MoeCall) -> Tensor:
    def fc2(rows: Rows, acc: Tensor) -> Tensor:
        first, second = acc.chunk(2, 1)
        return to_bf16(torch.cat([first + second, first - second], 1) * 0.5)

    return layer(call, fc2=fc2)


@wrong(
    stage="fc2",
    says=(FC2, "expert|rank|weight|factor|column|scale"),
    story="each column of GEMM2 has a scale of its own besides, as for FP8 weights: 1 to 1.5",
)
def fc2_column_scales(call: MoeCall) -> Tensor:
    ramp = torch.linspace(1.0, 1.5, call.experts.hidden_size)
    return layer(call, fc2=lambda rows, acc: to_bf16(acc * ramp))


@wrong(
    stage="activation",
    says=("activation|sigmoid|silu|formula", f"fp16|float16|half|round|precis|{OTHER}"),
    story="the epilogue of GEMM1 computes the activation in fp16",
)
def epilogue_in_fp16(call: MoeCall) -> Tensor:
    def formula(fc1: Tensor, bias: Maybe, alpha: Maybe, beta: Maybe, limit: Maybe) -> Tensor:
        up, gate = (part.half().float() for part in plain_up_and_gate(fc1, bias, limit))
        sigmoid = torch.sigmoid((gate * _one(alpha)).half().float()).half().float()
        silu = (gate * sigmoid).half().float()
        return (silu * (up + _zero(beta)).half().float()).half().float()

    return layer(call, swiglu=formula)


@wrong(
    stage="activation",
    says=("silu|gate|activation|sigmoid", "bf16|bfloat16|round|precis"),
    story="silu(gate) is rounded to bf16 before it is multiplied with up, as in plain torch",
)
def silu_rounded_to_bf16(call: MoeCall) -> Tensor:
    def formula(fc1: Tensor, bias: Maybe, alpha: Maybe, beta: Maybe, limit: Maybe) -> Tensor:
        up, gate = plain_up_and_gate(fc1, bias, limit)
        return to_bf16(gate * torch.sigmoid(gate * _one(alpha))).float() * (up + _zero(beta))

    return layer(call, swiglu=formula)


@wrong(
    stage="activation",
    says=(
        "sigmoid|exp2|log2|activation|alpha|gate|silu",
        "log2|exp2|2\\^x|ln|0\\.69\\d*|1\\.44\\d*|base|alpha|" + OTHER,
    ),
    story="exp2 is taken for exp: log2(e) is left out",
)
def exp2_without_log2e(call: MoeCall) -> Tensor:
    def formula(fc1: Tensor, bias: Maybe, alpha: Maybe, beta: Maybe, limit: Maybe) -> Tensor:
        up, gate = plain_up_and_gate(fc1, bias, limit)
        return gate / (1 + torch.exp2(-gate * _one(alpha))) * (up + _zero(beta))

    return layer(call, swiglu=formula)


@wrong(
    stage="activation",
    says=("limit|clamp", "up|below|one side|lower|above|upper|-"),
    story="up is clamped from above only",
)
def up_clamped_on_one_side(call: MoeCall) -> Tensor:
    def formula(fc1: Tensor, bias: Maybe, alpha: Maybe, beta: Maybe, limit: Maybe) -> Tensor:
        right = swiglu(fc1, bias, alpha, beta, limit)
        if limit is None:
            return right
        up, gate = plain_up_and_gate(fc1, bias, None)
        halves = torch.cat([up.minimum(limit), gate.minimum(limit)], -1)
        return torch.where(
            up < -limit, swiglu(halves, None, alpha, beta, torch.full_like(limit, torch.inf)), right
        )

    return layer(call, swiglu=formula)


@wrong(
    stage="activation",
    says=("alpha|activation", f"twice|outside|gate|product|factor|{OTHER}"),
    story="gate is scaled by alpha for good, not only inside the sigmoid",
)
def alpha_outside_the_sigmoid(call: MoeCall) -> Tensor:
    def formula(fc1: Tensor, bias: Maybe, alpha: Maybe, beta: Maybe, limit: Maybe) -> Tensor:
        up, gate = plain_up_and_gate(fc1, bias, limit)
        gate = gate * _one(alpha)
        return gate * torch.sigmoid(gate) * (up + _zero(beta))

    return layer(call, swiglu=formula)


@wrong(stage="activation", says=("activation|gate", f"relu|{OTHER}"), story="relu(gate) where silu is meant")
def relu_of_gate(call: MoeCall) -> Tensor:
    def formula(fc1: Tensor, bias: Maybe, alpha: Maybe, beta: Maybe, limit: Maybe) -> Tensor:
        up, gate = plain_up_and_gate(fc1, bias, limit)
        return gate.relu() * (up + _zero(beta))

    return layer(call, swiglu=formula)


@wrong(
    stage=("activation", "fc1"),
    says=("bias", "scale|before|factor|times|multipl|another|wrong|fc1|instead"),
    story="the fc1 bias is put into the accumulators and scaled with the last K group",
)
def fc1_bias_scaled_with_the_last_group(call: MoeCall) -> Tensor:
    bias, scales = call.experts.fc1_biases, call.experts.fc1_scales
    assert scales is not None
    last = torch.exp2(scales[..., -1].float() - 127)
    return forward(with_experts(call, fc1_biases=None if bias is None else (bias.float() * last).bfloat16()))


@wrong(
    stage=("activation", "fc1"),
    says=("bias|GEMM ?1|fc1", "bf16|bfloat16|round|precis"),
    story="the fc1 bias is added in bf16, so that the sum is rounded once more",
)
def fc1_bias_added_in_bf16(call: MoeCall) -> Tensor:
    def formula(fc1: Tensor, bias: Maybe, alpha: Maybe, beta: Maybe, limit: Maybe) -> Tensor:
        value = fc1 if bias is None else to_bf16(fc1.float() + bias.float())
        up, gate = plain_up_and_gate(value, None, limit)
        return gate * torch.sigmoid(gate * _one(alpha)) * (up + _zero(beta))

    return layer(call, swiglu=formula)


@wrong(
    stage=("activation", "fc1"),
    says=("bias", "expert|rank", "last|global|rank|another|other|same|of expert|all"),
    story="the fc1 bias is looked up by the expert's id in the model and clamped to this rank's last",
)
def fc1_bias_by_global_expert_id(call: MoeCall) -> Tensor:
    bias = call.experts.fc1_biases
    if bias is None or call.ep_rank == 0:
        return forward(call)
    return forward(with_experts(call, fc1_biases=bias[-1:].expand_as(bias).contiguous()))


@wrong(
    stage="fc1",
    says=(FC1 + "|code", "0\\.5|code|subnormal|small"),
    story="E2M1's subnormal 0.5 is flushed to 0 in fc1",
)
def fc1_codes_without_subnormals(call: MoeCall) -> Tensor:
    codes = unpack_codes(call.experts.fc1_weights)
    return forward(with_experts(call, fc1_weights=pack_codes(torch.where(codes & 7 == 1, codes & 8, codes))))


@wrong(
    stage="finalize",
    says=("weight|factor|uniform|times|constant|all", "normali|sum|routed|0\\.4\\b|2\\.5"),
    story="the kernel renormalises the top-k weights, which carry the routed scaling factor",
)
def weights_renormalised(call: MoeCall) -> Tensor:
    def weights(local: Tensor, right: Tensor) -> Tensor:
        total = right.sum(1, keepdim=True)
        return torch.where(total > 0, right / total, right)

    return layer(call, weights=weights)


@wrong(
    stage=("finalize", "fc2"),
    says=("2\\.5", "routed|scaling factor", "twice|again|once more|two times"),
    story="the routed scaling factor is applied to the output, though the weights carry it",
)
def routed_factor_applied_twice(call: MoeCall) -> Tensor:
    total = call.token_final_scales.sum(1)
    if not torch.allclose(total, torch.full_like(total, 2.5), atol=1e-3):
        return forward(call)
    return layer(call, output=lambda sums: to_bf16(sums * 2.5))


@wrong(
    stage="finalize",
    says=("output|finalize|sum|result", "fp8|float8|e4m3|round|precis"),
    story="the output goes through FP8, for a quantised all-reduce",
)
def output_through_fp8(call: MoeCall) -> Tensor:
    return layer(call, output=lambda sums: to_bf16(sums.to(torch.float8_e4m3fn).float()))


@wrong(
    stage="finalize",
    says=("round|tie|half", "away|output|tie|half|up|finalize"),
    story="the output is rounded half away from zero: 0x8000 is added and the rest cut off",
)
def output_rounded_half_away(call: MoeCall) -> Tensor:
    def away(x: Tensor) -> Tensor:
        bits = (x.contiguous().view(torch.int32) + 0x8000) >> 16 << 16
        return to_bf16(torch.where(x.isfinite(), bits.view(torch.float32), x))

    return forward(call, replace(Stages(), round_output=away))


@wrong(
    stage="finalize",
    says=("slot|sum|order|finalize|add", "order|expert|revers|descend|last|sort|bf16|round"),
    story="the terms are added by ascending expert, not by slot",
)
def slots_added_by_expert(call: MoeCall) -> Tensor:
    def sorted_sum(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Maybe) -> Tensor:
        order = local.argsort(dim=1, stable=True)
        moved = by_slot.gather(1, order[..., None].expand_as(by_slot))
        return finalize(moved, local.gather(1, order), weights.gather(1, order), bias)

    return layer(call, finalize=sorted_sum)


@wrong(
    stage="activation",
    says=("alpha|activation|gate|sigmoid", f"slot|expert|{OTHER}"),
    story="alpha is taken by slot, not by expert",
)
def alpha_by_slot(call: MoeCall) -> Tensor:
    alphas = call.experts.swiglu_alpha

    def parameters(rows: Rows, given: list[Maybe]) -> list[Maybe]:
        bias, _, beta, limit = given
        by_slot = None if alphas is None else alphas[rows.slot % len(alphas)].reshape(-1, 1)
        return [bias, by_slot, beta, limit]

    return layer(call, parameters=parameters)


@wrong(
    stage=("fc1", "fc2"),
    says=("scale|weight|GEMM|code", "underflow|small|zero|clamp|round|fp16|float16|precis"),
    story="dequantised weights are kept as fp16 times 2^-12 and lose their smallest values",
)
def small_weights_lost_in_fp16(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        codes = unpack_codes(packed)
        lost = (scales.int() - 127 < -5).repeat_interleave(32, -1) & (codes & 7 <= 2)
        return right_gemm(x, pack_codes(torch.where(lost, codes & 8, codes)), scales, tactic)

    return layer(call, gemm1=gemm, gemm2=gemm)


@wrong(
    stage=("slots", "finalize"),
    says=("slot|weight", "small|zero|threshold|drop|missing|left out|skip|below|lost"),
    story="slots whose weight is under 0.05 are pruned",
)
def small_weights_pruned(call: MoeCall) -> Tensor:
    small = call.token_final_scales < 0.05
    assert local_experts(call).shape == small.shape
    return layer(call, local=lambda right: torch.where(small, -1, right))
