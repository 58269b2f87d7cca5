"""Engines and kernels that round, add, scale or choose in another way than the layer does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mxfp4ref import MoeCall, decode_ue8m0, dequantize, quantize
from mxfp4ref.formats.mxfp4 import E2M1_VALUES, pack_codes, unpack_codes
from mxfp4ref.goldens.runs import run_stage
from mxfp4ref.routing.models import DEEPSEEK_V3
from mxfp4ref.routing.presets import routing_weights
from mxfp4ref.routing.scoring import sigmoid as router_sigmoid
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.activation import SWIGLU, SWIGLU_BIAS, clamp, sigmoid
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.fp32 import to_bf16, widen
from mxfp4ref.sm90.swiglu import swiglu
from mxfp4ref.sm90.tactics import Tactic
from tests.held_out_kernels.by_hand import Rows, layer, local_experts, right_gemm, up_and_gate, with_experts
from tests.held_out_kernels.definition import wrong


def _bf16(x: Tensor) -> Tensor:
    """Rounded to bf16, as float32."""
    return widen(to_bf16(x))


# Sums and roundings of the GEMMs


@wrong(
    stage="fc2",
    says=(r"split|hal(f|ves)|part|two (pieces|sums)|K tiles?", r"bf16|bfloat16|round"),
    story="GEMM2 is split along K in two at a tile's border; the parts go through a bf16 workspace and are added",
)
def fc2_two_way_split_k_with_bf16_workspace(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        tiles = x.shape[1] // tactic.tile_k
        if tiles < 2:
            return right_gemm(x, packed, scales, tactic)
        cut = (tiles + 1) // 2 * tactic.tile_k
        parts = [
            right_gemm(
                x[:, k].contiguous(),
                packed[:, k.start // 2 : k.stop // 2].contiguous(),
                scales[:, k.start // 32 : k.stop // 32].contiguous(),
                tactic,
            )
            for k in (slice(0, cut), slice(cut, x.shape[1]))
        ]
        return fp32.add(_bf16(parts[0]), _bf16(parts[1]))

    return layer(call, gemm2=gemm)


@wrong(
    stage="fc1",
    says=(
        r"even|odd|alternat|interleav|every (second|other)|parity|two (accumulators|chains|partial)|strided?",
        r"order|sum|add|accumulat",
    ),
    story="GEMM1 hides the latency of its FMAs by two accumulators, even and odd K groups, added at the end",
)
def fc1_accumulators_of_even_and_of_odd_groups(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        odd = (torch.arange(x.shape[1]) // 32 % 2).bool()
        zero = torch.zeros_like(x)
        evens = right_gemm(torch.where(odd, zero, x), packed, scales, tactic)
        odds = right_gemm(torch.where(odd, x, zero), packed, scales, tactic)
        return fp32.add(evens, odds)

    return layer(call, gemm1=gemm)


@wrong(
    stage=("fc1", "activation"),
    says=(r"bias", r"round|bf16|bfloat16|fp32|float32|unrounded|accumulator"),
    story="GEMM1's epilogue adds the bias to the float32 accumulators and rounds the sum to bf16, once",
)
def fc1_bias_in_the_epilogue_rounded_once(call: MoeCall) -> Tensor:
    bias = call.experts.fc1_biases
    if bias is None or call.activation.id not in (SWIGLU, SWIGLU_BIAS):
        return layer(call)
    return layer(
        call,
        fc1=lambda rows, acc: to_bf16(fp32.add(acc, widen(bias[rows.expert]))),
        parameters=lambda rows, given: [None, *given[1:]],
    )


@wrong(
    stage="fc2",
    says=(
        r"scale",
        r"(an)?other expert|wrong expert|expert \d|of expert|active|idle|compact|experts (that|with)|shift",
    ),
    story="GEMM2's scale pointers are set up for the experts that have rows, one after another, but filled by group: "
    "the n-th expert that has rows gets the scales of expert n",
)
def fc2_scales_by_number_among_active_experts(call: MoeCall) -> Tensor:
    scales = call.experts.fc2_scales
    assert scales is not None
    rows = torch.bincount(local_experts(call).flatten() + 1, minlength=len(scales) + 1)[1:]
    active = rows.nonzero().flatten()
    taken = scales.clone()
    taken[active] = scales[: len(active)]
    return layer(with_experts(call, fc2_scales=taken))


@wrong(
    stage=("fc2", "activation"),
    says=(
        r"row|token|slot",
        r"activation|GEMM ?2|fc2|second GEMM",
        r"top.?k|divid|// ?\w|another|permut|mapped|instead of|of (token|slot|row)|read",
    ),
    story="the grouped kernel reads row `slot_id // top_k` of its input; GEMM2 is launched with GEMM1's top_k, not 1",
)
def fc2_launched_with_top_k_of_fc1(call: MoeCall) -> Tensor:
    def activation(rows: Rows, activated: Tensor) -> Tensor:
        by_slot = torch.zeros(call.num_tokens * call.top_k, activated.shape[1], dtype=torch.bfloat16)
        slot_id = rows.token * call.top_k + rows.slot
        by_slot[slot_id] = to_bf16(activated)
        return by_slot[slot_id // call.top_k]

    return layer(call, activation=activation)


@wrong(
    stage="input",
    says=(r"fp8|e4m3|8.?bits?|3 (\w+ )?bits", r"input|hidden|rows?|dispatch"),
    story="tokens are dispatched to the experts in FP8: E4M3, a float32 scale for 128 channels, then widened",
)
def dispatch_of_tokens_in_fp8(call: MoeCall) -> Tensor:
    def cast(x: Tensor) -> Tensor:
        values = x.float()
        largest = values.abs().amax(1, keepdim=True).clamp(min=1e-4)
        sent = (values * (448.0 / largest)).to(torch.float8_e4m3fn)
        return (sent.float() * (largest / 448.0)).bfloat16()

    return layer(call, x=lambda rows, x: torch.cat([cast(part) for part in x.split(128, dim=1)], dim=1))


# The activation


@wrong(
    stage="activation",
    says=(r"alpha|beta|limit|parameter", r"bf16|bfloat16"),
    story="`model.to(bfloat16)` casts the per-expert alpha, beta and limit along with everything else",
)
def swiglu_parameters_cast_with_the_model(call: MoeCall) -> Tensor:
    def parameters(rows: Rows, given: list[Tensor | None]) -> list[Tensor | None]:
        bias, *others = given
        return [bias, *(None if p is None else _bf16(p) for p in others)]

    return layer(call, parameters=parameters)


@wrong(
    stage="activation",
    says=(r"clamp|limit", r"beta", r"before|after|order|sum|up ?\+ ?beta|added|outside|inside"),
    story="beta is added to up first and the sum is clamped, where up is to be clamped alone",
)
def swiglu_clamps_up_with_beta_in_it(call: MoeCall) -> Tensor:
    def act(
        fc1: Tensor, bias: Tensor | None, alpha: Tensor | None, beta: Tensor | None, limit: Tensor | None
    ) -> Tensor:
        if beta is None or limit is None:
            return swiglu(fc1, bias, alpha, beta, limit)
        up, gate = up_and_gate(fc1, bias)
        gate = fp32.minimum(gate, limit.expand_as(gate))
        scaled = gate if alpha is None else fp32.mul(gate, alpha.expand_as(gate))
        up = clamp(fp32.add(up, beta.expand_as(up)), limit.expand_as(up))
        return fp32.mul(fp32.mul(gate, sigmoid(scaled)), up)

    return layer(call, swiglu=act)


@wrong(
    stage="activation",
    says=(
        r"sigmoid|silu|sigma",
        r"unclamped|not (clamped|limited)|raw|(before|without|ignor\w+|no) (the |its |a )?(gate'?s? )?(clamp|limit)|"
        r"not for the sigmoid",
    ),
    story="the sigmoid is computed early, of the gate as it was before the clamp; the factor is the clamped gate",
)
def swiglu_sigmoid_taken_ahead_of_the_clamp(call: MoeCall) -> Tensor:
    def act(
        fc1: Tensor, bias: Tensor | None, alpha: Tensor | None, beta: Tensor | None, limit: Tensor | None
    ) -> Tensor:
        if limit is None:
            return swiglu(fc1, bias, alpha, beta, limit)
        up, gate = up_and_gate(fc1, bias)
        limit = limit.expand_as(up)
        factor = sigmoid(gate if alpha is None else fp32.mul(gate, alpha.expand_as(gate)))
        up = clamp(up, limit)
        up = up if beta is None else fp32.add(up, beta.expand_as(up))
        return fp32.mul(fp32.mul(fp32.minimum(gate, limit), factor), up)

    return layer(call, swiglu=act)


@wrong(
    stage="activation",
    says=(r"subnormal|denormal|flush|ftz",),
    story="the activation is compiled without -ftz=true: its subnormal float32 operands and results are kept",
)
def swiglu_compiled_without_ftz(call: MoeCall) -> Tensor:
    def act(
        fc1: Tensor, bias: Tensor | None, alpha: Tensor | None, beta: Tensor | None, limit: Tensor | None
    ) -> Tensor:
        up, gate = (widen(fc1) if bias is None else widen(fc1) + widen(bias)).chunk(2, dim=-1)
        if limit is not None:
            up, gate = torch.fmax(torch.fmin(up, limit), -limit), torch.fmin(gate, limit)
        gated = gate * sigmoid(gate if alpha is None else gate * alpha)
        return gated * (up if beta is None else up + beta)

    return layer(call, swiglu=act)


# The weighted sum


@wrong(
    stage="finalize",
    says=(r"weight", r"tf32|1[01] (\w+ )?bits|13 (\w+ )*bits"),
    story="the sum over the experts is a small matrix product on TF32 tensor cores, which ignore 13 bits of a weight",
)
def finalize_by_a_tf32_product(call: MoeCall) -> Tensor:
    return layer(
        call, weights=lambda local, weights: (weights.view(torch.int32) & ~0x1FFF).view(torch.float32)
    )


@wrong(
    stage="finalize",
    says=(r"bias", r"half|halv|0\.5|2\^-1\b|factor (of )?(2|two)|1/2"),
    story="E2M1 codes are decoded as integers, twice their value, and GEMM2's epilogue halves the sum, bias and all",
)
def fc2_epilogue_halves_the_bias_too(call: MoeCall) -> Tensor:
    def halved(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        return finalize(by_slot, local, weights, None if bias is None else bias * 0.5)

    return layer(call, finalize=halved)


@wrong(
    stage="finalize",
    says=(
        r"bf16|bfloat16",
        r"accumulat|atomic|running|partial|after (each|every)|each (slot|expert|addition|step)|"
        r"(sum|total|added)\b.* (in|to) (bf16|bfloat16)|(bf16|bfloat16) (sum|total|add)",
    ),
    story="GEMM2's epilogue adds weighted rows to the output by bf16 atomics, which come in order of experts",
)
def fused_finalize_by_bf16_atomics_expert_by_expert(call: MoeCall) -> Tensor:
    def atomics(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        tokens = torch.arange(len(local))
        total = torch.zeros(len(local), by_slot.shape[2])
        order = torch.where(local < 0, call.experts.num_experts, local).argsort(dim=1, stable=True)
        for slot in order.unbind(1):
            expert = local[tokens, slot]
            y = widen(by_slot[tokens, slot])
            if bias is not None:
                y = fp32.add(y, widen(bias[expert.clamp(min=0)]))
            added = _bf16(fp32.mul(weights[tokens, slot, None].expand_as(y), y))
            total = torch.where((expert >= 0)[:, None], _bf16(fp32.add(total, added)), total)
        return total

    return layer(call, finalize=atomics)


@wrong(
    stage="finalize",
    says=(r"last|slot (k ?- ?1|\d)|shared", r"weight"),
    story="fusion with a shared expert is on though the model has none: the last slot, a routed expert's, gets "
    "the sum of the others' weights for its own, as a shared expert would",
)
def last_slot_weighted_like_a_fused_shared_expert(call: MoeCall) -> Tensor:
    def weights(local: Tensor, given: Tensor) -> Tensor:
        if given.shape[1] == 1:
            return given
        return torch.cat([given[:, :-1], given[:, :-1].sum(1, keepdim=True)], dim=1)

    return layer(call, weights=weights)


@wrong(
    stage="finalize",
    says=(
        r"normali[sz]|divid|sums? (up )?to (1|one)|over (the|their) sum|quotient",
        r"weight|routing scale",
    ),
    story="weights of slots of other ranks are set to zero and what is left is renormalised to a sum of one",
)
def routing_weights_renormalised_after_the_rank_mask(call: MoeCall) -> Tensor:
    def weights(local: Tensor, given: Tensor) -> Tensor:
        kept = given.masked_fill(local < 0, 0.0)
        total = kept.sum(1, keepdim=True)
        return torch.where(total == 0, kept, kept / total)

    return layer(call, weights=weights)


# Routers


@wrong(
    kind="routing",
    stage="routing",
    says=(r"bias", r"bf16|bfloat16|round"),
    story="the correction bias is loaded in the model's dtype, bf16, and experts are chosen by scores plus that",
)
def router_correction_bias_loaded_as_bf16(**inputs: Any) -> dict[str, Tensor]:
    bias = inputs.get("correction_bias")
    return dict(run_stage("routing", inputs if bias is None else {**inputs, "correction_bias": _bf16(bias)}))


@wrong(
    kind="routing",
    stage="routing",
    says=(r"group", r"max|best|largest|single|two|top.?2|highest"),
    story="groups are ranked by their best expert, as in DeepSeek-V2, where V3 takes the sum of the two best",
)
def router_groups_ranked_by_one_expert(**inputs: Any) -> dict[str, Tensor]:
    if inputs["preset"] != "deepseek_v3":
        return dict(run_stage("routing", inputs))
    scores = router_sigmoid(inputs["logits"])
    biased = scores + inputs["correction_bias"]
    grouped = biased.unflatten(1, (inputs["n_group"], -1))
    ranked = grouped.amax(2).argsort(dim=1, descending=True, stable=True)
    inside = torch.zeros(grouped.shape[:2], dtype=torch.bool)
    inside.scatter_(1, ranked[:, : inputs["topk_group"]], True)
    candidates = grouped.masked_fill(~inside[:, :, None], -torch.inf).flatten(1)
    ids = candidates.argsort(dim=1, descending=True, stable=True)[:, : inputs["top_k"]].int()
    weights = routing_weights(
        scores, ids, normalize="sum", epsilon=DEEPSEEK_V3.epsilon, factor=inputs["routed_scaling_factor"]
    )
    return {"ids": ids, "scales": weights}


# MXFP4 itself


def _encode(quotients: Tensor) -> Tensor:
    """The nearest E2M1 codes, ties to even, packed; beyond 6 they saturate."""
    codes = torch.signbit(quotients).to(torch.uint8) << 3
    for number, middle in enumerate((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)):
        above = quotients.abs() >= middle if number % 2 else quotients.abs() > middle
        codes += above.to(torch.uint8)
    return pack_codes(codes)


def _quotients(values: Tensor, scales: Tensor) -> Tensor:
    """Values over their group's scale, as float32; +0 in groups that are not finite."""
    factors = (scales.double() - 127).exp2().repeat_interleave(32, dim=-1)
    finite = (scales != 255).repeat_interleave(32, dim=-1)
    return torch.where(finite, values.double() / factors, 0.0).float()


