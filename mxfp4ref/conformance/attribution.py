"""Which share of an output differs, by what could be the reason: expert, rows of an expert, tokens, columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mxfp4ref.conformance.families.slot_kinds import position_in_expert
from mxfp4ref.conformance.reduction import local_experts
from mxfp4ref.model.call import MoeCall

__all__ = ["Attribution", "attribution"]

_MOST = 12  # places of a kind
_CONTRAST = 0.25  # between the shares of two places, below which a kind says nothing
_AS_MUCH = 0.05  # of contrast, that smaller blocks may have more than larger ones of the same kind


@dataclass(frozen=True)
class Attribution:
    """One row of the table.

    Attributes:
        by: the kind of place, such as "expert".
        place: which of them.
        differing, elements: of the output elements that have to do with it, and could have differed.
    """

    by: str
    place: str
    differing: int
    elements: int


def attribution(call: MoeCall, mask: Tensor, could: Tensor | None = None) -> tuple[Attribution, ...]:
    """The kinds of places whose shares of wrong elements differ most, with their counts; none where none differ.

    Of columns, tokens or rows in blocks of several sizes one is told.

    Args:
        call: the call.
        mask: `[M, H] bool`, where the output differs.
        could: `[M, H] bool`, where it could have, and the only elements that count; everywhere by default.
    """
    kinds: dict[str, list[Attribution]] = {}
    for by, place, chosen in _places(call, mask):
        if could is not None:
            chosen &= could
        if bool(chosen.any()):
            row = Attribution(by, place, int((mask & chosen).sum()), int(chosen.sum()))
            kinds.setdefault(by, []).append(row)
    contrasts = {by: _contrast(rows) for by, rows in kinds.items()}
    # Of one kind in blocks of several sizes, the largest that tells as much as any.
    most: dict[str, float] = {}
    for by, contrast in contrasts.items():
        most[_kind(by)] = max(contrast, most.get(_kind(by), 0.0))
    sizes: dict[str, str] = {}
    for by, contrast in contrasts.items():
        if contrast >= max(_CONTRAST, most[_kind(by)] - _AS_MUCH):
            sizes.setdefault(_kind(by), by)
    telling = sorted(sizes.values(), key=lambda by: -contrasts[by])
    return tuple(row for by in telling for row in _most(kinds[by]))


def _kind(by: str) -> str:
    return by.partition(", by ")[0]


def _contrast(rows: list[Attribution]) -> float:
    shares = [row.differing / row.elements for row in rows]
    return max(shares) - min(shares)


def _most(rows: list[Attribution]) -> list[Attribution]:
    """The places with the largest shares, in their own order."""
    chosen = sorted(rows, key=lambda row: -row.differing / row.elements)[:_MOST]
    return [row for row in rows if row in chosen]


def _places(call: MoeCall, mask: Tensor) -> Iterator[tuple[str, str, Tensor]]:
    """Kind, place, and its elements `[M, H] bool`."""
    local = local_experts(call)
    tokens, width = mask.shape
    every = torch.ones_like(mask)
    first = call.ep_rank * call.experts.num_experts
    for expert in torch.unique(local[local >= 0]).tolist():
        yield "expert", str(expert + first), every & (local == expert).any(1, keepdim=True)
    for count in range(int((local >= 0).sum(1).max()) + 1 if tokens else 0):
        words = f"{count} slot{'s' * (count != 1)} of this rank"
        yield "slots of a token", words, every & ((local >= 0).sum(1) == count)[:, None]
    skipped = (local < 0).any(1, keepdim=True)
    for words, chosen in (("with skipped slots", skipped), ("without skipped slots", ~skipped)):
        yield "ranks and padding", f"tokens {words}", every & chosen
    position, _ = position_in_expert(local)
    for size in (64, 16, 4):
        for block in torch.unique(position[position >= 0] // size).tolist():
            rows = f"{block * size} to {block * size + size - 1}"
            yield (
                f"row of an expert, by {size}",
                rows,
                every & (position // size == block).any(1, keepdim=True),
            )
    token, column = (torch.arange(n, device=mask.device) for n in (tokens, width))
    for size in (64, 16, 1):
        if tokens > size:
            for block in range(-(-tokens // size)):
                place = f"{block * size} to {block * size + size - 1}" if size > 1 else str(block)
                yield f"token, by {size}", place, every & (token // size == block)[:, None]
    for size in (128, 64, 32, 16):
        if width > size:
            for block in range(-(-width // size)):
                place = f"{block * size} to {block * size + size - 1}"
                yield f"column, by {size}", place, every & (column // size == block)
