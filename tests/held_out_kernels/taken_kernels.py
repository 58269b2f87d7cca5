"""What happened in kernels: operands, tiles, pipelines, schedulers, roundings, sums."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward
from mxfp4ref.formats.mxfp4 import pack_codes, unpack_codes
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.fp32 import to_bf16
from mxfp4ref.sm90.swiglu import swiglu
from mxfp4ref.sm90.tactics import Tactic

from .by_hand import Rows, layer, right_gemm, with_experts
from .definition import wrong


def _is_gated(call: MoeCall) -> bool:
    return call.experts.fc1_weights.shape[1] == 4 * call.experts.fc2_weights.shape[2]


@wrong(
    stage="fc1",
    says=("scale", "swap|exchang|pair|xor|neighbou?r|partner|permut|another expert|other expert|of expert"),
    story="two experts' scales go through one buffer, ping and pong, and come out the wrong way round",
)
def ping_pong_of_fc1_scales(call: MoeCall) -> Tensor:
    assert call.experts.fc1_scales is not None
    experts = torch.arange(call.experts.num_experts)
    other = experts ^ 1
    other = torch.where(other < len(experts), other, experts)
    return forward(with_experts(call, fc1_scales=call.experts.fc1_scales[other]))


@wrong(
    stage="fc1",
    says=("row|column", "16|block|swap|exchang|permut|shuffl"),
    story="ldmatrix.x4 takes its 16-row blocks of the packed weights in the order 1, 0, 3, 2; the scales are right",
)
def ldmatrix_blocks_the_other_way(call: MoeCall) -> Tensor:
    w = call.experts.fc1_weights
    e, n, k = w.shape
    swapped = w.reshape(e, n // 32, 2, 16, k).flip(2).reshape(e, n, k).contiguous()
    return forward(with_experts(call, fc1_weights=swapped))


@wrong(
    stage="fc2",
    says=(
        r"row|column|output|tile|block",
        r"128|modulo|repeat|\bwrap",
    ),
    story="the N coordinate of the TMA load is 0 for every tile, so columns from 128 on repeat the first 128",
)
def n_coordinate_of_tma_is_zero(call: MoeCall) -> Tensor:
    experts = call.experts
    assert experts.fc2_scales is not None
    rows = torch.arange(experts.hidden_size) % 128
    return forward(
        with_experts(call, fc2_weights=experts.fc2_weights[:, rows], fc2_scales=experts.fc2_scales[:, rows])
    )


@wrong(
    stage="fc2",
    says=(
        r"scale",
        r"group|64|\bK\b",
        (
            r"\beven\b|\bodd\b|pair|every (2|second|other)|64|share|same|previous|before|preceding|"
            r"repeat|two groups|another group|other group"
        ),
    ),
    story="the scale of a k64 step is loaded once, so every odd group is scaled by the even group before it",
)
def one_scale_for_each_k64(call: MoeCall) -> Tensor:
    scales = call.experts.fc2_scales
    assert scales is not None
    group = torch.arange(scales.shape[-1]) & ~1
    return forward(with_experts(call, fc2_scales=scales[..., group]))


@wrong(
    stage="input",
    says=(
        r"input|token|\bx\b",
        r"other|another|wrong token|order|permut|gather|sort|shuffl|of token|mapping|exchang|swap",
    ),
    story="the gather of A divides the sorted row by k instead of looking up where the row came from",
)
def gather_divides_the_sorted_row(call: MoeCall) -> Tensor:
    k = call.token_selected_experts.shape[1]
    return layer(call, x=lambda rows, x: call.input[torch.arange(len(x)) // k])


@wrong(
    stage="fc1",
    says=(
        r"\bK\b|group|hidden|column",
        r"last|tail|missing|drop|left out|beyond|256|truncat|\bend\b|\brest\b|not (added|summed|read)",
    ),
    story="K is unrolled by 256 without an epilogue: what is left beyond the last whole 256 is not added",
)
def unrolled_by_256_without_rest(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        k = x.shape[-1]
        whole = k // 256 * 256 if k > 256 else k
        return right_gemm(x[:, :whole], packed[:, : whole // 2], scales[:, : whole // 32], tactic)

    return layer(call, gemm1=gemm)


@wrong(
    stage="fc1",
    says=(
        r"gate|\bw1\b|second half",
        (
            r"0\.5|2\^-1|2\*\*-1|1/2|halved|half (as|of what|the|their)|one too (low|small)|"
            r"exponent|factor|too small|divided by (2|two)|power of two"
        ),
    ),
    story="a special case of the conversion for the gate's rows subtracts the exponent's bias once too often",
)
def gate_exponents_one_too_low(call: MoeCall) -> Tensor:
    scales = call.experts.fc1_scales
    assert scales is not None
    if not _is_gated(call):
        return forward(call)
    lower = torch.where((scales > 1) & (scales < 255), scales - 1, scales)
    up = scales.shape[1] // 2
    return forward(with_experts(call, fc1_scales=torch.cat([scales[:, :up], lower[:, up:]], dim=1)))


@wrong(
    stage="activation",
    says=(
        "limit|clamp",
        "expert 0|first|another|other|one expert|same|single|scalar|all experts|every expert",
    ),
    story="the epilogue reads swiglu_limit[0] for every expert, as if it were a scalar",
)
def limit_pointer_as_a_scalar(call: MoeCall) -> Tensor:
    limit = call.experts.swiglu_limit
    if limit is None:
        return forward(call)
    return forward(with_experts(call, swiglu_limit=limit[:1].expand(len(limit)).contiguous()))


@wrong(
    stage=("finalize", "fc2"),
    says=(
        r"bias",
        r"slot|loop|position in the top",
    ),
    story="finalize takes the row of fc2's bias by the loop's counter, the slot, not by the expert in it",
)
def loop_counter_takes_the_bias(call: MoeCall) -> Tensor:
    def by_counter(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None:
            return finalize(by_slot, local, weights, None)
        taken = bias[torch.arange(local.shape[1]) % len(bias)]
        return finalize(by_slot.float() + taken.float(), local, weights, None)

    return layer(call, finalize=by_counter)


@wrong(
    stage="activation",
    says=(r"fp16|(?<!b)float16|half.?precision|binary16|65,?504|\bf16",),
    story="the activation is packed with cvt.rn.f16x2 into the staging buffer and widened to bf16 on the way out",
)
def staged_as_f16x2(call: MoeCall) -> Tensor:
    return layer(call, activation=lambda rows, a: to_bf16(a.to(torch.float16).float()))


@wrong(
    stage="finalize",
    says=(r"trunc|towards? zero|\brz\b|\bchop|\bcut|round(ed|ing)? down|upper (16|half)",),
    story="the output is packed with prmt, the upper halves of two floats, which cuts instead of rounding",
)
def output_packed_with_prmt(call: MoeCall) -> Tensor:
    def cut(sums: Tensor) -> Tensor:
        return (sums.contiguous().view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)

    return layer(call, output=cut)


@wrong(
    stage="finalize",
    says=(
        "bf16|bfloat16|round",
        "term|product|each|per.slot|slot|weighted|contribution|addend|summand|before",
    ),
    story="each weighted row goes back to memory in bf16, and a second kernel adds these in float32",
)
def weighted_rows_written_in_bf16(call: MoeCall) -> Tensor:
    def twice(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        total = torch.zeros(len(by_slot), by_slot.shape[-1])
        for slot in range(local.shape[1]):
            one = slice(slot, slot + 1)
            term = to_bf16(finalize(by_slot[:, one], local[:, one], weights[:, one], bias)).float()
            total = torch.where((local[:, one] >= 0), total + term, total)
        return total

    return layer(call, finalize=twice)


@wrong(
    stage="fc2",
    says=(
        (
            r"split|stream.?k|partial|separate|(two|2) (parts|halves|pieces|chunks|ranges|sums|"
            r"accumul)|halves of K|(other|another|different) order|order of (the )?(sum|add)"
        ),
    ),
    story="stream-K: one CTA sums the first half of GEMM2's K tiles, another the rest, then both are added",
)
def stream_k_in_two(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        tile = tactic.tile[2]
        tiles = x.shape[-1] // tile
        if tiles < 2:
            return right_gemm(x, packed, scales, tactic)
        cut = (tiles + 1) // 2 * tile
        first = right_gemm(x[:, :cut], packed[:, : cut // 2], scales[:, : cut // 32], tactic)
        return first + right_gemm(x[:, cut:], packed[:, cut // 2 :], scales[:, cut // 32 :], tactic)

    return layer(call, gemm2=gemm)


@wrong(
    stage="finalize",
    says=(
        r"order|sorted|sequence|ascending|by expert",
        r"expert|ascending|\bids?\b",
    ),
    story="the rows are summed as they lie in the permuted buffer, by expert, not by slot",
)
def summed_as_the_rows_lie(call: MoeCall) -> Tensor:
    def by_expert(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        order = local.argsort(dim=1, stable=True)
        rows = by_slot.gather(1, order[..., None].expand_as(by_slot))
        return finalize(rows, local.gather(1, order), weights.gather(1, order), bias)

    return layer(call, finalize=by_expert)


@wrong(
    stage="activation",
    says=(
        r"beta|\bup\b",
        r"clamp|limit",
        r"before|after|order|first|then|includ|sum|\+ ?beta",
    ),
    story="beta is added in the prologue with the bias, so the limit clamps up + beta",
)
def beta_in_the_prologue(call: MoeCall) -> Tensor:
    def early(
        fc1: Tensor, bias: Tensor | None, alpha: Tensor | None, beta: Tensor | None, limit: Tensor | None
    ) -> Tensor:
        if beta is None:
            return swiglu(fc1, bias, alpha, beta, limit)
        h = fc1.float() if bias is None else fc1.float() + bias.float()
        inner = h.shape[-1] // 2
        h = torch.cat([h[..., :inner] + beta, h[..., inner:]], dim=-1)
        return swiglu(h, None, alpha, torch.zeros_like(beta), limit)

    return layer(call, swiglu=early)


@wrong(
    stage=("slots", "finalize"),
    says=(
        (
            r"-1|pad|skip|foreign|mask|invalid|no expert|without|other rank|not local|empty|"
            r"sentinel|unused|absent|not (its|this|of)"
        ),
        r"row|expert|comput|added|count|not skipped|stale|contribut|summed",
    ),
    story="the inverse map of a slot without an expert is left at 0, so the first row of the buffer is added for it",
)
def inverse_map_of_nothing_is_zero(call: MoeCall) -> Tensor:
    seen: dict[str, Tensor] = {}

    def keep(rows: Rows, acc: Tensor) -> Tensor:
        fc2 = to_bf16(acc)
        if len(fc2):
            seen["row"], seen["expert"] = fc2[0], rows.expert[0]
        return fc2

    def aliased(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        if seen:
            none = local < 0
            by_slot = torch.where(none[..., None], seen["row"], by_slot)
            local = torch.where(none, seen["expert"], local)
        return finalize(by_slot, local, weights, bias)

    return layer(call, fc2=keep, finalize=aliased)


@wrong(
    stage="fc2",
    says=(
        r"row|token|tile|position",
        r"expert",
        (
            r"previous|another|other|before|lower|neighbou?r|preceding|overwrit|first (row|token)|"
            r"boundar|(those|weights|that) of expert|expert \d+'s|\b16\b"
        ),
    ),
    story="the last tile of 16 rows is stored unpredicated: the next expert's first rows hold this expert's product",
)
def tile_stored_over_the_next_expert(call: MoeCall) -> Tensor:
    def whose(rows: Rows) -> Tensor:
        result = rows.expert.clone()
        for expert in reversed(rows.expert.unique().tolist()):
            mine = (rows.expert == expert).nonzero().flatten()
            end = int(mine[-1]) + 1
            padded = int(mine[0]) + -(-len(mine) // 16) * 16
            result[end:padded] = expert
        return result

    return layer(call, expert2=whose)


@wrong(
    stage="fc1",
    says=(
        r"weight|code|fc1|GEMM ?1",
        (
            r"swizzl|permut|xor|chunk|16.byte|shuffl|swap|exchang|(other|another|wrong) group|"
            r"groups? .*(moved|mixed)|interleav"
        ),
    ),
    story="weights are stored to shared memory with a 64-byte swizzle and read without it",
)
def swizzle_64b_on_one_side(call: MoeCall) -> Tensor:
    w = call.experts.fc1_weights
    e, n, k = w.shape
    chunks = w.reshape(e, n, k // 64, 4, 16)
    place = torch.arange(4)[None] ^ ((torch.arange(n)[:, None] >> 1) & 3)
    index = place[None, :, None, :, None].expand_as(chunks)
    return forward(with_experts(call, fc1_weights=chunks.gather(3, index).reshape(e, n, k).contiguous()))


@wrong(
    stage="fc1",
    says=(
        r"scale",
        r"group|tile|128|\bK\b",
        (
            r"next|following|shift|ahead|later|too (far|early|late|high)|\+ ?4|4 (groups )?(on|"
            r"further)|one tile"
        ),
    ),
    story="the scales' buffer has no empty barrier: the producer has put the next K tile's there when they are read",
)
def scales_of_the_tile_in_flight(call: MoeCall) -> Tensor:
    scales = call.experts.fc1_scales
    assert scales is not None
    groups = scales.shape[-1]
    later = torch.arange(groups) + 4
    later = torch.where(later < groups, later, later - 4)
    return forward(with_experts(call, fc1_scales=scales[..., later]))


@wrong(
    stage="fc1",
    says=(
        r"row|tile|expert|column|token",
        r"132|missing|zero|beyond|not computed|drop|skip|never|unwritten|left out|not written",
        r"tile|after|beyond|from|\blast\b|later|\b\d{2,}",
    ),
    story="the persistent loop never advances: 132 CTAs compute a tile (16 x 64) each, the rest stay zero",
)
def one_wave_of_132(call: MoeCall) -> Tensor:
    def first_wave(rows: Rows, acc: Tensor) -> Tensor:
        fc1 = to_bf16(acc)
        if not len(fc1):
            return fc1
        columns = -(-fc1.shape[1] // 64)
        counts = torch.bincount(rows.expert, minlength=call.experts.num_experts)
        tiles = (counts + 15) // 16
        base = torch.cumsum(tiles, 0) - tiles
        tile = (base[rows.expert] + rows.tile(16))[:, None] * columns + torch.arange(fc1.shape[1]) // 64
        return torch.where(tile < 132, fc1, torch.zeros_like(fc1))

    return layer(call, fc1=first_wave)


@wrong(
    stage="fc1",
    says=(
        r"expert",
        (
            r"empty|without (rows|tokens)|no (rows|tokens)|compact|(?:another|other) expert|lower|skip|"
            r"previous|earlier|dense|consecutive|(those|weights|that) of expert|expert \d+'s"
        ),
    ),
    story="GEMM1's problem list leaves out empty experts, but takes the weights' pointers by the place in it",
)
def pointers_by_place_in_the_list(call: MoeCall) -> Tensor:
    return layer(call, expert1=lambda rows: torch.unique(rows.expert, return_inverse=True)[1])


@wrong(
    stage="input",
    says=(
        r"row|token|input",
        (
            r"\b40\d\d\b|\b410\d\b|65,?53[56]|16.?bit|overflow|\bwrap|modulo|repeat|another token|"
            r"other token|of token|4,096|begin again"
        ),
    ),
    story="the gather's offset, in vectors of 8, is kept in 16 bits and begins again after 65536",
)
def vector_offset_in_16_bits(call: MoeCall) -> Tensor:
    vectors = call.input.shape[1] // 8

    def wrapped(rows: Rows, x: Tensor) -> Tensor:
        offset = (rows.token[:, None] * vectors + torch.arange(vectors)) & 0xFFFF
        return call.input.reshape(-1, 8)[offset].reshape(x.shape)

    return layer(call, x=wrapped)


@wrong(
    stage=("fc1", "fc2"),
    says=(
        r"code|value|magnitude|nibble|weight|E2M1|fp4",
        r"\b6(\.0)?\b|\bcodes? 7|\b0x[7f]\b|largest|satur|maxim",
    ),
    story="the conversion's table was typed with 4, 4 at its end: codes of 6 are 4, in both GEMMs",
)
def table_ends_with_4_twice(call: MoeCall) -> Tensor:
    def typed(packed: Tensor) -> Tensor:
        codes = unpack_codes(packed)
        return pack_codes(torch.where((codes & 7) == 7, codes - 1, codes))

    experts = call.experts
    return forward(
        with_experts(call, fc1_weights=typed(experts.fc1_weights), fc2_weights=typed(experts.fc2_weights))
    )


@wrong(
    stage="none",
    says=("noise|chance|random|unknown|damag|scattered|without a pattern|rounding",),
    story="a race in the epilogue: here and there an element is another one's",
)
def epilogue_that_races(call: MoeCall) -> Tensor:
    right = forward(call)
    generator = torch.Generator().manual_seed(right.numel() + int(call.token_selected_experts.sum()))
    flat = right.flatten().clone()
    count = max(1, flat.numel() // 200)
    where = torch.randint(flat.numel(), (count,), generator=generator)
    other = torch.randint(flat.numel(), (count,), generator=generator)
    flat[where] = right.flatten()[other]
    return flat.reshape(right.shape)


@wrong(
    stage=("fc1", "activation"),
    says=("gate|\\bup\\b|halves", "limit|clamp"),
    story="for layers with a limit the epilogue falls back to a stock SiluAndMul: gate first, then up, and no limit",
)
def stock_silu_and_mul(call: MoeCall) -> Tensor:
    experts = call.experts
    if not _is_gated(call) or call.activation_type != 3 or experts.swiglu_limit is None:
        return forward(call)
    half = experts.fc1_weights.shape[1] // 2
    rows = {
        name: tensor.roll(half, dims=1)
        for name in ("fc1_weights", "fc1_scales", "fc1_biases")
        if (tensor := getattr(experts, name)) is not None
    }
    return forward(with_experts(call, **rows, swiglu_limit=None))
