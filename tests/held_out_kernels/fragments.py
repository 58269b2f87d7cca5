"""What goes wrong inside warps: fragments, signs in a word, stages, tensor maps, epilogues, persistent blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.fp32 import to_bf16
from mxfp4ref.sm90.swiglu import swiglu
from tests.held_out_kernels.by_hand import Rows, layer, with_experts
from tests.held_out_kernels.definition import wrong

Maybe = Tensor | None

FC1 = "GEMM ?1|fc1|first GEMM"
FC2 = "GEMM ?2|fc2|second GEMM"
MOVED = "another|other|neighbou?r|swap|exchang|trad|mixed|permut|shift|moved|\\bnext\\b|previous|before"
BLOCKS = 132  # of a persistent grid: the SMs of an H100


def _biased(fc1: Tensor, bias: Maybe) -> Tensor:
    return fc1.float() if bias is None else fp32.add(fc1.float(), bias.float())


def _row_beside(rows: Rows) -> tuple[Tensor, Tensor]:
    """Of each row, the one with which it shares a thread's registers, and whether the expert has it."""
    index = torch.arange(len(rows.expert))
    beside = index + torch.where(rows.position % 2 == 0, 1, -1)
    there = beside < len(index)
    beside = torch.where(there, beside, index)
    return beside, there & (rows.expert[beside] == rows.expert)


@wrong(
    stage=("activation", "fc2"),
    says=(
        FC2 + "|activation",
        "\\bK\\b|column|block|tile|chunk|\\b64\\b|stage|group",
        "another|other|later|ahead|after|\\bnext\\b|shift|overwrit|early|stale|repeat|twice",
    ),
    story="the stage is released before wgmma has read it: of three stages, columns of the activation in K tile t of "
    "64 are those of tile t + 3, where there is one",
)
def activation_stage_released_too_early(call: MoeCall) -> Tensor:
    def activation(rows: Rows, a: Tensor) -> Tensor:
        column = torch.arange(a.shape[1])
        return to_bf16(a)[:, torch.where(column + 3 * 64 < a.shape[1], column + 3 * 64, column)]

    return layer(call, activation=activation)


