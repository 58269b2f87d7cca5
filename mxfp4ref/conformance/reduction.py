"""A call cut down to a few of its tokens, and to the experts that they use."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import select_local

__all__ = ["is_heavy", "local_experts", "one_token", "reduce_call"]

_EXPERT_BYTES = 1 << 25  # beyond which a call is heavy


def reduce_call(call: MoeCall, tokens: Tensor, *, neighbours: bool = False) -> MoeCall:
    """The call for some of its tokens, `[T] int64`; without expert parallelism, with the experts they use.

    With `neighbours` the next expert of each is kept too, and the first and the last of all: what a defect may
    take for the right one.
    """
    ids = call.token_selected_experts[tokens]
    experts = call.experts
    if call.ep_size == 1:
        local = select_local(ids, experts.num_experts, 1, 0)
        kept = torch.unique(local[local >= 0])
        if neighbours or len(kept) == 0:
            last = experts.num_experts - 1
            ends = torch.tensor([0, last], device=kept.device)
            kept = torch.unique(torch.cat((kept, (kept + 1).clamp(max=last), ends)))
        position = torch.searchsorted(kept, ids.clamp(min=0).to(torch.int64)).clamp(max=len(kept) - 1)
        inside = (ids >= 0) & (ids < experts.num_experts)
        ids = torch.where(inside, position.to(torch.int32), torch.where(ids < 0, ids, len(kept)))
        experts = experts.select(kept) if len(kept) < experts.num_experts else experts
    return replace(
        call,
        input=call.input[tokens],
        token_selected_experts=ids,
        token_final_scales=call.token_final_scales[tokens],
        experts=experts,
    )


def one_token(call: MoeCall, token: int) -> MoeCall:
    """The call for one of its tokens."""
    return reduce_call(call, torch.tensor([token], device=call.input.device))


def is_heavy(call: MoeCall) -> bool:
    """Whether a call is too large to try all defects on: even one token's experts are."""
    experts = call.experts
    return min(experts.num_experts, call.top_k + 1) * experts.fc1_weights[0].nbytes > _EXPERT_BYTES


def local_experts(call: MoeCall) -> Tensor:
    """This rank's index of each slot's expert, `[M, k] int64`; -1 where the slot is not this rank's."""
    return select_local(call.token_selected_experts, call.experts.num_experts, call.ep_size, call.ep_rank)
