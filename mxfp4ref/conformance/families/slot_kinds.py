"""Kinds of slots: by place, weight, expert, and where their row lies among their expert's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mxfp4ref.conformance.families.solved.pursuit import Rows
from mxfp4ref.model.call import MoeCall

__all__ = ["HALVES", "SlotKind", "attributes", "position_in_expert", "slots_of_kind"]

_COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512)
# Which experts are in the half, of so many.
HALVES: tuple[tuple[Callable[[int], range], str], ...] = (
    (lambda n: range((n + 1) // 2, n), "upper half of the experts"),
    (lambda n: range((n + 1) // 2), "lower half of the experts"),
)


def position_in_expert(local: Tensor) -> tuple[Tensor, Tensor]:
    """Of each slot, its row's number among its expert's and how many these are, `[M, k] int64`; -1, 0 if skipped."""
    rows = Rows.of(local)
    position, counts = torch.full_like(local, -1).flatten(), torch.zeros_like(local).flatten()
    position[rows.flat], counts[rows.flat] = rows.position, rows.counts
    return position.view_as(local), counts.view_as(local)


@dataclass(frozen=True)
class SlotKind:
    """Some slots of a call.

    Attributes:
        words: behind "slots", which they are.
        mask: `[M, k] bool`.
        tokens: of all slots of some tokens, which tokens these are; "" of others.
    """

    words: str
    mask: Tensor
    tokens: str = ""

    @property
    def of_rows(self) -> bool:
        """Whether it goes by the expert or the row's place among its expert's, as tiles and weights of a GEMM do."""
        return " row" in self.words or " expert" in self.words

    @property
    def of_places(self) -> bool:
        """Whether it goes by the slot's place in its token, as the loop of the weighted sum does."""
        return " place" in self.words


def attributes(call: MoeCall, local: Tensor, *, every: bool = False) -> Iterator[SlotKind]:
    """Kinds of slots: those that are some of the call's, or `every` one."""
    here = local >= 0
    position, rows = position_in_expert(local)
    tokens, top_k = local.shape
    most = tokens if not every else _COUNTS[-1] + 1
    slot = torch.arange(top_k, device=local.device).expand_as(local)
    token = torch.arange(tokens, device=local.device)[:, None].expand_as(local)
    weights = call.token_final_scales

    def of_tokens(words: str, mask: Tensor) -> SlotKind:
        return SlotKind(f"of {words}", here & mask, words)

    for at, word in ((top_k - 1, "last"), (0, "first")) if top_k > 1 else ():
        yield SlotKind(f"of the {word} place of a token", here & (slot == at))
    for at in range(1, top_k - 1):
        yield SlotKind(f"of place {at} of a token", here & (slot == at))
    for at in range(2, top_k):
        yield SlotKind(f"of places from {at} on of a token", here & (slot >= at))
    if top_k > 2:
        for parity, word in ((1, "odd"), (0, "even")):
            yield SlotKind(f"of {word} places of a token", here & (slot % 2 == parity))
    earlier = torch.ones(top_k, top_k, dtype=torch.bool, device=local.device).tril(-1)
    yield SlotKind(
        "with the weight of an earlier slot",
        here & ((weights[:, :, None] == weights[:, None]) & here[:, None] & earlier).any(2),
    )
    yield SlotKind("with the largest weight of the token", here & (weights == weights.amax(1, keepdim=True)))
    yield SlotKind("with the smallest weight of the token", here & (weights == weights.amin(1, keepdim=True)))
    for share in (0.25, 0.5):
        light = here & (weights < share * weights.amax(1, keepdim=True))
        yield SlotKind(f"with a weight below {share:g} of the token's largest", light)
    yield SlotKind("that are the last row of their expert", here & (position == rows - 1))
    yield SlotKind("that are the first row of their expert", here & (position == 0))
    for count in _COUNTS:
        if count < most:
            yield SlotKind(
                f"that are rows beyond the first {count} of their expert", here & (position >= count)
            )
            yield of_tokens(f"tokens from {count} on", token >= count)
            if count > 1:
                yield of_tokens(f"the first {count} tokens", token < count)
            yield SlotKind(f"of experts with at most {count} row{'s' * (count > 1)}", here & (rows <= count))
        if count > 1 and count < most:
            yield SlotKind(
                f"that are the last row of each {count} of their expert",
                here & (position % count == count - 1),
            )
            yield SlotKind(
                f"that are the first row of each {count} of their expert", here & (position % count == 0)
            )
            yield SlotKind(
                f"in the last, unfilled {count} rows of their expert",
                here & (position >= rows // count * count),
            )
        if count % 8 == 0 and count < most:  # as a half of the rows of an MMA's fragment
            half = here & (position % count >= count // 2)
            yield SlotKind(f"in the second half of each {count} rows of their expert", half)
            yield SlotKind(
                f"beyond the first {count // 2} of the last, unfilled {count} rows of their expert",
                half & (position >= rows // count * count),
            )
    for size in (8, 16, 32, 64, 128):
        words = f"that are rows {size} to {2 * size - 1} of their expert (its second tile of {size})"
        yield SlotKind(words, here & (position // size == 1))
    yield of_tokens("the last token", token == tokens - 1)
    yield of_tokens("the first token", token == 0)
    for parity, word in ((1, "odd"), (0, "even")):
        yield of_tokens(f"tokens with an {word} number", token % 2 == parity)
        yield SlotKind(f"of experts with an {word} number", here & (local % 2 == parity))
    yield SlotKind("of the last expert", here & (local == call.experts.num_experts - 1))
    yield SlotKind("of the first expert", here & (local == 0))
    for which, words in HALVES:
        experts = torch.tensor([*which(call.experts.num_experts)], device=local.device)
        yield SlotKind(f"of the {words}", torch.isin(local, experts))
    for expert in range(call.experts.num_experts if call.experts.num_experts <= 16 else 0):
        yield SlotKind(f"of expert {expert}", here & (local == expert))
    for threshold in (0.5, 0.25, 0.1, 0.05, 0.01):
        yield SlotKind(f"with a weight below {threshold:g}", here & (weights < threshold))
        if every or bool((weights < 0).any()):
            small = here & (weights.abs() < threshold)
            yield SlotKind(f"with a weight of magnitude below {threshold:g}", small)
    yield SlotKind("with a negative weight", here & (weights < 0))


def slots_of_kind(words: str, call: MoeCall, local: Tensor) -> Tensor:
    """The slots of the kind that has these words, `[M, k] bool`; none where a call has no such kind."""
    none = torch.zeros_like(local, dtype=torch.bool)
    return next((kind.mask for kind in attributes(call, local, every=True) if kind.words == words), none)