@wrong(
    stage="fc1",
    says=(
        "scale",
        "row|column|channel",
        "eight|\\b8\\b|sixteen|\\b16\\b|pair|fragment|share|shared",
    ),
    story="a thread holds rows g and g + 8 of a fragment of fc1 and scales both with the scale of row g",
)
def fc1_fragment_rows_eight_apart_share_a_scale(call: MoeCall) -> Tensor:
    scales = call.experts.fc1_scales
    assert scales is not None
    row = torch.arange(scales.shape[1])
    return forward(with_experts(call, fc1_scales=scales[:, row - row % 16 // 8 * 8].contiguous()))


@wrong(
    stage=("fc2", "finalize"),
    says=(
        FC2 + "|output|column",
        "row|token|slot|register|fragment|transpos",
        MOVED,
    ),
    story="the epilogue of GEMM2 takes the two middle of a fragment's four registers for each other: column g of an "
    "odd row and column g + 8 of the even row before it trade places",
)
def fc2_accumulator_registers_exchanged(call: MoeCall) -> Tensor:
    def fc2(rows: Rows, acc: Tensor) -> Tensor:
        beside, there = _row_beside(rows)
        other = acc[beside] * there[:, None]  # rows beyond the expert's last were filled with zeros
        upper = torch.arange(acc.shape[1]) % 16 >= 8
        even = (rows.position % 2 == 0)[:, None]
        out = torch.where(even & upper, other.roll(8, 1), acc)
        return to_bf16(torch.where(~even & ~upper, other.roll(-8, 1), out))

    return layer(call, fc2=fc2)


@wrong(
    stage="fc2",
    says=(
        "sign|negat|minus",
        "nibble|pair|neighbou?r|byte|other|swap|exchang|even|odd|beside|adjacent|next",
    ),
    story="fc2's codes are widened in pairs by bit tricks, and each gets the sign of the other one in its byte",
)
def fc2_signs_of_the_other_nibble(call: MoeCall) -> Tensor:
    codes = call.experts.fc2_weights
    return forward(with_experts(call, fc2_weights=(codes & 0x77) | (codes & 0x80) >> 4 | (codes & 0x08) << 4))


@wrong(
    stage="finalize",
    says=(
        "token|row|output",
        "132|earlier|previous|before|another token|other token|stale|left ?over|"
        "not (re)?set|not cleared|not zeroed|uncleared",
        "\\badd|plus|on top|starts? (from|with|at)|begin|accumul|\\bsums?\\b|\\+|carr",
    ),
    story="finalize runs in 132 persistent blocks and clears its accumulators once: token t begins with the sum of "
    "token t - 132",
)
def finalize_accumulators_cleared_once_a_block(call: MoeCall) -> Tensor:
    def sums(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Maybe) -> Tensor:
        acc = torch.zeros(len(by_slot), by_slot.shape[2])
        for first in range(0, len(acc), BLOCKS):
            some = slice(first, first + BLOCKS)
            mine = acc[some]
            if first:
                mine.copy_(acc[first - BLOCKS : first][: len(mine)])
            for slot in range(local.shape[1]):
                tokens = (local[some, slot] >= 0).nonzero()[:, 0]
                y = fp32.widen(by_slot[some][tokens, slot])
                if bias is not None:
                    y = fp32.add(y, fp32.widen(bias[local[some][tokens, slot]]))
                mine[tokens] = fp32.fma(weights[some][tokens, slot, None], y, mine[tokens])
        return acc

    return layer(call, finalize=sums)


@wrong(
    stage=("slots", "finalize"),
    says=(
        "expert",
        "\\b0\\b|zero|first",
        "skip|left out|missing|drop|omit|not (computed|added|counted|summed)|ignored|lost|lack|without|no slots",
    ),
    story="slots are skipped where the expert is not above zero, -1 being meant: those of the rank's expert 0 too",
)
def slots_of_expert_zero_skipped(call: MoeCall) -> Tensor:
    return layer(call, local=lambda local: local.masked_fill(local == 0, -1))


@wrong(
    stage="activation",
    says=(
        "sigmoid|silu|\\bexp(2|onential)?\\b|swish|ex2",
        "bf16|bfloat16|round|precision|approx|accura|coarse|bits",
    ),
    story="the sigmoid's exponential is ex2.approx.ftz.bf16x2: exp(-x) is a bf16 before 1 is added",
)
def sigmoid_exponential_in_bf16(call: MoeCall) -> Tensor:
    def act(fc1: Tensor, bias: Maybe, alpha: Maybe, beta: Maybe, limit: Maybe) -> Tensor:
        up, gate = _biased(fc1, bias).chunk(2, dim=-1)
        if limit is not None:
            limit = limit.expand_as(up)
            up, gate = fp32.minimum(fp32.maximum(up, -limit), limit), fp32.minimum(gate, limit)
        z = gate if alpha is None else gate * alpha
        out = gate / (1 + torch.exp(-z).bfloat16().float()) * (up if beta is None else up + beta)
        return torch.where(z.isfinite() & up.isfinite(), out, swiglu(fc1, bias, alpha, beta, limit))

    return layer(call, swiglu=act)


@wrong(
    stage="activation",
    says=(
        "activation|product|GEMM ?2's input|input of GEMM ?2",
        "448|fp8|e4m3",
    ),
    story="the cast for W4A8 saturates before it is known that bf16 is stored: the activation stays within +-448",
)
def activation_saturated_at_448(call: MoeCall) -> Tensor:
    return layer(call, activation=lambda rows, a: to_bf16(a.clamp(-448.0, 448.0)))


@wrong(
    stage=("fc2", "slots"),
    says=(
        "expert",
        FC2 + "|row|count",
        "previous|before|preced|earlier|stale|another|other|same (number|count)|as many|equal|neighbou?r",
    ),
    story="tensor maps are updated only where the problem's shape changes: an expert with as many rows as the one "
    "with rows before it is multiplied with that one's fc2",
)
def fc2_map_kept_for_equal_row_counts(call: MoeCall) -> Tensor:
    def expert2(rows: Rows) -> Tensor:
        whose = rows.expert.clone()
        kept, count = -1, -1
        for expert, number in zip(*(t.tolist() for t in rows.expert.unique(return_counts=True)), strict=True):
            kept, count = (kept if number == count else expert), number
            whose[rows.expert == expert] = kept
        return whose

    return layer(call, expert2=expert2)


@wrong(
    stage=("activation", "fc2", "slots"),
    says=(
        FC2 + "|activation|row|slot",
        "row|slot|token|stride|expert",
        "stride|twice|double|2 ?\\*|2 ?r|every (second|other)|even|another|other|shift|offset|later|zero",
    ),
    story="the activation is stored with a stride of I and read with one of 2I, as GEMM1's output has: sorted row r "
    "takes row 2r, and beyond the last there are zeros",
)
def activation_read_with_the_stride_of_fc1(call: MoeCall) -> Tensor:
    if not call.activation.gated:
        return forward(call)

    def activation(rows: Rows, a: Tensor) -> Tensor:
        a, row = to_bf16(a), 2 * torch.arange(len(a))
        return torch.where((row < len(a))[:, None], a[row.clamp(max=len(a) - 1)], 0) if len(a) else a

    return layer(call, activation=activation)


@wrong(
    stage=("fc1", "activation"),
    says=(
        "gate",
        "row|token|slot",
        MOVED + "|pair|beside|adjacent",
    ),
    story="the fused epilogue takes gate from the wrong register: rows 2i and 2i + 1 of an expert have each other's "
    "gate, and up their own",
)
def gate_of_the_row_beside(call: MoeCall) -> Tensor:
    if not call.activation.gated:
        return forward(call)

    def fc1(rows: Rows, acc: Tensor) -> Tensor:
        beside, there = _row_beside(rows)
        up, gate = acc.chunk(2, dim=1)
        return to_bf16(torch.cat([up, gate[beside] * there[:, None]], 1))

    return layer(call, fc1=fc1)


@wrong(
    stage=("fc1", "activation"),
    says=(
        "bias",
        "128|tile|block|repeat|again|first|modulo|period|half|halves|\\bgate\\b",
    ),
    story="the fc1 bias is staged in shared memory once: every tile of 128 columns adds that of columns 0 to 127",
)
def fc1_bias_of_the_first_tile_everywhere(call: MoeCall) -> Tensor:
    bias = call.experts.fc1_biases
    if bias is None:
        return forward(call)
    return forward(with_experts(call, fc1_biases=bias[:, torch.arange(bias.shape[1]) % 128].contiguous()))


@wrong(
    stage=("activation", "finalize"),
    says=(
        "gate",
        "clamp|limit",
        "bias",
    ),
    story="two at once, of a rewritten epilogue: gate is clamped from below too, as up is, and the fc2 bias is added "
    "to the finished sum, without the weight",
)
def gate_clamped_below_and_fc2_bias_unweighted(call: MoeCall) -> Tensor:
    def act(fc1: Tensor, bias: Maybe, alpha: Maybe, beta: Maybe, limit: Maybe) -> Tensor:
        if limit is None:
            return swiglu(fc1, bias, alpha, beta, limit)
        up, gate = _biased(fc1, bias).chunk(2, dim=-1)
        gate = fp32.maximum(gate, -limit.expand_as(gate))
        return swiglu(torch.cat([up, gate], -1), None, alpha, beta, limit)

    def sums(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Maybe) -> Tensor:
        acc = torch.zeros(len(by_slot), by_slot.shape[2])
        for with_bias in (False, True):
            for slot in range(local.shape[1] if bias is not None or not with_bias else 0):
                tokens = (local[:, slot] >= 0).nonzero()[:, 0]
                if with_bias and bias is not None:
                    acc[tokens] = fp32.add(acc[tokens], fp32.widen(bias[local[tokens, slot]]))
                else:
                    y = fp32.widen(by_slot[tokens, slot])
                    acc[tokens] = fp32.fma(weights[tokens, slot, None], y, acc[tokens])
        return acc

    return layer(call, swiglu=act, finalize=sums)
