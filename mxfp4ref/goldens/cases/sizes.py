"""Suite `sizes`: numbers of tokens, rows, slots and experts beyond which kernels take other ways."""

from __future__ import annotations

from dataclasses import replace

import torch

from mxfp4ref.formats.experts import Experts
from mxfp4ref.goldens.cases.definition import Content, define, moe_content
from mxfp4ref.goldens.cases.gemm import mirror_hidden
from mxfp4ref.goldens.cases.models import recipes_and_tensors
from mxfp4ref.goldens.cases.source import Source
from mxfp4ref.model.call import MoeCall

_H, _I = 128, 128


def _half_mirrored(source: Source, num_tokens: int, num_experts: int) -> tuple[torch.Tensor, Experts]:
    """Inputs and experts; every second token's GEMM1 is its rounding error, so that another way to round shows."""
    experts = source.experts(num_experts, _H, _I, fc1_scales=(108, 124))
    x = source.spread("input", -8, 3, num_tokens, _H)
    mirrored, experts = mirror_hidden(x, experts)
    x[1::2] = mirrored[1::2]
    return x, experts


@define(unique_for="more than 512 tokens")
def tokens_520(source: Source) -> Content:
    """520 tokens, where no expert has 256 rows: kernels that take another way for large batches, such as from 512
    tokens on, have taken it.
    """
    x, experts = _half_mirrored(source, 520, 5)
    call = MoeCall(x, source.distinct("ids", 520, 2, 5), source.weights(520, 2), experts)
    return moe_content(call, compact=True)


@define(unique_for="more than 256 rows of one expert in less than 512 tokens")
def rows_297_of_one_expert(source: Source) -> Content:
    """297 of 300 tokens go to one expert: more rows than the largest N tile has, while the batch is not large."""
    ids = torch.ones(300, 1, dtype=torch.int32)
    ids[100:103] = 0
    x, experts = _half_mirrored(source, 300, 2)
    experts = replace(experts, swiglu_limit=torch.full((2,), 2.0))
    call = MoeCall(x, ids, source.weights(300, 1), experts)
    return moe_content(call, compact=True)


@define(unique_for="more than 4,096 rows of one expert")
def rows_4100_of_one_expert(source: Source) -> Content:
    """4,100 rows of one expert and four of another. Tokens repeat after 61, a prime that divides no tile, so that
    the file compresses to the size of 61 tokens, and a row taken for the one 256 or 4,096 further on shows.
    """
    token = torch.arange(4104) % 61
    ids = torch.zeros(4104, 1, dtype=torch.int32)
    ids[2000:2004] = 1
    x, experts = _half_mirrored(source, 61, 2)
    call = MoeCall(x[token], ids, source.weights(61, 1)[token], experts)
    return moe_content(call, compact=True)


@define(unique_for="eight slots a token")
def eight_slots(source: Source) -> Content:
    """Eight slots a token, as in DeepSeek-V3, over all eight experts in different orders: more than kernels
    unroll or keep in registers.
    """
    call = MoeCall(
        source.normal("input", 8, _H),
        source.distinct("ids", 8, 8, 8),
        source.weights(8, 8),
        source.experts(8, _H, _I),
    )
    return moe_content(call, compact=True)


@define(unique_for="hidden states padded with zeros")
def hidden_192_padded_to_256(source: Source) -> Content:
    """A hidden size that is a multiple of 64 and no more, padded to 256 as engines do it: zeros in the last 64
    columns of the input and of fc1, and in the last 64 rows of fc2. Kernels that skip what is padded may skip a
    whole tile of 128, half of which is none.
    """
    x, experts = source.normal("input", 8, 256), source.experts(2, 256, _I)
    assert experts.fc1_scales is not None
    assert experts.fc2_scales is not None
    x[:, 192:] = 0
    experts.fc1_weights[..., 96:], experts.fc1_scales[..., 6:] = 0, 0
    experts.fc2_weights[:, 192:], experts.fc2_scales[:, 192:] = 0, 0
    call = MoeCall(x, source.distinct("ids", 8, 2, 2), source.weights(8, 2), experts)
    return moe_content(call, compact=True)


@define(unique_for="384 experts with rows each")
def experts_384_with_a_row_each(source: Source) -> Content:
    """384 experts, as many as DeepSeek-V4-Pro has, and one row for each: an expert's number does not fit into a
    byte, and prefix sums over experts are longer than 256.
    """
    ids = source.words("order", 384).argsort(stable=True).view(96, 4).to(torch.int32)
    recipes, tensors = recipes_and_tensors(source, 384, list(range(384)), _H, _I)
    call = MoeCall(source.normal("input", 96, _H), ids, source.weights(96, 4), Experts(**tensors))
    return moe_content(call, derived=recipes)
