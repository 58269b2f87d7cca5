"""What a judge would bring that nobody named: TMA, swizzles, barriers, schedulers, engines, loaders."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref import MoeCall
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.tactics import Tactic
from tests.held_out_kernels.by_hand import Rows, layer, right_gemm, with_experts
from tests.held_out_kernels.definition import wrong


@wrong(
    stage=("finalize", "fc2"),
    says=(
        r"column|hidden|channel|\bH\b|rows of (the )?weights?|fc2 rows?",
        r"zero|unwritten|missing|not (written|stored|computed)|beyond|last|tail|drop|cut|\b256\b",
    ),
    story="the descriptor of the TMA store has the hidden size rounded down to 256, and stores beyond it are clipped",
)
def tma_store_clipped_at_256(call: MoeCall) -> Tensor:
    def output(sums: Tensor) -> Tensor:
        out = fp32.to_bf16(sums)
        if out.shape[1] > 256:
            out[:, out.shape[1] // 256 * 256 :] = 0
        return out

    return layer(call, output=output)


@wrong(
    stage=("input", "fc1"),
    says=(
        r"permut|swizzl|xor|shuffl|swap|exchang|moved|scrambl|reorder|out of order|mixed|rearrang|interleav",
        r"column|chunk|\bk\b|input|element|\b8\b|tokens?|16.?byte",
    ),
    story="TMA writes tokens with the 128-byte swizzle and the main loop reads them with that of 64 bytes",
)
def tokens_swizzled_128_read_as_64(call: MoeCall) -> Tensor:
    def x(rows: Rows, taken: Tensor) -> Tensor:
        chunks = taken.unflatten(1, (-1, 8, 8))  # of 16 bytes, eight to a line of 128
        line = rows.position
        index = torch.arange(8) ^ (line & 7)[:, None] ^ ((line >> 1) & 3)[:, None]
        return chunks.gather(2, index[:, None, :, None].expand(chunks.shape)).flatten(1)

    return layer(call, x=x)


@wrong(
    stage="fc1",
    says=(
        r"tile|group|\bk\b|block|stage",
        r"stale|again|repeat|twice|instead|pipeline|copy|missing|replac|those of|not (read|loaded|summed)|tile 0|"
        r"first (k.?)?(tile|group|128|four|4)|groups? 0",
    ),
    story="three stages: the consumer's phase does not flip at the first wrap, so K tile 3 is tile 0 once more",
)
def mbarrier_phase_not_flipped(call: MoeCall) -> Tensor:
    def gemm1(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        if x.shape[1] < 512:
            return right_gemm(x, packed, scales, tactic)
        seen = []
        for operand, width in ((x, 128), (packed, 64), (scales, 4)):
            operand = operand.clone()
            operand[:, 3 * width : 4 * width] = operand[:, :width]
            seen.append(operand)
        return right_gemm(*seen, tactic)

    return layer(call, gemm1=gemm1)


@wrong(
    stage="fc2",
    says=(
        r"tile|rows?\b|expert|last|beyond|column|wave|\b132\b",
        r"zero|missing|not (computed|written|stored)|unwritten|skip|drop|lost|left out|never",
    ),
    story="GEMM2's tile scheduler does not advance: 132 CTAs do one tile each, and what is beyond stays zero",
)
def persistent_ctas_do_one_wave(call: MoeCall) -> Tensor:
    def fc2(rows: Rows, acc: Tensor) -> Tensor:
        out = fp32.to_bf16(acc)
        key = rows.expert * (len(rows.expert) + 1) + rows.tile(16)
        across = acc.shape[1] // 64
        number = key.unique(return_inverse=True)[1][:, None] * across + torch.arange(acc.shape[1]) // 64
        out[number >= 132] = 0
        return out

    return layer(call, fc2=fc2)


@wrong(
    stage=("fc1", "fc2"),
    says=(
        r"expert",
        r"empty|without (rows|tokens)|compact|skip|among|non-?empty|unused|(?:another|other) expert|"
        r"wrong|shift|previous|"
        r"earlier|preceding|lower|no (rows|tokens)|before",
    ),
    story="experts without rows are left out of the problem sizes but not of the pointers to the weights",
)
def problem_sizes_compacted_pointers_not(call: MoeCall) -> Tensor:
    def among(rows: Rows) -> Tensor:
        return rows.expert.unique(return_inverse=True)[1]

    return layer(call, expert1=among, expert2=among)


@wrong(
    stage=("input", "fc2", "finalize"),
    says=(r"\b25[56]\b|uint8|8.bit|modulo|\bmod\b|wrap|overflow", r"row|token|position"),
    story="the position of a row among those of its expert is kept in a uint8 between permutation and its inverse",
)
def unpermute_positions_in_a_byte(call: MoeCall) -> Tensor:
    def fc2(rows: Rows, acc: Tensor) -> Tensor:
        here = torch.arange(len(rows.position))
        return fp32.to_bf16(acc)[here - rows.position // 256 * 256]

    return layer(call, fc2=fc2)


@wrong(
    stage=("activation", "fc1"),
    says=(r"fc1|gemm1|first|\bw13?\b|gate|\bup\b|activation", r"bias"),
    story="the engine casts the model to fp16 but for fc1's biases, whose bf16 bits are then read as fp16",
)
def w13_bias_bits_taken_for_half(call: MoeCall) -> Tensor:
    bias = call.experts.fc1_biases
    if bias is None:
        return layer(call)
    return layer(
        with_experts(call, fc1_biases=bias.contiguous().view(torch.float16).float().to(torch.bfloat16))
    )


@wrong(
    stage=("finalize", "slots"),
    says=(
        r"weight|final scale",
        r"(an)?other token|wrong token|other rows?|\b128\b|chunk|modulo|\bmod\b|wrap|repeat|first tokens|from token|"
        r"tokens? (from|beyond|before|earlier)|\d+ tokens",
    ),
    story="long batches run in chunks of 128 tokens, and the pointer to the routing weights is not advanced",
)
def chunks_share_the_first_weights(call: MoeCall) -> Tensor:
    def weights(local: Tensor, given: Tensor) -> Tensor:
        return given[torch.arange(len(given)) % 128]

    return layer(call, weights=weights)


@wrong(
    stage="fc2",
    says=(r"scale", r"transpos|permut|order|layout|stride|reshap|major|shuffl|scrambl|mixed|rearrang"),
    story="the loader keeps w2's scales K-major, as the checkpoint of another engine has them, under the usual shape",
)
def w2_scales_left_k_major(call: MoeCall) -> Tensor:
    scales = call.experts.fc2_scales
    assert scales is not None
    return layer(with_experts(call, fc2_scales=scales.transpose(1, 2).reshape(scales.shape)))


@wrong(
    stage="finalize",
    says=(
        r"bias",
        r"rank|\btp\b|tensor.?parallel|not (be )?(added|there)|twice|too (many|often)|should|although|extra",
    ),
    story="each tensor-parallel rank adds fc2's bias, so that the all-reduce has it tp_size times",
)
def down_bias_on_each_shard(call: MoeCall) -> Tensor:
    def summed(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        return finalize(by_slot, local, weights, call.experts.fc2_biases)

    return layer(call, finalize=summed)


@wrong(
    stage=("finalize", "slots", "input"),
    says=(
        r"token|\brows?\b|batch",
        r"last|tail|beyond|remain|zero|unwritten|not (written|computed)|missing|drop|left out|skip|final|from .* on",
    ),
    story="a CUDA graph is picked for the batch rounded down to 8: the last tokens keep the zeros of the buffer",
)
def graph_of_the_smaller_batch(call: MoeCall) -> Tensor:
    out = layer(call)
    tokens = call.num_tokens
    if tokens > 8:
        out[tokens - tokens % 8 :] = 0
    return out


@wrong(
    stage="none",
    says=("noise|chance|random|unknown|damag|scattered|without a pattern|rounding",),
    story="a card with a failing memory: one element in two hundred has one of its bits flipped, never the same ones",
)
def memory_flips_single_bits(call: MoeCall) -> Tensor:
    bits = layer(call).view(torch.int16)
    seed = int(bits.to(torch.int64).abs().sum()) + bits.numel()
    generator = torch.Generator().manual_seed(seed)
    hit = torch.rand(bits.shape, generator=generator) < 0.005
    place = torch.randint(0, 15, bits.shape, generator=generator)
    return torch.where(hit, bits ^ (1 << place).to(torch.int16), bits).view(torch.bfloat16)
