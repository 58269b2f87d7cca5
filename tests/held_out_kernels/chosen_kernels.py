"""A judge's sample of kernels: index maps, drops, factors, substitutions, roundings, orders, formulas and routers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mxfp4ref import MoeCall, decode_ue8m0
from mxfp4ref.formats.mxfp4 import pack_codes, unpack_codes
from mxfp4ref.goldens import run_stage
from mxfp4ref.routing import PRESETS, routing_weights
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.fp32 import mul, to_bf16, to_fp16
from mxfp4ref.sm90.swiglu import swiglu
from mxfp4ref.sm90.tactics import Tactic

from .by_hand import Rows, layer, right_gemm, with_experts
from .definition import wrong

EXPERT = "expert"
GEMM1 = r"GEMM ?1|fc1|w13|\bw1\b|first GEMM|gate|up\b"
GEMM2 = r"GEMM ?2|fc2|\bw2\b|second GEMM|down"


# -- index maps


@wrong(
    stage="fc2",
    says=(
        EXPERT,
        r"swap|pair|exchang|\^ ?1|xor|each other|neighbou?r|partner|even.*odd|odd.*even"
        r"|next.*previous|expert 1.*expert 0|expert 0.*expert 1|another expert|other expert",
    ),
    story="the down projections of experts 2i and 2i + 1 are exchanged: CTAs of a cluster take each other's group",
)
def cluster_pair_takes_each_others_w2(call: MoeCall) -> Tensor:
    def whose(rows: Rows) -> Tensor:
        partner = rows.expert ^ 1
        return torch.where(partner < call.experts.num_experts, partner, rows.expert)

    return layer(call, expert2=whose)


@wrong(
    stage="fc1",
    says=(
        GEMM1,
        r"16|block|within|sub.?tile",
        r"swap|permut|exchang|order|shuffl|transpos|interleav",
    ),
    story="of each 64 rows of GEMM1's output the second and third 16 are stored in each other's place",
)
def middle_sixteens_of_w13_exchanged(call: MoeCall) -> Tensor:
    def fc1(rows: Rows, acc: Tensor) -> Tensor:
        blocks = acc.unflatten(-1, (-1, 4, 16))[..., [0, 2, 1, 3], :]
        return to_bf16(blocks.flatten(-3))

    return layer(call, fc1=fc1)


@wrong(
    stage="fc2",
    says=(
        r"column|row|hidden|channel|feature|\bH\b|\bN\b",
        r"modul|\bmod\b|%|repeat|cop(y|ies)|same as|wrap|again|first 128|those of|128|period",
    ),
    story="the N tile index is left out of W2's address: columns from 128 on repeat the first 128",
)
def w2_rows_wrap_at_128(call: MoeCall) -> Tensor:
    def gemm2(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        row = torch.arange(len(packed)) % 128
        return right_gemm(x, packed[row].contiguous(), scales[row].contiguous(), tactic)

    return layer(call, gemm2=gemm2)


@wrong(
    stage="fc1",
    says=(
        "scale",
        r"swap|pair|exchang|neighbou?r|byte|order|\^ ?1|xor|permut|each other|even.*odd|reorder"
        r"|another group|other group|next.*previous",
    ),
    story="two scale bytes of GEMM1 are fetched as a 16-bit word and taken in the wrong order: groups 2g and 2g + 1",
)
def scale_bytes_of_a_word_reversed(call: MoeCall) -> Tensor:
    scales = call.experts.fc1_scales
    assert scales is not None
    reversed_words = scales.unflatten(-1, (-1, 2)).flip(-1).flatten(-2).contiguous()
    return layer(with_experts(call, fc1_scales=reversed_words))


@wrong(
    stage="finalize",
    says=(
        r"weight|scale",
        r"slot",
        r"swap|exchang|permut|each other|other slot|another slot|last two|order|previous|next|neighbou?r|wrong slot",
    ),
    story="the weights of the last two slots are exchanged: the sorter moves ids and leaves a pair of weights behind",
)
def weights_of_the_last_two_slots_exchanged(call: MoeCall) -> Tensor:
    def weights(local: Tensor, given: Tensor) -> Tensor:
        k = given.shape[1]
        return given if k < 2 else given[:, [*range(k - 2), k - 1, k - 2]]

    return layer(call, weights=weights)


@wrong(
    stage=("input", "fc1"),
    says=(
        r"token|input|row",
        r"modul|\bmod\b|%|other token|another token|wrong token|different token|permut"
        r"|stride|major|gather|mix|transpos",
    ),
    story="expanded row m * k + j reads token (m * k + j) % M: the row map is slot-major, the gather token-major",
)
def gather_thinks_slots_are_outermost(call: MoeCall) -> Tensor:
    tokens, k = call.token_selected_experts.shape

    def x(rows: Rows, given: Tensor) -> Tensor:
        return call.input[(rows.token * k + rows.slot) % tokens]

    return layer(call, x=x)


@wrong(
    stage="slots",
    says=(
        r"expert|slot|\bids?\b",
        r"foreign|other rank|another rank|next rank|not local|remote|off.by.one|range|bound|border|"
        r"outside (?:its|the|this) ra"
        r"|not (?:this|the) rank|of no|last|belong|neighbou?r",
    ),
    story="a rank takes start <= id <= end for its range: the next rank's first expert is computed as its last",
)
def end_of_the_rank_is_inclusive(call: MoeCall) -> Tensor:
    experts = call.experts.num_experts
    end = (call.ep_rank + 1) * experts

    def local(right: Tensor) -> Tensor:
        if call.ep_rank + 1 >= call.ep_size:
            return right
        return torch.where(call.token_selected_experts == end, experts - 1, right)

    return layer(call, local=local)


@wrong(
    stage=("activation", "fc1"),
    says=(
        r"gate",
        r"shift|off.by.one|one row|previous|preceding|neighbou?r|offset|one (?:too|place|element)|roll|earl|by 1\b"
        r"|- ?1\b|row before",
    ),
    story="the gate half begins one row too early: its row i is that of i - 1, its first the last one of up",
)
def gate_begins_a_row_early(call: MoeCall) -> Tensor:
    def activated(fc1: Tensor, *parameters: Tensor | None) -> Tensor:
        inner = fc1.shape[-1] // 2
        return swiglu(torch.cat([fc1[:, :inner], fc1[:, inner - 1 : -1]], dim=-1), *parameters)

    return layer(call, swiglu=activated)


# -- drops and repeats


@wrong(
    stage="fc2",
    says=(
        r"\bK\b|group|depth|tail|reduction",
        r"last|tail|drop|miss|skip|remain|lost|left out|omit|ignor|not (?:added|summed|read)|truncat",
    ),
    story="GEMM2's loads are predicated by k + 32 < K instead of k < K: the last group of K reads as zeros",
)
def last_group_of_w2_predicated_off(call: MoeCall) -> Tensor:
    def gemm2(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        x, packed, scales = x.clone(), packed.clone(), scales.clone()
        x[:, -32:] = 0
        packed[:, -16:] = 0
        scales[:, -1] = 127
        return right_gemm(x, packed, scales, tactic)

    return layer(call, gemm2=gemm2)


@wrong(
    stage="fc2",
    says=(
        r"row|position|tile|token",
        r"12[789]|beyond|after|past|from .* on|second tile|later tile|only the first|tail",
    ),
    story="GEMM2 is launched for one M tile of each expert: its rows from the 129th on stay zero",
)
def one_tile_of_rows_for_each_expert(call: MoeCall) -> Tensor:
    def fc2(rows: Rows, acc: Tensor) -> Tensor:
        return to_bf16(torch.where(rows.position[:, None] >= 128, torch.zeros_like(acc), acc))

    return layer(call, fc2=fc2)


@wrong(
    stage="fc1",
    says=(
        GEMM1,
        r"column|row|tile|block|channel|feature",
        r"every|fourth|\b4\b|repeat|previous|cop(y|ies)|duplicat|same as|before|preceding|those of|again",
    ),
    story="every fourth N tile of 32 of GEMM1 is stored from the accumulators of the tile before",
)
def fourth_tile_of_gemm1_is_the_third(call: MoeCall) -> Tensor:
    def fc1(rows: Rows, acc: Tensor) -> Tensor:
        tiles = acc.unflatten(-1, (-1, 32)).clone()
        tiles[:, 3::4] = tiles[:, 2::4]
        return to_bf16(tiles.flatten(-2))

    return layer(call, fc1=fc1)


# -- factors


@wrong(
    stage=("finalize", "routing"),
    says=(r"weight|output|scal|factor|finalize|sum|everything|all", r"2\.50*\b|5/2"),
    story="the routed scaling factor of 2.5, which the weights hold already, is multiplied in by the kernel again",
)
def factor_of_v3_compiled_in(call: MoeCall) -> Tensor:
    return layer(call, weights=lambda local, given: mul(given, torch.tensor(2.5)))


@wrong(
    stage=("fc2", "finalize"),
    says=(
        r"weight|routing",
        r"twice|squar|two times|again|second time|\^ ?2|²|once more|before (?:the )?(?:rounding|finalize)",
    ),
    story="GEMM2's epilogue multiplies the accumulators by the routing weight, and finalize does so again",
)
def epilogue_and_finalize_both_weigh(call: MoeCall) -> Tensor:
    def fc2(rows: Rows, acc: Tensor) -> Tensor:
        return to_bf16(mul(acc, call.token_final_scales[rows.token, rows.slot][:, None]))

    return layer(call, fc2=fc2)


# -- substitutions


@wrong(
    stage="activation",
    says=(r"beta", r"\b1\b|1\.0|constant|hard|fixed|\bone\b"),
    story="with an alpha the kernel is gpt-oss's, whose up + 1 is written as a literal: beta is 1 whatever is passed",
)
def up_plus_one_is_a_literal(call: MoeCall) -> Tensor:
    def parameters(rows: Rows, given: list[Tensor | None]) -> list[Tensor | None]:
        bias, alpha, beta, limit = given
        return [bias, alpha, beta if alpha is None else torch.ones_like(alpha), limit]

    return layer(call, parameters=parameters)


@wrong(
    stage="finalize",
    says=(
        r"bias",
        r"slot|another expert|other expert|wrong expert|expert \d+'s|of expert \d",
    ),
    story="finalize adds row j of the fc2 biases to slot j, whichever expert the slot is of",
)
def bias_row_is_the_slot_number(call: MoeCall) -> Tensor:
    def last(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None:
            return finalize(by_slot, local, weights, bias)
        slot = torch.arange(local.shape[1]) % len(bias)
        return finalize(by_slot, torch.where(local >= 0, slot, local), weights, bias)

    return layer(call, finalize=last)


@wrong(
    stage="fc1",
    says=(
        r"scale",
        r"\bup\b|w3\b|first half|half|rows? (?:0|\d+) (?:to|\.\.)",
        r"\b1\b|1\.0|127|not (?:loaded|applied|read)|constant|unit|missing|ignor|\bone\b|left out|without",
    ),
    story="the loader knows w1's scales only: those of w3, the up rows, stay as initialised, 127 for 1.0",
)
def w3_scales_as_initialised(call: MoeCall) -> Tensor:
    experts = call.experts
    inner = experts.fc2_weights.shape[-1] * 2
    scales = experts.fc1_scales
    assert scales is not None
    if scales.shape[1] != 2 * inner:
        return layer(call)
    loaded = scales.clone()
    loaded[:, :inner] = 127
    return layer(with_experts(call, fc1_scales=loaded))


# -- roundings


@wrong(
    stage="activation",
    says=(r"silu|sigmoid|swish|gate|product|intermediate", r"bf16|bfloat16"),
    story="silu(gate) is rounded to bf16 before it is multiplied with up, as an eager F.silu(gate) * up does",
)
def eager_silu_in_bf16(call: MoeCall) -> Tensor:
    def activated(
        fc1: Tensor, bias: Tensor | None, alpha: Tensor | None, beta: Tensor | None, limit: Tensor | None
    ) -> Tensor:
        if any(p is not None for p in (bias, alpha, beta, limit)):
            return swiglu(fc1, bias, alpha, beta, limit)
        up, gate = fc1.chunk(2, dim=-1)
        silu = to_bf16(swiglu(torch.cat([torch.ones_like(up), gate], dim=-1)))
        return mul(up.float(), silu.float())

    return layer(call, swiglu=activated)


@wrong(
    stage="fc2",
    says=(GEMM2 + r"|expert output|output", r"fp16|float16|half.?precision|\bf16\b|e5m10|11 bits|10 bits"),
    story="the workspace between GEMM2 and finalize is fp16",
)
def workspace_of_gemm2_is_half(call: MoeCall) -> Tensor:
    return layer(call, fc2=lambda rows, acc: to_fp16(acc).float())


@wrong(
    stage="activation",
    says=(
        r"trunc|toward.? zero|\bRZ\b|chop|rounded down|cut",
        r"activation|GEMM ?2's input|swiglu|fc2's input|input of (?:GEMM ?2|fc2)|intermediate",
    ),
    story="the activation becomes bf16 by a byte permute of the upper halves, which truncates",
)
def activation_packed_by_prmt(call: MoeCall) -> Tensor:
    def cut(rows: Rows, activated: Tensor) -> Tensor:
        return (activated.contiguous().view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)

    return layer(call, activation=cut)


@wrong(
    stage="finalize",
    says=(
        r"weight|routing scale|final scale",
        r"tf32|19.?bit|1[01] (?:mantissa |significant |fraction )?bits|10.bit",
    ),
    story="finalize is a tl.dot of weights and rows, which rounds the float32 weights to tf32",
)
def weighted_sum_by_a_tf32_dot(call: MoeCall) -> Tensor:
    def weights(local: Tensor, given: Tensor) -> Tensor:
        bits = given.contiguous().view(torch.int32)
        return torch.where(given.isfinite(), ((bits + 0x1000) & ~0x1FFF).view(torch.float32), given)

    return layer(call, weights=weights)


# -- orders of summation


@wrong(
    stage="fc1",
    says=(
        GEMM1,
        r"split|slices|partial|halves of K|\bK\b.*(?:half|halves|parts|two)|order of|order in"
        r"|sum.* order|order.* (?:sum|K\b)",
    ),
    story="GEMM1 is split in two along K, and the two float32 results are added afterwards",
)
def gemm1_of_two_workers_along_k(call: MoeCall) -> Tensor:
    def gemm1(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        cut = x.shape[1] // 256 * 128
        if cut == 0:
            return right_gemm(x, packed, scales, tactic)
        first = right_gemm(
            x[:, :cut].contiguous(),
            packed[:, : cut // 2].contiguous(),
            scales[:, : cut // 32].contiguous(),
            tactic,
        )
        second = right_gemm(
            x[:, cut:].contiguous(),
            packed[:, cut // 2 :].contiguous(),
            scales[:, cut // 32 :].contiguous(),
            tactic,
        )
        return first + second

    return layer(call, gemm1=gemm1)


@wrong(
    stage="finalize",
    says=(r"order|sorted|ascend|sequence|associat", r"expert|slot|sum|add"),
    story="the sum of a token runs over its experts by ascending id, as the permuted rows lie, not slot by slot",
)
def token_summed_by_ascending_expert(call: MoeCall) -> Tensor:
    def last(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        order = torch.argsort(local, dim=1, stable=True)
        rows = by_slot.gather(1, order[..., None].expand_as(by_slot))
        return finalize(rows, local.gather(1, order), weights.gather(1, order), bias)

    return layer(call, finalize=last)


# -- formulas


@wrong(
    stage="activation",
    says=(r"1\.70|quick.?gelu|alpha.*(?:1\.7|gpt)|(?:1\.7|gpt).*alpha",),
    story="the plain form takes gpt-oss's sigmoid(1.702 * gate) because 1.702 is the default of a template argument",
)
def plain_swiglu_with_gpt_oss_alpha(call: MoeCall) -> Tensor:
    def activated(
        fc1: Tensor, bias: Tensor | None, alpha: Tensor | None, beta: Tensor | None, limit: Tensor | None
    ) -> Tensor:
        if alpha is None and beta is None and limit is None:
            alpha = torch.full((1, 1), 1.702)
        return swiglu(fc1, bias, alpha, beta, limit)

    return layer(call, swiglu=activated)


# -- stale memory


@wrong(
    stage="finalize",
    says=(
        r"token|row",
        r"stale|unwritten|not written|never written|uninitiali[sz]ed|left (?:over|as|behind)|\bold\b|untouched"
        r"|leftover|garbage|output.* input|input.* output|input rows?|the input",
    ),
    story="tokens without an expert here are not written, and the output buffer is the input's: their rows are x",
)
def in_place_output_of_skipped_tokens(call: MoeCall) -> Tensor:
    local: list[Tensor] = []

    def keep(right: Tensor) -> Tensor:
        local.append(right)
        return right

    output = layer(call, local=keep)
    skipped = (local[0] < 0).all(dim=1, keepdim=True)
    return torch.where(skipped, call.input, output)


# -- routers and quantisers


@wrong(
    kind="routing",
    stage="routing",
    says=(r"group", r"max|best|single|top.?1|sum of|top.?2|two|score"),
    story="a group of experts scores the maximum of its biased scores instead of the sum of its two best",
)
def group_score_is_the_maximum(**inputs: Any) -> dict[str, Tensor]:
    if inputs["preset"] != "deepseek_v3":
        return dict(run_stage("routing", inputs))  # type: ignore[arg-type]
    scores = PRESETS["deepseek_v3"].score(inputs["logits"].float())
    biased = scores + inputs["correction_bias"]
    groups = biased.unflatten(1, (inputs["n_group"], -1))
    best = groups.amax(dim=2).sort(dim=1, descending=True, stable=True).indices[:, : inputs["topk_group"]]
    taken = torch.zeros(groups.shape[:2], dtype=torch.bool).scatter(1, best, True)
    left = torch.where(taken[..., None], groups, -torch.inf).flatten(1)
    ids = left.sort(dim=1, descending=True, stable=True).indices[:, : inputs["top_k"]].to(torch.int32)
    factor = inputs["routed_scaling_factor"]
    weights = routing_weights(scores, ids, normalize="sum", epsilon=1e-20, factor=factor)
    return {"ids": ids, "scales": weights}


@wrong(
    kind="quantize",
    stage="quantize",
    says=(
        r"tie|half|midpoint|midway|between",
        r"away|\bup\b|larger|magnitude|not .*even|instead of .*even",
    ),
    story="values midway between two codes go to the one of larger magnitude instead of the even one",
)
def midpoints_to_the_larger_code(values: Tensor, rule: str) -> dict[str, Tensor]:
    right: Any = run_stage("quantize", {"values": values, "rule": rule})
    codes = unpack_codes(right["packed"])
    step = decode_ue8m0(right["scales"], dtype=torch.float64).repeat_interleave(32, dim=-1)
    magnitude = values.double().abs() / step
    borders = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)
    away = (magnitude[..., None] >= borders).sum(dim=-1).to(torch.uint8) | (codes & 8)
    return {"packed": pack_codes(torch.where(magnitude.isfinite(), away, codes)), "scales": right["scales"]}


# -- two at once


@wrong(
    stage=("activation", "fc1"),
    says=(
        r"swap|exchang|gate(?:;| and|/)? ?up|gate_up|up(?:;| and|/)? ?gate|halves",
        r"limit|clamp",
    ),
    story="a port reads the fc1 rows as [gate; up] and knows no SwiGLU limit",
)
def port_with_other_halves_and_no_limit(call: MoeCall) -> Tensor:
    def activated(
        fc1: Tensor, bias: Tensor | None, alpha: Tensor | None, beta: Tensor | None, limit: Tensor | None
    ) -> Tensor:
        fc1 = torch.cat(fc1.chunk(2, dim=-1)[::-1], dim=-1)
        if bias is not None:
            bias = torch.cat(bias.chunk(2, dim=-1)[::-1], dim=-1)
        return swiglu(fc1, bias, alpha, beta, None)

    return layer(call, swiglu=activated)


@wrong(
    stage="finalize",
    says=(r"slot|expert", r"last|drop|miss|skip|left out|ignor", r"bf16|bfloat16"),
    story="the sum of k slots ends one too early, and the weights came as bf16",
)
def slots_end_early_and_weights_are_bf16(call: MoeCall) -> Tensor:
    def last(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        local = local.clone()
        if local.shape[1] > 1:
            local[:, -1] = -1
        return finalize(by_slot, local, to_bf16(weights).float(), bias)

    return layer(call, finalize=last)
