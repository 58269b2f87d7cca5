"""Rules by which rows have tensors of another expert: by its number, by tiles of rows, or by the row's own number."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mxfp4ref.conformance.families.solved.pursuit import Rows
from mxfp4ref.model.call import MoeCall

__all__ = ["Rule", "rules"]

Rule = Callable[[MoeCall, Rows], Tensor]  # to the expert whose tensors each sorted row has, `[R] int64`
_SIZES = (8, 16, 32, 64, 128)


def rules() -> Iterator[tuple[str, Rule, float]]:
    """In words with "{has}" for "has those of", the rule, and how unusual it is; without those of `expert_maps`."""
    yield from _of_experts()
    yield from _of_tiles()
    yield from _of_rows()


def _of_experts() -> Iterator[tuple[str, Rule, float]]:
    for words, by in (("before", -1), ("after", 1)):
        yield (
            f"each expert {{has}} the one with rows {words} it (idle ones left out)",
            lambda _, rows, b=by: _moved(rows.expert, b),
            1.4,
        )
    yield (
        "the n-th expert that has rows {has} expert n (idle ones are not counted)",
        lambda _, rows: torch.searchsorted(torch.unique(rows.expert), rows.expert),
        1.3,
    )
    yield (
        "expert n {has} the n-th expert that has rows (idle ones are not counted)",
        lambda _, rows: (found := torch.unique(rows.expert))[rows.expert.clamp(max=len(found) - 1)],
        1.4,
    )
    yield (
        "an expert that has as many rows as the one with rows before it {has} that one (kept from before where the "
        "problem's shape, the number of rows, is the same)",
        lambda _, rows: _kept(rows.expert, rows.counts),
        1.4,
    )
    ways: tuple[tuple[str, Rule], ...] = (
        ("of their names sorted as strings (experts.10 before experts.2)", _by_name),
        ("of their numbers of rows, the most first", lambda call, rows: _by_count(call, rows, -1)),
        ("of their numbers of rows, the fewest first", lambda call, rows: _by_count(call, rows, 1)),
    )
    for words, order in ways:
        yield (
            f"expert n {{has}} the n-th in the order {words}",
            lambda call, rows, o=order: o(call, rows)[rows.expert],
            1.5,
        )
        yield (
            f"the n-th expert in the order {words} {{has}} expert n",
            lambda call, rows, o=order: o(call, rows).argsort()[rows.expert],
            1.55,
        )


def _of_tiles() -> Iterator[tuple[str, Rule, float]]:
    for size in _SIZES:
        tile = f"each tile of {size} sorted rows, which may hold rows of several experts, {{has}} its"
        yield f"{tile} first row's expert", lambda _, rows, s=size: rows.expert[_of_tile(rows, s)[0]], 1.3
        yield f"{tile} last row's expert", lambda _, rows, s=size: rows.expert[_of_tile(rows, s)[1]], 1.3
        for by, words, which in ((-1, "before", "first"), (1, "after", "last")):
            yield (
                f"the {which} tile of {size} rows of each expert {{has}} the expert with rows {words} it: of the "
                f"tile {words} (fetched a tile {'late' if by < 0 else 'early'})",
                lambda _, rows, s=size, b=by: _moved(rows.position // s + (rows.expert << 32), b) >> 32,
                1.35,
            )
        for other in _SIZES:
            if other != size:
                yield (
                    f"each expert's rows are padded to blocks of {size}, and a row {{has}} the expert that the "
                    f"number of its block of {other} gives in the list of the former",
                    lambda _, rows, s=size, o=other: _looked_up(rows, s, o),
                    1.45,
                )
    for by in (1, -1, 2, -2, 4, -4, 8, -8):
        some = f"the {'first' if by < 0 else 'last'} {abs(by)} row{'s' * (abs(by) > 1)} of an expert"
        yield (
            f"each of {some} {{has}} the expert {'before' if by < 0 else 'after'} it (boundaries between the "
            f"experts' rows are {abs(by)} off)",
            lambda _, rows, b=by: rows.expert[(torch.arange(len(rows)) + b).clamp(0, len(rows) - 1)],
            1.4,
        )


def _of_tile(rows: Rows, size: int) -> tuple[Tensor, Tensor]:
    """The first and the last row of each sorted row's tile."""
    first = torch.arange(len(rows)) // size * size
    return first, (first + size - 1).clamp(max=len(rows) - 1)


def _of_rows() -> Iterator[tuple[str, Rule, float]]:
    numbers: tuple[tuple[str, Callable[[Rows], Tensor]], ...] = (
        ("the slot's place in its token", lambda rows: rows.slot),
        ("the token's number", lambda rows: rows.token),
        ("the row's number among those of its expert", lambda rows: rows.position),
        ("the row's number in the sorted order", lambda rows: torch.arange(len(rows))),
    )
    for words, number in numbers:
        yield (
            f"they are indexed by {words} instead of the expert",
            lambda call, rows, n=number: n(rows) % call.experts.num_experts,
            1.5,
        )
    places: tuple[tuple[str, Callable[[Rows], Tensor]], ...] = (
        ("slot before it, around the token's end", lambda rows: rows.slot - 1),
        ("slot after it, around the token's end", lambda rows: rows.slot + 1),
        ("token's first slot", lambda rows: rows.slot * 0),
        ("token's last slot", lambda rows: rows.slot * 0 - 1),
    )
    for words, place in places:
        yield (
            f"each slot {{has}} the expert of the {words}",
            lambda _, rows, p=place: _of_slot(rows, p(rows) % rows.per_token),
            1.5,
        )


def _of_slot(rows: Rows, slot: Tensor) -> Tensor:
    """The expert of another slot of each row's token, its own where that is skipped."""
    experts = torch.full((int(rows.token.max()) + 1, rows.per_token), -1)
    experts[rows.token, rows.slot] = rows.expert
    found = experts[rows.token, slot]
    return torch.where(found < 0, rows.expert, found)


def _moved(number: Tensor, by: int) -> Tensor:
    """So many further on among the numbers that occur, the first and last keep theirs."""
    which, inverse = torch.unique(number, return_inverse=True)
    found: Tensor = which[(inverse + by).clamp(0, len(which) - 1)]
    return found


def _kept(expert: Tensor, counts: Tensor) -> Tensor:
    with_rows, inverse = torch.unique(expert, return_inverse=True)
    counts = counts[torch.searchsorted(expert, with_rows)]
    whose = with_rows.clone()
    for i in range(1, len(whose)):
        if counts[i] == counts[i - 1]:
            whose[i] = whose[i - 1]
    found: Tensor = whose[inverse]
    return found


def _by_name(call: MoeCall, _: Rows) -> Tensor:
    held = call.experts.num_experts
    return torch.tensor(sorted(range(held), key=lambda expert: str(call.ep_rank * held + expert)))


def _by_count(call: MoeCall, rows: Rows, sign: int) -> Tensor:
    counts = torch.bincount(rows.expert, minlength=call.experts.num_experts)
    return (sign * counts).argsort(stable=True)


def _looked_up(rows: Rows, size: int, other: int) -> Tensor:
    blocks = (torch.bincount(rows.expert) + size - 1) // size
    of_block = torch.arange(len(blocks)).repeat_interleave(blocks)
    begin = (blocks.cumsum(0) - blocks) * size
    found: Tensor = of_block[((begin[rows.expert] + rows.position) // other).clamp(max=len(of_block) - 1)]
    return found
