"""Kernels that read, round, add or multiply wrongly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward, quantize
from mxfp4ref.goldens.runs import run_stage
from mxfp4ref.model.forward import select_local
from mxfp4ref.routing import routing_weights
from mxfp4ref.routing.scoring import sigmoid as router_sigmoid
from mxfp4ref.routing.scoring import softmax
from mxfp4ref.sm90 import fp32, mufu
from mxfp4ref.sm90.activation import clamp, sigmoid
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.fp32 import to_bf16, to_fp16, widen
from mxfp4ref.sm90.tactics import Tactic
from tests.held_out_kernels.by_hand import Rows, layer, right_gemm, with_experts
from tests.held_out_kernels.definition import wrong

GEMM1 = r"GEMM ?1|\bfc1\b|first GEMM|\bw13\b|up and gate|gate and up"
GEMM2 = r"GEMM ?2|\bfc2\b|second GEMM|\bw2\b|down.?proj"


@wrong(
    stage="activation",
    says=(
        r"limit|clamp",
        r"next|neighbou?r|another expert|other expert|wrong expert|expert'?s? ?\+ ?1|shift|rotat|e ?\+ ?1",
    ),
    story="the array of limits is read from its second entry on, since a header of one element was taken for data",
)
def clamp_limit_one_expert_on(call: MoeCall) -> Tensor:
    limit = call.experts.swiglu_limit
    return forward(with_experts(call, swiglu_limit=None if limit is None else limit.roll(-1)))


@wrong(
    stage="fc2",
    says=(
        GEMM2,
        r"expert",
        r"half|halves|rotat|shift|E ?/ ?2|block|swap|exchang|another|other|permut|wrong|next|\+ ?\d",
    ),
    story="w2 was saved by two ranks and the files were joined in the other order; w13 was saved by one",
)
def down_weights_of_the_other_half_of_experts(call: MoeCall) -> Tensor:
    count = call.experts.num_experts
    return layer(call, expert2=lambda rows: (rows.expert + count // 2) % count)


@wrong(
    stage="fc1",
    says=(GEMM1, r"\b(8|eight|16)\b|\b8-", r"swap|exchang|permut|interchang|xor|trad|pair|\^|blocks?"),
    story="stmatrix.x4 is given the addresses of its matrices 1 and 2 in the other order: columns "
    "c and c ^ 8 change",
)
def stmatrix_pairs_of_eight_exchanged(call: MoeCall) -> Tensor:
    def fc1(rows: Rows, acc: Tensor) -> Tensor:
        return to_bf16(acc)[:, torch.arange(acc.shape[1]) ^ 8]

    return layer(call, fc1=fc1)


@wrong(
    stage=("finalize", "fc2"),
    says=(
        r"bias",
        r"column|element|\brow|position|entr",
        r"shift|next|off|\bone\b|\+ ?1|\b1\b|rotat|neighbou?r|-1",
    ),
    story="the fc2 bias is read one element too far, across the experts",
)
def down_bias_pointer_one_element_late(call: MoeCall) -> Tensor:
    bias = call.experts.fc2_biases
    if bias is None:
        return forward(call)
    return forward(with_experts(call, fc2_biases=bias.flatten().roll(-1).view_as(bias)))


@wrong(
    stage="fc1",
    says=(
        GEMM1,
        r"scale",
        r"modulo|\bmod\b|first (K )?(tile|block)|first (four|4)|repeat|reus|% ?4"
        r"|tile 0|(each|every) K tile|periodic|every (four|4)"
        r"|groups? 0",
    ),
    story="the pointer to the scales of GEMM1 does not advance with the K tile: all tiles take those of the first",
)
def scale_pointer_stays_on_the_first_k_tile(call: MoeCall) -> Tensor:
    scales = call.experts.fc1_scales
    assert scales is not None
    return forward(
        with_experts(call, fc1_scales=scales[..., torch.arange(scales.shape[-1]) % 4].contiguous())
    )


@wrong(
    stage="finalize",
    says=(
        r"weight|scale",
        r"revers|flip|mirror|descend|backward|permut|swap|exchang|order|k ?- ?1|other slots?",
    ),
    story="ids come sorted by descending score, weights by ascending: slot s has the weight of slot k - 1 - s",
)
def weights_sorted_the_other_way_than_ids(call: MoeCall) -> Tensor:
    return layer(call, weights=lambda local, weights: weights.flip(1))


@wrong(
    stage="input",
    says=(r"input|token|hidden|\brows?\b", r"256|255|modulo|\bmod\b|wrap|8.?bit|uint8|byte"),
    story="the gather keeps a row's token in shared memory as one byte: token 256 reads the input of token 0",
)
def gather_keeps_tokens_in_a_byte(call: MoeCall) -> Tensor:
    return layer(call, x=lambda rows, x: call.input[rows.token & 255])


@wrong(
    stage="slots",
    says=(
        r"rank|expert",
        r"revers|mirror|(an)?other rank|wrong rank|ep_rank|rank (\d|r)|opposite|shift|offset|foreign|ranks\b",
    ),
    story="ranks are placed in descending order while the kernel's first expert is ep_size - 1 - ep_rank times E",
)
def ranks_counted_from_the_end(call: MoeCall) -> Tensor:
    experts, size, rank = call.experts.num_experts, call.ep_size, call.ep_rank
    ids = call.token_selected_experts
    return layer(call, local=lambda local: select_local(ids, experts, size, size - 1 - rank))


@wrong(
    stage="fc1",
    says=(
        GEMM1,
        r"last|tail|end of K|remain|final|odd|groups? (8|88)",
        r"drop|miss|skip|left out|omit|not added|without|lack|lost|ignor|cut|not read|zero",
    ),
    story="the main loop of GEMM1 is unrolled by two K tiles of 128, and of an odd number the last is left out",
)
def odd_last_k_tile_left_by_unrolling(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        tiles = x.shape[1] // 128
        if tiles > 1 and tiles % 2:
            kept = (tiles - 1) * 128
            x, packed, scales = x[:, :kept], packed[:, : kept // 2], scales[:, : kept // 32]
        return right_gemm(x.contiguous(), packed.contiguous(), scales.contiguous(), tactic)

    return layer(call, gemm1=gemm)


@wrong(
    stage=("slots", "finalize"),
    says=(
        r"slot|top.?k|experts? per token",
        r"last (two|2)|slots? (6|7)|\b6 (to|and|-|or)|first (six|6)|beyond|seventh|more than (six"
        r"|6)|from (slot )?(6|six)",
    ),
    story="written for DeepSeek-V4: a token has room for six slots, and others are not looked at",
)
def room_for_six_slots_only(call: MoeCall) -> Tensor:
    def local(right: Tensor) -> Tensor:
        seen = right.clone()
        seen[:, 6:] = -1
        return seen

    return layer(call, local=local)


@wrong(
    stage="fc2",
    says=(
        GEMM2,
        r"twice|double|repeat|two times|2 times|2 ?x|again",
        r"first|group 0|\bgroups?\b|\bK\b|tile",
    ),
    story="the prologue takes the first group of K, and the loop begins with it once more",
)
def prologue_group_also_in_the_loop(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        first = right_gemm(
            x[:, :32].contiguous(), packed[:, :16].contiguous(), scales[:, :1].contiguous(), tactic
        )
        return fp32.add(right_gemm(x, packed, scales, tactic), first)

    return layer(call, gemm2=gemm)


@wrong(
    stage=("slots", "fc2", "finalize"),
    says=(
        r"\brows?\b|token|slot",
        r"last|beyond|remain|tail|16|partial|incomplete|full tile|multiple|\bfrom\b|rest",
        r"drop|miss|zero|skip|not computed|never|left out|unwritten|lack|lost|not added|absent|ignor",
    ),
    story="the number of row tiles of an expert is rows / 16, at least one, so that what is left "
    "over is not computed",
)
def row_tiles_counted_by_floor(call: MoeCall) -> Tensor:
    def local(right: Tensor) -> Tensor:
        kept = right.flatten().clone()
        for expert in range(call.experts.num_experts):
            rows = (kept == expert).nonzero().flatten()
            kept[rows[max(len(rows) // 16, 1) * 16 :]] = -1
        return kept.view_as(right)

    return layer(call, local=local)


@wrong(
    stage=("input", "finalize"),
    says=(r"weight", r"twice|squared?|again|also|on the input|second time|two times"),
    story="apply_router_weight_on_input is true for the gather, and finalize does not know",
)
def router_weight_on_input_and_in_finalize(call: MoeCall) -> Tensor:
    def x(rows: Rows, taken: Tensor) -> Tensor:
        weight = call.token_final_scales[rows.token, rows.slot, None]
        return to_bf16(fp32.mul(widen(taken), weight.expand(taken.shape).contiguous()))

    return layer(call, x=x)


@wrong(
    stage="activation",
    says=(r"limit|clamp", r"\b7(\.0)?\b|constant|hard.?coded|fixed"),
    story="gpt-oss's limit of 7 is compiled in and used wherever one is given",
)
def limit_seven_compiled_in(call: MoeCall) -> Tensor:
    limit = call.experts.swiglu_limit
    return forward(with_experts(call, swiglu_limit=None if limit is None else torch.full_like(limit, 7.0)))


@wrong(
    stage="activation",
    says=(r"alpha|beta|limit|param", r"slot|expert 0|first expert|another expert|other expert|wrong expert"),
    story="alpha, beta and limit are indexed by the slot, which is called `expert_idx` in that kernel",
)
def swiglu_parameters_by_slot_number(call: MoeCall) -> Tensor:
    experts = call.experts
    named = (experts.swiglu_alpha, experts.swiglu_beta, experts.swiglu_limit)

    def parameters(rows: Rows, given: list[Tensor | None]) -> list[Tensor | None]:
        index = rows.slot % experts.num_experts
        return [
            given[0],
            *(old if new is None else new[index, None] for old, new in zip(given[1:], named, strict=True)),
        ]

    return layer(call, parameters=parameters)


@wrong(
    stage="fc1",
    says=(GEMM1, r"fp16|float16|\bhalf\b|half.precision|\bf16\b|65504|65,504"),
    story="the epilogue of GEMM1 was instantiated for half, and a cast makes bf16 of it",
)
def first_epilogue_by_way_of_half(call: MoeCall) -> Tensor:
    return layer(call, fc1=lambda rows, acc: to_bf16(widen(to_fp16(acc))))


@wrong(
    stage="finalize",
    says=(r"finali|output|\bsum", r"truncat|toward|\bRZ\b|cut|chop|round(ed|ing)? down|no rounding|shift"),
    story="the last conversion takes the upper 16 bits of the sum",
)
def output_is_the_upper_half_of_a_float(call: MoeCall) -> Tensor:
    def output(sums: Tensor) -> Tensor:
        return (sums.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)

    return layer(call, output=output)


@wrong(
    stage="fc2",
    says=(GEMM2, r"split|order|halves|partial sum|two parts|2 parts|parts|separately|slices"),
    story="GEMM2 is split along K in two, whose sums are added in float32",
)
def down_projection_split_in_two_along_k(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        groups = scales.shape[1]
        spans = ((0, groups // 2), (groups // 2, groups))
        parts = [
            right_gemm(
                x[:, 32 * a : 32 * b].contiguous(),
                packed[:, 16 * a : 16 * b].contiguous(),
                scales[:, a:b].contiguous(),
                tactic,
            )
            for a, b in spans
            if a < b
        ]
        return parts[0] if len(parts) == 1 else fp32.add(*parts)

    return layer(call, gemm2=gemm)


@wrong(
    stage="finalize",
    says=(r"order|sort|ascend|sequence", r"slot|expert|\bsum|add"),
    story="finalize walks over the rows as GEMM2 left them, so that a token's experts are added by ascending id",
)
def combine_walks_in_order_of_experts(call: MoeCall) -> Tensor:
    def in_order(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        order = local.argsort(dim=1, stable=True)
        rows = torch.arange(len(local))[:, None]
        return finalize(by_slot[rows, order], local.gather(1, order), weights.gather(1, order), bias)

    return layer(call, finalize=in_order)


def _swiglu(
    fc1: Tensor,
    bias: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    limit: Tensor | None,
    *,
    by: Any = sigmoid,
    bias_last: bool = False,
) -> Tensor:
    value = widen(fc1)
    offset = None if bias is None else widen(bias.contiguous())
    if offset is not None and not bias_last:
        value = fp32.add(value, offset)
    up, gate = (half.contiguous() for half in value.chunk(2, dim=-1))
    if alpha is beta is limit is None:
        return fp32.mul(fp32.mul(gate, by(gate)), up)
    like = torch.ones_like(up)
    alpha = like if alpha is None else alpha.expand(up.shape).contiguous()
    beta = like * 0 if beta is None else beta.expand(up.shape).contiguous()
    limit = like * torch.inf if limit is None else limit.expand(up.shape).contiguous()
    up, gate = clamp(up, limit), fp32.minimum(gate, limit)
    if offset is not None and bias_last:
        of_up, of_gate = (half.contiguous() for half in offset.chunk(2, dim=-1))
        up, gate = fp32.add(up, of_up), fp32.add(gate, of_gate)
    return fp32.mul(fp32.mul(gate, by(fp32.mul(gate, alpha))), fp32.add(up, beta))


@wrong(
    stage="activation",
    says=(
        r"sigmoid|silu|tanh|swish",
        r"tanh|approx|(an)?other (function|formula|sigmoid)|hard.?(ware|sigmoid)|different",
    ),
    story="sigmoid(z) is 0.5 tanh.approx(z / 2) + 0.5, one instruction of the special function unit less",
)
def sigmoid_by_tanh_approx(call: MoeCall) -> Tensor:
    def by(z: Tensor) -> Tensor:
        half = torch.full_like(z, 0.5)
        return fp32.fma(half, mufu.tanh(fp32.mul(z, half)), half)

    return layer(call, swiglu=lambda *values: _swiglu(*values, by=by))


@wrong(
    stage="activation",
    says=(
        r"sigmoid|alpha|silu|swish|\bexp",
        r"0\.69|\bln ?\(?2|log_?2|log ?2|1\.44|exp2|base (2|two)|2\^|2 ?\*\*",
    ),
    story="exp2f takes the place of expf, and the factor log2(e) of its argument was forgotten: sigmoid(z ln 2)",
)
def sigmoid_without_its_log2_e(call: MoeCall) -> Tensor:
    def by(z: Tensor) -> Tensor:
        power = mufu.ex2(-z)
        return mufu.rcp(fp32.add(torch.ones_like(power), power))

    return layer(call, swiglu=lambda *values: _swiglu(*values, by=by))


@wrong(
    stage="activation",
    says=(r"bias", r"clamp|limit", r"after|before|outside|unclamped|not clamped"),
    story="the bias is added after the clamps, by a kernel that has it in an epilogue of its own",
)
def bias_joins_after_the_clamps(call: MoeCall) -> Tensor:
    def swiglu(fc1: Tensor, bias: Tensor | None, *given: Tensor | None) -> Tensor:
        clamped = not all(value is None for value in given)
        return _swiglu(fc1, bias, *given, bias_last=clamped)

    return layer(call, swiglu=swiglu)


@wrong(
    stage=("finalize", "slots"),
    says=(
        r"slot|\bids?\b|expert",
        r"padd|-1|empty|foreign|skipp|missing|sentinel|other ranks?|not of this rank|no expert",
        r"previous|before|preced|stale|neighbou?r|another|comput|counted|added|adds|taken",
    ),
    story="the row number of a skipped slot is not written, and the register still holds that of the slot before",
)
def skipped_slot_keeps_the_row_before(call: MoeCall) -> Tensor:
    def stale(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        by_slot, local = by_slot.clone(), local.clone()
        for slot in range(1, local.shape[1]):
            skipped = local[:, slot] < 0
            by_slot[skipped, slot] = by_slot[skipped, slot - 1]
            local[skipped, slot] = local[skipped, slot - 1]
        return finalize(by_slot, local, weights, bias)

    return layer(call, finalize=stale)


@wrong(
    kind="routing",
    stage="routing",
    says=(r"group", r"max|best|top.?(1|2|two|one)|\btwo\b|single|largest|highest"),
    story="a group's score is its best expert's, as in DeepSeek-V2, in place of the sum of the best two",
)
def group_scored_by_its_best_expert(**inputs: Any) -> dict[str, Tensor]:
    if inputs["preset"] != "deepseek_v3":
        return dict(run_stage("routing", inputs))  # type: ignore[arg-type]
    scores = router_sigmoid(inputs["logits"])
    biased = fp32.add(scores, inputs["correction_bias"].expand_as(scores).contiguous())
    n_group, size = inputs["n_group"], scores.shape[1] // inputs["n_group"]
    best = biased.view(-1, n_group, size).amax(2)
    groups = best.argsort(dim=1, descending=True, stable=True)[:, : inputs["topk_group"]]
    inside = torch.zeros_like(best, dtype=torch.bool).scatter_(1, groups, True).repeat_interleave(size, 1)
    order = biased.masked_fill(~inside, -torch.inf).argsort(dim=1, descending=True, stable=True)
    ids = order[:, : inputs["top_k"]].to(torch.int32)
    factor = inputs["routed_scaling_factor"]
    scales = routing_weights(scores, ids, normalize="sum", epsilon=1e-20, factor=factor)
    return {"ids": ids, "scales": scales}


@wrong(
    kind="routing",
    stage="routing",
    says=(r"softmax|renormali|normali|\bsum", r"\ball\b|every|before|missing|\bnot\b|without"),
    story="gpt-oss: softmax over all experts, then top-k, without a second normalisation",
)
def gpt_oss_softmax_ahead_of_top_k(**inputs: Any) -> dict[str, Tensor]:
    right = dict(run_stage("routing", inputs))  # type: ignore[arg-type]
    if inputs["preset"] == "gpt_oss":
        right["scales"] = softmax(inputs["logits"].float()).gather(1, right["ids"].long())
    return right


@wrong(
    kind="quantize",
    stage="quantize",
    says=(r"\btie|half|midpoint|round", r"away|\bup\b|not to even|larger|magnitude|half.?up|outward"),
    story="the quantiser compares with >= the midpoints: ties go away from zero",
)
def quantiser_thresholds_take_their_ties(values: Tensor, rule: Any) -> dict[str, Tensor]:
    packed, scales = quantize(values, rule=rule)
    exponent = scales.to(torch.float64) - 127
    scaled = values.double().abs() / torch.exp2(exponent).repeat_interleave(32, -1)
    tie = (scaled == 0.25) | (scaled == 1.25) | (scaled == 2.5) | (scaled == 5.0)
    tie &= (scales != 255).repeat_interleave(32, -1)
    more = tie.to(torch.uint8)
    return {"packed": packed + more[..., 0::2] + (more[..., 1::2] << 4), "scales": scales}


@wrong(
    stage=("fc1", "activation", "finalize"),
    says=(r"bias", r"weight|scale", r"bf16|bfloat16|round"),
    story="two at once: the fc1 bias is not added, and the routing weights are held as bf16",
)
def no_first_bias_and_weights_in_bf16(call: MoeCall) -> Tensor:
    weights = widen(to_bf16(call.token_final_scales))
    return forward(replace(with_experts(call, fc1_biases=None), token_final_scales=weights))


@wrong(
    stage=("fc1", "fc2"),
    says=(
        r"\bup\b|w3|first half|rows 0|lower half",
        r"\b2(\.0)? ?x|twice|doubl|exponent|by 2|of 2\b|times 2|power of two",
        r"last|tail|miss|drop|left out|lack|end of K|without",
    ),
    story="two at once: the scales of w3 are one exponent too high, and GEMM2 ends a group of K too early",
)
def up_scales_doubled_and_down_k_cut(call: MoeCall) -> Tensor:
    if not call.experts.gated:
        return forward(call)
    scales = call.experts.fc1_scales
    assert scales is not None
    raised = scales.clone()
    half = scales.shape[1] // 2
    raised[:, :half] = scales[:, :half].clamp(max=254) + 1

    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        return right_gemm(
            x[:, :-32].contiguous(), packed[:, :-16].contiguous(), scales[:, :-1].contiguous(), tactic
        )

    return layer(with_experts(call, fc1_scales=raised), gemm2=gemm)
