"""Biases and SwiGLU parameters, and formulas that are nearly the one meant."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref import MoeCall, Stages, forward
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.activation import sigmoid
from mxfp4ref.sm90.swiglu import swiglu
from tests.held_out_kernels.by_hand import layer, with_experts
from tests.held_out_kernels.definition import wrong

Maybe = Tensor | None


def _halves(value: Tensor, bias: Maybe) -> tuple[Tensor, Tensor]:
    value = value.float()
    if bias is not None:
        value = fp32.add(value, bias.float().expand_as(value))
    up, gate = value.chunk(2, -1)
    return up, gate


def _formula(call: MoeCall, function: object) -> Tensor:
    return layer(call, swiglu=function)  # type: ignore[arg-type]


@wrong(
    stage="activation",
    says=("limit|clamp", "\\b7(\\.0)?\\b|constant|hard|fixed|instead of|same for"),
    story="the limit is 7 whatever the model says",
)
def limit_is_seven(call: MoeCall) -> Tensor:
    limit = call.experts.swiglu_limit
    return forward(call if limit is None else with_experts(call, swiglu_limit=torch.full_like(limit, 7.0)))


@wrong(
    stage="activation",
    says=("limit|clamp", "gate|up", "only|not|without|unclamped|no\\b|ignored"),
    story="only up is clamped, gate is not",
)
def gate_not_clamped(call: MoeCall) -> Tensor:
    def formula(value: Tensor, bias: Maybe, alpha: Maybe, beta: Maybe, limit: Maybe) -> Tensor:
        if limit is None:
            return swiglu(value, bias, alpha, beta, limit)
        up, gate = _halves(value, bias)
        up = fp32.maximum(fp32.minimum(up, limit.expand_as(up)), -limit.expand_as(up))
        scaled = gate if alpha is None else fp32.mul(gate, alpha.expand_as(gate))
        shift = torch.zeros_like(up) if beta is None else beta.expand_as(up)
        return fp32.mul(fp32.mul(gate, sigmoid(scaled)), fp32.add(up, shift))

    return _formula(call, formula)


@wrong(
    stage="activation",
    says=("limit|clamp", "after|product|output|result|silu|sigmoid"),
    story="the product is clamped, not its factors",
)
def product_clamped(call: MoeCall) -> Tensor:
    def formula(value: Tensor, bias: Maybe, alpha: Maybe, beta: Maybe, limit: Maybe) -> Tensor:
        free = None if limit is None else torch.full_like(limit, torch.inf)
        out = swiglu(value, bias, alpha, beta, free)
        return out if limit is None else out.clamp(-limit, limit)

    return _formula(call, formula)


@wrong(
    stage="activation",
    says=("limit|clamp", "expert", "next|another|neighbou?r|first|other|shift|of expert"),
    story="the limits are those of the expert after",
)
def limit_of_the_next_expert(call: MoeCall) -> Tensor:
    limit = call.experts.swiglu_limit
    return forward(call if limit is None else with_experts(call, swiglu_limit=limit.roll(-1)))


@wrong(
    stage="activation",
    says=("alpha", "expert", "first|expert 0|same|one\\b|all|another"),
    story="all experts take alpha of the first",
)
def alpha_of_the_first_expert(call: MoeCall) -> Tensor:
    alpha = call.experts.swiglu_alpha
    first = None if alpha is None else alpha[:1].expand_as(alpha).contiguous()
    return forward(with_experts(call, swiglu_alpha=first))


@wrong(
    stage="activation",
    says=("alpha|1\\.702", "1\\.702|constant|hard|fixed|instead of|gelu"),
    story="alpha is 1.702 in every model, also where there is none",
)
def alpha_is_always_1_702(call: MoeCall) -> Tensor:
    return forward(with_experts(call, swiglu_alpha=torch.full((call.experts.num_experts,), 1.702)))


@wrong(
    stage="activation",
    says=("beta|\\+ ?1|shift", "1\\b|one|constant|up|added"),
    story="1 is added to up in every model, as gpt-oss asks for",
)
def one_always_added_to_up(call: MoeCall) -> Tensor:
    return forward(with_experts(call, swiglu_beta=torch.ones(call.experts.num_experts)))


@wrong(
    stage="activation",
    says=(
        "sigmoid|\\bex(p|2)\\b|\\brcp\\b|reciprocal|division",
        "exact|correct|rounded|ieee|approximat|accura|precis",
    ),
    story="an exact sigmoid where the kernel has the special function unit's",
)
def exact_sigmoid(call: MoeCall) -> Tensor:
    def formula(value: Tensor, bias: Maybe, alpha: Maybe, beta: Maybe, limit: Maybe) -> Tensor:
        up, gate = _halves(value, bias)
        if limit is not None:
            up = fp32.maximum(fp32.minimum(up, limit.expand_as(up)), -limit.expand_as(up))
            gate = fp32.minimum(gate, limit.expand_as(gate))
        scaled = gate if alpha is None else fp32.mul(gate, alpha.expand_as(gate))
        shifted = up if beta is None else fp32.add(up, beta.expand_as(up))
        return fp32.mul(fp32.mul(gate, torch.sigmoid(scaled.double()).float()), shifted)

    return _formula(call, formula)


@wrong(
    stage="activation",
    says=(
        "gelu|activation|formula|silu|sigmoid|function",
        "gelu|geglu|erf|tanh|another|other|not silu|1\\.702|instead",
    ),
    story="GeGLU: gelu(gate) where silu is meant",
)
def gelu_instead_of_silu(call: MoeCall) -> Tensor:
    def formula(value: Tensor, bias: Maybe, alpha: Maybe, beta: Maybe, limit: Maybe) -> Tensor:
        up, gate = _halves(value, bias)
        return fp32.mul(torch.nn.functional.gelu(gate), up)

    return _formula(call, formula)


@wrong(
    stage="activation",
    says=("sigmoid|silu|gate", "missing|omit|without|no\\b|left out|linear|ignored|not applied|dropped"),
    story="the sigmoid is left out: gate times up",
)
def bilinear(call: MoeCall) -> Tensor:
    def formula(value: Tensor, bias: Maybe, alpha: Maybe, beta: Maybe, limit: Maybe) -> Tensor:
        up, gate = _halves(value, bias)
        return fp32.mul(gate, up)

    return _formula(call, formula)


@wrong(
    stage=("activation", "fc1"),
    says=("bias", "gate|half", "drop|missing|omit|left out|not added|ignored|zero|only|without"),
    story="the bias of the gate half is not added",
)
def gate_bias_left_out(call: MoeCall) -> Tensor:
    bias = call.experts.fc1_biases
    if bias is None:
        return forward(call)
    bias = bias.clone()
    bias[:, bias.shape[1] // 2 :] = 0
    return forward(with_experts(call, fc1_biases=bias))


@wrong(
    stage=("activation", "fc1"),
    says=("bias", "twice|double|2x|\\b2\\b|two"),
    story="the fc1 bias is added in the epilogue and again before the activation",
)
def fc1_bias_added_twice(call: MoeCall) -> Tensor:
    def formula(value: Tensor, bias: Maybe, alpha: Maybe, beta: Maybe, limit: Maybe) -> Tensor:
        once = value if bias is None else fp32.add(value.float(), bias.float())
        return swiglu(once, bias, alpha, beta, limit)

    return _formula(call, formula)


@wrong(
    stage=("activation", "fc1"),
    says=("bias", "interleav|permut|order|shuffl|gate|up"),
    story="the fc1 bias is still interleaved gate0, up0, gate1, up1, ... as the checkpoint stores it",
)
def fc1_bias_still_interleaved(call: MoeCall) -> Tensor:
    bias = call.experts.fc1_biases
    if bias is None:
        return forward(call)
    up, gate = bias.chunk(2, 1)
    return forward(with_experts(call, fc1_biases=torch.stack([gate, up], 2).flatten(1)))


@wrong(
    stage=("activation", "fc1"),
    says=("bias", "expert", "next|another|neighbou?r|previous|other|shift|of expert"),
    story="the fc1 bias is that of the expert before",
)
def fc1_bias_of_the_expert_before(call: MoeCall) -> Tensor:
    bias = call.experts.fc1_biases
    return forward(with_experts(call, fc1_biases=None if bias is None else bias.roll(1, 0)))


@wrong(
    stage="activation",
    says=("bias", "clamp|limit"),
    story="the fc1 bias is added after the clamp",
)
def fc1_bias_after_the_clamp(call: MoeCall) -> Tensor:
    def formula(value: Tensor, bias: Maybe, alpha: Maybe, beta: Maybe, limit: Maybe) -> Tensor:
        if bias is None or limit is None:
            return swiglu(value, bias, alpha, beta, limit)
        up, gate = _halves(value, None)
        up, gate = up.clamp(-limit, limit), gate.minimum(limit)
        free = torch.full_like(limit, torch.inf)
        return swiglu(torch.cat([up, gate], -1), bias, alpha, beta, free)

    return _formula(call, formula)


@wrong(
    stage="activation",
    says=("limit|clamp", "alpha|scaled"),
    story="gate is scaled by alpha before it is clamped",
)
def gate_clamped_after_alpha(call: MoeCall) -> Tensor:
    def formula(value: Tensor, bias: Maybe, alpha: Maybe, beta: Maybe, limit: Maybe) -> Tensor:
        if alpha is None or limit is None:
            return swiglu(value, bias, alpha, beta, limit)
        up, gate = _halves(value, bias)
        scaled = fp32.mul(gate, alpha.expand_as(gate)).minimum(limit)
        up, gate = up.clamp(-limit, limit), gate.minimum(limit)
        shift = torch.zeros_like(up) if beta is None else beta.expand_as(up)
        return fp32.mul(fp32.mul(gate, sigmoid(scaled)), fp32.add(up, shift))

    return _formula(call, formula)


@wrong(
    stage=("activation", "fc1", "fc2"),
    says=("gate|up|half|column|row", "expert|last|end|tail|64|column", "zero|missing|omit|drop|lost|swap"),
    story="the last 64 columns of the activation are never written: the grid is rounded down",
)
def last_activation_columns_zero(call: MoeCall) -> Tensor:
    def zeroed(a: Tensor) -> Tensor:
        a = fp32.to_bf16(a)
        a[..., -64:] = 0
        return a

    return forward(call, replace(Stages(), round_activation=zeroed))
