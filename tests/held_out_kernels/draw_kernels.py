"""A draw of kernels: what goes wrong in CUDA between the first load and the last store."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mxfp4ref import MoeCall
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.fp32 import to_bf16
from mxfp4ref.sm90.swiglu import swiglu
from mxfp4ref.sm90.tactics import Tactic
from tests.held_out_kernels.by_hand import Rows, layer, right_gemm, with_experts
from tests.held_out_kernels.definition import wrong

__all__: list[str] = []


def _bits(x: Tensor) -> Tensor:
    return x.float().contiguous().view(torch.int32)


def _cut(x: Tensor, kept: int) -> Tensor:
    """float32 with the low 32 - kept bits cleared; NaN stays one."""
    cleared = (_bits(x) & (-1 << (32 - kept))).view(torch.float32)
    return torch.where(x.isnan(), x.float(), cleared)


def _truncated(x: Tensor) -> Tensor:
    return to_bf16(_cut(x, 16))


# --- index maps


@wrong(
    stage="fc1",
    says=(
        "expert",
        r"swap|exchang|pair|xor|neighbou?r|permut|\^ ?1|each other|two by two|2 by 2|"
        r"blocks of (two|2)",
    ),
    story="the two CTAs of a cluster take each other's expert of GEMM1: 0 and 1, 2 and 3 are exchanged",
)
def fc1_experts_exchanged_in_clusters_of_two(call: MoeCall) -> Tensor:
    experts = call.experts.num_experts

    def other(rows: Rows) -> Tensor:
        flipped = rows.expert ^ 1
        return torch.where(flipped < experts, flipped, rows.expert)

    return layer(call, expert1=other)


@wrong(
    stage="fc2",
    says=(
        r"\brow|column|tile|output|\bn\b",
        r"modulo|mod\b|% ?128|wrap|repeat|again|first 128|128|0 to 127|cop(y|ies)",
    ),
    story="GEMM2's row coordinate is masked to seven bits: columns from 128 on are columns 0 to 127 again",
)
def fc2_row_coordinate_masked_to_seven_bits(call: MoeCall) -> Tensor:
    def again(rows: Rows, acc: Tensor) -> Tensor:
        return to_bf16(acc[:, torch.arange(acc.shape[1]) % 128])

    return layer(call, fc2=again)


@wrong(
    stage=("activation", "fc2"),
    says=(
        r"column|element|\bk\b|position|channel|lane",
        r"shift|roll|rotat|moved|off by|by 8|\+ ?8|- ?8|\b8 (col|el|pos)",
    ),
    story="ldmatrix starts 16 bytes late: GEMM2's input is read eight columns further, around its end",
)
def gemm2_operand_a_read_sixteen_bytes_late(call: MoeCall) -> Tensor:
    return layer(call, activation=lambda rows, a: to_bf16(a).roll(-8, dims=1))


@wrong(
    stage="fc1",
    says=(
        "scale",
        r"swap|exchang|pair|permut|neighbou?r|xor|\^ ?1|other group|each other|odd.*even|"
        r"even.*odd",
    ),
    story="a 16-bit load of two scale bytes is taken high byte first: K groups 2g and 2g + 1 exchange their scales",
)
def fc1_scale_pairs_high_byte_first(call: MoeCall) -> Tensor:
    scales = call.experts.fc1_scales
    assert scales is not None
    return layer(
        with_experts(call, fc1_scales=scales.unflatten(-1, (-1, 2)).flip(-1).flatten(-2).contiguous())
    )


@wrong(
    stage="finalize",
    says=(
        "weight|final.?scale|routing.?scale",
        r"revers|mirror|backward|flip|last slot|other slot|another slot|slots? .*(swap|permut|"
        r"\border)|k - 1|opposite",
    ),
    story="finalize reads the routing weights from the last slot to the first while the expert rows go forward",
)
def finalize_weights_read_backwards(call: MoeCall) -> Tensor:
    return layer(call, weights=lambda local, w: w.flip(1).contiguous())


@wrong(
    stage="input",
    says=(
        r"token|\brow",
        r"next|\+ ?1|shift|off.by.one|following|one (too|later|further)|neighbou?r|"
        r"another token|wrong token|other token",
    ),
    story="the gather of GEMM1's rows takes token t + 1, clamped to the last",
)
def gather_takes_the_token_after(call: MoeCall) -> Tensor:
    last = len(call.input) - 1
    return layer(call, x=lambda rows, x: call.input[(rows.token + 1).clamp(max=last)])


# --- drops and repeats


@wrong(
    stage="fc2",
    says=(
        r"\bk\b|group|k.?tile|tile|inner",
        r"last|\btail|\bends?\b|drop|missing|omit|skip|left out|without|lost|lacks?",
    ),
    story="the main loop goes two K tiles at a time; of an odd number (more than one) the last is never multiplied",
)
def fc2_odd_k_tile_lost_in_unrolled_loop(call: MoeCall) -> Tensor:
    def unrolled(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        tiles = x.shape[1] // 128
        if tiles > 1 and tiles % 2:
            x = x.clone()
            x[:, (tiles - 1) * 128 :] = 0
            packed = packed.clone()
            packed[:, (tiles - 1) * 64 :] = 0
        return right_gemm(x, packed, scales, tactic)

    return layer(call, gemm2=unrolled)


@wrong(
    stage="fc1",
    says=(
        r"\brow|column|tile|block",
        r"previous|before|repeat|stale|again|preceding|shift|cop(y|ies)|instead|twice|"
        r"are (those|rows|columns)",
    ),
    story="the epilogue's staging buffer is not waited for at every third 64-row tile: it stores the"
    " tile before again",
)
def fc1_every_third_tile_stores_the_one_before(call: MoeCall) -> Tensor:
    def staged(rows: Rows, acc: Tensor) -> Tensor:
        out = to_bf16(acc).clone()
        for tile in range(2, acc.shape[1] // 64, 3):
            out[:, tile * 64 : tile * 64 + 64] = to_bf16(acc[:, tile * 64 - 64 : tile * 64])
        return out

    return layer(call, fc1=staged)


# --- factors


@wrong(
    stage="finalize",
    says=(
        r"weight|factor|output|sum|scal",
        r"1 ?/ ?(k|top|2|3|4|8)|0\.\d+|divid|averag|\bmean\b|halve|by half|quarter|number of slots|"
        r"top.?k|2\^-",
    ),
    story="the weighted sum over the slots is divided by k: a mean",
)
def finalize_takes_the_mean_over_slots(call: MoeCall) -> Tensor:
    return layer(call, output=lambda sums: to_bf16(sums / call.token_final_scales.shape[1]))


@wrong(
    stage="fc1",
    says=(
        r"gate|second half|lower half|last half|rows? \d|half",
        r"2x|twice|doubl|times 2|2 times|x ?2\b|factor (of )?2|\+ ?1|2\^1|too high|2\.0|"
        r"1 higher",
    ),
    story="a rebias of the scale exponents adds one to the gate half of the fc1 scales only",
)
def fc1_gate_scales_one_exponent_high(call: MoeCall) -> Tensor:
    scales = call.experts.fc1_scales
    assert scales is not None
    changed = scales.clone()
    half = scales.shape[1] // 2
    gate = scales[:, half:].to(torch.int32)
    changed[:, half:] = torch.where((gate == 0) | (gate == 255), gate, gate + 1).to(torch.uint8)
    return layer(with_experts(call, fc1_scales=changed))


# --- substitutions


@wrong(
    stage="activation",
    says=(
        "limit|clamp",
        r"expert 0|first expert|another expert|other expert|one expert|expert.s|"
        r"same (limit )?for|every expert|all experts",
    ),
    story="the limit is read without the expert's offset: every expert has that of expert 0",
)
def limit_pointer_not_advanced_by_expert(call: MoeCall) -> Tensor:
    limit = call.experts.swiglu_limit
    if limit is None:
        return layer(call)
    return layer(with_experts(call, swiglu_limit=limit[:1].expand_as(limit).contiguous()))


@wrong(
    stage="finalize",
    says=("bias", r"slot|another expert|other expert|wrong expert|expert .*(is|are) (that|those)"),
    story="the fc2 bias is indexed by the slot's number instead of the slot's expert",
)
def finalize_bias_indexed_by_slot_number(call: MoeCall) -> Tensor:
    def by_number(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None:
            return finalize(by_slot, local, weights, bias)
        number = torch.arange(local.shape[1]) % len(bias)
        return finalize(by_slot, torch.where(local >= 0, number, local), weights, bias)

    return layer(call, finalize=by_number)


@wrong(
    stage="fc2",
    says=(
        "scale",
        r"127|\b1\.0\b|(are|of|by|as|is|=) 1\b|constant|not (loaded|applied|read|used)|missing|"
        r"ignor|without|unit|unscaled|never|left out|all the same|2\^0",
    ),
    story="the scale tensors of GEMM2 keep what they were made with, bytes of 127: never loaded",
)
def fc2_scales_kept_as_they_were_made(call: MoeCall) -> Tensor:
    scales = call.experts.fc2_scales
    assert scales is not None
    return layer(with_experts(call, fc2_scales=torch.full_like(scales, 127)))


# --- roundings


@wrong(
    stage="fc1",
    says=(
        r"fp16|float16|f16|half.?precision|(to|in|through) half|__half|e5m10|65504|10.bit|"
        r"11.bit",
    ),
    story="GEMM1's epilogue converts to fp16 before the bf16 that it stores",
)
def fc1_epilogue_goes_through_half(call: MoeCall) -> Tensor:
    return layer(call, fc1=lambda rows, acc: to_bf16(acc.to(torch.float16).float()))


@wrong(
    stage="activation",
    says=(
        r"\bties?\b|half.?way|half.?(up|away)|away from zero|0x8000|not to even|nearest.*(up|"
        r"away)|round.half",
    ),
    story="the activation is stored by (bits + 0x8000) >> 16: ties go away from zero",
)
def activation_stored_with_ties_away(call: MoeCall) -> Tensor:
    def away(rows: Rows, a: Tensor) -> Tensor:
        ordinary = torch.isfinite(a)
        rounded = ((_bits(a).to(torch.int64) + 0x8000) & 0xFFFF0000).to(torch.int64)
        rounded = torch.where(rounded >= 2**31, rounded - 2**32, rounded).to(torch.int32).view(torch.float32)
        return to_bf16(torch.where(ordinary, rounded, a))

    return layer(call, activation=away)


@wrong(
    stage="finalize",
    says=(
        r"tf32|10.bit|11.bit|13.bit|19.bit|weights?.*(round|trunc|\bcut|precision|bits)|(round|"
        r"trunc|\bcut|precision).*weights?",
    ),
    story="the weighted sum is written as a small product on tensor cores, to which the routing weights go as tf32",
)
def finalize_weights_as_tf32_operand(call: MoeCall) -> Tensor:
    def tf32(w: Tensor) -> Tensor:
        bits = _bits(w)
        rounded = (bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF
        return torch.where(torch.isfinite(w), rounded.view(torch.float32), w)

    return layer(call, weights=lambda local, w: tf32(w))


# --- orders of summation


@wrong(
    stage="finalize",
    says=(r"\border|tree|pair|associat|two halves|split|partial|butterfly|even.*odd",),
    story="the slots are summed as a tree: even slots first, odd slots apart, then both",
)
def finalize_even_and_odd_slots_apart(call: MoeCall) -> Tensor:
    def apart(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        even = finalize(by_slot[:, ::2], local[:, ::2], weights[:, ::2].contiguous(), bias)
        if local.shape[1] == 1:
            return even
        return even + finalize(by_slot[:, 1::2], local[:, 1::2], weights[:, 1::2].contiguous(), bias)

    return layer(call, finalize=apart)


@wrong(
    stage="fc2",
    says=(
        r"split.?k|\border|partial|slices? of k|k.*(apart|separate)|in (two|2) (parts|halves|"
        r"sums)|even.*odd|stream.?k|tree|associat|warp.?group",
    ),
    story="two warp groups take the even and the odd K tiles of GEMM2 and add their accumulators at the end",
)
def fc2_k_tiles_dealt_to_two_warp_groups(call: MoeCall) -> Tensor:
    def dealt(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        if x.shape[1] < 256 or x.shape[1] % 128:
            return right_gemm(x, packed, scales, tactic)
        sums = []
        for first in (0, 1):
            tiles = range(first, x.shape[1] // 128, 2)
            taken = torch.cat([x[:, t * 128 : t * 128 + 128] for t in tiles], 1)
            codes = torch.cat([packed[:, t * 64 : t * 64 + 64] for t in tiles], 1)
            theirs = torch.cat([scales[:, t * 4 : t * 4 + 4] for t in tiles], 1)
            sums.append(right_gemm(taken, codes, theirs, Tactic()))
        return sums[0] + sums[1]

    return layer(call, gemm2=dealt)


# --- formulas


@wrong(
    stage="activation",
    says=(
        r"clamp|limit|\bcap\b",
        r"product|after|output|result|\blate\b|at the end|both factors|instead of (the )?(inputs|"
        r"gate)|up.{0,4}\*",
    ),
    story="the limit clamps the product of both halves to [-L, L] instead of gate and up",
)
def swiglu_limit_on_the_product(call: MoeCall) -> Tensor:
    def late(fc1: Tensor, bias: Any, alpha: Any, beta: Any, limit: Any) -> Tensor:
        if limit is None:
            return swiglu(fc1, bias, alpha, beta, limit)
        out = swiglu(fc1, bias, alpha, beta, torch.full_like(limit, torch.inf))
        return torch.minimum(torch.maximum(out, -limit), limit)

    return layer(call, swiglu=late)


# --- memory


@wrong(
    stage="activation",
    says=(
        r"last|odd|\btail|final",
        r"\brow|token",
        r"zero|stale|not (written|computed)|unwritten|missing|uninit|drop|skip|lost|left out|"
        r"omit",
    ),
    story="the activation kernel handles two rows a block: the last row of an expert with an odd number stays zero",
)
def activation_of_the_last_odd_row_unwritten(call: MoeCall) -> Tensor:
    def paired(rows: Rows, a: Tensor) -> Tensor:
        out = to_bf16(a).clone()
        count = torch.bincount(rows.expert, minlength=call.experts.num_experts)[rows.expert]
        out[(rows.position == count - 1) & (count % 2 == 1) & (count > 1)] = 0
        return out

    return layer(call, activation=paired)


# --- two at once


@wrong(
    stage=("fc2", "finalize"),
    says=(
        r"scales?\b.*(expert|previous|before|shift|next|neighbou?r)|trunc|toward zero|"
        r"chop|\bcut",
    ),
    story="two at once: fc2 scales are those of the expert before, and the output is truncated to bf16",
)
def fc2_scales_of_expert_before_and_output_chopped(call: MoeCall) -> Tensor:
    scales = call.experts.fc2_scales
    assert scales is not None
    return layer(with_experts(call, fc2_scales=scales.roll(1, dims=0)), output=_truncated)


# --- what the list does not name


@wrong(
    stage="fc1",
    says=(
        "expert",
        r"\brow|tile|token|first",
        r"previous|before|lower|another|other|wrong|preceding|neighbou?r|are (those )?of",
    ),
    story="GEMM1 stores whole tiles of 16 rows without a predicate: the end of an expert's last"
    " tile, rows of the next"
    " experts times its weights, lands on theirs",
)
def whole_tile_store_lands_on_next_experts(call: MoeCall) -> Tensor:
    def overrun(rows: Rows) -> Tensor:
        whose = rows.expert.clone()
        for expert in sorted(rows.expert.unique().tolist(), reverse=True):
            mine = (rows.expert == expert).nonzero().flatten()
            start, count = int(mine[0]), len(mine)
            whose[start + count : start + (count + 15) // 16 * 16] = expert
        return whose

    return layer(call, expert1=overrun)


@wrong(
    stage=("activation", "fc2"),
    says=(
        r"column|chunk|\bk\b|element|input|operand|activation",
        r"swizzl|permut|xor|\border|swap|shuffl|scrambl|reorder|16 bytes|blocks? of 8|exchang",
    ),
    story="GEMM2's input is written to shared memory with the 128-byte swizzle and read with the 64-byte one",
)
def operand_a_read_with_the_64_byte_swizzle(call: MoeCall) -> Tensor:
    def swizzled(rows: Rows, a: Tensor) -> Tensor:
        a = to_bf16(a)
        row = (rows.position % 16)[:, None]
        column = torch.arange(a.shape[1])[None]
        chunk = (column // 8) % 8
        taken = chunk ^ (row % 8) ^ ((row // 2) % 4)
        return a.gather(1, (column - chunk * 8) + taken * 8)

    return layer(call, activation=swizzled)


@wrong(
    stage="fc1",
    says=(
        r"\bk\b|group|tile|column|hidden",
        r"earlier|previous|before|stale|repeat|again|first|modulo|wrap|instead|are (those|"
        r"that) of|\bold\b|shift|cop(y|ies)|256",
    ),
    story="the full barrier's phase bit is not flipped: from the third K tile on, the two-stage ring"
    " hands out the codes"
    " of two tiles before",
)
def full_barrier_phase_never_flips(call: MoeCall) -> Tensor:
    def ring(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        old = packed.clone()
        for tile in range(2, packed.shape[1] // 64):
            source = tile % 2
            old[:, tile * 64 : tile * 64 + 64] = packed[:, source * 64 : source * 64 + 64]
        return right_gemm(x, old, scales, tactic)

    return layer(call, gemm1=ring)


@wrong(
    stage=("fc2", "slots", "finalize"),
    says=(
        "expert",
        r"empty|idle|without (a )?(\brow|token)|after|zero|missing|skip|not (computed|visited|"
        r"run)|drop|left out|lost|never",
    ),
    story="the persistent scheduler's walk over problems steps twice at an empty one: the expert"
    " after it gets no GEMM2",
)
def problem_walk_steps_over_the_expert_after_an_empty_one(call: MoeCall) -> Tensor:
    def walked(rows: Rows, acc: Tensor) -> Tensor:
        count = torch.bincount(rows.expert, minlength=call.experts.num_experts)
        out, problem = to_bf16(acc).clone(), 0
        while problem < len(count):
            if count[problem] == 0:
                out[rows.expert == problem + 1] = 0
                problem += 1
            problem += 1
        return out

    return layer(call, fc2=walked)


@wrong(
    stage=("fc1", "input"),
    says=(
        r"\brow|token",
        r"last|\btail|beyond|remain|multiples? of (8|eight)|drop|missing|zero|not computed|"
        r"\brest\b|\bends?\b|lost|skip|% 8|modulo 8",
    ),
    story="the problem list rounds an expert's rows down to a multiple of 8 once it has more than 8:"
    " the rest stays zero",
)
def problem_rows_rounded_down_to_eight(call: MoeCall) -> Tensor:
    def short(rows: Rows, acc: Tensor) -> Tensor:
        count = torch.bincount(rows.expert, minlength=call.experts.num_experts)[rows.expert]
        out = to_bf16(acc).clone()
        out[(count > 8) & (rows.position >= count // 8 * 8)] = 0
        return out

    return layer(call, fc1=short)


@wrong(
    stage="finalize",
    says=(
        r"\brow|slot|expert output|fc2 output|token",
        r"256|modulo|wrap|overflow|8.?bit|byte|uint8|first rows|another row|other row|"
        r"wrong row|another token|other token",
    ),
    story="the map from slots to permuted rows is held in bytes: rows from 256 on are read as row - 256",
)
def unpermuted_row_kept_in_a_byte(call: MoeCall) -> Tensor:
    return layer(call, fc2=lambda rows, acc: to_bf16(acc)[torch.arange(len(acc)) % 256])


@wrong(
    stage="activation",
    says=(
        "alpha",
        r"bf16|16.?bit|half|halves|0\b|zero|garbage|type|pointer|other|another|wrong|constant|"
        r"replac|expert",
    ),
    story="the float32 vector of alphas is read through a bf16 pointer: halves of other experts' numbers",
)
def alpha_vector_read_through_a_bf16_pointer(call: MoeCall) -> Tensor:
    alpha = call.experts.swiglu_alpha
    if alpha is None:
        return layer(call)
    halves = alpha.float().contiguous().flatten().view(torch.bfloat16)[: alpha.numel()]
    return layer(with_experts(call, swiglu_alpha=halves.float().reshape(alpha.shape)))
