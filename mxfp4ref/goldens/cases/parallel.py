"""Suite `parallel`: what each rank of expert and tensor parallelism computes. Ids are always global."""

from __future__ import annotations

from dataclasses import replace

import torch

from mxfp4ref.formats.experts import Experts
from mxfp4ref.goldens.cases.definition import Content, define, moe_content
from mxfp4ref.goldens.cases.source import Source
from mxfp4ref.model.call import MoeCall

_H, _I = 128, 128
_EP, _TP = 4, 2


def _layer() -> tuple[Source, Experts]:
    """The eight experts of the whole layer, each with its own SwiGLU parameters; all ranks hold parts of them."""
    source = Source("parallel/layer")
    alpha = [1.0 + 0.125 * expert for expert in range(8)]
    beta = [0.25 * expert - 1.0 for expert in range(8)]
    limit = [1.0 + 0.5 * expert for expert in range(8)]
    return source, source.experts(8, _H, _I, biases=True, alpha=alpha, beta=beta, limit=limit)


def _ep_call(source: Source, rank: int, ids: torch.Tensor, strict: bool = True) -> MoeCall:
    layer, experts = _layer()
    return MoeCall(
        layer.normal("input", len(ids), _H),
        ids,
        layer.weights(*ids.shape),
        experts.slice(2 * rank, 2 * rank + 2),
        ep_size=_EP,
        ep_rank=rank,
        strict=strict,
    )


for _rank in range(_EP):

    @define(
        why=f"Rank {_rank} of 4: experts {2 * _rank} and {2 * _rank + 1} of 8, global ids, parameters by local "
        "index. The four ranks have the same tokens, ids and weights.",
        catches="ep_double_mapping ep_offset_dropped" if _rank else "",
        unique_for="every rank of one layer",
        name=f"expert_rank_{_rank}_of_4",
    )
    def _(source: Source, rank: int = _rank) -> MoeCall:
        return _ep_call(source, rank, Source("parallel/layer").distinct("ids", 16, 4, 8))


@define(
    catches="ep_sentinel_aliases ep_double_mapping ep_offset_dropped",
    unique_for="padding under expert parallelism",
)
def sentinels_on_rank_3_of_4(source: Source) -> MoeCall:
    """The last of 4 ranks with padded rows and slots of -1 among ids of all ranks: -1 is nobody's expert, not
    the last one and not, after an offset, somebody else's.
    """
    ids = source.distinct("ids", 16, 4, 8)
    ids = torch.where(source.bytes("padded", 16, 4) < 80, -1, ids)
    ids[12:] = -1
    return _ep_call(source, 3, ids.to(torch.int32))


@define(unique_for="what the kernel does with a mistake of its caller")
def ids_of_no_rank(source: Source) -> MoeCall:
    """Ids beyond the last rank's experts, and below -1, on one of several expert-parallel ranks: the kernel
    skips them like -1.
    """
    ids = source.distinct("ids", 16, 4, 12)
    ids[::3, 1], ids[::5, 2] = -7, 2**31 - 1
    return _ep_call(source, 3, ids, strict=False)


for _rank in range(_TP):

    @define(
        why=f"Rank {_rank} of 2 of tensor parallelism: its share of I, with the fc2 bias handed to both ranks; only "
        "rank 0 adds it.",
        catches="" if _rank else "bias2_ignored",
        unique_for="every rank of one layer",
        name=f"tensor_rank_{_rank}_of_2",
    )
    def _(source: Source, rank: int = _rank) -> MoeCall:
        whole = Source("parallel/tensor_layer")
        experts = whole.experts(2, _H, 2 * _I, biases=True)
        assert experts.fc1_scales is not None
        assert experts.fc2_scales is not None
        assert experts.fc1_biases is not None

        def rows(t: torch.Tensor) -> torch.Tensor:
            return t.view(len(t), 2, _TP, -1, *t.shape[2:])[:, :, rank].flatten(1, 2)

        def columns(t: torch.Tensor) -> torch.Tensor:
            return t.chunk(_TP, dim=2)[rank].contiguous()

        shard = replace(
            experts,
            fc1_weights=rows(experts.fc1_weights),
            fc1_scales=rows(experts.fc1_scales),
            fc1_biases=rows(experts.fc1_biases),
            fc2_weights=columns(experts.fc2_weights),
            fc2_scales=columns(experts.fc2_scales),
        )
        return MoeCall(
            whole.normal("input", 8, _H),
            whole.distinct("ids", 8, 2, 2),
            whole.weights(8, 2),
            shard,
            tp_size=_TP,
            tp_rank=rank,
        )


@define(catches="ep_offset_dropped", unique_for="a rank that has nothing to do")
def rank_without_tokens(source: Source) -> MoeCall:
    """Rank 2 of 4 none of whose experts is named by any token: zeros everywhere."""
    layer, experts = _layer()
    return MoeCall(
        layer.normal("input", 4, _H),
        source.distinct("ids", 4, 2, 4),
        layer.weights(4, 2),
        experts.slice(4, 6),
        ep_size=4,
        ep_rank=2,
    )


@define(unique_for="a rank that begins at no power of two")
def expert_rank_2_of_4_with_three_each(source: Source) -> Content:
    """Rank 2 of 4 with three experts each, 6 to 8 of 12: no power of two, so that ids taken modulo something or
    masked show, with neighbours 5 and 9 in nearly every token, and local ids 0 to 2 that are other ranks'.
    """
    ids = source.distinct("ids", 16, 4, 12)
    ids[1::2] = torch.where(source.distinct("near", 8, 4, 5) == 4, 0, source.distinct("near", 8, 4, 5) + 5)
    experts = source.experts(3, _H, _I, biases=True, limit=[1.0, 2.0, 3.0])
    call = MoeCall(source.normal("input", 16, _H), ids, source.weights(16, 4), experts, ep_size=4, ep_rank=2)
    return moe_content(call, compact=True)


@define(unique_for="foreign slots beside experts that give Inf")
def foreign_slots_beside_infinite_experts(source: Source) -> Content:
    """Rank 1 of 2 whose first and last expert give Inf and NaN for every token: a slot of the other rank that is
    computed as one of them, with its weight or with weight 0, gives NaN. Half of the foreign slots have weight 0.
    """
    experts = source.experts(3, _H, _I)
    assert experts.fc2_scales is not None
    fc2_scales = experts.fc2_scales.clone()
    fc2_scales[0], fc2_scales[2] = 255, 255
    foreign = source.distinct("ids", 8, 3, 3)
    ids = torch.where(source.distinct("slot", 8, 3, 3) == 0, 4, foreign).to(torch.int32)
    scales = source.weights(8, 3)
    scales[:4].masked_fill_(ids[:4] < 3, 0.0)
    call = MoeCall(
        source.normal("input", 8, _H),
        ids,
        scales,
        replace(experts, fc2_scales=fc2_scales),
        ep_size=2,
        ep_rank=1,
    )
    return moe_content(call, compact=True)


@define(unique_for="expert and tensor parallelism together")
def expert_and_tensor_rank_1(source: Source) -> MoeCall:
    """Expert and tensor parallelism at once: rank 1 of 2 of either, biases given; the fc2 bias is that of
    tensor rank 0 and not added here.
    """
    return MoeCall(
        source.normal("input", 8, _H),
        source.distinct("ids", 8, 2, 4),
        source.weights(8, 2),
        source.experts(2, _H, _I, biases=True),
        ep_size=2,
        ep_rank=1,
        tp_size=2,
        tp_rank=1,
    )
