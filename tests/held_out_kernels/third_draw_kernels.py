"""A third draw: lanes, promotions, conversions, tails, epilogues, clamps and the weighted sum of one kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mxfp4ref import MoeCall
from mxfp4ref.formats.mxfp4 import E2M1_VALUES, decode_ue8m0, unpack_codes
from mxfp4ref.sm90 import fp32, tensor_core
from mxfp4ref.sm90.activation import clamp, sigmoid
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.fp32 import to_bf16, widen
from mxfp4ref.sm90.gemm.order import group_order
from mxfp4ref.sm90.swiglu import swiglu
from mxfp4ref.sm90.tactics import Tactic
from tests.held_out_kernels.by_hand import Rows, layer, right_gemm
from tests.held_out_kernels.definition import wrong

FC1, FC2 = "GEMM ?1|fc1|first GEMM", "GEMM ?2|fc2|second GEMM|down"
INPUT = f"{FC1}|input|\\bx\\b|hidden|gather|\\bread"
MOVED = "swap|exchang|permut|order|neighbou?r|another|other(?! weights)|next|previous|shuffl|xor|swizzl|instead|from"
SUM = "finali|sum|combin|output|weight|slot"

Clamped = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def clamped(up: Tensor, gate: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    return clamp(up, limit), fp32.minimum(gate, limit)


def activation(
    fc1: Tensor,
    *given: Tensor | None,
    clamped: Clamped = clamped,
    sigmoid: Callable[[Tensor], Tensor] = sigmoid,
    gate_takes_beta: bool = False,
) -> Tensor:
    """SwiGLU once more, in steps: bias, clamps, alpha, sigmoid, beta, products."""
    bias, *parameters = given
    value = widen(fc1) if bias is None else fp32.add(widen(fc1), widen(bias))
    up, gate = value.chunk(2, dim=-1)
    alpha, beta, limit = (None if p is None else p.expand_as(up) for p in parameters)
    if (
        limit is not None
    ):  # the form with parameters, which the layer gives a limit of Inf where there is none
        up, gate = clamped(up, gate, limit)
        beta = torch.zeros_like(up) if beta is None else beta
    if beta is not None and gate_takes_beta:
        gate = fp32.add(gate, beta)
    elif beta is not None:
        up = fp32.add(up, beta)
    z = gate if alpha is None else fp32.mul(gate, alpha)
    return fp32.mul(fp32.mul(gate, sigmoid(z)), up)


def decoded(packed: Tensor, table: Sequence[float] = E2M1_VALUES) -> Tensor:
    return torch.tensor(table, dtype=torch.bfloat16)[unpack_codes(packed).long()]


def accumulators(x: Tensor, weights: Tensor, scales: Tensor, tactic: Tactic, *, late: int = 0) -> Tensor:
    """A GEMM by tensor-core steps, two between promotions, which may come so many steps too early."""
    factors = decode_ue8m0(scales, convention="sm90")
    order = group_order(scales.shape[1], tactic.tile_k)
    steps = [32 * group + k for group in order for k in (0, 16)]
    t = acc = zero = torch.zeros(len(x), len(weights))
    for number, k in enumerate(steps):
        t = tensor_core.step(x[:, None, k : k + 16], weights[None, :, k : k + 16], t)
        done = number + 1 + late
        if done % 2 == 0 or number + 1 == len(steps):
            scale = factors[:, order[min(done // 2, len(order)) - 1]]
            acc, t = fp32.fma(t, scale.expand_as(t), acc), zero
    return fp32.add(acc, zero)


@wrong(
    stage="fc1",
    says=(FC1, "scale", f"\\brow|lane|column|{MOVED}|shared|same|wrong"),
    story="GEMM1's scales are picked for a fragment by lane % 8 where lane / 4 is the row: rows of eight take the "
    "first four scales or the last four by turns, which of them hangs on the token's place in its eight",
)
def third_scale_row_by_lane_modulo_eight(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        out = torch.zeros(len(x), len(packed))
        row, pair = torch.arange(len(packed)), torch.arange(len(x)) % 8 // 2
        for quarter in range(4):
            lane = row % 8 * 4 + quarter
            mine = pair == quarter
            out[mine] = right_gemm(x[mine], packed, scales[row // 8 * 8 + lane % 8], tactic)
        return out

    return layer(call, gemm1=gemm)


@wrong(
    stage="fc2",
    says=(
        FC2,
        "scale",
        "\\b16\\b|half|halves|second|last|next|ahead|shift|early|offset|another|other|neighbou?r",
    ),
    story="the counter of steps between promotions begins at one: GEMM2's partial sums are scaled in the middle of a "
    "group, and the last 16 of each 32 columns of K have the scale of the group after",
)
def third_promoted_in_the_middle_of_a_group(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        return accumulators(x, decoded(packed), scales, tactic, late=1)

    return layer(call, gemm2=gemm)


@wrong(
    stage="fc2",
    says=(
        FC2,
        "code|value|weight|decod|table|format|E2M1|element",
        "E3M0|power|\\b16\\b|\\b8\\b|\\.25|exponent|another|other|wrong|instead|becomes?|larger|taken for",
    ),
    story="the converter of GEMM2's weights is instantiated for E3M0, four bits without a fraction: codes 0 to 7 are "
    "0, 1/4, 1/2, 1, 2, 4, 8, 16",
)
def third_codes_converted_as_e3m0(call: MoeCall) -> Tensor:
    positive = [0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0]

    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        return accumulators(x, decoded(packed, positive + [-value for value in positive]), scales, tactic)

    return layer(call, gemm2=gemm)


@wrong(
    stage="activation",
    says=(
        "sigmoid|silu|swish|swiglu|exp|gate",
        "negativ|\\babs|absolute|magnitude|\\bsign|\\|\\w+\\||below (zero|0)|positive|\\bminus",
    ),
    story="the sigmoid is written with exp(-|z|) so as not to overflow, and the other branch, for negative z, is "
    "missing: z and -z have one sigmoid",
)
def third_stable_sigmoid_without_its_negative_branch(call: MoeCall) -> Tensor:
    def activated(fc1: Tensor, *given: Tensor | None) -> Tensor:
        return activation(fc1, *given, sigmoid=lambda z: sigmoid(z.abs()))

    return layer(call, swiglu=activated)


@wrong(
    stage="activation",
    says=("limit|clamp", "\\bzero|\\b0(\\.0)?\\b|mask|drop|discard|remov|instead of|thrown|lost"),
    story="the clamp is a masked_fill with 0: up beyond the limit on either side and gate above it become zero, not "
    "the limit",
)
def third_zero_beyond_the_limit(call: MoeCall) -> Tensor:
    def filled(up: Tensor, gate: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
        return up.masked_fill(up.abs() > limit, 0.0), gate.masked_fill(gate > limit, 0.0)

    def activated(fc1: Tensor, *given: Tensor | None) -> Tensor:
        return activation(fc1, *given, clamped=filled)

    return layer(call, swiglu=activated)


@wrong(
    stage=("fc1", "activation"),
    says=(
        "bias",
        f"column|element|channel|position|pair|even|odd|{MOVED}|same|repeat|twice|shared|broadcast|two",
    ),
    story="fc1's bias is loaded as a word of two bf16 and only its lower half is unpacked: columns 2i and 2i + 1 "
    "both get the bias of 2i",
)
def third_bias_of_the_even_column_for_both(call: MoeCall) -> Tensor:
    def given(rows: Rows, parameters: list[Tensor | None]) -> list[Tensor | None]:
        bias, *others = parameters
        if bias is not None:
            bias = bias[:, torch.arange(bias.shape[1]) // 2 * 2]
        return [bias, *others]

    return layer(call, parameters=given)


@wrong(
    stage="activation",
    says=(
        "activation|swiglu|silu|swish|gate|\\bup\\b",
        "twice|again|\\btwo\\b|double|second time|squared|already|overwrit|in place|written|itself",
    ),
    story="the activation goes in blocks of 256 columns, in place of up, and the last block is shifted back so as "
    "to be whole: columns that it shares with the one before are activated twice, the second time with their own "
    "result for up",
)
def third_overlapping_last_block_activates_twice(call: MoeCall) -> Tensor:
    def in_place(fc1: Tensor, *given: Tensor | None) -> Tensor:
        inner = fc1.shape[1] // 2
        first = swiglu(fc1, *given)
        if inner < 256 or inner % 256 == 0:
            return first
        shared = slice(inner - 256, inner // 256 * 256)
        memory = fc1.clone()
        memory[:, shared] = to_bf16(first)[:, shared]
        first[:, shared] = swiglu(memory, *given)[:, shared]
        return first

    return layer(call, swiglu=in_place)


@wrong(
    stage="finalize",
    says=(
        "weight|scale|sum",
        "slot|accumul|partial|running|running sum|earlier|sum",
        "exchang|operand|swap|multipl|times|unweighted|not weighted|without|later|next|other|another|wrong|Horner",
    ),
    story="two operands of finalize's fma are exchanged: a slot's weight multiplies what was summed before it, and "
    "the slot's own row is added as it is",
)
def third_weight_multiplies_the_sum_so_far(call: MoeCall) -> Tensor:
    def summed(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        total = torch.zeros(len(by_slot), by_slot.shape[2])
        for slot in range(local.shape[1]):
            here = local[:, slot] >= 0
            y = widen(by_slot[here, slot])
            if bias is not None:
                y = fp32.add(y, widen(bias[local[here, slot]]))
            total[here] = fp32.fma(total[here], weights[here, slot, None].expand_as(y), y)
        return total

    return layer(call, finalize=summed)


@wrong(
    stage=("input", "fc1", "slots", "finalize"),
    says=("token|\\brow|\\bx\\b|input", "first|\\b0\\b|\\bzero|missing|dropp|skipp|lost"),
    story="the gather's predicate is `token > 0` where `token >= 0` is meant, as -1 marks padding: cp.async fills "
    "the input of token 0 with zeros",
)
def third_token_zero_taken_for_padding(call: MoeCall) -> Tensor:
    return layer(call, x=lambda rows, x: x.masked_fill((rows.token == 0)[:, None], 0.0))


@wrong(
    stage="fc1",
    says=(FC1, "scale|exponent", "\\bzero|\\b0\\b|vanish|empty"),
    story="GEMM1 scales a group's partial sum by adding to its exponent field, and nobody has thought of a sum of "
    "zero, which becomes a power of two, or for scales below 1 a huge negative number",
)
def third_exponent_of_a_zero_sum_shifted(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        weights = decoded(packed)
        acc = zero = torch.zeros(len(x), len(weights))
        for group in group_order(scales.shape[1], tactic.tile_k):
            t = zero
            for k in (32 * group, 32 * group + 16):
                t = tensor_core.step(x[:, None, k : k + 16], weights[None, :, k : k + 16], t)
            shifted = t.view(torch.int32) + ((scales[:, group].to(torch.int32) - 127) << 23)
            acc = fp32.add(shifted.view(torch.float32), acc)
        return fp32.add(acc, zero)

    return layer(call, gemm1=gemm)


@wrong(
    stage="fc2",
    says=("column|chunk|\\b8\\b|eight|\\bN\\b|output", f"{MOVED}|moved|place|rearrang|mixed"),
    story="GEMM2's output tile is written to shared memory with the 128-byte swizzle and its TMA store has none: in "
    "row r of an expert chunk c of 8 columns lands at c ^ (r & 7)",
)
def third_output_tile_stored_swizzled(call: MoeCall) -> Tensor:
    def stored(rows: Rows, acc: Tensor) -> Tensor:
        column = torch.arange(acc.shape[1])
        chunk = (column // 8 % 8) ^ (rows.position % 8)[:, None]
        return to_bf16(acc.gather(1, column // 64 * 64 + 8 * chunk + column % 8))

    return layer(call, fc2=stored)


@wrong(
    stage=("input", "fc1"),
    says=(INPUT, "\\brow|token", f"{MOVED}|later|\\b16\\b|tile|ahead|wrong"),
    story="the row indices in shared memory are refilled for the next 16 rows of an expert while the second half of "
    "K is still to be gathered: there GEMM1 reads x of the row 16 further on, where there is one",
)
def third_row_indices_refilled_at_half_of_k(call: MoeCall) -> Tensor:
    def gathered(rows: Rows, x: Tensor) -> Tensor:
        there = rows.position + 16 < torch.bincount(rows.expert)[rows.expert]
        later = x[torch.where(there, torch.arange(len(x)) + 16, torch.arange(len(x)))]
        half = x.shape[1] // 2
        return torch.cat((x[:, :half], later[:, half:]), 1)

    return layer(call, x=gathered)


@wrong(
    stage="finalize",
    says=(
        "bias",
        f"column|element|channel|position|\\b4\\b|four|\\b8\\b|eight|{MOVED}|repeat|twice|same|half",
    ),
    story="finalize loads fc2's bias for a thread's eight columns by 8 bytes where it takes 16: the last four "
    "columns of each eight get the bias of the first four",
)
def third_four_biases_for_eight_columns(call: MoeCall) -> Tensor:
    def summed(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None:
            column = torch.arange(bias.shape[1])
            bias = bias[:, column // 8 * 8 + column % 4]
        return finalize(by_slot, local, weights, bias)

    return layer(call, finalize=summed)


@wrong(
    stage="fc2",
    says=(FC2, "expert", "previous|before|preced|earlier|another|other|wrong|neighbou?r|last"),
    story="GEMM2's scheduler looks up a tile's expert by lower_bound where upper_bound is meant: the tile that "
    "begins where an expert begins, its first 16 rows, is multiplied with the expert before that has any",
)
def third_first_tile_by_the_expert_before(call: MoeCall) -> Tensor:
    def whose(rows: Rows) -> Tensor:
        present, place = torch.unique(rows.expert, return_inverse=True)
        before = present[(place - 1).clamp(min=0)] if len(present) else rows.expert
        return torch.where(rows.position < 16, before, rows.expert)

    return layer(call, expert2=whose)


@wrong(
    stage=("activation", "finalize"),
    says=(
        "beta|\\b1(\\.0)?\\b|plus|add|offset",
        "gate|linear|\\bup\\b",
        SUM,
        "token|\\brow|even|odd|pair|neighbou?r|before|previous|another|other",
    ),
    story="beta is added to gate, once it is clamped, and not to up; and finalize's blocks take two tokens and load "
    "the routing weights of the first for both",
)
def third_beta_on_the_gate_and_weights_of_even_tokens(call: MoeCall) -> Tensor:
    def activated(fc1: Tensor, *given: Tensor | None) -> Tensor:
        return activation(fc1, *given, gate_takes_beta=True)

    def loaded(local: Tensor, weights: Tensor) -> Tensor:
        return weights[torch.arange(len(weights)) // 2 * 2]

    return layer(call, swiglu=activated, weights=loaded)
