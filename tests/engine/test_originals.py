"""The calls of engines, made as they make them, against the forward of the same layer that nobody padded or moved.

What an engine hands over stands in `originals.toml`. Its own preparation is described there, not copied: here this
package's layouts do it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mxfp4ref.formats.generations import PLAIN, WORDWISE, Generation, generation_of
from mxfp4ref.formats.humming_experts import HummingExperts
from mxfp4ref.formats.resize import resize_experts
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.flashinfer import drop_in
from mxfp4ref.model.forward import Stages, forward
from mxfp4ref.model.parallel import Ranks, forward_all_ranks, gather, split_intermediate
from mxfp4ref.sm90.gemm import compiled
from mxfp4ref.sm90.gemm.order import first_pair_swapped, group_order
from mxfp4ref.sm90.tactics import Sm90Kernel, Tactic
from tests.engine.originals import (
    CALLS,
    ORIGINALS,
    SHARDS,
    Layer,
    Original,
    Rank,
    Tokens,
    arguments,
    expert_range,
    parameters,
    random_tokens,
    round_up,
)
from tests.helpers import bits, layers

MODELLED = [original for original in ORIGINALS if original.missing is None]
SIZES = [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (1, 4), (2, 2)]  # tp_size, ep_size
random_layer = functools.cache(Layer.random)


def fits(original: Original, intermediate: int, tp_size: int) -> bool:
    """Whether the engine gets as far as the call: sglang has buffers of I / tp, and does not pad them in time."""
    if not original.name.startswith("sglang"):
        return True
    first = SHARDS[original.shard].columns(intermediate, tp_size, 0)
    if SHARDS[original.shard].rule == "equal":
        return first.stop % original.intermediate == 0
    return first.stop <= intermediate // tp_size


def calls() -> list[tuple[Original, int, int]]:
    return [
        (original, tp_size, ep_size)
        for original in MODELLED
        for tp_size, ep_size in SIZES
        if fits(original, random_layer(original.checkpoint).intermediate, tp_size)
        and (original.tp_beside_ep or 1 in (tp_size, ep_size))
    ]


def always() -> list[Any]:
    """Of each original the smallest and the largest number of ranks; the others are slow tests."""
    every = calls()
    names = [original.name for original, _, _ in every]
    return [
        pytest.param(*one, marks=pytest.mark.slow)
        if names[number] in names[:number] and names[number] in names[number + 1 :]
        else one
        for number, one in enumerate(every)
    ]


def of_unpadded(depth: int, rows: list[slice]) -> Callable[..., Tensor]:
    """The GEMM of a layer without padding: it gets none of it to see, neither along K nor along the rows."""

    def gemm(
        x: Tensor,
        packed: Tensor,
        scales: Tensor,
        *,
        tactic: Tactic,
        generation: Generation,
        positions: Tensor | None,
    ) -> Tensor:
        order = [g for g in group_order(scales.shape[2], tactic.tile_k, generation) if g < depth // 32]
        swapped = first_pair_swapped(x, positions, tactic, generation)
        out = torch.zeros(*x.shape[:2], packed.shape[1])
        for part in rows:
            w, s = packed[:, part, : depth // 2].contiguous(), scales[:, part, : depth // 32].contiguous()
            out[:, :, part] = compiled.gemm(x[:, :, :depth].contiguous(), w, s, order, swapped)
        return out

    return gemm


def expected(original: Original, layer: Layer, tokens: Tokens, rank: Rank) -> Tensor:
    """The forward of what the rank has of the layer, `[M, H] bf16`."""
    columns = SHARDS[original.shard].columns(layer.intermediate, rank.tp_size, rank.tp_rank)
    experts = layer.logical(expert_range(layer, rank), columns)
    hidden, width = layer.hidden, columns.stop - columns.start
    experts = replace(experts, **parameters(original, experts.num_experts))
    call = MoeCall(
        F.pad(tokens.hidden_states, (0, -hidden % 128)),
        tokens.topk_ids.to(torch.int32),
        tokens.topk_weights,
        resize_experts(experts, round_up(hidden, 128), round_up(width, 128)),
        **rank._asdict(),
        kernel=Sm90Kernel(generation=original.generation),
        activation_type=original.activation_type,
    )
    if original.fp8:  # with sizes that need no padding
        return forward(replace(call, experts=HummingExperts.prepare(call.experts)))[:, :hidden]
    up, gate = slice(0, width), slice(round_up(width, 128), round_up(width, 128) + width)
    stages = Stages(fc1_gemm=of_unpadded(hidden, [up, gate]), fc2_gemm=of_unpadded(width, [slice(0, hidden)]))
    return forward(call, stages)[:, :hidden]


@pytest.mark.parametrize(
    ("original", "tp_size", "ep_size"),
    always(),
    ids=lambda value: value.name if isinstance(value, Original) else str(value),
)
def test_the_call_of_every_rank(original: Original, tp_size: int, ep_size: int) -> None:
    layer = random_layer(original.checkpoint)
    tokens = random_tokens(layer, original.padding_id)
    function = drop_in(weight_layout=original.weight_layout)
    for ep_rank in range(ep_size):
        for tp_rank in range(tp_size):
            rank = Rank(tp_size, tp_rank, ep_size, ep_rank)
            call = arguments(original, layer, tokens, rank)
            output = call.get("output")
            result = function(**call)
            assert len(result) == 1
            assert output is None or result[0] is output
            bits.assert_same(result[0][:, : layer.hidden], expected(original, layer, tokens, rank))
            assert result[0].any()
            assert not result[0][:, layer.hidden :].any()


@pytest.mark.parametrize(
    ("original", "tp_size"),
    [(original, tp_size) for original, tp_size, ep_size in calls() if ep_size == 1 and not original.fp8],
    ids=lambda value: value.name if isinstance(value, Original) else str(value),
)
def test_all_ranks_at_once(original: Original, tp_size: int) -> None:
    """`forward_all_ranks` cuts the experts where the engine does."""
    layer = random_layer(original.checkpoint)
    tokens = random_tokens(layer, original.padding_id)
    function = drop_in(weight_layout=original.weight_layout)
    ranks = [Rank(tp_size, tp_rank) for tp_rank in range(tp_size)]
    outputs = [function(**arguments(original, layer, tokens, rank))[0] for rank in ranks]
    experts = layer.logical(slice(0, layer.num_experts), slice(0, layer.intermediate))
    hidden, inner = original.padded(layer.hidden, layer.intermediate, 1)
    call = MoeCall(
        F.pad(tokens.hidden_states, (0, hidden - layer.hidden)),
        tokens.topk_ids.to(torch.int32),
        tokens.topk_weights,
        resize_experts(replace(experts, **parameters(original, layer.num_experts)), hidden, inner),
        kernel=Sm90Kernel(generation=original.generation),
        activation_type=original.activation_type,
    )
    all_ranks = Ranks(tp_size=tp_size, intermediate_size=layer.intermediate)
    bits.assert_same(forward_all_ranks(call, all_ranks), gather(outputs))


@pytest.mark.parametrize("original", ORIGINALS, ids=lambda original: original.name)
def test_the_layout_is_that_of_the_release(original: Original) -> None:
    if original.flashinfer is None:
        assert original.layout == "plain"
    elif original.layout == "plain":
        assert original.flashinfer in PLAIN.releases
    else:
        assert generation_of(original.flashinfer) is original.generation
    # 3-D scales belong to two layouts: only these have to be named.
    assert (original.weight_layout is None) == (original.generation is WORDWISE)


@pytest.mark.parametrize(
    "original",
    [
        pytest.param(
            original,
            id=original.name,
            marks=pytest.mark.xfail(raises=NotImplementedError, reason=original.missing, strict=True),
        )
        for original in ORIGINALS
        if original.missing is not None
    ],
)
def test_calls_that_are_not_modelled(original: Original) -> None:
    """Once one of them is, its `missing` goes, and it becomes a call of every rank above."""
    layer = random_layer(original.checkpoint)
    drop_in(weight_layout=original.weight_layout)(
        **arguments(original, layer, random_tokens(layer, original.padding_id), Rank())
    )


def test_every_call_and_shard_has_an_original() -> None:
    assert {original.call for original in ORIGINALS} == set(CALLS)
    assert {original.shard for original in ORIGINALS} == set(SHARDS)


@pytest.mark.parametrize("original", ORIGINALS, ids=lambda original: original.name)
def test_the_shards_of_the_published_sizes(original: Original) -> None:
    shard = SHARDS[original.shard]
    for row in shard.rows:
        size, tp_size = row["intermediate"], row["tp"]
        parts = [shard.columns(size, tp_size, rank) for rank in range(tp_size)]
        widths = [part.stop - part.start for part in parts]
        assert widths == [row["width"]] * (tp_size - 1) + [row["last"]]
        assert [part.start for part in parts] == [sum(widths[:rank]) for rank in range(tp_size)]
        assert sum(widths) == size
        assert fits(original, size, tp_size) == ("fails" not in row) == ("padded" in row)
        if "padded" in row:
            assert original.padded(4096, size, tp_size)[1] == row["padded"] >= max(widths)
            experts = layers.random_experts(0, num_experts=1, hidden=32, inner=size)
            shards = split_intermediate(
                resize_experts(experts, 32, round_up(size, 128)), tp_size, intermediate_size=size
            )
            assert {shard.intermediate_size for shard in shards} == {row["padded"]}
            assert torch.equal(
                shards[-1].fc2_scales[..., : row["last"] // 32],
                experts.fc2_scales[..., parts[-1].start // 32 :],
            )
