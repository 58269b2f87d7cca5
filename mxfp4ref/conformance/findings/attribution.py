"""Which share of an output differs, by what could be the reason: expert, rows of an expert, tokens, columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mxfp4ref.conformance.families.slot_kinds import position_in_expert
from mxfp4ref.conformance.findings.reduction import local_experts
from mxfp4ref.model.call import MoeCall

__all__ = ["ALL_TOKENS", "OF_SLOTS", "Attribution", "attribution"]

ALL_TOKENS = (
    ", of all tokens with a slot there"  # where slots are not told apart: a token counts in several places
)

_MOST = 64  # places of a kind
OF_SLOTS = ("expert", "row of an expert")  # a token may have slots in several places
_CONTRAST = 0.25  # between the shares of two places, below which a kind says nothing
_AS_MUCH = 0.05  # of contrast, that smaller blocks may have more than larger ones of the same kind


@dataclass(frozen=True)
class Attribution:
    """One row of the table.

    Attributes:
        by: the kind of place, such as "expert".
        place: which of them.
        differing, elements: of the output elements that have to do with it, and could have differed; of experts and
            their rows without those of tokens that have a slot in a place of which more differs, unless `by` ends
            with `ALL_TOKENS`.
        places: how many of its kind there are, of which no more than 64 are listed, those with the largest shares.
    """

    by: str
    place: str
    differing: int
    elements: int
    places: int = 0


def attribution(call: MoeCall, mask: Tensor, could: Tensor | None = None) -> tuple[Attribution, ...]:
    """The kinds of places whose shares of wrong elements differ most, with their counts; none where none differ.

    Of columns, tokens or rows in blocks of several sizes one is told.

    Args:
        call: the call.
        mask: `[M, H] bool`, where the output differs.
        could: `[M, H] bool`, where it could have, and the only elements that count; everywhere by default.
    """
    could = torch.ones_like(mask) if could is None else could
    # Of each token, and of each column: how many elements differ, and how many could have.
    counts = [((mask & could).sum(dim), could.sum(dim)) for dim in (1, 0)]
    kinds: dict[str, list[_Place]] = {}
    for by, place in _places(call, mask):
        kinds.setdefault(by, []).append(place)
    rows = {by: [one.row(by, counts) for one in places] for by, places in kinds.items()}
    contrasts = {by: _contrast(rows[by]) for by in kinds}
    for by in kinds:
        if by.startswith(OF_SLOTS):
            apart = [one.row(by, counts) for one in _without_worse(kinds[by], rows[by])]
            rows[by] = apart if _told_apart(apart, rows[by], mask & could) else _overlapping(rows[by])
    # Of one kind in blocks of several sizes, the largest that tells as much as any.
    most: dict[str, float] = {}
    for by, contrast in contrasts.items():
        most[_kind(by)] = max(contrast, most.get(_kind(by), 0.0))
    sizes: dict[str, str] = {}
    for by, contrast in contrasts.items():
        if contrast >= max(_CONTRAST, most[_kind(by)] - _AS_MUCH):
            sizes.setdefault(_kind(by), by)
    telling = sorted(sizes.values(), key=lambda by: -contrasts[by])
    return tuple(row for by in telling for row in _most(rows[by]))


@dataclass(frozen=True)
class _Place:
    """A place, 0 and which tokens it is, `[M] bool`, or 1 and which columns, `[H] bool`."""

    name: str
    dim: int
    chosen: Tensor

    def row(self, by: str, counts: list[tuple[Tensor, Tensor]]) -> Attribution:
        wrong, could = (int(count[self.chosen].sum()) for count in counts[self.dim])
        return Attribution(by, self.name, wrong, could)


def _without_worse(places: list[_Place], rows: list[Attribution]) -> Iterator[_Place]:
    """The places, each without the tokens that have a slot in another place, of which a larger share differs."""
    shares = [_share(row) for row in rows]
    worse: dict[float, Tensor] = {}
    taken = torch.zeros_like(places[0].chosen)
    for share in sorted(set(shares), reverse=True):
        worse[share] = taken
        for place, own in zip(places, shares, strict=True):
            taken = taken | place.chosen if own == share else taken
    for place, share in zip(places, shares, strict=True):
        yield replace(place, chosen=place.chosen & ~worse[share])


def _told_apart(apart: list[Attribution], all_of_them: list[Attribution], wrong: Tensor) -> bool:
    """Whether every wrong element is counted once, and every place with wrong ones has tokens of its own."""
    alone = all(one.elements or not row.differing for one, row in zip(apart, all_of_them, strict=True))
    return alone and sum(row.differing for row in apart) == int(wrong.sum())


def _overlapping(rows: list[Attribution]) -> list[Attribution]:
    return [replace(row, by=f"{row.by}{ALL_TOKENS}") for row in rows]


def _share(row: Attribution) -> float:
    return row.differing / row.elements if row.elements else 0.0


def _kind(by: str) -> str:
    return by.partition(", by ")[0]


def _contrast(rows: list[Attribution]) -> float:
    shares = [_share(row) for row in rows if row.elements]
    return max(shares) - min(shares) if shares else 0.0


def _most(rows: list[Attribution]) -> list[Attribution]:
    """The places with the largest shares, in their own order."""
    rows = [row for row in rows if row.elements]
    chosen = sorted(rows, key=lambda row: -_share(row))[:_MOST]
    return [replace(row, places=len(rows)) for row in rows if row in chosen]


def _places(call: MoeCall, mask: Tensor) -> Iterator[tuple[str, _Place]]:
    """Each with its kind."""
    local = local_experts(call)
    tokens, width = mask.shape
    first = call.ep_rank * call.experts.num_experts
    for expert in torch.unique(local[local >= 0]).tolist():
        yield "expert", _Place(str(expert + first), 0, (local == expert).any(1))
    for count in range(int((local >= 0).sum(1).max()) + 1 if tokens else 0):
        words = f"{count} slot{'s' * (count != 1)} of this rank"
        yield "slots of a token", _Place(words, 0, (local >= 0).sum(1) == count)
    skipped = (local < 0).any(1)
    for words, chosen in (("with skipped slots", skipped), ("without skipped slots", ~skipped)):
        yield "ranks and padding", _Place(f"tokens {words}", 0, chosen)
    position, _ = position_in_expert(local)
    for size in (64, 16, 4):
        for block in torch.unique(position[position >= 0] // size).tolist():
            rows = f"{block * size} to {block * size + size - 1}"
            yield f"row of an expert, by {size}", _Place(rows, 0, (position // size == block).any(1))
    token, column = (torch.arange(n, device=mask.device) for n in (tokens, width))
    for size in (64, 16, 1):
        if tokens > size:
            for block in range(-(-tokens // size)):
                place = f"{block * size} to {block * size + size - 1}" if size > 1 else str(block)
                yield f"token, by {size}", _Place(place, 0, token // size == block)
    for size in (128, 64, 32, 16):
        if width > size:
            for block in range(-(-width // size)):
                place = f"{block * size} to {block * size + size - 1}"
                yield f"column, by {size}", _Place(place, 1, column // size == block)
