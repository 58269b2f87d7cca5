"""Placements, dispatchers, converters and fused steps of engines that are almost right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward, quantize
from mxfp4ref._choices import ScaleRule
from mxfp4ref.formats.mxfp4 import E2M1_VALUES, dequantize, pack_codes, unpack_codes
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.activation import sigmoid
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.fp32 import to_bf16
from mxfp4ref.sm90.tactics import Tactic
from tests.held_out_kernels.by_hand import Rows, groups_of, layer, right_gemm, right_routing, with_experts
from tests.held_out_kernels.definition import wrong
from tests.held_out_kernels.routers import _grouped, in_torch

Tensors = dict[str, Tensor]
FC1 = "GEMM ?1|fc1|first GEMM|w13|gate|\\bup\\b"
FC2 = "GEMM ?2|fc2|second GEMM|w2|down"
INPUT = "input|hidden|tokens?\\b|gather|\\bx\\b"
GATE = "gate|silu|swiglu|sigmoid|activation"


@wrong(
    stage="input",
    says=(
        INPUT,
        "(earlier|previous|another|other|wrong|lower) (token|row|input|one)|shift|divi|k ?\\+ ?1|\\bmap"
        "|permut"
        "|neighbou?r|drift|token before|instead of (its|their|the) own|\\bof tokens?\\b|smaller number",
    ),
    story="a row's token is its number over top-k + 1, for a fused shared expert that this model lacks",
)
def row_divided_by_top_k_and_the_shared_expert(call: MoeCall) -> Tensor:
    def x(rows: Rows, _: Tensor) -> Tensor:
        return call.input[(rows.token * call.top_k + rows.slot) // (call.top_k + 1)]

    return layer(call, x=x)


@wrong(
    stage=("input", "fc1"),
    says=(
        INPUT + "|" + FC1,
        "hadamard|rotat|mix|transform|combin|\\bsums? (and|of) |butterfl|basis|orthogonal|spread",
    ),
    story="the online Hadamard rotation of every 32 input columns stays on for unrotated weights",
)
def input_rotated_but_weights_not(call: MoeCall) -> Tensor:
    def x(_: Rows, taken: Tensor) -> Tensor:
        values = taken.double().unflatten(1, (-1, 32))
        for width in (1, 2, 4, 8, 16):
            first, second = values.unflatten(2, (-1, 2, width)).unbind(3)
            values = torch.stack((first + second, first - second), 3).flatten(2)
        return to_bf16((values.flatten(1) * 32**-0.5).float())

    return layer(call, x=x)


@wrong(
    stage="slots",
    says=(
        "expert|\\bids?\\b|slot",
        "shift|\\bmap|moved|offset|redundan|replica|physical|every (four|4|fourth)|next expert|one too"
        "|higher (id|expert)"
        "|(of|to|for|by) (another|a later|other) expert|taken for|left out|dropped|missing|skipped|->",
    ),
    story="ids are of a placement with a redundant expert after every four, weights are loaded without",
)
def ids_of_a_placement_with_redundant_experts(call: MoeCall) -> Tensor:
    ids, held = call.token_selected_experts.long(), call.experts.num_experts
    physical = torch.where(ids >= 0, ids + ids // 4, ids) - call.ep_rank * held
    mine = (ids >= 0) & (physical >= 0) & (physical < held)
    return layer(call, local=lambda _: torch.where(mine, physical, -1))


@wrong(
    stage=("slots", "fc2"),
    says=(
        "expert",
        "identity|hidden state|pass(es|ed)? through|token itself|unchanged|zero.computation|copied"
        "|not computed|bypass"
        "|\\binput (rows? )?(itself|as it is|back|instead)|(is|are|equals?|gives?|returns?|by) (the|their"
        "|its) (own )?input",
    ),
    story="the last expert is counted among the zero-computation ones, which give the token back as it is",
)
def last_expert_is_an_identity_expert(call: MoeCall) -> Tensor:
    last = call.num_global_experts - 1 - call.ep_rank * call.experts.num_experts

    def fc2(rows: Rows, acc: Tensor) -> Tensor:
        return torch.where((rows.expert == last)[:, None], call.input[rows.token], to_bf16(acc))

    return layer(call, fc2=fc2)


@wrong(
    stage="fc1",
    says=(
        FC1,
        "twice|double|two times|again|repeat|overlap|once more|2 ?x\\b|factor (of )?2|times 2",
        "group|\\bK\\b|columns?|block|middle|half|tile|depth",
    ),
    story="two workers share fc1's K, the second begins a group early: that group counts twice",
)
def fc1_workers_overlap_by_a_group(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        border = max(scales.shape[1] // 2 - 1, 0)
        again = groups_of(x, packed, scales)[border]
        return fp32.add(right_gemm(x, packed, scales, tactic), again)

    return layer(call, gemm1=gemm)


@wrong(
    stage="fc1",
    says=(
        FC1,
        "spars|2:4|2 of 4|two of (the |each |every )?four|prun|(small|least|low)\\w* (codes?|weights?"
        "|magnitudes?)"
        "|codes? \\w*.*(zero|\\b0\\b)|weights? \\w*.*(zero|\\b0\\b|lost|missing|left out)",
    ),
    story="fc1 is prepared for the sparse core: of every four weights along K the two smallest are zero",
)
def fc1_pruned_for_the_sparse_core(call: MoeCall) -> Tensor:
    if not call.experts.quantized:
        return forward(call)
    codes = unpack_codes(call.experts.fc1_weights).unflatten(-1, (-1, 4))
    order = (codes & 7).sort(dim=-1, descending=True, stable=True).indices
    kept = torch.zeros(codes.shape, dtype=torch.bool).scatter_(-1, order[..., :2], True)
    return forward(with_experts(call, fc1_weights=pack_codes(codes.masked_fill(~kept, 0).flatten(-2))))


def _linear_and_gate(
    fc1: Tensor, bias: Tensor | None, beta: Tensor | None, limit: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What is multiplied in the end, up with beta in it and the clamped gate."""
    value = fp32.widen(fc1)
    if bias is not None:
        value = fp32.add(value, fp32.widen(bias))
    up, gate = value.chunk(2, dim=-1)
    if limit is not None:
        up = fp32.maximum(fp32.minimum(up, limit.expand_as(up)), -limit.expand_as(up))
        gate = fp32.minimum(gate, limit.expand_as(gate))
    return up if beta is None else fp32.add(up, beta.expand_as(up)), gate