@wrong(
    kind="quantize",
    stage="quantize",
    says=(r"abs|magnitude|sign|negative|positive", r"max|largest|scale"),
    story="a group's scale follows from its largest element, not its largest magnitude: negative ones saturate",
)
def quantizer_maximum_without_abs(values: Tensor, rule: Any) -> dict[str, Tensor]:
    _, scales = quantize(values.clamp(min=0), rule=rule)
    return {"packed": _encode(_quotients(values, scales)), "scales": scales}


@wrong(
    kind="quantize",
    stage="quantize",
    says=(
        r"fp8|e4m3|twice|double|two roundings|[34] (\w+ )?bits|half.?way|middle|midpoint|rounded (to|via|through)",
    ),
    story="scaled elements are converted to FP8 (E4M3) and from there to E2M1: they are rounded twice",
)
def quantizer_converts_by_way_of_e4m3(values: Tensor, rule: Any) -> dict[str, Tensor]:
    _, scales = quantize(values, rule=rule)
    eight_bits = _quotients(values, scales).to(torch.float8_e4m3fn).float()
    return {"packed": _encode(eight_bits), "scales": scales}


@wrong(
    kind="dequantize",
    stage="dequantize",
    says=(r"fp16|float16|half.?precision|65504|2\^1[56]|2\^-(14|24)|overflow|out of range",),
    story="code times scale is formed in fp16, whose range most scales are beyond, and then converted",
)
def dequantizer_multiplies_in_fp16(
    packed: Tensor, scales: Tensor, convention: Any, dtype: str
) -> dict[str, Tensor]:
    right = dequantize(packed, scales, convention=convention, dtype=getattr(torch, dtype))
    codes = torch.tensor(E2M1_VALUES, dtype=torch.float16)[unpack_codes(packed).long()]
    factors = decode_ue8m0(scales, convention).half().repeat_interleave(32, dim=-1)
    values = (codes * factors).to(right.dtype)
    return {"values": torch.where(values.isnan() & right.isnan(), right, values)}
