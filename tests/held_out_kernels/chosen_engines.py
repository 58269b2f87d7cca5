"""A judge's sample of what lies around the arithmetic: TMA, swizzles, barriers, problem lists, engines, loaders."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref import MoeCall
from mxfp4ref.formats.mxfp4 import pack_codes, unpack_codes
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.fp32 import mul, to_bf16
from mxfp4ref.sm90.swiglu import swiglu
from mxfp4ref.sm90.tactics import Tactic

from .by_hand import Rows, layer, right_gemm
from .definition import wrong


@wrong(
    stage="fc2",
    says=(
        r"row|tile|token|first",
        r"previous expert|expert before|another expert|other expert|wrong expert|neighbou?r|preceding|overwrit"
        r"|overlap|expert \d+'s|of expert \d+ .*expert \d",
    ),
    story="GEMM2's TMA store writes whole tiles of 16 rows: the last tile of an expert overwrites the next rows",
)
def full_tile_store_runs_into_the_next_expert(call: MoeCall) -> Tensor:
    def whose(rows: Rows) -> Tensor:
        owner = rows.expert.clone()
        present, count = rows.expert.unique(return_counts=True)
        for before, n, expert in zip(
            present[:-1].tolist(), count.tolist(), present[1:].tolist(), strict=False
        ):
            over = -n % 16
            owner[(rows.expert == expert) & (rows.position < over)] = before
        return owner

    return layer(call, expert2=whose)


@wrong(
    stage=("activation", "fc2"),
    says=(
        r"\bK\b|column|element|chunk|channel|activation|input of (?:GEMM ?2|fc2)|GEMM ?2|fc2",
        r"permut|swizzl|xor|shuffl|chunk|scrambl|misplaced",
    ),
    story="the activation is stored to shared memory under the 128-byte swizzle and read by GEMM2 without it",
)
def activation_tile_read_unswizzled(call: MoeCall) -> Tensor:
    def activation(rows: Rows, activated: Tensor) -> Tensor:
        chunks = to_bf16(activated).unflatten(-1, (-1, 8, 8))
        index = torch.arange(8) ^ (rows.position % 8)[:, None]
        index = index[:, None, :, None].expand_as(chunks)
        return chunks.gather(2, index).flatten(-3)

    return layer(call, activation=activation)


@wrong(
    stage=("fc1", "input"),
    says=(
        r"\bK\b|tile|group|column",
        r"stale|earlier|previous|repeat|same as|again|another|\bold\b|before|those of|instead of|overwr",
    ),
    story="the consumer does not wait for the last K tile of GEMM1: its stage still holds x of two tiles before",
)
def last_stage_read_before_its_barrier(call: MoeCall) -> Tensor:
    def x(rows: Rows, given: Tensor) -> Tensor:
        tiles = given.shape[1] // 128
        if tiles < 3:
            return given
        given = given.clone()
        given[:, (tiles - 1) * 128 : tiles * 128] = given[:, (tiles - 3) * 128 : (tiles - 2) * 128]
        return given

    return layer(call, x=x)


@wrong(
    stage=("slots", "fc1", "fc2"),
    says=(r"expert", r"256|modul|\bmod\b|wrap|8.?bit|uint8|overflow"),
    story="the scheduler keeps a tile's group in 8 bits: experts from 256 on are multiplied with those of e - 256",
)
def group_index_of_a_byte(call: MoeCall) -> Tensor:
    return layer(call, expert1=lambda rows: rows.expert % 256, expert2=lambda rows: rows.expert % 256)


@wrong(
    stage="fc1",
    says=(
        r"expert",
        r"empty|without (?:rows|tokens)|compact|no tokens|no rows|unused|active|another expert|other expert"
        r"|wrong expert|previous|expert \d+'s|of expert \d+ .*expert \d",
    ),
    story="GEMM1's problem list leaves out empty experts, its pointers do not: the i-th takes expert i's weights",
)
def pointers_of_the_uncompacted_list(call: MoeCall) -> Tensor:
    return layer(call, expert1=lambda rows: torch.searchsorted(rows.expert.unique(), rows.expert))


@wrong(
    stage=("finalize", "routing"),
    says=(
        r"weight|scale",
        r"reinterpret|\bview|read as|taken as|dtype|wrong type|\btype|halves|bit pattern|as if"
        r"|garbage|\bas (?:bf16|bfloat16)",
    ),
    story="the float32 routing weights are handed to a kernel that reads the buffer as bf16",
)
def weight_buffer_read_as_bf16(call: MoeCall) -> Tensor:
    def weights(local: Tensor, given: Tensor) -> Tensor:
        if call.unscaled:
            return given
        halves = given.contiguous().view(torch.bfloat16).flatten()
        return halves[: given.numel()].view(given.shape).float()

    return layer(call, weights=weights)


@wrong(
    stage="finalize",
    says=(
        r"weight|scale",
        r"512|first tokens|other token|another token|modul|\bmod\b|chunk|wrong token|tokens? from",
    ),
    story="chunks of 512 tokens, and the routing weights are not advanced: token 512 + i has those of token i",
)
def second_chunk_with_weights_of_the_first(call: MoeCall) -> Tensor:
    return layer(call, weights=lambda local, given: given[torch.arange(len(given)) % 512])


@wrong(
    stage="fc2",
    says=(
        r"nibble|code|element|pack|weight|\bK\b|word|column",
        r"AWQ|(?:8|eight|word|32.?bit).*(?:order|permut|shuffl|interleav)"
        r"|(?:order|permut|shuffl|interleav).*(?:8|eight|word|32.?bit)|0,? ?2,? ?4,? ?6",
    ),
    story="W2 was packed by an AWQ tool: the eight codes of a 32-bit word lie in the order 0 2 4 6 1 3 5 7",
)
def words_of_w2_in_awq_order(call: MoeCall) -> Tensor:
    def gemm2(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        codes = unpack_codes(packed).unflatten(-1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]]
        return right_gemm(x, pack_codes(codes.flatten(-2).contiguous()), scales, tactic)

    return layer(call, gemm2=gemm2)


@wrong(
    stage="finalize",
    says=(
        r"bias",
        r"missing|ignor|drop|left out|not added|without|lost|never|no fc2|only (?:on|where|for) .*rank|zero",
    ),
    story="fc2 biases are added where ep_rank is 0, mistaken for tp_rank: the other expert ranks leave theirs out",
)
def bias_only_on_expert_rank_0(call: MoeCall) -> Tensor:
    def last(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        return finalize(by_slot, local, weights, bias if call.ep_rank == 0 else None)

    return layer(call, finalize=last)


@wrong(
    stage="input",
    says=(
        r"input|hidden|\bx\b|GEMM ?1's (?:A|operand)",
        r"fp8|e4m3|8.?bit|quanti[sz]|[34] (?:mantissa |significant |fraction )?bits",
    ),
    story="the all-to-all dispatches hidden states as FP8 with a scale per 128: GEMM1 gets them dequantised to bf16",
)
def dispatched_as_fp8_by_128(call: MoeCall) -> Tensor:
    def x(rows: Rows, given: Tensor) -> Tensor:
        blocks = given.float().unflatten(-1, (-1, 128))
        amax = blocks.abs().amax(dim=-1, keepdim=True)
        step = torch.where((amax > 0) & amax.isfinite(), amax / 448, torch.ones_like(amax))
        codes = (blocks / step).to(torch.float8_e4m3fn)
        return to_bf16(codes.float() * step).flatten(-2)

    return layer(call, x=x)


@wrong(
    stage="activation",
    says=(
        r"sigmoid|silu|swish|gate|activation",
        r"tanh|approx|cancel|formula|fast|variant|inaccura",
    ),
    story="the plain SwiGLU's sigmoid is 0.5 * tanh(0.5 * gate) + 0.5 in float32, which cancels for negative gates",
)
def sigmoid_by_way_of_tanh(call: MoeCall) -> Tensor:
    def activated(
        fc1: Tensor, bias: Tensor | None, alpha: Tensor | None, beta: Tensor | None, limit: Tensor | None
    ) -> Tensor:
        if any(p is not None for p in (bias, alpha, beta, limit)):
            return swiglu(fc1, bias, alpha, beta, limit)
        up, gate = fc1.float().chunk(2, dim=-1)
        sigmoid = 0.5 * torch.tanh(0.5 * gate) + 0.5
        return mul(up, mul(gate, sigmoid))

    return layer(call, swiglu=activated)


@wrong(
    stage="finalize",
    says=(r"inf|overflow", r"satur|finite|max|clamp|3\.39|largest|cap"),
    story="the output is converted with cvt.satfinite: what should be infinite is the largest bf16 number",
)
def output_saturates_instead_of_infinity(call: MoeCall) -> Tensor:
    def output(sums: Tensor) -> Tensor:
        rounded = to_bf16(sums)
        largest = torch.finfo(torch.bfloat16).max
        return torch.where(
            rounded.isinf(), torch.copysign(torch.full_like(rounded, largest), rounded), rounded
        )

    return layer(call, output=output)
