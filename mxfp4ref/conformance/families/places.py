"""Where a change applies: kinds of slots, tokens or columns, and their words."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mxfp4ref.conformance.families.slot_kinds import HALVES, SlotKind, attributes, slots_of_kind
from mxfp4ref.model.call import MoeCall

__all__ = [
    "MaskOf",
    "concerns_what_is_wrong",
    "kinds_of_slots",
    "kinds_of_tokens",
    "named_columns",
    "named_experts",
    "named_tokens",
    "residue_in_words",
    "stage_before_gemm2",
    "suspected_experts",
]

_ORDINALS = {2: "second", 4: "fourth", 8: "eighth"}
_REPEATED = 0.4  # of the periods have some of the columns
_FEWEST_COLUMNS = 8  # of which a common rest is no chance
_LISTED = 8
_MOSTLY = 0.8  # of the places that a change concerns, which come out wrong

MaskOf = Callable[[MoeCall, Tensor], Tensor]
_Columns = Callable[[int], Tensor]  # of a width, which


def stage_before_gemm2(call: MoeCall) -> str:
    """The first one in which rows of zeros, or columns in other places, come out of the activation as such.

    GEMM1, unless it has a bias: that is added to zeros too, and where it belongs.
    """
    return "fc1" if call.experts.fc1_biases is None else "activation"


def concerns_what_is_wrong(concerned: Tensor, wrong: Tensor) -> bool:
    """Whether the places that a change concerns, `bool`, are all that are wrong, `bool`, and hardly any others."""
    if bool((wrong & ~concerned).any()) or not bool(concerned.any()):
        return False
    return float(wrong[concerned].float().mean()) >= _MOSTLY


@dataclass(frozen=True)
class Suspects:
    """Some experts of this rank.

    Attributes:
        words: which they are.
        of_any: their numbers on the rank of any call, by how many experts it has.
    """

    words: str
    of_any: Callable[[int], Collection[int]]

    def among(self, call: MoeCall, local: Tensor) -> Tensor:
        """Which slots are theirs."""
        experts = self.of_any(call.experts.num_experts)
        return torch.isin(local, torch.tensor([*experts], dtype=local.dtype, device=local.device))


def suspected_experts(call: MoeCall, local: Tensor, wrong: Tensor) -> Suspects | None:
    """The experts that no right token uses, if every wrong token uses one of them."""
    in_right = set(local[~wrong].flatten().tolist())
    suspects = sorted(set(local[wrong].flatten().tolist()) - in_right - {-1})
    used = set(local.flatten().tolist()) - {-1}
    if not suspects or len(suspects) > _LISTED or len(suspects) == len(used):
        return None
    if not bool(torch.isin(local[wrong], torch.tensor(suspects, device=local.device)).any(1).all()):
        return None
    return named_experts(call, set(suspects), used - set(suspects))


def named_experts(call: MoeCall, some: set[int], others: set[int]) -> Suspects | None:
    """Words for some experts of this rank, of which others are none, or for all but these; None if both are many."""
    for half, words in HALVES:
        of_half = set(half(call.experts.num_experts))
        if len(some) > 1 and some <= of_half and not others & of_half:
            return Suspects(f"the {words}", half)
    if len(some) > 1 and 0 < len(others) < len(some):
        rest = _few_experts(call, others)
        return Suspects(
            f"all experts but {rest.words}", lambda n: [e for e in range(n) if e not in rest.of_any(n)]
        )
    return _few_experts(call, some) if len(some) <= _LISTED else None


def _few_experts(call: MoeCall, some: set[int]) -> Suspects:
    ids = _ids(call, some)
    if some == {0}:
        return Suspects("the first expert", lambda n: (0,))
    if some == {call.experts.num_experts - 1}:
        return Suspects("the last expert", lambda n: (n - 1,))
    return Suspects(f"expert{'s' * (len(ids) > 1)} {_listed(ids)}", lambda n: some)


def _ids(call: MoeCall, some: Iterable[int]) -> list[int]:
    return sorted(s + call.ep_rank * call.experts.num_experts for s in some)


def kinds_of_slots(
    call: MoeCall, local: Tensor, experts: Suspects | None
) -> Iterator[tuple[SlotKind, MaskOf]]:
    """Kinds of slots, first that of some experts, and how to find them in any call."""
    if experts is not None:
        yield SlotKind(f"of {experts.words}", experts.among(call, local)), experts.among
    for kind in attributes(call, local):
        yield kind, partial(slots_of_kind, kind.words)


def kinds_of_tokens(
    call: MoeCall, local: Tensor, chosen: Tensor, among: Tensor
) -> Iterator[tuple[SlotKind, MaskOf]]:
    """Kinds of slots that the tokens `chosen [M] bool` have, and no other of those of `among`."""
    for kind, mask_of in kinds_of_slots(call, local, suspected_experts(call, local, chosen | ~among)):
        tokens = kind.mask.any(1)
        if bool(tokens.any()) and torch.equal(tokens & among, chosen & among):
            yield kind, mask_of


def named_tokens(call: MoeCall, local: Tensor, chosen: Tensor, among: Tensor) -> Iterator[tuple[str, MaskOf]]:
    """Words for the tokens `chosen [M] bool` among those of `among`, and how to find them in any call, `[M] bool`.

    The likeliest first; none if they are too many to name.
    """
    rows = chosen.nonzero().flatten().tolist()

    def listed(call: MoeCall, local: Tensor) -> Tensor:
        return torch.isin(torch.arange(len(local), device=local.device), chosen.nonzero().flatten())

    if len(rows) == 1:
        yield f"for token {rows[0]}{', the last' * (rows[0] == len(chosen) - 1 > 0)}", listed
    kinds = list(kinds_of_tokens(call, local, chosen, among))
    for kind, mask_of in kinds:
        words = f"for {kind.tokens or f'tokens with slots {kind.words}'}"
        yield words, lambda call, local, mask_of=mask_of: mask_of(call, local).any(1)
    if not kinds and 1 < len(rows) <= _LISTED:
        yield f"for tokens {_listed(rows)}", listed


def named_columns(columns: Tensor, among: Tensor | None = None) -> tuple[str, _Columns] | None:
    """Words for a set of output columns, `[H] bool`, among those of `among`, and that set for any width.

    None if there are no words for it.
    """
    sets = [(named, named[1](len(columns)).to(columns.device)) for named in _column_sets(columns)]
    sets = [(named, where) for named, where in sets if not bool(where.all())]  # as of columns right by chance
    for named, where in sets:
        if torch.equal(
            columns if among is None else columns & among, where if among is None else where & among
        ):
            return named
    if among is None:  # some were right by chance
        for named, where in sets:
            if bool((where | ~columns).all()) and float(columns[where].float().mean()) > 0.8:
                return named
    return None


def residue_in_words(columns: Tensor) -> str:
    """Words for columns, `[H] bool`, that repeat at a period and follow each other inside of it; else ""."""
    chosen = columns.nonzero().flatten()
    if len(chosen) < _FEWEST_COLUMNS:
        return ""
    for period in (128, 64, 32, 16, 8, 4, 2):
        places = torch.unique(chosen % period)
        first, last = int(places[0]), int(places[-1])
        repeats = len(torch.unique(chosen // period)) >= max(_REPEATED * (len(columns) // period), 2)
        if len(places) > period // 2 or last - first + 1 > len(places) or not repeats:
            continue
        if len(places) == 1 and period in _ORDINALS:
            return f"in every {_ORDINALS[period]} column, from {first} on"
        here = f"columns {first} to {last}" if last > first else f"column {first}"
        return f"in {here} of every {period}"
    return ""


def _column_sets(columns: Tensor) -> Iterator[tuple[str, _Columns]]:
    """Sets of columns that might be those, and their words."""
    chosen = columns.nonzero().flatten()
    if not len(chosen) or bool(columns.all()):
        return
    width, first, last = len(columns), int(chosen[0]), int(chosen[-1])
    if first == last:
        yield f"in column {first}", lambda n: torch.arange(n) == first
        return
    if width % 2 == 0 and first == width // 2:
        yield "in the second half of the columns", lambda n: torch.arange(n) >= n // 2
    for size in (128, 64, 32, 16, 8):
        if first == width - size and last == width - 1:
            yield f"in the last {size} columns", lambda n, s=size: torch.arange(n) >= n - s
    yield f"in columns {first} to {last}", lambda n: (torch.arange(n) >= first) & (torch.arange(n) <= last)
    for size in (8, 16, 32, 64, 128):
        low, high = first // size * size, last // size * size + size - 1
        yield (
            f"in columns {low} to {high}",
            lambda n, a=low, b=high: (torch.arange(n) >= a) & (torch.arange(n) <= b),
        )
    for size, unit in (
        (128, "block of 128 columns"),
        (64, "block of 64 columns"),
        (32, "block of 32 columns"),
        (16, "block of 16 columns"),
        (8, "block of 8 columns"),
        (1, "column"),
    ):
        for step, word in (
            (2, "second"),
            (3, "third"),
            (4, "fourth"),
            (8, "eighth"),
            (16, "sixteenth"),
            (32, "thirty-second"),
        ):
            at = first // size % step
            if width >= size * step:
                yield (
                    f"in every {word} {unit}, from {at * size} on",
                    lambda n, s=size, k=step, a=at: torch.arange(n) // s % k == a,
                )


def _listed(items: list[int]) -> str:
    return ", ".join(map(str, items[:_LISTED])) + (", ..." if len(items) > _LISTED else "")
