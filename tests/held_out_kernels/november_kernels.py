"""Fresh mistakes of November: loaders, mainloops, epilogues and number formats of one kernel."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward, quantize
from mxfp4ref.formats.mxfp4 import E2M1_VALUES, decode_ue8m0, dequantize, pack_codes, unpack_codes
from mxfp4ref.sm90 import fp32, mufu
from mxfp4ref.sm90.activation import clamp, sigmoid
from mxfp4ref.sm90.fp32 import to_bf16, widen
from mxfp4ref.sm90.tactics import Tactic
from tests.held_out_kernels.by_hand import Rows, layer, local_experts, right_gemm, with_experts
from tests.held_out_kernels.definition import wrong

FC1, FC2 = "GEMM ?1|fc1|first GEMM", "GEMM ?2|fc2|second GEMM|down"
BEFORE = "previous|before|preced|another|earlier|stale|\\bold\\b"
MOVED = "swap|exchang|permut|order|neighbou?r|another|next|previous|interleav|xor|swizzl|shuffl|instead of"
TRUNCATED = "truncat|toward(s)? zero|rounded down|cut off|chop"


@wrong(
    stage="fc1",
    says=(FC1, "scale", "last|final|tail", BEFORE + "|repeat|not (re)?load"),
    story="the prefetch of scales is predicated one K tile too early: GEMM1's last 128 columns of K are multiplied "
    "with the scales of the 128 before",
)
def november_last_scales_not_fetched(call: MoeCall) -> Tensor:
    assert call.experts.fc1_scales is not None
    scales = call.experts.fc1_scales.clone()
    if scales.shape[2] > 4:
        scales[:, :, -4:] = scales[:, :, -8:-4]
    return forward(with_experts(call, fc1_scales=scales))


@wrong(
    stage="fc1",
    says=(FC1, "scale", "\\bsign|negat|minus|-1\\b|int8"),
    story="GEMM1's scale bytes are loaded as int8 and shifted into bf16's exponent: from byte 128 on the sign bit "
    "is extended, and the scale is negative",
)
def november_scales_with_a_sign(call: MoeCall) -> Tensor:
    assert call.experts.fc1_scales is not None
    negative = (call.experts.fc1_scales.view(torch.uint8) >= 128).repeat_interleave(16, -1)
    codes = call.experts.fc1_weights
    return forward(with_experts(call, fc1_weights=torch.where(negative, codes ^ 0x88, codes)))


@wrong(
    stage="fc2",
    says=("row|token|tile", "\\badd|\\bsum|accum|clear|plus", BEFORE + "|\\d+ rows|\\bodd"),
    story="of two consumer warpgroups the second does not clear its accumulators: in every other tile of an expert's "
    "rows GEMM2 adds up on top of the tile before",
)
def november_second_tile_not_cleared(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        right = right_gemm(x, packed, scales, tactic)
        size, acc = tactic.tile_n, right.clone()
        for start in range(size, len(x), 2 * size):
            count = len(acc[start : start + size])
            acc[start : start + count] += right[start - size : start - size + count]
        return acc

    return layer(call, gemm2=gemm)


@wrong(
    stage=("fc1", "activation"),
    says=("gate", "\\b8\\b|eight|block|column|row", MOVED),
    story="stmatrix stores the gate's core matrices in the wrong order: its columns 16j..16j+7 and 16j+8..16j+15 are "
    "exchanged, those of up are right",
)
def november_gate_matrices_exchanged(call: MoeCall) -> Tensor:
    def stored(rows: Rows, acc: Tensor) -> Tensor:
        out = to_bf16(acc)
        if not call.experts.gated:
            return out
        up, gate = out.chunk(2, dim=1)
        return torch.cat((up, gate.unflatten(1, (-1, 2, 8)).flip(2).reshape(up.shape)), 1)

    return layer(call, fc1=stored)


def _swiglu(
    fc1: Tensor, bias: Tensor | None, given: tuple[Tensor | None, ...], *, by_tanh: bool, late: bool
) -> Tensor:
    """SwiGLU with the sigmoid by tanh.approx, or of the gate before it is clamped."""
    alpha, beta, limit = given
    value = widen(fc1)
    if bias is not None:
        value = fp32.add(value, widen(bias))
    up, gate = value.chunk(2, dim=-1)
    inside = gate
    if alpha is not None or beta is not None or limit is not None:
        bound = torch.full_like(up, torch.inf) if limit is None else limit.expand_as(up)
        up, gate = clamp(up, bound), fp32.minimum(gate, bound)
        inside = inside if late else gate
        inside = inside if alpha is None else fp32.mul(inside, alpha.expand_as(gate))
        up = up if beta is None else fp32.add(up, beta.expand_as(up))
    half = torch.full_like(gate, 0.5)
    factor = fp32.fma(mufu.tanh(fp32.mul(inside, half)), half, half) if by_tanh else sigmoid(inside)
    return fp32.mul(fp32.mul(gate, factor), up)


@wrong(
    stage="activation",
    says=("sigmoid|silu|swish|swiglu", "tanh|approx"),
    story="the sigmoid is 0.5 * tanh.approx(0.5 x) + 0.5, one instruction of the special function unit",
)
def november_sigmoid_of_one_instruction(call: MoeCall) -> Tensor:
    return layer(call, swiglu=lambda fc1, bias, *given: _swiglu(fc1, bias, given, by_tanh=True, late=False))


@wrong(
    stage="activation",
    says=("clamp|limit", "sigmoid", "before|unclamped|not clamped|without|not limited|ignor|raw|inside"),
    story="the sigmoid is issued before the clamp to hide its latency: it sees the gate without the limit",
)
def november_sigmoid_ahead_of_the_clamp(call: MoeCall) -> Tensor:
    return layer(call, swiglu=lambda fc1, bias, *given: _swiglu(fc1, bias, given, by_tanh=False, late=True))


@wrong(
    stage="activation",
    says=("activation|(input|operand) of (GEMM ?2|fc2)|GEMM ?2's input", "fp8|e4m3|mxfp8|8.bits?|quanti"),
    story="the W4A8 epilogue is instantiated: the activation goes to GEMM2 as MXFP8, e4m3 with a power of two for "
    "each 32",
)
def november_activation_in_mxfp8(call: MoeCall) -> Tensor:
    def quantised(rows: Rows, activated: Tensor) -> Tensor:
        groups = activated.double().unflatten(1, (-1, 32))
        exponent = groups.abs().amax(2, keepdim=True).clamp(2.0**-100, 2.0**120).log2().floor() - 8
        scaled = (groups * torch.exp2(-exponent)).clamp(-448, 448).float()
        return to_bf16(
            (scaled.to(torch.float8_e4m3fn).double() * torch.exp2(exponent)).float().view_as(activated)
        )

    return layer(call, activation=quantised)


@wrong(
    stage="finalize",
    says=(TRUNCATED, "odd|every (second|other)|column|half of|one of two|alternat|high"),
    story="two sums are packed by prmt after cvt.rn of the low one only: odd columns of the output are truncated",
)
def november_odd_columns_truncated(call: MoeCall) -> Tensor:
    def stored(sums: Tensor) -> Tensor:
        out = to_bf16(sums)
        out[:, 1::2] = (
            (sums[:, 1::2].contiguous().view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
        )
        return out

    return layer(call, output=stored)


@wrong(
    stage="fc2",
    says=("split|half|halves|partial|two (parts|pieces|sums)|twice", "bf16|bfloat16|round"),
    story="GEMM2 runs with split-K of 2 and reduces in the output's type: each half of K is rounded to bf16, then "
    "their sum",
)
def november_halves_of_k_in_bf16(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        half = scales.shape[1] // 2
        low = right_gemm(x[:, : 32 * half], packed[:, : 16 * half], scales[:, :half], tactic)
        high = right_gemm(x[:, 32 * half :], packed[:, 16 * half :], scales[:, half:], tactic)
        return fp32.add(widen(to_bf16(low)), widen(to_bf16(high)))

    return layer(call, gemm2=gemm if call.experts.intermediate_size >= 64 else right_gemm)


@wrong(
    stage="input",
    says=("input|\\bx\\b", "\\b8\\b|chunk|block|16 bytes|swizzl|xor|column", MOVED + "|wrong place"),
    story="TMA writes the input with 128-byte swizzle, the consumer reads it plain: in row r of an expert chunk c of "
    "8 columns is chunk c ^ (r & 7)",
)
def november_input_stays_swizzled(call: MoeCall) -> Tensor:
    def read(rows: Rows, x: Tensor) -> Tensor:
        column = torch.arange(x.shape[1])
        chunk = (column // 8)[None] ^ (rows.position & 7)[:, None]
        return x.gather(1, chunk * 8 + column % 8) if x.shape[1] % 64 == 0 else x

    return layer(call, x=read)


@wrong(
    stage="fc2",
    says=("scale", "\\brow|strid|offset|shift|colum|channel", "expert"),
    story="the stride between experts of GEMM2's scales is one row short: expert e has its scales shifted by e rows",
)
def november_scale_stride_a_row_short(call: MoeCall) -> Tensor:
    scales = call.experts.fc2_scales
    assert scales is not None
    experts, rows, groups = scales.shape
    at = torch.arange(experts)[:, None] * (rows - 1) + torch.arange(rows)
    return forward(with_experts(call, fc2_scales=scales.reshape(-1, groups)[at]))


@wrong(
    stage="fc2",
    says=("expert", BEFORE, "first|\\b0\\b|\\bK\\b|group|column|\\b64\\b"),
    story="the first stage of GEMM2's pipeline is issued before the tensor map is updated: its 64 columns of codes "
    "and scales are of the expert before, among those with rows",
)
def november_first_stage_of_the_expert_before(call: MoeCall) -> Tensor:
    experts, local = call.experts, local_experts(call)
    assert experts.fc2_scales is not None
    weights, scales = experts.fc2_weights.clone(), experts.fc2_scales.clone()
    active = local[local >= 0].unique().tolist()
    for before, expert in pairwise(active):
        weights[expert, :, :32] = experts.fc2_weights[before, :, :32]
        scales[expert, :, :2] = experts.fc2_scales[before, :, :2]
    return forward(with_experts(call, fc2_weights=weights, fc2_scales=scales))


@wrong(
    stage="fc1",
    says=("scale", "\\b16\\b|sixteen|half|next|group size|another|NVFP4|row", FC1),
    story="GEMM1's scale index is k / 16 as for NVFP4: the first half of K uses all scales of its row, the second "
    "those of the next row",
)
def november_a_scale_for_each_sixteen(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        rows, groups = scales.shape
        at = torch.arange(rows)[:, None] * groups + torch.arange(2 * groups)
        # Each 16 become a group of their own, filled up with zeros.
        x = torch.nn.functional.pad(x.reshape(len(x), -1, 16), (0, 16)).flatten(1)
        packed = torch.nn.functional.pad(packed.view(torch.uint8).reshape(rows, -1, 8), (0, 8)).flatten(1)
        return right_gemm(x, packed, scales.flatten()[at % scales.numel()], tactic)

    return layer(call, gemm1=gemm)


@wrong(
    stage="fc1",
    says=("bf16|bfloat16", "round", "\\bK\\b|tile|between|\\b128\\b|partial|intermediate|accumul|each|every"),
    story="GEMM1's accumulators are spilled to shared memory as bf16 after every 128 of K",
)
def november_accumulators_spilled(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        acc = torch.zeros(len(x), len(packed))
        for k in range(0, scales.shape[1], 4):
            some = (packed[:, 16 * k : 16 * k + 64], scales[:, k : k + 4])
            part = right_gemm(x[:, 32 * k : 32 * k + 128], *some, tactic)
            acc = widen(to_bf16(fp32.add(acc, part)))
        return acc

    return layer(call, gemm1=gemm)


@wrong(
    stage=("fc1", "activation"),
    says=("gate", "\\bup\\b", MOVED + "|revers", "(one|1) row|single|only (one|some|a)|alone"),
    story="experts with a single row take the GEMV path, which has gate and up the other way round",
)
def november_lone_rows_exchanged(call: MoeCall) -> Tensor:
    def stored(rows: Rows, acc: Tensor) -> Tensor:
        lone = (torch.bincount(rows.expert, minlength=call.experts.num_experts) == 1)[rows.expert]
        half = acc.shape[1] // 2 if call.experts.gated else 0
        return to_bf16(torch.where(lone[:, None], acc.roll(half, 1), acc))

    return layer(call, fc1=stored)


@wrong(
    stage="activation",
    says=("rotat|hadamard|transform|mix|combin|linear|orthogonal", "\\b32\\b|group|activation|block|column"),
    story="the online Hadamard transform of 32 columns is left on for a checkpoint whose weights are not rotated",
)
def november_activation_rotated(call: MoeCall) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(5):
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)

    def rotated(rows: Rows, activated: Tensor) -> Tensor:
        groups = widen(to_bf16(activated)).double().unflatten(1, (-1, 32))
        return to_bf16((groups @ matrix * 32**-0.5).float().reshape(activated.shape))

    return layer(call, activation=rotated)


@wrong(
    stage=("fc1", "fc2"),
    says=("scale|factor|twice", "last|final|tail", "nibble|\\bcode|byte", "\\bodd|every (second|other)"),
    story="GEMM1's last group of K has its exponent one too high, and GEMM2's odd rows have the nibbles of a byte "
    "exchanged",
)
def november_a_doubled_group_and_nibbles(call: MoeCall) -> Tensor:
    experts = call.experts
    assert experts.fc1_scales is not None
    scales, codes = experts.fc1_scales.clone(), experts.fc2_weights.clone()
    scales[:, :, -1] += (scales[:, :, -1] < 254).to(torch.uint8)
    codes[:, 1::2] = codes[:, 1::2] << 4 | codes[:, 1::2] >> 4
    return forward(with_experts(call, fc1_scales=scales, fc2_weights=codes))


@wrong(
    stage="quantize",
    kind="quantize",
    says=("scale", "\\bsign|negative|abs|magnitude|positive", "max|largest|ignor|without|only|not count"),
    story="a group's largest value is taken without abs(): negative values do not count for the scale",
)
def november_largest_without_abs(values: Tensor, rule: str) -> dict[str, Tensor]:
    right, of_right = quantize(values, rule=rule)  # type: ignore[arg-type]
    _, scales = quantize(values.clamp(min=0), rule=rule)  # type: ignore[arg-type]
    exponent = scales.double().sub_(127).repeat_interleave(32, -1)
    magnitude = values.double().abs() * torch.exp2(-exponent)
    codes = (values.view(torch.int16 if values.dtype == torch.bfloat16 else torch.int32) < 0).to(
        torch.uint8
    ) << 3
    for step, up in ((0.25, 0), (0.75, 1), (1.25, 0), (1.75, 1), (2.5, 0), (3.5, 1), (5.0, 0)):
        codes += magnitude >= step if up else magnitude > step
    lost = of_right == 255
    packed = torch.where(lost.repeat_interleave(16, -1), right, pack_codes(codes))
    return {"packed": packed, "scales": torch.where(lost, of_right, scales)}


@wrong(
    stage="quantize",
    kind="quantize",
    says=("negative|\\bsign|minus", "complement|16 ?-|code|negat|bit"),
    story="negative codes are written as two's complement of 4 bits, not as sign and magnitude",
)
def november_codes_in_twos_complement(values: Tensor, rule: str) -> dict[str, Tensor]:
    packed, scales = quantize(values, rule=rule)  # type: ignore[arg-type]
    codes = unpack_codes(packed)
    return {"packed": pack_codes(torch.where(codes < 8, codes, -(codes & 7) & 15)), "scales": scales}


@wrong(
    stage="dequantize",
    kind="dequantize",
    says=("fp16|float16|half.precision|binary16|range|overflow|underflow|saturat|too (large|small)|2\\^",),
    story="codes and scales are multiplied in fp16 and converted after: what is beyond its range is Inf or 0",
)
def november_by_way_of_fp16(packed: Tensor, scales: Tensor, convention: str, dtype: str) -> dict[str, Tensor]:
    kind = getattr(torch, dtype)
    values = torch.tensor(E2M1_VALUES, dtype=torch.float16)[unpack_codes(packed).long()]
    factors = decode_ue8m0(scales, convention=convention).half()  # type: ignore[arg-type]
    product = (values * factors.repeat_interleave(32, -1)).to(kind)
    nan = dequantize(torch.zeros_like(packed), torch.full_like(scales, 255), convention="ocp", dtype=kind)
    return {"values": torch.where(product.isnan(), nan, product)}