@wrong(
    stage="activation",
    says=(GATE, "1\\.44\\d*|log ?_?2|log2|factor|ln ?2|0\\.69\\d*|(too|times) large"),
    story="gate is multiplied by log2 e in place, for EX2, and so it is multiplied with the sigmoid",
)
def gate_keeps_log2_e(call: MoeCall) -> Tensor:
    def glu(
        fc1: Tensor, bias: Tensor | None, alpha: Tensor | None, beta: Tensor | None, limit: Tensor | None
    ) -> Tensor:
        up, gate = _linear_and_gate(fc1, bias, beta, limit)
        z = gate if alpha is None else fp32.mul(gate, alpha.expand_as(gate))
        stretched = fp32.mul(gate, torch.full_like(gate, 1.44269502))
        return fp32.mul(fp32.mul(stretched, sigmoid(z)), up)

    return layer(call, swiglu=glu)


@wrong(
    stage="activation",
    says=(
        GATE,
        "hard|piecewise|straight|linear|relu ?6|clamp\\w* .*\\b[36]\\b|1/6|0\\.16\\d*"
        "|(zero|\\b0\\b) (below|under|up to|where|for)|saturat|another (function|curve|sigmoid|formula)",
    ),
    story="the mobile backend's hard swish, gate times relu6(gate + 3) / 6, stands in for silu",
)
def hard_swish_instead_of_silu(call: MoeCall) -> Tensor:
    def glu(
        fc1: Tensor, bias: Tensor | None, alpha: Tensor | None, beta: Tensor | None, limit: Tensor | None
    ) -> Tensor:
        up, gate = _linear_and_gate(fc1, bias, beta, limit)
        z = gate if alpha is None else fp32.mul(gate, alpha.expand_as(gate))
        part = fp32.mul((z + 3).clamp(0, 6), torch.full_like(z, 1 / 6))
        return fp32.mul(fp32.mul(gate, part), up)

    return layer(call, swiglu=glu)


