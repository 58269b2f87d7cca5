"""What goes wrong around the arithmetic: copies, schedulers, loaders, engines and ranks."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward
from mxfp4ref.sm90.fp32 import to_bf16, to_fp16, widen
from mxfp4ref.sm90.tactics import Tactic
from tests.held_out_kernels.by_hand import Rows, layer, local_experts, right_gemm, with_experts
from tests.held_out_kernels.definition import wrong

GEMM1 = r"GEMM ?1|\bfc1\b|first GEMM|\bw13\b|up and gate|gate and up"
GEMM2 = r"GEMM ?2|\bfc2\b|second GEMM|\bw2\b|down.?proj"


@wrong(
    stage=("fc1", "input"),
    says=(
        r"\brows?\b|token|input",
        r"zero|miss|empty|drop|never|not (read|loaded|computed)|lost|skip|left out|absent",
        r"64|beyond|last|after|from|tail|later|\bexperts? \d|end",
    ),
    story="the TMA descriptor of the gathered rows was made at warm-up for 64 of them; beyond, the "
    "copy fills in zeros",
)
def tma_descriptor_of_the_warm_up(call: MoeCall) -> Tensor:
    def x(rows: Rows, taken: Tensor) -> Tensor:
        filled = taken.clone()
        filled[64:] = 0
        return filled

    return layer(call, x=x)


@wrong(
    stage=("activation", "fc2"),
    says=(
        r"GEMM ?2|\bfc2\b|\bK\b|column|activation",
        r"permut|swizz|swap|xor|shuffl|exchang|trad|order|\bmap|moved|mix",
        r"\b8\b|eight|chunk|block|16.?byte|64|\brows?\b",
    ),
    story="GEMM2 reads its odd 64-wide K blocks as if they were not swizzled: 16-byte chunk c is c ^ (row mod 8)",
)
def swizzle_forgotten_in_odd_k_blocks(call: MoeCall) -> Tensor:
    def activation(rows: Rows, activated: Tensor) -> Tensor:
        a = to_bf16(activated)
        chunks = torch.arange(a.shape[1] // 8)[None]
        phase = (rows.position & 7)[:, None]
        source = torch.where((chunks // 8) % 2 == 1, chunks ^ phase, chunks)
        source = torch.where(source < chunks.shape[1], source, chunks)
        return (
            a.view(len(a), a.shape[1] // 8, 8).gather(1, source[..., None].expand(-1, -1, 8)).reshape(a.shape)
        )

    return layer(call, activation=activation)


@wrong(
    stage=("fc1", "input"),
    says=(
        r"GEMM ?1|\bfc1\b|first GEMM|input|hidden",
        r"\bK\b|tile|group|column|block|128",
        r"stale|earlier|previous|modulo|\bmod\b|wrap|first|repeat|256|reus|of (K )?(tile|group|column)",
    ),
    story="two pipeline stages, and the parity of the full barrier never flips: from the third K "
    "tile on x is what was "
    "there two tiles before",
)
def full_barrier_parity_never_flips(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        tile = torch.arange(x.shape[1]) // 128
        source = torch.arange(x.shape[1]) - 256 * (tile >= 2)
        return right_gemm(x[:, source].contiguous(), packed, scales, tactic)

    return layer(call, gemm1=gemm)


@wrong(
    stage="fc1",
    says=(
        GEMM1,
        r"expert",
        r"empty|previous|before|preced|no rows|another|other|wrong|neighbou?r|- ?1|shift",
    ),
    story="the scheduler steps over an expert without rows, but not its pointers: the next one has "
    "the empty one's w13",
)
def pointers_stay_at_the_empty_expert(call: MoeCall) -> Tensor:
    local = local_experts(call)
    count = call.experts.num_experts
    used = torch.bincount(local[local >= 0], minlength=count) > 0
    source = torch.arange(count)
    source[1:] -= (~used[:-1]).long()
    return layer(call, expert1=lambda rows: source[rows.expert])


@wrong(
    stage="slots",
    says=(r"expert|\bids?\b", r"256|255|modulo|\bmod\b|wrap|uint8|8.?bit|byte"),
    story="the sort keeps expert ids as uint8: expert 256 becomes expert 0",
)
def expert_sort_keys_of_eight_bits(call: MoeCall) -> Tensor:
    return layer(call, local=lambda local: torch.where(local >= 0, local & 255, local))


@wrong(
    stage=("finalize", "fc2"),
    says=(
        r"bias",
        r"fp16|float16|\bf16\b|half.?precision|reinterpret|dtype|bit pattern|other format|\bbits of\b",
    ),
    story="the loader converted the fc2 bias to float16 and the kernel reads these bits as bf16",
)
def down_bias_bits_are_half_precision(call: MoeCall) -> Tensor:
    bias = call.experts.fc2_biases
    if bias is None:
        return forward(call)
    return forward(with_experts(call, fc2_biases=to_fp16(widen(bias)).view(torch.bfloat16)))


@wrong(
    stage="finalize",
    says=(
        r"weight|scale",
        r"token|\brows?\b",
        r"\b8\b|eight|modulo|\bmod\b|repeat|stale|earlier|previous|shift|wrap",
    ),
    story="a CUDA graph was captured for eight tokens, and its buffer of routing weights is read modulo its size",
)
def graph_buffer_of_eight_weights(call: MoeCall) -> Tensor:
    index = torch.arange(call.num_tokens) % 8
    return forward(replace(call, token_final_scales=call.token_final_scales[index].contiguous()))


@wrong(
    stage="fc1",
    says=(
        GEMM1,
        r"scale",
        r"interleav|alternat|up and gate|gate and up|permut|strid|\border\b|even.*odd",
    ),
    story="the loader de-interleaves gate and up of gpt-oss's codes, and forgets the scales",
)
def loader_leaves_scales_interleaved(call: MoeCall) -> Tensor:
    scales = call.experts.fc1_scales
    if not call.experts.gated or scales is None:
        return forward(call)
    up, gate = scales.chunk(2, dim=1)
    return forward(with_experts(call, fc1_scales=torch.stack([up, gate], dim=2).flatten(1, 2)))


@wrong(
    stage=("finalize", "fc2"),
    says=(r"bias", r"rank|\btp\b|tensor.?parallel|all.?reduce"),
    story="every tensor-parallel rank adds the fc2 bias, and the all-reduce counts it as often",
)
def down_bias_of_every_tensor_rank(call: MoeCall) -> Tensor:
    return forward(replace(call, tp_rank=0))


@wrong(
    stage="fc2",
    says=(
        GEMM2,
        r"64|half|halves|block",
        r"\brows?\b|column|weight",
        r"other|previous|repeat|same|of (rows|columns)|another|modulo|shift",
    ),
    story="the multicast mask is wrong: the cluster's second CTA has the codes of the first one's 64 rows of w2",
)
def multicast_gives_both_ctas_one_half(call: MoeCall) -> Tensor:
    rows = torch.arange(call.experts.hidden_size)
    source = rows - 64 * ((rows // 64) % 2)
    return forward(with_experts(call, fc2_weights=call.experts.fc2_weights[:, source].contiguous()))


@wrong(
    stage="none",
    says=(
        r"unknown|noise|random|unexplained|scatter|no pattern|no (single|simple)|nothing (known|explains)",
    ),
    story="a card with a bad HBM stack: in a few of a thousand elements of the output some bit is another one",
)
def some_bits_of_bad_memory(call: MoeCall) -> Tensor:
    right = forward(call)
    seed = (right.view(torch.int16).long().flatten() * (torch.arange(right.numel()) % 9973 + 1)).sum()
    dice = torch.Generator().manual_seed(int(seed) & 0x7FFFFFFF)
    struck = torch.rand(right.shape, generator=dice) < 0.004
    bit = torch.randint(0, 14, right.shape, generator=dice)
    flipped = right.view(torch.int16).int() ^ (1 << bit).int()
    return torch.where(struck, flipped, right.view(torch.int16).int()).to(torch.int16).view(torch.bfloat16)


@wrong(
    stage="slots",
    says=(
        r"\brows?\b|token|slot",
        r"capacity|beyond|more than|drop|first \d+|overflow|miss|lost|skip|left out|not computed|last",
        r"expert",
    ),
    story="a training framework's capacity: an expert takes its even share of rows, ceil(M k / E), "
    "and drops the rest",
)
def capacity_of_an_even_share(call: MoeCall) -> Tensor:
    share = -(-call.num_tokens * call.top_k // call.num_global_experts)

    def local(right: Tensor) -> Tensor:
        kept = right.flatten().clone()
        for expert in range(call.experts.num_experts):
            kept[(kept == expert).nonzero().flatten()[share:]] = -1
        return kept.view_as(right)

    return layer(call, local=local)
