"""What goes wrong before and around a kernel: converters, load balancers, graphs, fallbacks, routers, quantisers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mxfp4ref import MoeCall, dequantize, forward, quantize
from mxfp4ref.formats.mxfp4 import pack_codes, unpack_codes
from tests.held_out_kernels.by_hand import layer, right_routing, with_experts
from tests.held_out_kernels.definition import wrong
from tests.held_out_kernels.routers import _grouped, in_torch

FC2 = "GEMM ?2|fc2|second GEMM"


@wrong(
    stage="fc2",
    says=(
        "scale",
        FC2,
        "transpos|order|permut|layout|\\[?K|column|row|stride|reshape|arranged",
    ),
    story="the checkpoint's fc2 scales are [E, I/32, H] and are viewed as [E, H, I/32] without being transposed",
)
def fc2_scales_viewed_not_transposed(call: MoeCall) -> Tensor:
    scales = call.experts.fc2_scales
    assert scales is not None
    return forward(with_experts(call, fc2_scales=scales.transpose(1, 2).contiguous().view_as(scales)))


@wrong(
    stage=("slots", "fc1", "fc2"),
    says=(
        "expert",
        "first|\\b0\\b|another|other|instead|replica|taken for",
        "odd|token|slot|row|every (second|other)|last|half",
    ),
    story="the load balancer sends odd tokens of the last expert to its replica, which was never filled and still "
    "holds the first expert",
)
def replica_holds_another_expert(call: MoeCall) -> Tensor:
    odd = (torch.arange(call.num_tokens) % 2 == 1)[:, None]
    last = call.experts.num_experts - 1
    return layer(call, local=lambda local: torch.where(odd & (local == last), 0, local))


@wrong(
    stage="slots",
    says=(
        "token|row",
        "last|tail|remain|multiple|beyond|eight|\\b8\\b",
        "expert|\\bids?\\b",
    ),
    story="expert ids are copied into a graph's buffer in vectors of eight tokens: those of the last M mod 8 tokens "
    "stay zero, so that all their slots are expert 0's",
)
def graph_ids_copied_in_eights(call: MoeCall) -> Tensor:
    tail = (torch.arange(call.num_tokens) >= call.num_tokens // 8 * 8)[:, None]
    zero = 0 if call.ep_rank == 0 else -1
    return layer(call, local=lambda local: torch.where(tail, zero, local))


@wrong(
    stage=("fc1", "fc2"),
    says=(
        "scale|exponent|weight|code|dequanti",
        "fp16|float16|half.precision|range|2\\^-24|2\\^1[56]|underflow|overflow|small|tiny|large|zero|flush|\\binf",
    ),
    story="a fallback makes fp16 of the scales: those under 2^-24 are zero, those from 2^16 on are Inf",
)
def fallback_holds_scales_in_fp16(call: MoeCall) -> Tensor:
    def in_fp16(scales: Tensor | None) -> Tensor:
        assert scales is not None
        return torch.where(scales > 127 + 15, 255, torch.where(scales < 127 - 24, 0, scales))

    experts = call.experts
    return forward(
        with_experts(call, fc1_scales=in_fp16(experts.fc1_scales), fc2_scales=in_fp16(experts.fc2_scales))
    )


@wrong(
    stage=("fc1", "activation"),
    says=(
        "bias",
        "limit|clamp",
        "half|halves|\\bgate\\b|\\bup\\b|swap|exchang|order",
    ),
    story="two at once, of a converter: it exchanges gate and up of fc1's weights but not of its bias, which is left "
    "[gate; up], and it knows no limit",
)
def bias_halves_not_exchanged_and_no_limit(call: MoeCall) -> Tensor:
    bias, limit = call.experts.fc1_biases, call.experts.swiglu_limit
    if bias is None or limit is None:
        return forward(call)
    return forward(with_experts(call, fc1_biases=bias.roll(bias.shape[1] // 2, 1), swiglu_limit=None))


@wrong(
    stage="activation",
    says=(
        "limit|clamp",
        "zero|\\b0(\\.0)?\\b|first|beyond|but one|one element|single",
    ),
    story="the wrapper hands over a limit of one element where the kernel reads one for each expert: beyond the "
    "first it reads zeros",
)
def limit_of_one_element(call: MoeCall) -> Tensor:
    limit = call.experts.swiglu_limit
    if limit is None:
        return forward(call)
    return forward(with_experts(call, swiglu_limit=torch.cat([limit[:1], torch.zeros_like(limit[1:])])))


@wrong(
    kind="routing",
    stage="routing",
    says=("bias", "bf16|bfloat16|round|precision|dtype|cast"),
    story="e_score_correction_bias is created in the model's dtype: it is rounded to bf16 when it is loaded",
)
def correction_bias_loaded_as_bf16(**inputs: Any) -> dict[str, Tensor]:
    if "correction_bias" not in inputs:
        return right_routing(inputs)
    return right_routing({**inputs, "correction_bias": inputs["correction_bias"].bfloat16().float()})


@wrong(
    kind="routing",
    stage="routing",
    says=(
        "padd|-1|no tokens?|not tokens?",
        "routed|mask|expert|\\bids?\\b|weight|ignored|treated|slot|row|token",
    ),
    story="rows that pad the batch are routed like tokens: they get experts and weights, where -1 and 0 belong",
)
def padded_rows_are_routed(**inputs: Any) -> dict[str, Tensor]:
    if "padded" not in inputs:
        return right_routing(inputs)
    plain = {name: value for name, value in inputs.items() if name != "padded"}
    if "token_ids" in plain:
        plain["token_ids"] = plain["token_ids"].masked_fill(inputs["padded"], 0)
    plain["logits"] = torch.where(inputs["padded"][:, None], 0, plain["logits"])
    return right_routing(plain)


@wrong(
    kind="routing",
    mode="bounded",
    stage="routing",
    says=(
        "bias",
        "logit|before|inside|ahead|sigmoid|softplus|scor(ing|e function)|not (to|after) the scores?",
    ),
    story="the correction bias is added to the logits, as a bias of the gate's, and not to the scores: others "
    "are chosen",
)
def correction_bias_added_to_the_logits(**inputs: Any) -> dict[str, Tensor]:
    if "correction_bias" not in inputs or "tid2eid" in inputs:
        return in_torch(inputs)

    def keys(biased: Tensor) -> Tensor:
        logits = inputs["logits"].double() + inputs["correction_bias"].double()
        score = torch.sigmoid(logits)
        if inputs["preset"] == "deepseek_v4":
            score = torch.nn.functional.softplus(logits).sqrt()
        return _grouped(score.float(), inputs)

    return in_torch(inputs, keys=keys)


@wrong(
    kind="routing",
    stage="routing",
    says=(
        "group",
        "one more|too many|\\+ ?1|extra|more|additional|topk.?group|\\b[2-9]\\b|wider|outside|not chosen",
    ),
    story="experts are masked where their group's rank is above topk_group, not at or above: one group more "
    "takes part",
)
def one_group_too_many(**inputs: Any) -> dict[str, Tensor]:
    if inputs.get("topk_group", 1) >= inputs.get("n_group", 1):
        return right_routing(inputs)
    return right_routing({**inputs, "topk_group": inputs["topk_group"] + 1})


@wrong(
    kind="quantize",
    stage="quantize",
    says=(
        "sign|negat|minus|below zero|8 to 15|from 8 on",
        "complement|16 ?-|magnitude|revers|mirror|backward|code|invert",
    ),
    story="codes are small integers negated as such: a negative one is 16 less its magnitude, not 8 and "
    "its magnitude",
)
def quantiser_negates_in_twos_complement(*, values: Tensor, rule: str) -> dict[str, Tensor]:
    packed, scales = quantize(values, rule=rule)
    codes = unpack_codes(packed)
    return {"packed": pack_codes(torch.where(codes >= 8, (24 - codes) & 15, codes)), "scales": scales}


@wrong(
    kind="quantize",
    stage="quantize",
    says=("zero|\\b0\\b", "sign|minus|negativ|-0|code 8|\\b8\\b"),
    story="the sign is taken of the rounded value: what rounds to -0 has code 0 instead of 8",
)
def quantiser_has_no_minus_zero(*, values: Tensor, rule: str) -> dict[str, Tensor]:
    packed, scales = quantize(values, rule=rule)
    codes = unpack_codes(packed)
    return {"packed": pack_codes(codes.masked_fill(codes == 8, 0)), "scales": scales}


@wrong(
    kind="dequantize",
    stage="dequantize",
    says=(
        "scale|byte|exponent",
        "\\b0\\b|zero|255|\\binf|\\bnan\\b|subnormal|2\\^-127|shift|\\bsm90\\b|convention",
    ),
    story="a scale is its byte shifted by 23 and taken for a float: 0 is 0 instead of 2^-127, and 255 is "
    "Inf, not NaN",
)
def scales_decoded_by_a_shift(
    packed: Tensor, scales: Tensor, convention: str, dtype: str
) -> dict[str, Tensor]:
    return {"values": dequantize(packed, scales, convention="sm90", dtype=getattr(torch, dtype))}
