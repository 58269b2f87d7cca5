"""Rows that are missing, stale or never written, and noise, which no name fits."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward
from mxfp4ref.sm90.fp32 import to_bf16
from tests.held_out_kernels.by_hand import Rows, layer
from tests.held_out_kernels.definition import wrong

MISSING = "zero|missing|not (written|computed)|empty|dropped|left out|skipped"
STALE = "stale|previous|before|another token|same as|copy|of token|repeat"
NOISE = ("random|noise|scatter|isolated|single|few|no pattern|unknown|sporadic|bit ?flip",)


def _noise(out: Tensor, seed: int, share: float) -> Tensor:
    return torch.rand(out.shape, generator=torch.Generator().manual_seed(seed)) < share


@wrong(
    stage=("slots", "finalize"),
    says=("token|row", "last|final|tail", MISSING),
    story="the last token is never computed",
)
def last_token_missing(call: MoeCall) -> Tensor:
    out = forward(call)
    out[-1:] = 0
    return out


@wrong(
    stage=("slots", "finalize"),
    says=("token|row", "odd|every (second|other)|alternate|second", MISSING),
    story="two tokens a block, the second one forgotten",
)
def odd_tokens_missing(call: MoeCall) -> Tensor:
    out = forward(call)
    out[1::2] = 0
    return out


@wrong(
    stage=("slots", "finalize"),
    says=("token|row", "64|beyond|after|from|tail|first", MISSING),
    story="one block of 64 tokens is launched, whatever M is",
)
def tokens_beyond_64_zero(call: MoeCall) -> Tensor:
    out = forward(call)
    out[64:] = 0
    return out


@wrong(
    stage=("slots", "finalize", "input"),
    says=("token|row", "128|beyond|after|from|tail|wrap|first", STALE + "|other tokens' rows|modulo"),
    story="tokens beyond 128 get what token - 128 got",
)
def tokens_beyond_128_stale(call: MoeCall) -> Tensor:
    out = forward(call)
    out[128:256] = out[: len(out[128:256])]
    return out


@wrong(
    stage=("slots", "finalize", "input"),
    says=("token|row", "previous|before|stale|copy|same as|of token|repeat|neighbou?r"),
    story="the last token of a partial tile of 16 gets the row of the token before",
)
def last_token_is_the_one_before(call: MoeCall) -> Tensor:
    out = forward(call)
    if len(out) % 16 and len(out) > 1:
        out[-1] = out[-2]
    return out


@wrong(
    stage=("fc2", "finalize"),
    says=(
        "column|block|tile",
        "uninitiali|garbage|stale|unrelated|random|unwritten|not written|arbitrary|constant",
    ),
    story="16 columns of the output are never written and hold what was in memory",
)
def a_column_block_of_garbage(call: MoeCall) -> Tensor:
    out = forward(call)
    junk = torch.randint(-(1 << 15), 1 << 15, (len(out), 16), generator=torch.Generator().manual_seed(7))
    out[:, 48:64] = (junk.to(torch.int16) & 0x3FFF).view(torch.bfloat16)
    return out


@wrong(
    stage=("fc1", "input"),
    says=(
        "GEMM ?1|fc1|\\bK\\b|group|input",
        "rows?|expert|tile|position",
        "stale|previous|another|of row|other|shared|tile",
    ),
    story="a missing barrier: the last 64 of K of the second tile of eight rows are the first tile's",
)
def fc1_stale_tile_of_the_input(call: MoeCall) -> Tensor:
    def x(rows: Rows, taken: Tensor) -> Tensor:
        stale = taken.clone()
        late = (rows.position >= 8).nonzero().flatten()
        stale[late, -64:] = taken[late - 8, -64:]
        return stale

    return layer(call, x=x)


@wrong(
    stage=("input", "slots", "fc1", "activation", "fc2", "finalize"),
    says=("token|output|everything|all", "zero|nothing|empty|not written"),
    story="the kernel does nothing and the output is zeros",
)
def all_zeros(call: MoeCall) -> Tensor:
    return torch.zeros_like(call.input)


@wrong(
    stage=("fc1", "activation", "fc2", "finalize", "input"),
    says=("nan", "token|row"),
    story="one token is NaN",
)
def one_token_is_nan(call: MoeCall) -> Tensor:
    out = forward(call)
    out[len(out) // 2] = torch.nan
    return out


@wrong(
    stage=("finalize", "fc2"),
    says=("column", "last|tail|end", MISSING),
    story="a vector of eight columns at the end of each row is not stored",
)
def last_eight_columns_zero(call: MoeCall) -> Tensor:
    out = forward(call)
    out[:, -8:] = 0
    return out


@wrong(stage="none", says=NOISE, story="single bits flip, anywhere and seldom: broken memory")
def random_bit_flips(call: MoeCall) -> Tensor:
    out = forward(call)
    bit = torch.randint(0, 15, out.shape, generator=torch.Generator().manual_seed(1))
    flips = torch.where(_noise(out, 0, 0.002), (1 << bit).to(torch.int16), 0)
    flipped = out.view(torch.int16) ^ flips.to(torch.int16)
    return torch.where(flipped.view(torch.bfloat16).isfinite(), flipped, out.view(torch.int16)).view(
        torch.bfloat16
    )


@wrong(stage="none", says=NOISE, story="some elements are one ulp too high, without any rule")
def noise_of_one_ulp(call: MoeCall) -> Tensor:
    out = forward(call)
    wrong_at = _noise(out, 2, 0.05) & out.isfinite() & (out != 0)
    return (out.view(torch.int16) + wrong_at.to(torch.int16)).view(torch.bfloat16)


@wrong(stage="none", says=NOISE, story="noise of a percent on every element, as of another number format")
def noise_of_a_percent(call: MoeCall) -> Tensor:
    out = forward(call)
    noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    return to_bf16(out.float() * (1 + 0.01 * noise))
