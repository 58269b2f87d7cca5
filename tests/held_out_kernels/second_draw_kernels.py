"""A second draw: loaders, pipelines, mainloops, epilogues, number formats, activation and sum of one kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mxfp4ref import MoeCall
from mxfp4ref.formats.mxfp4 import E2M1_VALUES, decode_ue8m0, unpack_codes
from mxfp4ref.sm90 import fp32, mufu, tensor_core
from mxfp4ref.sm90.activation import clamp
from mxfp4ref.sm90.fp32 import to_bf16, to_fp16, widen
from mxfp4ref.sm90.gemm.order import group_order
from mxfp4ref.sm90.swiglu import swiglu
from mxfp4ref.sm90.tactics import Tactic
from tests.held_out_kernels.by_hand import Rows, layer, right_gemm
from tests.held_out_kernels.definition import wrong

FC1, FC2 = "GEMM ?1|fc1|first GEMM", "GEMM ?2|fc2|second GEMM|down"
BEFORE = "previous|before|preced|earlier|stale|\\bold\\b|late|behind|one group|neighbou?r"
MOVED = "swap|exchang|permut|order|neighbou?r|another|other|next|previous|shuffl|xor|swizzl|instead of|from"
SUM = "finali|sum|combin|output|weight"


def _gemm_of(x: Tensor, weights: Tensor, scales: Tensor, tactic: Tactic, groups: int = 1) -> Tensor:
    """The accumulators for weights `[N, K]` of any value; every so many groups the tensor core starts from 0."""
    factors = decode_ue8m0(scales, convention="sm90")
    t = acc = zero = torch.zeros(len(x), len(weights))
    for number, group in enumerate(group_order(scales.shape[1], tactic.tile_k)):
        t = t if number % groups else zero
        for k in (32 * group, 32 * group + 16):
            t = tensor_core.step(x[:, None, k : k + 16], weights[None, :, k : k + 16], t)
        acc = fp32.fma(t, factors[:, group].expand_as(t), acc)
    return fp32.add(acc, zero)


def _decoded_by(table: Sequence[float], packed: Tensor) -> Tensor:
    return torch.tensor(table, dtype=torch.bfloat16)[unpack_codes(packed).long()]


@wrong(
    stage=("input", "fc1"),
    says=(
        f"{FC1}|input|\\bx\\b",
        "column|\\bK\\b|\\bk\\b",
        "next|after|later|ahead|\\+ ?128|128 (on|further)|another|other",
    ),
    story="the empty barrier is arrived at before a K tile's last wgmma has read it: GEMM1 takes the last 16 columns "
    "of each K tile of x from the tile that TMA loads after it",
)
def second_stage_released_one_step_early(call: MoeCall) -> Tensor:
    def loaded(rows: Rows, x: Tensor) -> Tensor:
        width = call.kernel.gemm1.tile_k
        tiles = x.view(len(x), x.shape[1] // width, width)
        out = tiles.clone()
        out[:, :-1, -16:] = tiles[:, 1:, -16:]
        return out.flatten(1)

    return layer(call, x=loaded)


@wrong(
    stage="fc2",
    says=(FC2, "code|value|weight|decod|E2M1", "subnormal|0\\.75|0\\.5|\\bzero"),
    story="E2M1 is widened by adding 126 to the exponent field, without a case for exponent 0: GEMM2's zeros become "
    "0.5 of their sign and 0.5 becomes 0.75",
)
def second_exponent_rebased_for_subnormals_too(call: MoeCall) -> Tensor:
    table = [0.5, 0.75, *E2M1_VALUES[2:8], -0.5, -0.75, *E2M1_VALUES[10:]]

    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        return _gemm_of(x, _decoded_by(table, packed), scales, tactic)

    return layer(call, gemm2=gemm)


@wrong(
    stage="fc2",
    says=(f"{FC2}|activation", "column|\\bK\\b|\\bk\\b", f"{MOVED}|\\b8\\b|\\b64\\b|repeat|twice"),
    story="GEMM2's descriptor of the activation is advanced by 16 bytes a k-step, not by 32: step j of the four of "
    "each 64 columns reads columns 8j to 8j+15",
)
def second_descriptor_advanced_by_half(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        k = torch.arange(x.shape[1])
        return right_gemm(x[:, k // 64 * 64 + k % 64 // 16 * 8 + k % 16], packed, scales, tactic)

    return layer(call, gemm2=gemm)


@wrong(
    stage=("input", "fc1"),
    says=(f"{FC1}|input|\\bx\\b", "row|token", "\\b8\\b|eight|another|other|previous|earlier"),
    story="lanes 24 to 31 of an ldmatrix.x4 give the addresses of lanes 16 to 23: in rows 8 to 15 of 16, GEMM1 reads "
    "columns 8 to 15 of each 16 from the row 8 before",
)
def second_last_matrix_of_ldmatrix_is_the_third(call: MoeCall) -> Tensor:
    def loaded(rows: Rows, x: Tensor) -> Tensor:
        lower = (rows.position % 16 >= 8)[:, None]
        right = torch.arange(x.shape[1]) % 16 >= 8
        return torch.where(lower & right, x.roll(8, 0), x)

    return layer(call, x=loaded)


@wrong(
    stage="finalize",
    says=("weight", "slot", "\\b2\\b|two|third|modulo|first|another|other|wrong|odd|even"),
    story="finalize broadcasts the routing weights by a shuffle of width 2: slot s takes the weight of slot s mod 2",
)
def second_weights_shuffled_in_pairs(call: MoeCall) -> Tensor:
    return layer(call, weights=lambda local, weights: weights[:, torch.arange(weights.shape[1]) % 2])


@wrong(
    stage="activation",
    says=(
        "sigmoid|silu|swish|swiglu|exp|alpha",
        "1\\.44|1\\.00|log2|constant|factor|times|alpha|bf16|argument",
    ),
    story="the sigmoid's log2(e) is a bf16 constant, 1.4453125",
)
def second_log2_e_in_bf16(call: MoeCall) -> Tensor:
    def activated(fc1: Tensor, bias: Tensor | None, *given: Tensor | None) -> Tensor:
        value = widen(fc1) if bias is None else fp32.add(widen(fc1), widen(bias))
        up, gate = value.chunk(2, dim=-1)
        alpha, beta, limit = (None if p is None else p.expand_as(up) for p in given)
        if limit is not None:
            up, gate = clamp(up, limit), fp32.minimum(gate, limit)
        up = up if beta is None else fp32.add(up, beta)
        z = gate if alpha is None else fp32.mul(gate, alpha)
        power = mufu.ex2(fp32.mul(-z, torch.full_like(z, 1.4453125)))
        return fp32.mul(fp32.mul(gate, mufu.rcp(fp32.add(torch.ones_like(power), power))), up)

    return layer(call, swiglu=activated)


@wrong(
    stage=("fc1", "activation"),
    says=("gate", "(not|never|un|without( being)?|no) ?round|float32|fp32|accumulator|precision"),
    story="the warpgroup that has the gate applies SiLU to its accumulators, only up has been through shared memory "
    "in bf16: the gate is not rounded",
)
def second_gate_from_the_accumulators(call: MoeCall) -> Tensor:
    def stored(rows: Rows, acc: Tensor) -> Tensor:
        out = to_bf16(acc)
        half = out.shape[1] // 2
        return torch.cat((widen(out[:, :half]), acc[:, half:]), 1) if call.experts.gated else out

    return layer(call, fc1=stored)


@wrong(
    stage="fc2",
    says=(
        "column|row of (the )?weight|output",
        "split|partial|half|halves|twice|in two|middle",
        "bf16|round",
    ),
    story="stream-K: the last wave's tiles, the last quarter of GEMM2's columns, are cut in two along K, and the "
    "first half's partial sum waits in a bf16 workspace",
)
def second_split_tiles_meet_in_bf16(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        out, last = right_gemm(x, packed, scales, tactic), len(packed) // 4
        halves = zip(x.chunk(2, 1), packed[-last:].chunk(2, 1), scales[-last:].chunk(2, 1), strict=True)
        first, second = (right_gemm(*half, tactic) for half in halves)
        out[:, -last:] = fp32.add(widen(to_bf16(first)), second)
        return out

    return layer(call, gemm2=gemm)


@wrong(
    stage="fc1",
    says=(FC1, "negativ|\\bsign|minus|-[1346]\\b", "code|value|weight|decod|table"),
    story="the table of GEMM1's codes is read by prmt, for its low byte with the code's sign still in the selector, "
    "where that bit asks for copies of the sign: -1 and -1.5 become -1.992, -3 becomes -2, -4 and -6 become -7.97",
)
def second_prmt_replicates_the_sign(call: MoeCall) -> Tensor:
    negative = [-0.0, -0.5, -1.9921875, -1.9921875, -2.0, -2.0, -7.96875, -7.96875]

    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        return _gemm_of(x, _decoded_by([*E2M1_VALUES[:8], *negative], packed), scales, tactic)

    return layer(call, gemm1=gemm)


@wrong(
    stage="fc1",
    says=(
        FC1,
        "group|\\bK\\b|\\bk\\b|tile|128",
        "accum|sum|clear|again|twice|more than once|earlier|before|add|plus",
    ),
    story="wgmma is told to start from zero at the first group of a K tile alone: a group's scale in GEMM1 "
    "multiplies the products of the tile's earlier groups too",
)
def second_partial_sums_cleared_by_the_tile(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        return _gemm_of(x, _decoded_by(E2M1_VALUES, packed), scales, tactic, tactic.tile_k // 32)

    return layer(call, gemm1=gemm)


@wrong(
    stage=("fc1", "activation"),
    says=("\\bup\\b", "gate", "last|\\b64\\b|column|block|from"),
    story="the epilogue's staging buffer is not waited for after the last store: in the last 64 columns the gate has "
    "overwritten up before TMA takes it",
)
def second_up_overwritten_by_the_gate(call: MoeCall) -> Tensor:
    def stored(rows: Rows, acc: Tensor) -> Tensor:
        out = to_bf16(acc)
        if call.experts.gated:
            up, gate = out.chunk(2, dim=1)
            up[:, -64:] = gate[:, -64:]
        return out

    return layer(call, fc1=stored)


@wrong(
    stage="activation",
    says=("bias", "row|token|position|column|constant|same|broadcast|transpos"),
    story="with A and B exchanged the bias has to be broadcast along the tile's columns and goes along its rows: the "
    "n-th row of an expert gets the n-th bias in all its columns",
)
def second_bias_along_the_tokens(call: MoeCall) -> Tensor:
    def given(rows: Rows, parameters: list[Tensor | None]) -> list[Tensor | None]:
        bias, *others = parameters
        if bias is not None:
            place = (rows.position % bias.shape[1])[:, None]
            bias = bias.gather(1, place).expand_as(bias)
        return [bias, *others]

    return layer(call, parameters=given)


@wrong(
    stage="fc2",
    says=(FC2, "scale", BEFORE),
    story="scales are fetched to registers a group ahead only at the start of a K tile, then always a group behind: "
    "of each tile's groups GEMM2 scales 0, 1, 2, 3 by those of 0, 0, 1, 2",
)
def second_scale_register_a_group_behind(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        tiles = scales.view(len(scales), -1, tactic.tile_k // 32)
        late = torch.cat((tiles[..., :1], tiles[..., :-1]), -1).flatten(1)
        return right_gemm(x, packed, late, tactic)

    return layer(call, gemm2=gemm)


@wrong(
    stage="fc2",
    says=("row|token", "last|final|\\bodd\\b|end", f"{BEFORE}|another|other|repeat|twice|copy|same"),
    story="tokens are the tile's columns and leave in pairs of bf16: where an expert has an odd number of rows, the "
    "last pair begins one row early, and GEMM2's last row is that before it",
)
def second_last_odd_row_is_the_one_before(call: MoeCall) -> Tensor:
    def stored(rows: Rows, acc: Tensor) -> Tensor:
        out = to_bf16(acc)
        last = torch.bincount(rows.expert)[rows.expert] - 1 == rows.position
        alone = last & (rows.position % 2 == 0) & (rows.position > 0)
        return torch.where(alone[:, None], out.roll(1, 0), out)

    return layer(call, fc2=stored)


@wrong(
    stage="activation",
    says=(
        "activation|swiglu|\\bup\\b|gate|GEMM ?1|fc1",
        "row|token",
        "overwrit|written|alias|another|other|half|later|in place|already",
    ),
    story="the activation is written into GEMM1's output, the last rows first: row r's goes over up or gate of row "
    "r / 2, which are still to be read",
)
def second_activation_over_its_input(call: MoeCall) -> Tensor:
    def in_place(fc1: Tensor, *given: Tensor | None) -> Tensor:
        memory, inner = fc1.flatten().clone(), fc1.shape[1] // 2
        for row in reversed(range(len(fc1))):
            mine = memory[2 * inner * row : 2 * inner * (row + 1)][None]
            result = swiglu(mine, *(None if p is None else p[row : row + 1] for p in given))
            memory[inner * row : inner * (row + 1)] = to_bf16(result)[0]
        return widen(memory[: inner * len(fc1)].view(len(fc1), inner))

    return layer(call, swiglu=in_place)


@wrong(
    stage=("input", "fc1", "finalize"),
    says=(
        f"{FC1}|input|\\bx\\b|\\bread|gather",
        "row|token",
        MOVED,
        SUM,
        "truncat|toward(s)? zero|cut off|chop|rounded down",
    ),
    story="of each gather4 of TMA the second and the third row index are exchanged (past an expert's rows there is "
    "token 0); and the output is cut off to bf16, not rounded",
)
def second_gathered_rows_and_a_cut_output(call: MoeCall) -> Tensor:
    def gathered(rows: Rows, x: Tensor) -> Tensor:
        step = torch.tensor([0, 1, -1, 0])[rows.position % 4]
        source = rows.position + step
        there = source < torch.bincount(rows.expert)[rows.expert]
        place = (torch.arange(len(x)) + step).clamp(max=max(len(x) - 1, 0))
        return call.input[torch.where(there, rows.token[place], 0)]

    def cut(sums: Tensor) -> Tensor:
        return (sums.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)

    return layer(call, x=gathered, output=cut)


@wrong(
    stage=("fc1", "activation", "finalize"),
    says=("gate", "negativ|relu|below|clamp|\\bzero|max", SUM, "bf16|bfloat16|round"),
    story="the epilogue's ReLU is left on for the gate's half of GEMM1's columns; and finalize has weights, products "
    "and sums in bf16, by fma.rn.bf16x2",
)
def second_gate_rectified_and_a_packed_sum(call: MoeCall) -> Tensor:
    def stored(rows: Rows, acc: Tensor) -> Tensor:
        out = to_bf16(acc)
        if call.experts.gated:
            out[:, out.shape[1] // 2 :].clamp_(min=0)
        return out

    def summed(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        total = torch.zeros(len(by_slot), by_slot.shape[2])
        for slot in range(local.shape[1]):
            here = local[:, slot] >= 0
            y = widen(by_slot[here, slot])
            if bias is not None:
                y = widen(to_bf16(fp32.add(y, widen(bias[local[here, slot]]))))
            weight = widen(to_bf16(weights[here, slot, None]))
            total[here] = widen(to_bf16(fp32.fma(weight.expand_as(y), y, total[here])))
        return total

    return layer(call, fc1=stored, finalize=summed)


@wrong(
    stage=("fc1", "fc2"),
    says=(
        FC1,
        "fp16|half|float16|f16",
        f"{FC2}|activation",
        "column|\\bK\\b|\\bk\\b",
        f"{MOVED}|\\b32\\b|\\b64\\b",
    ),
    story="GEMM1's output passes through fp16; and GEMM2 reads its input, swizzled by 128 bytes, as if by 64: in "
    "rows 4 to 7 of each 8 the halves of each 64 columns are exchanged",
)
def second_output_in_fp16_and_half_a_swizzle(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        upper = (torch.arange(len(x)) % 8 >= 4)[:, None]
        exchanged = x.view(len(x), x.shape[1] // 64, 2, 32).flip(2).reshape(x.shape)
        return right_gemm(torch.where(upper, exchanged, x), packed, scales, tactic)

    return layer(call, fc1=lambda rows, acc: to_bf16(widen(to_fp16(acc))), gemm2=gemm)
