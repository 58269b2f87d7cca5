"""A call cut down to a few of its tokens, and to the experts that they use."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mxfp4ref._compiled import seconds_loading
from mxfp4ref.conformance.comparison import differing
from mxfp4ref.model.call import PADDING_ID, MoeCall
from mxfp4ref.model.forward import forward, select_local

__all__ = [
    "Part",
    "by_every_expert",
    "clock_of",
    "expert_numbers",
    "is_heavy",
    "isolate",
    "local_experts",
    "one_token",
    "reduce_call",
    "thread_clock",
]

_EXPERT_BYTES = 1 << 25  # beyond which a call is heavy


def reduce_call(call: MoeCall, tokens: Tensor, *, neighbours: bool = False) -> MoeCall:
    """The call for some of its tokens, `[T] int64`, with the experts of their slots.

    Every rank keeps those of its experts that have the place of one that is used, on whichever rank that is, so
    that the ids of all ranks can be numbered anew alike: what was on another rank still is, at the place that an
    expert of this rank has too. With `neighbours` the next expert of each is kept as well, and the first and
    the last of all: what a defect may take for the right one.
    """
    ids = call.token_selected_experts[tokens]
    experts = call.experts
    size = experts.num_experts
    valid = (ids >= 0) & (ids < call.num_global_experts)
    kept = torch.unique(ids[valid] % size).to(torch.int64)
    if neighbours or len(kept) == 0:
        ends = torch.tensor([0, size - 1], device=kept.device)
        kept = torch.unique(torch.cat((kept, (kept + 1).clamp(max=size - 1), ends)))
    if len(kept) < size:
        place = torch.zeros(size, dtype=torch.int32, device=ids.device)
        place[kept] = torch.arange(len(kept), dtype=torch.int32, device=ids.device)
        renumbered = ids.div(size, rounding_mode="floor") * len(kept) + place[(ids % size).to(torch.int64)]
        owned_by_none = torch.where(ids < 0, ids, len(kept) * call.ep_size)
        ids = torch.where(valid, renumbered, owned_by_none)
        experts = experts.select(kept)
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


def by_every_expert(call: MoeCall, tokens: Tensor) -> MoeCall:
    """Some tokens, `[T] int64`, each with every expert of its rank, in the order of ids and with a weight of 1."""
    count = call.experts.num_experts
    ids = torch.arange(count, dtype=torch.int32, device=call.input.device)
    return replace(
        call,
        input=call.input[tokens],
        token_selected_experts=ids.expand(len(tokens), -1).contiguous(),
        token_final_scales=torch.ones(len(tokens), count, dtype=torch.float32, device=call.input.device),
        ep_size=1,
        ep_rank=0,
    )


def expert_numbers(call: MoeCall) -> range:
    """The ids of the rank's experts."""
    count = call.experts.num_experts
    return range(call.ep_rank * count, (call.ep_rank + 1) * count)


@dataclass(frozen=True)
class Part:
    """A call that is cut down, and which rows of its output stand for which tokens of the whole one.

    Attributes:
        call: the small call.
        tokens: `[T] int64`, of the whole call, on the CPU.
        first: the row of the first of them; the others follow it, and are the last.
    """

    call: MoeCall
    tokens: Tensor
    first: int = 0


def isolate(call: MoeCall, token: int, expected: Tensor) -> Part | None:
    """One token and its experts, with their neighbours, if that gives the token's `expected` row, `[H] bf16`.

    A row's position among the rows of its expert shows where the first two groups of K over- or underflow
    (`docs/arithmetic.md`, "The exception"): where the token alone gives other bits, its rows get their positions
    back by tokens of zeros before it. None if that does not help either.
    """
    alone = reduce_call(call, torch.tensor([token], device=call.input.device), neighbours=True)
    for small in (alone, _in_place(call, token, alone)):
        if not bool(differing(forward(small)[-1], expected).any()):
            return Part(small, torch.tensor([token], device="cpu"), small.num_tokens - 1)
    return None


def _in_place(call: MoeCall, token: int, alone: MoeCall) -> MoeCall:
    """`alone` behind as many tokens of zeros as it takes; positions count modulo the N tile, a power of two."""
    local = local_experts(call)
    before = local[:token].flatten()
    period = max(tactic.tile_n for tactic in call.kernel.tactics)
    positions = (before == local[token, :, None]).sum(1) % period
    positions = positions * (local[token] >= 0)
    count = int(positions.max()) if len(positions) else 0
    row = torch.arange(count, device=before.device)[:, None]
    fillers = torch.where(row < positions, alone.token_selected_experts, PADDING_ID)
    return replace(
        alone,
        input=torch.cat((alone.input.new_zeros(count, alone.input.shape[1]), alone.input)),
        token_selected_experts=torch.cat((fillers, alone.token_selected_experts)),
        token_final_scales=torch.cat(
            (alone.token_final_scales.new_zeros(count, alone.top_k), alone.token_final_scales)
        ),
    )


def is_heavy(call: MoeCall) -> bool:
    """Whether a call is too large to compute it whole for each defect: even one token's experts are."""
    experts = call.experts
    return min(experts.num_experts, call.top_k + 1) * experts.fc1_weights[0].nbytes > _EXPERT_BYTES


def local_experts(call: MoeCall) -> Tensor:
    """This rank's index of each slot's expert, `[M, k] int64`; -1 where the slot is not this rank's."""
    return select_local(call.token_selected_experts, call.experts.num_experts, call.ep_size, call.ep_rank)


def clock_of(call: MoeCall) -> Callable[[], float]:
    """The clock for the limits of a search: seconds of the processor, of all threads where others compute."""
    return (lambda: time.process_time() - seconds_loading()) if is_heavy(call) else thread_clock


def thread_clock() -> float:
    """Seconds of the processor in this thread, without those that went into loading loops at their first use."""
    return time.thread_time() - seconds_loading()
