"""Formulas, quantised steps, stale tiles and noise: written when the others had been used to mend the diagnosis."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref import MoeCall, Stages, forward
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.fp32 import to_bf16
from mxfp4ref.sm90.tactics import Tactic
from tests.held_out_kernels.by_hand import Rows, groups_of, layer, plain_up_and_gate, right_gemm, with_experts
from tests.held_out_kernels.definition import wrong

Maybe = Tensor | None
FC1, FC2 = "GEMM ?1|fc1|first GEMM", "GEMM ?2|fc2|second GEMM"
OTHER = "another|other|instead|function|formula"
NOISE = ("random|noise|scatter|isolated|single|few|no pattern|unknown|sporadic|bit ?flip|chance",)


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _in_fp8(x: Tensor) -> Tensor:
    """Through e4m3 with a scale for each row."""
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-30) / 448
    return (x.float() / scale).to(torch.float8_e4m3fn).float() * scale


def _up_or_down(x: Tensor, seed: int) -> Tensor:
    """Stochastic rounding to bf16."""
    random = torch.randint(
        0, 1 << 16, x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32
    )
    bits = (x.contiguous().view(torch.int32) + random) >> 16 << 16
    return to_bf16(torch.where(x.isfinite(), bits.view(torch.float32), x))


@wrong(
    stage="activation",
    says=("activation|gate|formula", f"tanh|{OTHER}"),
    story="tanh(gate) where silu is meant",
)
def tanh_of_gate(call: MoeCall) -> Tensor:
    def formula(fc1: Tensor, bias: Maybe, alpha: Maybe, beta: Maybe, limit: Maybe) -> Tensor:
        up, gate = plain_up_and_gate(fc1, bias, limit)
        return torch.tanh(gate) * up

    return layer(call, swiglu=formula)


@wrong(stage="activation", says=("activation|gate|formula", f"mish|softplus|{OTHER}"), story="Mish for SiLU")
def mish_of_gate(call: MoeCall) -> Tensor:
    def formula(fc1: Tensor, bias: Maybe, alpha: Maybe, beta: Maybe, limit: Maybe) -> Tensor:
        up, gate = plain_up_and_gate(fc1, bias, limit)
        return torch.nn.functional.mish(gate) * up

    return layer(call, swiglu=formula)


@wrong(
    stage="activation",
    says=("beta|activation|formula", f"after|product|outside|{OTHER}"),
    story="beta is added to the product instead of up",
)
def beta_added_to_the_product(call: MoeCall) -> Tensor:
    def formula(fc1: Tensor, bias: Maybe, alpha: Maybe, beta: Maybe, limit: Maybe) -> Tensor:
        up, gate = plain_up_and_gate(fc1, bias, limit)
        scaled = gate if alpha is None else gate * alpha
        product = gate * torch.sigmoid(scaled) * up
        return product if beta is None else product + beta

    return layer(call, swiglu=formula)


@wrong(
    stage=("activation", "fc2"),
    says=("activation|GEMM ?2", "fp8|float8|e4m3|quanti|round|precis|scaled"),
    story="the activation is quantised to FP8 with a scale for each row, as W4A8 does",
)
def activation_in_fp8_by_row(call: MoeCall) -> Tensor:
    return layer(call, activation=lambda rows, a: to_bf16(_in_fp8(to_bf16(a))))


@wrong(
    stage=("input", "fc1"),
    says=(f"input|{FC1}", "fp8|float8|e4m3|quanti|round|precis"),
    story="the input is quantised to FP8 with a scale for each token",
)
def input_in_fp8_by_token(call: MoeCall) -> Tensor:
    return forward(replace(call, input=to_bf16(_in_fp8(call.input))))


@wrong(
    stage=("input", "fc1"),
    says=(f"input|{FC1}", "norm|factor|scale"),
    story="the input is normalised once more, to a mean square of 1",
)
def input_normalised_again(call: MoeCall) -> Tensor:
    x = call.input.float()
    size = x.nan_to_num(0, 0, 0).square().mean(1, keepdim=True).sqrt() + 1e-6
    return forward(replace(call, input=to_bf16(torch.where(x.isfinite(), x / size, x))))


@wrong(
    stage="fc1",
    says=(FC1, "row|expert|tile", "expert|stale|another"),
    story="one tile of 64 rows of fc1 in the second expert was never copied and holds the last expert's",
)
def fc1_stale_rows_in_expert_one(call: MoeCall) -> Tensor:
    weights, scales = call.experts.fc1_weights.clone(), call.experts.fc1_scales
    assert scales is not None
    scales = scales.clone()
    if len(weights) > 1:
        weights[1, 64:128], scales[1, 64:128] = weights[-1, 64:128], scales[-1, 64:128]
    return forward(with_experts(call, fc1_weights=weights, fc1_scales=scales))


@wrong(
    stage="fc1",
    says=(FC1, "weight|codes|garbage"),
    story="the first expert's fc1 codes were overwritten by something else",
)
def fc1_codes_of_expert_zero_overwritten(call: MoeCall) -> Tensor:
    weights = call.experts.fc1_weights.clone()
    random = torch.Generator().manual_seed(11)
    weights[0] = torch.randint(0, 256, weights[0].shape, generator=random, dtype=torch.uint8)
    return forward(with_experts(call, fc1_weights=weights))


@wrong(
    stage="fc2",
    says=(FC2, "weight|codes|garbage|scale"),
    story="fc2's codes were overwritten by something else, in all experts",
)
def fc2_codes_overwritten(call: MoeCall) -> Tensor:
    weights = call.experts.fc2_weights
    random = torch.Generator().manual_seed(12)
    other = torch.randint(0, 256, weights.shape, generator=random, dtype=torch.uint8)
    return forward(with_experts(call, fc2_weights=other))


@wrong(
    stage="fc2",
    says=("scale", "\\bK\\b|group|half|weights"),
    story="in the second half of K fc2's scales are those of the group before",
)
def fc2_scales_late_in_the_second_half(call: MoeCall) -> Tensor:
    scales = call.experts.fc2_scales
    assert scales is not None
    half = scales.shape[2] // 2
    late = torch.cat((scales[..., :half], scales.roll(1, 2)[..., half:]), 2)
    return forward(with_experts(call, fc2_scales=late))


@wrong(
    stage=("slots", "finalize"),
    says=("token|row", "another|other|next|previous|got|shift"),
    story="the sum takes slot 1's row from the token after",
)
def second_slot_of_the_next_token(call: MoeCall) -> Tensor:
    def moved(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Maybe) -> Tensor:
        by_slot = by_slot.clone()
        if by_slot.shape[1] > 1:
            by_slot[:, 1] = by_slot[:, 1].roll(-1, 0)
        return finalize(by_slot, local, weights, bias)

    return layer(call, finalize=moved)


@wrong(
    stage="finalize",
    says=("weight", "root|sqrt|power|0\\.5|1/2"),
    story="the square root of the routing weight is applied, twice by plan and once in fact",
)
def square_root_of_the_weight(call: MoeCall) -> Tensor:
    return forward(replace(call, token_final_scales=call.token_final_scales.clamp(min=0).sqrt()))


@wrong(
    stage="finalize",
    says=("weight", "fp8|float8|e4m3|round|precis"),
    story="the routing weights are kept as FP8",
)
def weights_in_fp8(call: MoeCall) -> Tensor:
    weights = call.token_final_scales
    return forward(replace(call, token_final_scales=weights.to(torch.float8_e4m3fn).float()))


@wrong(
    stage=("activation", "fc2", "slots"),
    says=("row|expert|activation|token", "another|previous|before|stale|first row of each"),
    story="every second row of an expert gets the activation of the row before",
)
def odd_rows_have_the_activation_before(call: MoeCall) -> Tensor:
    def activation(rows: Rows, a: Tensor) -> Tensor:
        a = to_bf16(a)
        odd = (rows.position % 2 == 1).nonzero().flatten()
        a[odd] = a[odd - 1]
        return a

    return layer(call, activation=activation)


@wrong(
    stage=("input", "fc1"),
    says=(f"input|{FC1}", "\\bK\\b|column|next token|token after"),
    story="the last 32 columns of the input are read from the token after",
)
def input_tail_of_the_next_token(call: MoeCall) -> Tensor:
    x = call.input.clone()
    x[:, -32:] = x[:, -32:].roll(-1, 0)
    return forward(replace(call, input=x))


@wrong(
    stage=("fc2", "finalize"),
    says=("nan", "column"),
    story="one column of the output is NaN: its scale was read as 255",
)
def one_column_is_nan(call: MoeCall) -> Tensor:
    out = forward(call)
    out[:, 17] = torch.nan
    return out


@wrong(
    stage="activation",
    says=("activation|GEMM ?1|fc1", "round|precis|proportion"),
    story="the activation is rounded to bf16 up or down by chance",
)
def activation_rounded_stochastically(call: MoeCall) -> Tensor:
    return forward(call, replace(Stages(), round_activation=lambda x: _up_or_down(x, 1)))


@wrong(
    stage="fc1",
    says=(FC1, "round|precis|proportion"),
    story="GEMM1's output is rounded to bf16 up or down by chance",
)
def fc1_rounded_stochastically(call: MoeCall) -> Tensor:
    return forward(call, replace(Stages(), round_fc1=lambda x: _up_or_down(x, 2)))


@wrong(
    stage="fc1",
    says=(FC1, "group|partial|sum|round", "bf16|bfloat16|round"),
    story="each K group's part of GEMM1 is rounded to bf16 before it is added",
)
def fc1_groups_rounded_to_bf16(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        total = torch.zeros(len(x), len(packed))
        for part in groups_of(x, packed, scales):
            total = total + to_bf16(part).float()
        return total

    return layer(call, gemm1=gemm)


@wrong(
    stage="fc2",
    says=(FC2, "tf32|10 bits|cut|round|precis"),
    story="GEMM2's accumulators are cut to 6 bits of mantissa",
)
def fc2_accumulators_cut_to_six_bits(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        exact = right_gemm(x, packed, scales, tactic)
        bits = exact.contiguous().view(torch.int32) >> 17 << 17
        return torch.where(exact.isfinite(), bits.view(torch.float32), exact)

    return layer(call, gemm2=gemm)


@wrong(stage="none", says=NOISE, story="noise of half a percent on every third token")
def noise_on_some_tokens(call: MoeCall) -> Tensor:
    out = forward(call)
    noisy = to_bf16(out.float() * (1 + 0.005 * _random(21, *out.shape)))
    return torch.where((torch.arange(len(out)) % 3 == 0)[:, None], noisy, out)


@wrong(
    stage="none", says=NOISE, story="noise that is as large in every element, of a tenth of the output's size"
)
def even_noise(call: MoeCall) -> Tensor:
    out = forward(call)
    size = fp32.widen(out).nan_to_num(0, 0, 0).square().mean().sqrt()
    return to_bf16(out.float() + 0.1 * size * _random(22, *out.shape))


@wrong(stage="none", says=NOISE, story="one element in fifty is lost and is zero")
def elements_lost(call: MoeCall) -> Tensor:
    out = forward(call)
    lost = torch.rand(out.shape, generator=torch.Generator().manual_seed(23)) < 0.02
    return out.masked_fill(lost, 0.0)