@wrong(
    stage="activation",
    says=(
        "alpha|beta|limit|parameter",
        "another|other (expert|parameter)|wrong expert|permut|transpos|view|strid|layout|exchang|swap|mixed"
        "|order|interleav|of expert|by expert|each other|instead|taken from|indexed",
    ),
    story="alpha, beta and limit lie in one buffer [3, E], which is read as [E, 3]",
)
def swiglu_buffer_read_expert_by_expert(call: MoeCall) -> Tensor:
    experts = call.experts
    given = (experts.swiglu_alpha, experts.swiglu_beta, experts.swiglu_limit)
    present = [parameter.flatten() for parameter in given if parameter is not None]
    if len(present) < 3:
        return forward(call)
    alpha, beta, limit = torch.stack(present).view(-1, 3).T.contiguous()
    return forward(with_experts(call, swiglu_alpha=alpha, swiglu_beta=beta, swiglu_limit=limit))


@wrong(
    stage="fc2",
    says=(
        FC2,
        "order|tree|pair|split|summed|summation|apart|partial|separate|reduc|flush|subnormal|fma\\b|fused",
        "group|\\bK\\b|accumulat|partial|sum|product|term",
    ),
    story="a warp for each K group of fc2, and their results are added as a tree, not one after another",
)
def groups_of_fc2_added_as_a_tree(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        depths = zip(x.split(32, 1), packed.split(16, 1), scales.split(1, 1), strict=True)
        parts = [right_gemm(*(part.contiguous() for part in depth), tactic) for depth in depths]
        while len(parts) > 1:
            added = [fp32.add(a, b) for a, b in zip(parts[::2], parts[1::2], strict=False)]
            parts = added + parts[2 * len(added) :]
        return parts[0]

    return layer(call, gemm2=gemm)


@wrong(
    stage=("fc2", "finalize"),
    says=(
        "column|hidden|\\bN\\b|rows? of (w2|fc2|the weights)|output",
        "revers|mirror|descend|swap|exchang|permut|order|moved|backwards",
        "block|segment|tile|\\b8\\b|eight|\\b64\\b|odd|every (second|other)|half",
    ),
    story="the epilogue walks to and fro: odd tiles of 64 columns store their eights in reverse",
)
def fc2_serpentine_stores_one_way(call: MoeCall) -> Tensor:
    def fc2(_: Rows, acc: Tensor) -> Tensor:
        column = torch.arange(acc.shape[1])
        tile, inside = column // 64, column % 64
        turned = tile * 64 + (7 - inside // 8) * 8 + inside % 8
        odd = (tile % 2 == 1) & ((tile + 1) * 64 <= acc.shape[1])
        return to_bf16(acc[:, torch.where(odd, turned, column)])

    return layer(call, fc2=fc2)


@wrong(
    stage="fc2",
    says=(FC2, "expert", "odd|every (second|other)|\\b1(, | and )3\\b|alternat|half of the experts|modulo 2"),
    story="a weight update in pairs writes w2 of the even experts only: odd ones keep the step before",
)
def update_leaves_w2_of_odd_experts(call: MoeCall) -> Tensor:
    if not call.experts.quantized:
        return forward(call)
    random = torch.Generator().manual_seed(11)
    codes = unpack_codes(call.experts.fc2_weights)
    # The step before: one code of eight had the magnitude beside.
    changed = torch.randint(8, codes.shape, generator=random) == 0
    beside = torch.where((codes & 7) == 0, codes + 1, codes - 1)
    changed[::2] = False
    return forward(with_experts(call, fc2_weights=pack_codes(torch.where(changed, beside, codes))))


@wrong(
    stage="fc2",
    says=(
        FC2,
        "scale|exponent|byte",
        "saturat|clamp|limit|\\bcap|larg(e|er|est) (scale|exponent|byte|one)|highest|lower|too small"
        "|range|two bits|narrow"
        "|above|minimum|smallest",
    ),
    story="a row's scales of w2 are its least exponent and two bits: what is 2^4 above it is cut to 2^3",
)
def fc2_scales_in_two_bits_above_the_least(call: MoeCall) -> Tensor:
    scales = call.experts.fc2_scales
    if scales is None:
        return forward(call)
    exponents = scales.view(torch.uint8).int()
    kept = torch.minimum(exponents, exponents.amin(2, keepdim=True) + 3)
    return forward(with_experts(call, fc2_scales=kept.to(torch.uint8)))


@wrong(
    stage="finalize",
    says=(
        "round|(in|to|as|through|of) (bf16|bfloat16)|precis",
        "partial|half|halves|two (sums|parts|ranks|groups)|(per|by|each|every) (rank|owner|expert|slot)"
        "|slot|terms?\\b"
        "|running|intermediate|order|more than once|twice|in between",
    ),
    story="two owners of the experts each sum their own slots and send the sum as bf16 to be added",
)
def owners_send_their_sums_in_bf16(call: MoeCall) -> Tensor:
    border = (call.experts.num_experts + 1) // 2

    def combined(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        first, second = (
            fp32.widen(to_bf16(finalize(by_slot, torch.where(owned, local, -1), weights, bias)))
            for owned in (local < border, local >= border)
        )
        return fp32.add(first, second)

    return layer(call, finalize=combined)


@wrong(
    stage="finalize",
    says=(
        "weight|scale",
        "modulo|\\bmod\\b|first four|first 4|slots? (0|4)|(four|4) (slots? )?(earlier|before|back)|repeat"
        "|wrap"
        "|(of|from) (another|other|wrong|an earlier) slot|index|\\bmap|slot.{1,9}slot|slots? 4|fifth|float4",
    ),
    story="a token's weights are fetched as one float4: from the fifth slot on those of the first again",
)
def weights_fetched_as_one_float4(call: MoeCall) -> Tensor:
    return layer(call, weights=lambda _, weights: weights[:, torch.arange(weights.shape[1]) % 4])


@wrong(
    stage=("fc2", "finalize"),
    says=(
        FC2 + "|finalize|combine|weighted sum|expert outputs?|slot|terms?",
        "round|quanti|precis|coarse|(\\d|few|fewer|less|lost) (\\w+ )?bits|relative|inexact|lossy"
        "|compress|logarithm",
        "logarithm|\\blog|block|\\b128\\b|fp8|e4m3|coarse|[4-9] (\\w+ )?bits|\\b10 bits|levels?\\b"
        "|mantissa|significan"
        "|fraction|than bf16|format",
    ),
    story="experts send outputs in 10 bits, a sign and an even step of the logarithm, by 128 columns",
)
def outputs_sent_as_logarithms(call: MoeCall) -> Tensor:
    def sent(values: Tensor) -> Tensor:
        size = values.abs()
        finite = size.isfinite().all(1, keepdim=True)
        present = (size > 0) & finite
        logarithm = torch.where(present, size, 1.0).log()
        top = torch.where(present, logarithm, -torch.inf).amax(1, keepdim=True)
        least = torch.where(present, logarithm, torch.inf).amin(1, keepdim=True)
        least = torch.maximum(least, top - 32 * torch.tensor(2.0, dtype=torch.float64).log())
        step = torch.where(top > least, (top - least) / 510, 1.0)
        level = ((logarithm - least) / step).round().clamp(min=0)
        return torch.where(present, (level * step + least).exp().copysign(values), values)

    def fc2(_: Rows, acc: Tensor) -> Tensor:
        blocks = fp32.widen(to_bf16(acc)).double().split(128, dim=1)
        return to_bf16(torch.cat([sent(block) for block in blocks], 1).float())

    return layer(call, fc2=fc2)


@wrong(
    kind="routing",
    stage="routing",
    says=(
        "hash|table|tid2eid|token.?ids?|\\bids\\b|experts?",
        "next token|(of|from) the next|shift|off by one|neighbou?r|roll|(of|from|for) (another|other"
        "|the wrong) token"
        "|moved|following|token after|t ?\\+ ?1|one (too )?(far|late)",
    ),
    story="the hash layers look up the draft layer's token ids, which are one token ahead",
)
def hash_layer_with_the_draft_layers_tokens(**inputs: Any) -> Tensors:
    if "tid2eid" not in inputs:
        return right_routing(inputs)
    return right_routing({**inputs, "token_ids": inputs["token_ids"].roll(-1)})


@wrong(
    kind="routing",
    mode="bounded",
    stage="routing",
    says=(
        "expert|\\bids?\\b|choice|chosen|select|top.?k",
        "one (expert )?(from|per|out of) |one expert of|only (one|the best|its best)|at most one|block"
        "|lane|thread|segment"
        "|consecutive|side by side|neighbou?r|same (group|block|lane)|adjacent|second.best"
        "|\\bgroups? of\\b",
    ),
    story="each of 32 lanes holds the scores of experts side by side and offers only its best",
)
def each_lane_offers_one_expert(**inputs: Any) -> Tensors:
    def keys(biased: Tensor) -> Tensor:
        allowed = _grouped(biased, inputs)
        count = allowed.shape[1]
        if count % 32 or inputs["top_k"] > 32 or inputs.get("n_group", 1) > 1:
            return allowed
        by_lane = allowed.unflatten(1, (32, -1))
        best = by_lane.sort(dim=2, descending=True, stable=True).indices[..., :1]
        offered = torch.zeros(by_lane.shape, dtype=torch.bool).scatter_(2, best, True)
        return by_lane.masked_fill(~offered, -torch.inf).flatten(1)

    return in_torch(inputs, keys=keys)


def _nearest(values: Tensor, scales: Tensor) -> Tensor:
    """The codes of `[groups, 32] float64` under `[groups] int64` bytes, ties to even."""
    quotient = values / (scales - 127).double().exp2()[:, None]
    codes = torch.zeros(values.shape, dtype=torch.uint8)
    middles = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
    for code, middle in enumerate(middles):
        above = quotient.abs() >= middle if code % 2 else quotient.abs() > middle
        codes += above
    return codes | (torch.signbit(values).to(torch.uint8) << 3)


@wrong(
    kind="quantize",
    stage="quantize",
    says=(
        "scale|exponent",
        "error|search|\\bmse\\b|squar|smaller|lower|one (less|low|below|more|high|above|too)|off by one"
        "|half|halv"
        "|another rule|other rule|clip|saturat|\\+-1|-1|some groups|not by",
    ),
    story="of the rule's exponent and those beside it the one of the least square error is taken",
)
def scale_of_the_least_square_error(values: Tensor, rule: ScaleRule) -> Tensors:
    packed, scales = quantize(values, rule=rule)
    groups, ruled = values.double().reshape(-1, 32), scales.flatten().long()
    table = torch.tensor(E2M1_VALUES, dtype=torch.float64)
    best, codes = ruled.clone(), unpack_codes(packed).reshape(-1, 32).clone()

    def error(of: Tensor, byte: Tensor) -> Tensor:
        return (table[of.long()] * (byte - 127).double().exp2()[:, None] - groups).square().sum(1)

    least = error(codes, ruled)
    for change in (-1, 1):
        tried = (ruled + change).clamp(0, 254)
        of = _nearest(groups, tried)
        better = (error(of, tried) < least) & (ruled < 255)
        least = torch.where(better, error(of, tried), least)
        best, codes = torch.where(better, tried, best), torch.where(better[:, None], of, codes)
    return {
        "packed": pack_codes(codes.view(values.shape)),
        "scales": best.to(torch.uint8).view(scales.shape),
    }


@wrong(
    kind="dequantize",
    stage="dequantize",
    says=(
        "code|nibble|E2M1|4.bit|fp4",
        "table|read as|look.?up|mean|decod|stands? for|bitsandbytes|another format|codes? \\d.*(is|as|->"
        "|gives)",
    ),
    story="codes are looked up in the FP4 table of bitsandbytes, whose bits mean other numbers",
)
def codes_by_the_table_of_bitsandbytes(
    packed: Tensor, scales: Tensor, convention: Any, dtype: str
) -> Tensors:
    halves = torch.tensor([0.0, 0.03125, 4.0, 6.0, 2.0, 3.0, 1.0, 1.5], dtype=torch.float64)
    table = torch.cat((halves, -halves))
    codes = unpack_codes(packed)
    ones = pack_codes(torch.full_like(codes, E2M1_VALUES.index(1.0)))
    factors = dequantize(ones, scales, convention=convention, dtype=torch.float64)
    return {"values": (table[codes.long()] * factors).to(getattr(torch, dtype))}
