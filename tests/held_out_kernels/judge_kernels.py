"""What a judge would bring of the kinds that were named: one instance of each, as it happens in a port."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mxfp4ref import MoeCall
from mxfp4ref.formats.mxfp4 import decode_ue8m0, dequantize, pack_codes
from mxfp4ref.formats.quantize import quantize
from mxfp4ref.goldens import run_stage
from mxfp4ref.routing.route import routing_weights
from mxfp4ref.routing.scoring import sigmoid as sigmoid_scores
from mxfp4ref.routing.scoring import softmax
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.activation import clamp, sigmoid
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.swiglu import swiglu
from mxfp4ref.sm90.tactics import Tactic
from tests.held_out_kernels.by_hand import Rows, groups_of, layer, right_gemm, with_experts
from tests.held_out_kernels.definition import wrong

# Index maps.


@wrong(
    stage="fc2",
    says=(
        r"expert",
        r"swap|exchang|trad|pair|neighbour|neighbor|adjacent|each other|\^ ?1|xor|permut",
        r"weight|code",
    ),
    story="the loader stacks w2 of two files at a time in the wrong order: codes of expert e are those of e ^ 1",
)
def w2_codes_of_the_twin_expert(call: MoeCall) -> Tensor:
    weights = call.experts.fc2_weights
    twin = torch.arange(len(weights)) ^ 1
    twin = torch.where(twin < len(weights), twin, twin ^ 1)
    return layer(with_experts(call, fc2_weights=weights[twin]))


@wrong(
    stage="fc1",
    says=(
        r"gate|second half",
        r"permut|swap|exchang|block|shuffl|reorder|xor|\^ ?8|\b8\b|eight|order|moved|other rows?|interleav",
    ),
    story="the two 8x8 matrices of each 16 gate rows are loaded by ldmatrix the other way round",
)
def gate_rows_of_8_trade_places(call: MoeCall) -> Tensor:
    def fc1(rows: Rows, acc: Tensor) -> Tensor:
        index = torch.arange(acc.shape[1])
        if call.activation.gated:
            inner = acc.shape[1] // 2
            index[inner:] = inner + (torch.arange(inner) ^ 8)
        return fp32.to_bf16(acc[:, index])

    return layer(call, fc1=fc1)


@wrong(
    stage=("fc2", "finalize"),
    says=(
        r"row|column|channel|hidden|output",
        r"modulo|\bmod\b|% ?128|repeat|wrap|\b128\b|again|copies|duplicat|first (tile|block)",
    ),
    story="the N coordinate of GEMM2's second and later tiles is taken inside the first tile of 128",
)
def hidden_index_stays_in_the_first_tile(call: MoeCall) -> Tensor:
    def fc2(rows: Rows, acc: Tensor) -> Tensor:
        return fp32.to_bf16(acc[:, torch.arange(acc.shape[1]) % 128])

    return layer(call, fc2=fc2)


@wrong(
    stage="fc1",
    says=(
        r"scale",
        r"group|block|\bk\b",
        r"swap|pair|exchang|neighbour|neighbor|adjacent|\^ ?1|xor|permut|trad|order|endian|even|odd",
    ),
    story="scale bytes are loaded two at a time as a 16-bit word and split high byte first",
)
def w13_scale_words_big_endian(call: MoeCall) -> Tensor:
    scales = call.experts.fc1_scales
    assert scales is not None
    return layer(with_experts(call, fc1_scales=scales.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)))


@wrong(
    stage=("finalize", "slots"),
    says=(
        r"weight|final scale",
        r"order|sort|permut|descending|swap|exchang|shift|largest|highest|(an)?other slot|next slot|wrong slot",
    ),
    story="the weights come from a sorted top-k, the ids from an unsorted one",
)
def weights_sorted_ids_not(call: MoeCall) -> Tensor:
    def weights(local: Tensor, given: Tensor) -> Tensor:
        return given.sort(dim=1, descending=True).values

    return layer(call, weights=weights)


@wrong(
    stage="input",
    says=(
        r"token|input|gather",
        r"modulo|\bmod\b|% ?\d|another|other|wrong|permut|shift|gather|transpos|major|foreign",
    ),
    story="the gather takes the flat index modulo the number of tokens, as of slot-major ids, instead of over top-k",
)
def gather_as_if_slot_major(call: MoeCall) -> Tensor:
    def x(rows: Rows, taken: Tensor) -> Tensor:
        return call.input[(rows.token * call.top_k + rows.slot) % call.num_tokens]

    return layer(call, x=x)


@wrong(
    stage="slots",
    says=(
        r"expert|slot|\bids?\b",
        r"foreign|next rank|other rank|another rank|neighbou?r|not local|non-local|remote|beyond|off by one|"
        r"inclusive|one too many|past|outside (?:its|the|this) ra|out of range|not (of )?(this|its|"
        r"the) rank|range|border|first id|upper",
    ),
    story="a rank's range of ids is tested with <= at its end, and the one too many reads the last expert",
)
def rank_range_closed_at_its_end(call: MoeCall) -> Tensor:
    experts = call.experts.num_experts

    def local(right: Tensor) -> Tensor:
        first_of_next = call.token_selected_experts.long() == (call.ep_rank + 1) * experts
        return torch.where(first_of_next, experts - 1, right)

    return layer(call, local=local)


# Drops and repeats.


@wrong(
    stage="fc1",
    says=(
        r"\bk\b|group|k.?tile",
        r"last|missing|drop|skip|tail|left out|omit|remain|lost|not (summed|added|counted)|beyond|from .* on",
    ),
    story="the main loop takes K by 256 and has no code for a rest, which only a K of 128 takes another way round",
)
def k_unrolled_by_256_without_a_rest(call: MoeCall) -> Tensor:
    def gemm1(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        depth = x.shape[1]
        kept = depth - depth % 256 if depth > 256 else depth
        return right_gemm(
            x[:, :kept].contiguous(),
            packed[:, : kept // 2].contiguous(),
            scales[:, : kept // 32].contiguous(),
            tactic,
        )

    return layer(call, gemm1=gemm1)


@wrong(
    stage="fc2",
    says=(
        r"group|tile|\bk\b|block",
        r"twice|again|repeat|doubl|two times|2x|duplicat|once more|two counts",
    ),
    story="the prologue has multiplied GEMM2's first group of K already, and the loop starts with it once more",
)
def prologue_group_counted_again(call: MoeCall) -> Tensor:
    def gemm2(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        first = groups_of(x[:, :32], packed[:, :16].contiguous(), scales[:, :1].contiguous())[0]
        return fp32.add(right_gemm(x, packed, scales, tactic), first)

    return layer(call, gemm2=gemm2)


@wrong(
    stage="fc2",
    says=(
        r"tile|rows?\b|third|\b16\b|position",
        r"zero|missing|skip|not (computed|written|stored)|drop|lost|left out|unwritten|omit|never",
    ),
    story="of every three tiles of 16 rows the one of the third consumer is never stored",
)
def third_consumer_never_stores(call: MoeCall) -> Tensor:
    def fc2(rows: Rows, acc: Tensor) -> Tensor:
        out = fp32.to_bf16(acc)
        out[rows.tile(16) % 3 == 2] = 0
        return out

    return layer(call, fc2=fc2)


# Factors and substitutions.


@wrong(
    stage="fc1",
    says=(
        r"gate|second half",
        r"halv|half (as|their|its|the (size|value|scale))|0\.5|1/2|2\^-1|factor|"
        r"too (low|small)|lower|exponent|power of",
    ),
    story="the scale bytes of the gate are decremented, for codes that were doubled, which only those of up are not",
)
def gate_scales_one_exponent_low(call: MoeCall) -> Tensor:
    scales = call.experts.fc1_scales
    assert scales is not None
    if call.activation.gated:
        inner = scales.shape[1] // 2
        gate = (scales[:, inner:].int() - 1).clamp(min=0).to(torch.uint8)
        scales = torch.cat([scales[:, :inner], gate], dim=1)
    return layer(with_experts(call, fc1_scales=scales))


@wrong(
    stage="finalize",
    says=(r"2\.5|5/2|constant|uniform", r"weight|output|scale|sum|finali|factor"),
    story="the kernel multiplies by the routed scaling factor of 2.5, which the weights contain already",
)
def factor_of_the_config_once_more(call: MoeCall) -> Tensor:
    def weights(local: Tensor, given: Tensor) -> Tensor:
        return fp32.mul(given, torch.full_like(given, 2.5))

    return layer(call, weights=weights)


@wrong(
    stage=("input", "finalize"),
    says=(r"weight", r"input|gemm1|fc1|before|earlier|instead of"),
    story="apply_router_weight_on_input is taken for an activation that is not linear",
)
def weight_multiplied_into_the_tokens(call: MoeCall) -> Tensor:
    def x(rows: Rows, taken: Tensor) -> Tensor:
        weight = call.token_final_scales[rows.token, rows.slot, None].expand(taken.shape)
        return fp32.to_bf16(fp32.mul(fp32.widen(taken), weight))

    def weights(local: Tensor, given: Tensor) -> Tensor:
        return torch.ones_like(given)

    return layer(call, x=x, weights=weights)


@wrong(
    stage="activation",
    says=(r"limit|clamp", r"\b10\b|10\.0|constant|hard|fixed|larger|too (high|large|loose|wide)"),
    story="the limit is a template constant of 10, DeepSeek-V4's, wherever a limit is given",
)
def limit_is_a_template_constant(call: MoeCall) -> Tensor:
    def parameters(rows: Rows, given: list[Tensor | None]) -> list[Tensor | None]:
        bias, alpha, beta, limit = given
        if limit is not None and call.experts.swiglu_limit is not None:
            limit = torch.full_like(limit, 10.0)
        return [bias, alpha, beta, limit]

    return layer(call, parameters=parameters)


@wrong(
    stage="activation",
    says=(
        r"alpha|beta|limit|parameter",
        r"slot|expert 0|first expert|another expert|other expert|wrong expert",
    ),
    story="alpha, beta and limit are indexed by the slot of the row, not by its expert",
)
def parameters_of_the_slot_number(call: MoeCall) -> Tensor:
    def parameters(rows: Rows, given: list[Tensor | None]) -> list[Tensor | None]:
        experts = call.experts
        named = (experts.swiglu_alpha, experts.swiglu_beta, experts.swiglu_limit)
        taken = [
            old if new is None else new.reshape(-1, 1)[rows.slot % len(new)]
            for old, new in zip(given[1:], named, strict=True)
        ]
        return [given[0], *taken]

    return layer(call, parameters=parameters)


# Roundings.


@wrong(
    stage="activation",
    says=(r"fp16|float16|\bf16\b|__half|half.?precision|\ba half\b|ieee half",),
    story="the activation is held as __half in shared memory and converted to bf16 when GEMM2 loads it",
)
def activation_parked_as_half(call: MoeCall) -> Tensor:
    def activation(rows: Rows, activated: Tensor) -> Tensor:
        return fp32.to_bf16(fp32.widen(fp32.to_fp16(activated)))

    return layer(call, activation=activation)


@wrong(
    stage="fc1",
    says=(
        r"tf32|10 (fraction |mantissa )?bits|rounded twice|double.?round|two roundings|twice rounded|19.bit",
    ),
    story="the accumulators go through a conversion to tf32 (ties away) before that to bf16",
)
def accumulators_through_tf32(call: MoeCall) -> Tensor:
    def fc1(rows: Rows, acc: Tensor) -> Tensor:
        bits = acc.view(torch.int32)
        finite = (bits & 0x7F800000) != 0x7F800000
        return fp32.to_bf16(torch.where(finite, (bits + 0x1000) & -0x2000, bits).view(torch.float32))

    return layer(call, fc1=fc1)


@wrong(
    stage="fc2",
    says=(r"trunc|towards? (zero|0)|\brtz\b|\brz\b|chop|cut off|upper (half|16)|high (half|16)",),
    story="GEMM2's epilogue stores the upper 16 bits of each float32",
)
def upper_half_words_stored(call: MoeCall) -> Tensor:
    def fc2(rows: Rows, acc: Tensor) -> Tensor:
        return (acc.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)

    return layer(call, fc2=fc2)


# Orders of summation.


@wrong(
    stage="fc2",
    says=(r"split|halves|two parts|partial|order|separate|\bparts\b",),
    story="GEMM2 runs with split-K of 2, whose partial sums meet in float32",
)
def down_projection_in_two_k_slices(call: MoeCall) -> Tensor:
    def gemm2(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        cut = x.shape[1] // 64 * 32
        low = right_gemm(
            x[:, :cut].contiguous(),
            packed[:, : cut // 2].contiguous(),
            scales[:, : cut // 32].contiguous(),
            tactic,
        )
        high = right_gemm(
            x[:, cut:].contiguous(),
            packed[:, cut // 2 :].contiguous(),
            scales[:, cut // 32 :].contiguous(),
            tactic,
        )
        return fp32.add(low, high)

    return layer(call, gemm2=gemm2)


@wrong(
    stage="finalize",
    says=(r"order|sort|ascending|sequence|summed by",),
    story="experts add their rows to the output as they come, in the order of the experts, not of the slots",
)
def experts_add_as_they_finish(call: MoeCall) -> Tensor:
    def summed(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        order = local.argsort(dim=1, stable=True)
        moved = by_slot.gather(1, order[:, :, None].expand(by_slot.shape))
        return finalize(moved, local.gather(1, order), weights.gather(1, order), bias)

    return layer(call, finalize=summed)


# The activation's formula.


@wrong(
    stage="activation",
    says=(
        r"alpha",
        r"silu|swish|outside|twice|factor|multipl|both|scaled|times|\* ?gate|x ?\* ?sig|argument|product",
    ),
    story="silu(alpha * gate) instead of gate * sigmoid(alpha * gate): alpha counts outside the sigmoid as well",
)
def silu_of_the_stretched_gate(call: MoeCall) -> Tensor:
    def formula(fc1: Tensor, bias: Any, alpha: Any, beta: Any, limit: Any) -> Tensor:
        if call.experts.swiglu_alpha is None:
            return swiglu(fc1, bias, alpha, beta, limit)
        values = fp32.widen(fc1)
        if bias is not None:
            values = fp32.add(values, fp32.widen(bias))
        up, gate = values.chunk(2, dim=-1)
        if limit is not None:
            bound = limit.expand(up.shape)
            up, gate = clamp(up, bound), fp32.minimum(gate, bound)
        if beta is not None:
            up = fp32.add(up, beta.expand(up.shape))
        stretched = fp32.mul(gate, alpha.expand(gate.shape))
        return fp32.mul(fp32.mul(stretched, sigmoid(stretched)), up)

    return layer(call, swiglu=formula)


# Stale memory.


@wrong(
    stage="fc1",
    says=(
        r"previous|preceding|stale|clear|zeroed|reset|carried|left.?over|another expert|other expert|earlier|"
        r"initiali|expert before|kept from|\+ expert",
    ),
    story="a persistent CTA keeps GEMM1's accumulators from expert to expert: those of the one before are added",
)
def accumulators_kept_from_expert_to_expert(call: MoeCall) -> Tensor:
    def fc1(rows: Rows, acc: Tensor) -> Tensor:
        kept = torch.zeros(0, acc.shape[1])
        out = acc.clone()
        for expert in rows.expert.unique().tolist():
            mine = (rows.expert == expert).nonzero().flatten()
            both = min(len(kept), len(mine))
            out[mine[:both]] = fp32.add(out[mine[:both]], kept[:both])
            kept = torch.cat([out[mine], kept[len(mine) :]])
        return fp32.to_bf16(out)

    return layer(call, fc1=fc1)


# Routing, quantisers and dequantisation.


@wrong(
    stage="routing",
    kind="routing",
    says=(r"group", r"max|best|top.?1\b|single|one expert|top.?2\b|two best|two largest|score"),
    story="a group of experts is scored by its best expert alone instead of the sum of its best two",
)
def groups_scored_by_their_best(**inputs: Any) -> dict[str, Tensor]:
    if inputs["preset"] != "deepseek_v3":
        return dict(run_stage("routing", inputs))
    scores = sigmoid_scores(inputs["logits"])
    biased = scores + inputs["correction_bias"]
    groups = biased.unflatten(1, (inputs["n_group"], -1))
    order = groups.amax(2).sort(dim=1, descending=True, stable=True).indices
    inside = torch.zeros(groups.shape[:2], dtype=torch.bool).scatter_(
        1, order[:, : inputs["topk_group"]], True
    )
    left = torch.where(inside[:, :, None], groups, -torch.inf).flatten(1)
    ids = left.sort(dim=1, descending=True, stable=True).indices[:, : inputs["top_k"]].int()
    factor = inputs["routed_scaling_factor"]
    return {"ids": ids, "scales": routing_weights(scores, ids, normalize="sum", epsilon=1e-20, factor=factor)}


@wrong(
    stage="routing",
    kind="routing",
    says=(r"softmax|normali|renorm|divid|sum to", r"all|every|before|over|not|without|missing|renorm"),
    story="gpt-oss: softmax over all experts before the top-k, whose weights then do not add up to 1",
)
def probabilities_of_all_experts_as_weights(**inputs: Any) -> dict[str, Tensor]:
    right = dict(run_stage("routing", inputs))
    if inputs["preset"] == "gpt_oss":
        right["scales"] = softmax(inputs["logits"].float()).gather(1, right["ids"].long())
    return right


@wrong(
    stage="quantize",
    kind="quantize",
    says=(
        r"\bties?\b|half.?way|midpoint|middle",
        r"away|\bup\b|outward|larger|not (to )?(the )?even|upwards?",
    ),
    story="codes are chosen by >= at every midpoint: ties go away from zero, not to the even code",
)
def midpoints_go_outwards(values: Tensor, rule: Any) -> dict[str, Tensor]:
    _, scales = quantize(values, rule=rule)
    broken = (scales == 255).repeat_interleave(32, dim=-1)
    step = decode_ue8m0(scales, dtype=torch.float64).repeat_interleave(32, dim=-1)
    size = values.double().abs() / step
    midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)
    codes = torch.bucketize(size, midpoints, right=True).to(torch.uint8)
    codes |= torch.signbit(values).to(torch.uint8) << 3
    return {"packed": pack_codes(codes.masked_fill(broken, 0)), "scales": scales}


@wrong(
    stage="dequantize",
    kind="dequantize",
    says=(
        r"\b2x|\b2\.0x|twice|doubl|factor (of )?(2|two)|(by|times) (2|two)|exponent|power of two|\b126\b|2\^1\b",
    ),
    story="the exponent bias of a scale byte is 126",
)
def exponent_bias_of_126(packed: Tensor, scales: Tensor, convention: Any, dtype: str) -> dict[str, Tensor]:
    values = dequantize(packed, scales, convention=convention, dtype=getattr(torch, dtype))
    doubled = values * 2
    return {"values": torch.where(values.isnan(), values, doubled)}


# Two at once.


@wrong(
    stage=("fc1", "fc2"),
    says=(
        r"scale",
        r"next|neighbou?r|another|other expert|wrong expert|shift|roll|\+ ?1|following|one too (far|high)",
    ),
    story="GEMM1's scales are the next expert's, and GEMM2's output is summed without its rounding to bf16",
)
def scales_one_ahead_and_fc2_unrounded(call: MoeCall) -> Tensor:
    scales = call.experts.fc1_scales
    assert scales is not None

    def fc2(rows: Rows, acc: Tensor) -> Tensor:
        return acc

    return layer(with_experts(call, fc1_scales=scales.roll(-1, dims=0)), fc2=fc2)


@wrong(
    stage=("input", "finalize"),
    says=(
        r"fp8|e4m3|8.bit|eight.bit|3 (fraction |mantissa )?bits|float8|"
        r"bias\w* (is |are )?(missing|ignored|left out|not|dropped|lost|zero)|(without|no|missing) [\w' ]*bias",
    ),
    story="a W4A8 path is taken, with tokens cast to E4M3 without a scale, and it knows no bias of fc2",
)
def eight_bit_tokens_and_no_down_bias(call: MoeCall) -> Tensor:
    def x(rows: Rows, taken: Tensor) -> Tensor:
        return taken.float().clamp(-448, 448).to(torch.float8_e4m3fn).to(torch.bfloat16)

    return layer(with_experts(call, fc2_biases=None), x=x)
