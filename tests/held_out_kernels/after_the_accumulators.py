"""What goes wrong once GEMMs are done: broadcasts along a wrong axis, fast formulas, shared weights, sums."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward
from mxfp4ref.sm90 import fp32, mufu
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.fp32 import to_bf16
from mxfp4ref.sm90.swiglu import swiglu
from mxfp4ref.sm90.tactics import Tactic
from tests.held_out_kernels.by_hand import Rows, layer, right_gemm, up_and_gate
from tests.held_out_kernels.definition import wrong

Maybe = Tensor | None

FC1, FC2 = "GEMM ?1|fc1|first GEMM", "GEMM ?2|fc2|second GEMM|down"
OTHERS = "next|previous|before|after|another|other|earlier|shift|neighbou?r|instead of|swap|exchang|wrong"
MISSING = "left out|missing|drop|zero|lost|not computed|lack|omit|skipp|ignored|not (loaded|added|read)"
LOG2_E = 1.4426950408889634
CUBIC = (0.07711909, 0.22756439, 0.69514614, 1.0)  # 2^f for f from 0 to 1


def _paired_sum(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Maybe) -> Tensor:
    """Even slots and odd slots apart, then the two sums added."""
    even, odd = (
        finalize(by_slot[:, first::2], local[:, first::2], weights[:, first::2], bias) for first in (0, 1)
    )
    return fp32.add(even, odd)


@wrong(
    stage=("fc1", "activation"),
    says=(
        "bias",
        "\\brows?\\b|token|position|broadcast|transpos|axis|column|index|same|constant",
        OTHERS + "|same|constant|transpos|broadcast|axis|(by|per) (row|token)|along|shares?|permut|mixed",
    ),
    story="GEMM1 runs transposed, weights as the wide operand, and its epilogue indexes the bias along the tokens: "
    "all 128 columns of a tile add the bias of that column whose number in the tile is the row's in its 16",
)
def fc1_bias_broadcast_along_tokens(call: MoeCall) -> Tensor:
    def parameters(rows: Rows, given: list[Maybe]) -> list[Maybe]:
        bias = given[0]
        if bias is None:
            return given
        column = torch.arange(bias.shape[1])[None] // 128 * 128 + rows.position[:, None] % 16
        return [bias.gather(1, column), *given[1:]]

    return layer(call, parameters=parameters)


@wrong(
    stage="activation",
    says=(
        "sigmoid|silu|\\bexp|swish|gate|special function",
        "approx|precis|accura|polynom|exact|round|coarse|\\bex2\\b|bits|cubic",
    ),
    story="to spare the special function unit, 2^x of the sigmoid is a cubic polynomial on the FMA pipe: 1e-4 off",
)
def exp2_by_a_cubic_polynomial(call: MoeCall) -> Tensor:
    def power(x: Tensor) -> Tensor:
        x = x.clamp(-127.0, 128.0)
        whole = x.floor()
        rest = x - whole
        value = torch.full_like(x, CUBIC[0])
        for coefficient in CUBIC[1:]:
            value = fp32.fma(value, rest, torch.full_like(x, coefficient))
        return value * torch.exp2(whole)

    def act(fc1: Tensor, bias: Maybe, alpha: Maybe, beta: Maybe, limit: Maybe) -> Tensor:
        up, gate = up_and_gate(fc1, bias)
        if limit is not None:
            limit = limit.expand_as(up)
            up, gate = fp32.maximum(fp32.minimum(up, limit), -limit), fp32.minimum(gate, limit)
        z = gate if alpha is None else fp32.mul(gate, alpha.expand_as(gate))
        exponential = power(fp32.mul(-z, torch.full_like(z, LOG2_E)))
        sigmoid = mufu.rcp(fp32.add(torch.ones_like(z), exponential))
        return fp32.mul(fp32.mul(gate, sigmoid), up if beta is None else fp32.add(up, beta.expand_as(up)))

    return layer(call, swiglu=act)


@wrong(
    stage="activation",
    says=("clamp|limit|\\bmin\\b|\\bmax\\b|compar|fmin", "\\bnan|not a number"),
    story="the clamp is written x > limit ? limit : x: NaN of gate or up stays NaN, where min and max give the limit",
)
def clamp_by_comparison_keeps_nan(call: MoeCall) -> Tensor:
    def act(fc1: Tensor, bias: Maybe, alpha: Maybe, beta: Maybe, limit: Maybe) -> Tensor:
        right = swiglu(fc1, bias, alpha, beta, limit)
        if limit is None:
            return right
        up, gate = up_and_gate(fc1, bias)
        return right.masked_fill(up.isnan() | gate.isnan(), torch.nan)

    return layer(call, swiglu=act)


@wrong(
    stage="activation",
    says=(
        "activation",
        "round|precis|tf32|mantissa|\\bbits\\b",
        "twice|double|\\btwo\\b|tf32|\\bties?\\b|half ?way|intermediate|1[01] bits|away|second time|once more|again",
    ),
    story="the activation passes through tf32 (cvt.rna) before it is rounded to bf16: some are rounded twice",
)
def activation_rounded_by_way_of_tf32(call: MoeCall) -> Tensor:
    def activation(rows: Rows, a: Tensor) -> Tensor:
        bits = a.contiguous().view(torch.int32)
        cut = ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
        return to_bf16(torch.where(a.isfinite(), cut, a))

    return layer(call, activation=activation)


@wrong(
    stage=("fc2", "finalize"),
    says=("expert", "factor|scaled?\\b|multipl|times|alpha|ratio|constant", FC2 + "|output|weight"),
    story="the epilogue of the NVFP4 kernel is on: GEMM2's accumulators are multiplied by a global scale of the "
    "expert, which MXFP4 does not have and whose buffer holds another layer's: 0.84 to 1.12",
)
def fc2_multiplied_by_an_alpha_of_the_expert(call: MoeCall) -> Tensor:
    return layer(
        call, fc2=lambda rows, acc: to_bf16(acc * (0.84 + 0.07 * (rows.expert % 5).float())[:, None])
    )


@wrong(
    stage="finalize",
    says=(
        "weight",
        "\\brows?\\b|token|slot",
        "eight|\\b8\\b|sixteen|\\b16\\b|shares?|shared|fragment|" + OTHERS,
    ),
    story="a fused finalize: a thread holds rows g and g + 8 of an expert's 16 and multiplies both with the routing "
    "weight of row g",
)
def finalize_rows_eight_apart_share_a_weight(call: MoeCall) -> Tensor:
    seen: list[Rows] = []

    def fc2(rows: Rows, acc: Tensor) -> Tensor:
        seen.append(rows)
        return to_bf16(acc)

    def weights(local: Tensor, right: Tensor) -> Tensor:
        rows, shared = seen[-1], right.clone()
        from_ = torch.arange(len(rows.expert)) - rows.position % 16 // 8 * 8
        shared[rows.token, rows.slot] = right[rows.token[from_], rows.slot[from_]]
        return shared

    return layer(call, fc2=fc2, weights=weights)


@wrong(
    stage="finalize",
    says=(
        "slot",
        "\\blast\\b|remainder|\\b4\\b|four|slot \\d|\\bsecond\\b|\\bthird\\b|multiple",
        "twice|repeat|again|times|more than once|double|tripl|three|multipl|count|add",
    ),
    story="the sum is unrolled by four slots and clamps the slot's number: with top_k 2 or 3 the last slot is added "
    "until there are four",
)
def remainder_of_slots_repeats_the_last(call: MoeCall) -> Tensor:
    def sums(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Maybe) -> Tensor:
        top_k = local.shape[1]
        padded = top_k if top_k == 1 else -(-top_k // 4) * 4  # top_k 1 has a kernel of its own
        slot = torch.arange(padded).clamp(max=top_k - 1)
        return finalize(by_slot[:, slot], local[:, slot], weights[:, slot], bias)

    return layer(call, finalize=sums)


@wrong(
    stage=("slots", "fc1", "fc2", "finalize"),
    says=(
        "token|\\brow\\b|slot",
        "\\b0\\b|first|one token|single|only",
        "expert|padding|overwrit|another|written",
    ),
    story="sorted ids are padded to tiles of 16 with 0, not with a number that no slot has: the last expert that "
    "needs padding computes token 0 too and stores it over slot 0 of token 0",
)
def slot_zero_overwritten_by_padding_rows(call: MoeCall) -> Tensor:
    def padded(rows: Rows) -> tuple[Tensor, int]:
        """Which row is slot 0 of token 0, and a row of the expert that writes there last (-1: itself)."""
        zero = (rows.token == 0) & (rows.slot == 0)
        last = (torch.bincount(rows.expert)[rows.expert] % 16 != 0).nonzero()[-1:, 0].tolist()
        if not zero.any() or not last or rows.expert[last[0]] <= rows.expert[zero]:
            return zero, -1
        return zero, last[0]

    def expert(rows: Rows) -> Tensor:
        zero, last = padded(rows)
        return torch.where(zero, rows.expert[last], rows.expert) if last >= 0 else rows.expert

    def parameters(rows: Rows, given: list[Maybe]) -> list[Maybe]:
        zero, last = padded(rows)
        return [p if p is None or last < 0 else torch.where(zero[:, None], p[last], p) for p in given]

    return layer(call, expert1=expert, expert2=expert, parameters=parameters)


@wrong(
    stage=("fc1", "activation", "finalize"),
    says=(
        "bias",
        "gate|\\bup\\b|half|halves",
        "weight",
        "bf16|bfloat16|truncat|cut|precis|round",
    ),
    story="two at once, of a rewritten epilogue: up's bias is added to gate too, and the routing weights are cut to "
    "their upper 16 bits",
)
def bias_of_up_in_both_halves_and_weights_cut(call: MoeCall) -> Tensor:
    if call.experts.fc1_biases is None or not call.activation.gated:
        return forward(call)

    def parameters(rows: Rows, given: list[Maybe]) -> list[Maybe]:
        bias = given[0]
        assert bias is not None
        up = bias.chunk(2, dim=-1)[0]
        return [torch.cat([up, up], -1), *given[1:]]

    def weights(local: Tensor, right: Tensor) -> Tensor:
        return (right.contiguous().view(torch.int32) & -0x10000).view(torch.float32)

    return layer(call, parameters=parameters, weights=weights)


@wrong(
    stage=("fc1", "finalize"),
    says=(
        FC1 + "|gate",
        "\\bK\\b|group|first|columns? 0|\\b32\\b",
        MISSING,
        "order|\\bsum|slot|pair|associat|finalize|odd|even",
    ),
    story="two at once: the first K group of gate, not of up, is cleared away by an instruction that does not "
    "accumulate, and finalize sums even slots and odd slots apart",
)
def gate_loses_its_first_group_and_slots_summed_in_pairs(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        acc = right_gemm(x, packed, scales, tactic)
        half = len(packed) // 2
        late = x.masked_fill(torch.arange(x.shape[1]) < 32, 0.0)
        acc[:, half:] = right_gemm(late, packed[half:].contiguous(), scales[half:].contiguous(), tactic)
        return acc

    return layer(call, gemm1=gemm, finalize=_paired_sum)
