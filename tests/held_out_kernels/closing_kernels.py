"""Mainloops, epilogues and memory: what goes wrong while a kernel is made fast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mxfp4ref import MoeCall, quantize
from mxfp4ref._choices import ScaleRule
from mxfp4ref.formats.mxfp4 import dequantize, pack_codes
from mxfp4ref.goldens.runs import run_stage
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.fp32 import to_bf16, to_fp16, widen
from mxfp4ref.sm90.swiglu import swiglu
from mxfp4ref.sm90.tactics import Tactic
from tests.held_out_kernels.by_hand import Rows, layer, local_experts, right_gemm, with_experts
from tests.held_out_kernels.definition import wrong

GEMM1, GEMM2 = "GEMM ?1|fc1|first GEMM", "GEMM ?2|fc2|second GEMM|down"
MISSING = "drop|missing|omit|left out|not added|skipp|ignored|lost|zero"
SUMMED = "order|sum|accumulat|associat|split|partial|round"


@wrong(
    stage="input",
    says=(
        "input|\\bx\\b|hidden|token",
        "pitch|stride|shift|offset|further|misalign|drift|rotat|permut|moved|wrong place|start",
    ),
    story="the input is read as if its rows lay eight elements further apart than they do",
)
def input_at_a_padded_pitch(call: MoeCall) -> Tensor:
    tokens, hidden = call.input.shape
    flat = torch.cat([call.input.flatten(), call.input.new_zeros(8 * tokens)])
    read = flat.as_strided((tokens, hidden), (hidden + 8, 1))
    return layer(call, x=lambda rows, x: read[rows.token])


@wrong(
    stage="slots",
    says=(
        "\\branks?\\b|local|foreign|not held|\\bEP\\b|expert.?parallel|skipp|ep_rank",
        "last|next|boundary|off by one|bound|range|too many|one more|beyond|first|clamp",
    ),
    story="the rank's range of ids includes its end: the next rank's first expert counts as its own last",
)
def next_ranks_first_expert_taken_as_the_last(call: MoeCall) -> Tensor:
    held = call.experts.num_experts
    ids = call.token_selected_experts.long() - call.ep_rank * held
    return layer(call, local=lambda local: torch.where(ids == held, held - 1, local))


@wrong(
    stage="fc1",
    says=(GEMM1, "scale", "64|128|\\brows?\\b|column|tile|half|modulo|repeat|block"),
    story="the tile of 128 weight rows fetches scales for 64, and its second half takes those of the first",
)
def fc1_scales_fetched_for_half_a_tile(call: MoeCall) -> Tensor:
    scales = call.experts.fc1_scales
    assert scales is not None
    row = torch.arange(scales.shape[1])
    return layer(with_experts(call, fc1_scales=scales[:, row - 64 * (row % 128 >= 64)]))


@wrong(
    stage="fc1",
    says=(
        GEMM1,
        "bf16|bfloat16|round|precision|partial|split",
        "\\bK\\b|split|partial|accumulat|half|halves|tile|\\bsums?\\b|twice|intermediate",
    ),
    story="GEMM1 is split in two along K, and the workspace in which the halves are put together is bf16",
)
def fc1_split_k_workspace_in_bf16(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        first = torch.arange(x.shape[1]) < x.shape[1] // tactic.tile_k // 2 * tactic.tile_k
        halves = [right_gemm(x.masked_fill(~mine, 0), packed, scales, tactic) for mine in (first, ~first)]
        return fp32.add(*(widen(to_bf16(half)) for half in halves))

    return layer(call, gemm1=gemm)


@wrong(
    stage="fc1",
    says=(
        "scale",
        "previous|before|stale|shift|neighbou?r|another expert|other expert|of expert|one too|preced",
        "first|group|\\bK\\b|columns? 0|0 to 31",
    ),
    story="the persistent loop of GEMM1 enters an expert with the first group's scales of the one before it",
)
def fc1_first_scales_left_from_the_expert_before(call: MoeCall) -> Tensor:
    right = call.experts.fc1_scales
    assert right is not None
    scales = right.clone()
    scales[1:, :, 0] = right[:-1, :, 0]
    return layer(with_experts(call, fc1_scales=scales))


@wrong(
    stage="fc2",
    says=(
        "scale",
        GEMM2,
        "idle|empty|without (rows|tokens)|no (rows|tokens)|compact|active|used|present|\\bmap|previous"
        "|another expert|other expert|of expert|before|permut|shift|index|number",
    ),
    story="idle experts are not in the list of GEMMs, and GEMM2's scales are looked up by place in it",
)
def fc2_scales_by_place_among_the_busy(call: MoeCall) -> Tensor:
    right = call.experts.fc2_scales
    assert right is not None
    local = local_experts(call)
    busy = local[local >= 0].unique()
    scales = right.clone()
    scales[busy] = right[: len(busy)]
    return layer(with_experts(call, fc2_scales=scales))


@wrong(
    stage="fc2",
    says=(
        GEMM2,
        SUMMED + "|two sums|interleav|apart",
        "even|odd|group|\\bK\\b|split|order|accumulat|partial",
    ),
    story="two warps share GEMM2's loop over K, one with the even and one with the odd groups",
)
def fc2_even_and_odd_groups_summed_apart(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        even = torch.arange(x.shape[1]) // 32 % 2 == 0
        halves = [right_gemm(x.masked_fill(~mine, 0), packed, scales, tactic) for mine in (even, ~even)]
        return fp32.add(*halves)

    return layer(call, gemm2=gemm)


@wrong(
    stage=("fc2", "finalize"),
    says=(
        "column|\\brows?\\b|block",
        MISSING + "|unwritten|not written|never",
        "64|every|each|period|\\b8\\b|eight|56|modulo|tile",
    ),
    story="the padding of the epilogue's staging buffer eats the last 8 of every 64 columns of GEMM2",
)
def fc2_last_eight_of_each_64_columns_unwritten(call: MoeCall) -> Tensor:
    def fc2(rows: Rows, acc: Tensor) -> Tensor:
        return to_bf16(acc).masked_fill(torch.arange(acc.shape[1]) % 64 >= 56, 0)

    return layer(call, fc2=fc2)


@wrong(
    stage="activation",
    says=(
        "clamp|limit|\\bcap|bounded",
        "bias",
        "before|after|order|first|then|without|unbiased|earlier|exceed|beyond|late",
    ),
    story="up and gate are clamped as they leave GEMM1, and the bias is added to what is clamped already",
)
def clamped_as_it_leaves_gemm1(call: MoeCall) -> Tensor:
    def early(fc1: Tensor, bias: Any, alpha: Any, beta: Any, limit: Any) -> Tensor:
        if bias is None or limit is None:
            return swiglu(fc1, bias, alpha, beta, limit)
        up, gate = widen(fc1).chunk(2, -1)
        up, gate = fp32.maximum(fp32.minimum(up, limit), -limit), fp32.minimum(gate, limit.expand_as(gate))
        return swiglu(torch.cat([up, gate], -1), bias, alpha, beta, torch.full_like(limit, torch.inf))

    return layer(call, swiglu=early)


@wrong(
    stage="activation",
    says=("bias", "gate", "\\bup\\b|first half|modulo|same|other half|half|column|index|shift"),
    story="the bias is indexed by the column of the activation, so that the gate gets up's",
)
def gate_gets_the_bias_of_up(call: MoeCall) -> Tensor:
    def parameters(rows: Rows, given: list[Tensor | None]) -> list[Tensor | None]:
        bias, *others = given
        return [None if bias is None else bias[:, : bias.shape[1] // 2].repeat(1, 2), *others]

    return layer(call, parameters=parameters)


@wrong(
    stage=("activation", "fc1"),
    says=(
        "\\bodd|every (other|second)|second of|alternat|pair|neighbou?r|\\beven\\b",
        "\\bbits?\\b|mask|mantissa|fraction|round|neighbou?r|\\blow|half.?word|contamin|noise|\\bulps?\\b",
    ),
    story="of two packed bf16 the upper is taken without masking the lower, whose bits extend its fraction",
)
def upper_of_a_pair_not_masked(call: MoeCall) -> Tensor:
    def unmasked(fc1: Tensor, *parameters: Any) -> Tensor:
        bits = widen(fc1).view(torch.int32).clone()
        bits[:, 1::2] |= bits[:, 0::2] >> 16 & 0xFFFF
        return swiglu(bits.view(torch.float32), *parameters)

    return layer(call, swiglu=unmasked)


@wrong(
    stage=("activation", "fc2"),
    says=(
        "int8|8.?bit|quanti|integer|levels|grid|coarse|multiples|\\bsteps?\\b|round|precision",
        "activation|GEMM ?2'?s? (input|operand)|(input|operand) of GEMM ?2",
    ),
    story="the path for 8-bit activations is taken: each row is quantised to 255 levels before GEMM2",
)
def activation_through_int8_rows(call: MoeCall) -> Tensor:
    def activation(rows: Rows, a: Tensor) -> Tensor:
        step = a.abs().amax(1, True).clamp(min=torch.finfo(torch.float32).tiny) / 127
        return to_bf16((a / step).round() * step)

    return layer(call, activation=activation)


@wrong(
    stage=("input", "fc1"),
    says=(
        "hadamard|rotat|\\bmix|transform|orthogonal|butterfly|combin|differences|linear|superpos|spread",
        "group|\\b32|input|\\bx\\b|\\bK\\b|column|hidden",
    ),
    story="the input passes the Hadamard transform of a rotated checkpoint, which this one is not",
)
def input_rotated_by_hadamard(call: MoeCall) -> Tensor:
    matrix = torch.ones(1, 1)
    for _ in range(5):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])

    def rotated(rows: Rows, x: Tensor) -> Tensor:
        turned = x.unflatten(1, (-1, 32)).double() @ matrix.double() * 32**-0.5
        return to_bf16(turned.flatten(1).float())

    return layer(call, x=rotated)


@wrong(
    stage=("finalize", "slots"),
    says=(
        "slot|expert|token",
        MISSING + "|prun|masked",
        "small|\\blow|below|threshold|less than|prun|largest|minor|light|weak",
    ),
    story="experts that weigh less than a third of the token's heaviest are skipped to save time",
)
def light_experts_are_skipped(call: MoeCall) -> Tensor:
    weights = call.token_final_scales
    light = weights < weights.amax(1, True) / 3
    return layer(call, local=lambda local: local.masked_fill(light, -1))


@wrong(
    stage="finalize",
    says=(
        "token|\\brows?\\b",
        "previous|before|neighbou?r|stale|not (reset|cleared|zeroed)|carr|left over|left from|another token"
        "|other token|preced|adjacent",
        "\\bodd|every (other|second)|second|pair|alternat|\\beven\\b|sum|add|accumulat|plus",
    ),
    story="a block sums two tokens one after the other and does not clear its registers for the second",
)
def sum_of_the_token_before_not_cleared(call: MoeCall) -> Tensor:
    def two_by_two(y: Tensor, local: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        sums = finalize(y, local, weights, bias)
        total = sums[:-1:2]
        for slot in range(local.shape[1]):
            expert, term = local[1::2, slot], widen(y[1::2, slot])
            if bias is not None:
                term = fp32.add(term, widen(bias[expert.clamp(min=0)]))
            added = fp32.fma(weights[1::2, slot, None], term, total)
            total = torch.where((expert >= 0)[:, None], added, total)
        sums[1::2] = total
        return sums

    return layer(call, finalize=two_by_two)


@wrong(
    stage="finalize",
    says=(
        "fp16|f16\\b|half.?precision|float16|1[01] (fraction |mantissa |significant )?bits",
        "sum|accumulat|slot|\\badd|partial|finali",
    ),
    story="the slots are added up by atomics on fp16, so that the sum is rounded to it after every slot",
)
def slots_added_up_in_fp16(call: MoeCall) -> Tensor:
    def in_fp16(y: Tensor, local: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        sums = torch.zeros(len(y), y.shape[2])
        for slot in range(local.shape[1]):
            one = slice(slot, slot + 1)
            sums = widen(
                to_fp16(
                    fp32.add(sums, finalize(y[:, one], local[:, one], weights[:, one].contiguous(), bias))
                )
            )
        return sums

    return layer(call, finalize=in_fp16)


@wrong(
    stage="finalize",
    says=(
        "\\bhal[fv]|0\\.5\\b|1/2|divid|factor|2\\^-1|mean\\b|average|multipl",
        "\\btp|tensor|\\branks?\\b|everything|whole|weight|uniform|every|sum|output",
    ),
    story="the output is divided by the number of tensor-parallel ranks: a mean in place of a sum",
)
def mean_over_the_tensor_ranks(call: MoeCall) -> Tensor:
    return layer(call, output=lambda sums: to_bf16(sums / call.tp_size))


@wrong(
    kind="routing",
    stage="routing",
    says=(
        "normali[sz]|denominator|\\bsum|\\bdivi|total|factor",
        "first|power of (two|2)|slot|last|left out|missing|partial|only|part of|\\b4\\b|four"
        "|too (large|small)|fewer|subset|constant|ratio",
    ),
    story="the warp that sums the weights reduces a power of two of lanes: of six weights it adds up four",
)
def weights_over_the_sum_of_the_first_four(**inputs: Any) -> dict[str, Tensor]:
    routed = run_stage("routing", inputs)
    assert isinstance(routed, dict)
    scales = routed["scales"].double()
    lanes = 1 << (scales.shape[1].bit_length() - 1)
    part = scales[:, :lanes].sum(1, True)
    ratio = torch.where(part > 0, scales.sum(1, True) / part, 1.0)
    return {"ids": routed["ids"], "scales": (scales * ratio).float()}


@wrong(
    kind="quantize",
    stage="quantize",
    says=("scale|exponent|byte|saturat", "negative|\\bsign|absolute|magnitude|\\babs\\b|positive"),
    story="the largest of a group is found without taking magnitudes: negative values do not count",
)
def largest_found_with_its_sign(values: Tensor, rule: ScaleRule) -> dict[str, Tensor]:
    _, scales = quantize(values.clamp(min=0), rule=rule)
    steps = torch.exp2(scales.double() - 127).repeat_interleave(32, -1)
    size = (values.double().abs() / steps).clamp(max=6)
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)
    up = torch.bucketize(size, middles, right=True)  # a tie goes up, and so down again to an odd code
    tied = (size[..., None] == middles).any(-1)
    codes = up - (tied & (up % 2 == 1)).long()
    codes = codes + 8 * torch.signbit(values).long()
    return {"packed": pack_codes(codes.to(torch.uint8)), "scales": scales}


@wrong(
    kind="dequantize",
    stage="dequantize",
    says=("scale", "\\b16\\b|sixteen|group|block|\\bhalf|halves|index|shift|repeat|modulo|NVFP4"),
    story="a group is taken to have 16 elements, as in NVFP4, and the scales run ahead of the codes",
)
def groups_of_sixteen(packed: Tensor, scales: Tensor, convention: Any, dtype: str) -> dict[str, Tensor]:
    flat = scales.flatten()
    ahead = torch.arange(len(flat)) * 2
    first, second = (
        dequantize(
            packed.reshape(-1, 16),
            flat[(ahead + half) % len(flat)][:, None],
            convention=convention,
            dtype=getattr(torch, dtype),
        )
        for half in range(2)
    )
    values = torch.cat([first[:, :16], second[:, 16:]], 1)
    return {"values": values.view(*packed.shape[:-1], 2 * packed.shape[-1])}
