"""Suite `sizes`: numbers of tokens, rows, slots and experts beyond which kernels take other ways."""

from __future__ import annotations

import torch

from mxfp4ref.formats.experts import Experts
from mxfp4ref.goldens.cases.definition import Content, define, moe_content
from mxfp4ref.goldens.cases.models import recipes_and_tensors
from mxfp4ref.goldens.cases.source import Source
from mxfp4ref.model.call import MoeCall

_H, _I = 128, 128


@define(unique_for="more than 512 tokens", pending=True)
def tokens_520(source: Source) -> Content:
    """520 tokens, where no expert has 256 rows: kernels that take another way for large batches, such as from 512
    tokens on, have taken it.
    """
    call = MoeCall(
        source.normal("input", 520, _H),
        source.distinct("ids", 520, 2, 5),
        source.weights(520, 2),
        source.experts(5, _H, _I),
    )
    return moe_content(call, compact=True)


@define(unique_for="more than 256 rows of one expert in less than 512 tokens", pending=True)
def rows_297_of_one_expert(source: Source) -> Content:
    """297 of 300 tokens go to one expert: more rows than the largest N tile has, while the batch is not large."""
    ids = torch.ones(300, 1, dtype=torch.int32)
    ids[100:103] = 0
    call = MoeCall(
        source.normal("input", 300, _H), ids, source.weights(300, 1), source.experts(2, _H, _I, limit=2.0)
    )
    return moe_content(call, compact=True)


@define(unique_for="more than 4,096 rows of one expert", pending=True)
def rows_4100_of_one_expert(source: Source) -> Content:
    """4,100 rows of one expert and four of another. Tokens repeat after 61, a prime that divides no tile, so that
    the file compresses to the size of 61 tokens, and a row taken for the one 256 or 4,096 further on shows.
    """
    token = torch.arange(4104) % 61
    ids = torch.zeros(4104, 1, dtype=torch.int32)
    ids[2000:2004] = 1
    call = MoeCall(
        source.normal("input", 61, _H)[token],
        ids,
        source.weights(61, 1)[token],
        source.experts(2, _H, _I, biases=True),
    )
    return moe_content(call, compact=True)


@define(unique_for="eight slots a token", pending=True)
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


@define(unique_for="384 experts with rows each", pending=True)
def experts_384_with_a_row_each(source: Source) -> Content:
    """384 experts, as many as DeepSeek-V4-Pro has, and one row for each: an expert's number does not fit into a
    byte, and prefix sums over experts are longer than 256.
    """
    ids = source.words("order", 384).argsort(stable=True).view(96, 4).to(torch.int32)
    recipes, tensors = recipes_and_tensors(source, 384, list(range(384)), _H, _I)
    call = MoeCall(source.normal("input", 96, _H), ids, source.weights(96, 4), Experts(**tensors))
    return moe_content(call, derived=recipes)
