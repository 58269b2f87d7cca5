"""The forward of a layer whose experts are too many for the memory: some of them at a time, bit for bit the same.

An expert's rows and their order are those of the whole call, so that its GEMMs give the same bits whichever
experts are there beside it; what they give each slot is kept, and the weighted sum is taken when all is there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from mxfp4ref._spans import spans
from mxfp4ref.formats.experts import Experts
from mxfp4ref.formats.mxfp4 import GROUP_SIZE
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import KERNEL, forward
from mxfp4ref.model.parallel import Ranks, gather, serving_ranks, split_intermediate
from mxfp4ref.routing.route import Routing
from mxfp4ref.sm90.activation import SWIGLU
from mxfp4ref.sm90.elementwise import finalize, to_bf16
from mxfp4ref.sm90.tactics import Sm90Kernel

__all__ = ["ExpertSource", "forward_in_parts"]

_BYTES_AT_ONCE = 1 << 27  # of experts; a few copies of them are alive at a time


class ExpertSource(Protocol):
    """Experts from which some can be taken: `Experts`, or those that lie in files."""

    @property
    def num_experts(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    def select(self, index: Tensor) -> Experts: ...


def forward_in_parts(
    hidden: Tensor,
    routing: Routing,
    experts: ExpertSource,
    ranks: Ranks,
    kernel: Sm90Kernel,
    step: Callable[[str, int], None] | None = None,
    *,
    activation_type: int = SWIGLU,
) -> Tensor:
    """`forward_all_ranks` with some experts in memory at a time; of those that no token chose, none is read.

    Args:
        hidden: `[M, H] bf16`.
        routing: its ids are indices into `experts`, -1 where a slot has none.
        experts: where they come from.
        ranks, kernel, activation_type: as for `forward_all_ranks` and `MoeCall`.
        step: called before each part with a description and the number of parts.

    Raises:
        TypeError, ValueError: as `MoeCall`, `split_intermediate` and `forward_all_ranks` do.
    """
    ids, scales = routing.ids, routing.scales
    count, width = experts.num_experts, experts.hidden_size
    serving = serving_ranks(ids, count, ranks)
    size = 3 * width * experts.intermediate_size * (GROUP_SIZE // 2 + 1) // GROUP_SIZE
    used = torch.arange(count, device="cpu")[torch.bincount(ids[ids >= 0].long(), minlength=count) > 0]
    used = (
        used if len(used) else torch.zeros(1, dtype=torch.int64, device="cpu")
    )  # which shows sizes and kernel to be right
    by_slot = torch.zeros(ranks.tp_size, *ids.shape, width, dtype=torch.bfloat16, device="cpu")
    biases = torch.zeros(count, width, dtype=torch.bfloat16, device="cpu")
    biased = False
    parts = [*spans(len(used), max(_BYTES_AT_ONCE // size, 1))]
    for part in parts:
        some = used[part]
        if step is not None:
            step(f"experts {int(some[0])} to {int(some[-1])}", len(parts))
        index = torch.full((count + 1,), -1, dtype=torch.int32, device="cpu")  # the last is that of id -1
        index[some] = torch.arange(len(some), dtype=torch.int32, device="cpu")
        local = index[ids.long()]
        here = local >= 0
        loaded = experts.select(some)
        if loaded.fc2_biases is not None:
            biases[some], biased = loaded.fc2_biases, True
        shards = split_intermediate(loaded, ranks.tp_size, intermediate_size=ranks.intermediate_size)
        for rank in ranks.tp_ranks:
            call = MoeCall(
                hidden, local, scales, shards[rank], kernel=kernel, activation_type=activation_type
            )
            by_slot[rank][here] = _slots(call)[here]
    outputs = []
    for ep_rank in range(ranks.ep_size):
        mine = torch.where(serving == ep_rank, ids, -1).long()
        for tp_rank in ranks.tp_ranks:
            bias = biases if biased and tp_rank == 0 else None
            outputs.append(to_bf16(finalize(by_slot[tp_rank], mine, scales, bias)))
    return gather(outputs, reduction=ranks.reduction)


def _slots(call: MoeCall) -> Tensor:
    """What the call's experts give each slot, `[M, k, H] bf16`, before bias and routing weight."""
    kept: list[Tensor] = []

    def keep(by_slot: Tensor, local: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        kept.append(by_slot)
        return torch.zeros(len(by_slot), by_slot.shape[2], device="cpu", dtype=torch.float32)

    forward(call, replace(KERNEL, finalize=keep))
    return torch.cat(kept)
