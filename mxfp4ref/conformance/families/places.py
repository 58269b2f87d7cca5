"""Where a change applies: kinds of slots, tokens or columns, and their words."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mxfp4ref.conformance.families.slot_kinds import attributes
from mxfp4ref.model.call import MoeCall

__all__ = [
    "column_set",
    "columns_in_words",
    "fitting_attributes",
    "residue_in_words",
    "suspected_experts",
    "tokens_in_words",
]

_FEWEST_COLUMNS = 8  # of which a common rest is no chance

_MaskOf = Callable[[MoeCall, Tensor], Tensor]


def fitting_attributes(
    call: MoeCall, local: Tensor, wrong: Tensor, *, most: int = 8
) -> list[tuple[str, Tensor, _MaskOf]]:
    """Kinds of slots that every wrong token has one of and no right token, the most telling first.

    Args:
        call: the call.
        local: its local experts, `[M, k]`.
        wrong: `[M] bool`.
    """
    here = local >= 0
    found: list[tuple[str, Tensor, _MaskOf]] = []
    for words, mask, mask_of in _kinds(call, local, wrong):
        if not bool(mask.any()) or torch.equal(mask, here):
            continue
        if torch.equal(mask.any(1), wrong) and not any(torch.equal(mask, other) for _, other, _ in found):
            found.append((words, mask, mask_of))
    return found[:most]


def suspected_experts(call: MoeCall, local: Tensor, wrong: Tensor) -> tuple[str, list[int]] | None:
    """The experts that no right token uses, if every wrong token uses one of them; in words too."""
    in_right = set(local[~wrong].flatten().tolist())
    suspects = sorted(set(local[wrong].flatten().tolist()) - in_right - {-1})
    used = set(local.flatten().tolist()) - {-1}
    if not suspects or len(suspects) > 8 or len(suspects) == len(used):
        return None
    if not bool(torch.isin(local[wrong], torch.tensor(suspects, device=local.device)).any(1).all()):
        return None
    count = call.experts.num_experts
    ids = [s + call.ep_rank * count for s in suspects]
    if len(ids) == 1 and suspects[0] in (0, count - 1):
        return f"the {'last' if suspects[0] else 'first'} expert (here {ids[0]})", suspects
    return f"expert{'s' if len(ids) > 1 else ''} {_listed(ids)}", suspects


def _kinds(call: MoeCall, local: Tensor, wrong: Tensor) -> Iterator[tuple[str, Tensor, _MaskOf]]:
    if (found := suspected_experts(call, local, wrong)) is not None:
        who, suspects = found

        def of_experts(call: MoeCall, local: Tensor) -> Tensor:
            if "the last" in who:
                return local == call.experts.num_experts - 1
            return torch.isin(local, torch.tensor(suspects, device=local.device))

        yield f"of {who}", of_experts(call, local), of_experts
    for words, mask in attributes(call, local):

        def of_kind(call: MoeCall, local: Tensor, words: str = words) -> Tensor:
            found = dict(attributes(call, local)).get(words)
            return torch.zeros_like(local, dtype=torch.bool) if found is None else found

        yield words, mask, of_kind


def tokens_in_words(call: MoeCall, local: Tensor, chosen: Tensor, among: Tensor) -> str:
    """Words for the tokens `chosen [M] bool` among those of `among`; "" if they are too many to name."""
    if int(chosen.sum()) == 1:
        token = int(chosen.nonzero()[0])
        return f"for token {token}{', the last' * (token == len(chosen) - 1 > 0)}"
    for words, mask, _ in _kinds(call, local, chosen | ~among):
        tokens = mask.any(1)
        if bool(tokens.any()) and torch.equal(tokens & among, chosen & among):
            return _of_tokens(words)
    rows = chosen.nonzero().flatten().tolist()
    return f"for token{'s' if len(rows) > 1 else ''} {_listed(rows)}" if len(rows) <= 8 else ""


def _of_tokens(words: str) -> str:
    """Words for the tokens that have slots of a kind."""
    if words.startswith(("of tokens ", "of the first token", "of the last token")):
        return f"for {words.removeprefix('of ')}"
    return f"for tokens with slots {words}"


def columns_in_words(columns: Tensor, among: Tensor | None = None) -> str:
    """Words for a set of output columns, `[H] bool`, among those of `among`; "" if there are none for it."""
    sets = [(words, chosen(len(columns)).to(columns.device)) for words, chosen in _column_sets(columns)]
    sets = [(words, where) for words, where in sets if not bool(where.all())]  # as of columns right by chance
    for words, where in sets:
        if torch.equal(
            columns if among is None else columns & among, where if among is None else where & among
        ):
            return words
    if among is None:  # some were right by chance
        for words, where in sets:
            if bool((where | ~columns).all()) and float(columns[where].float().mean()) > 0.8:
                return words
    return ""


def residue_in_words(columns: Tensor) -> str:
    """Words for columns, `[H] bool`, that all leave the same rest by 8, 4 or 2; "" of few, or where they do not."""
    chosen = columns.nonzero().flatten()
    if len(chosen) < _FEWEST_COLUMNS:
        return ""
    for step, word in ((8, "eighth"), (4, "fourth"), (2, "second")):
        if bool((chosen % step == chosen[0] % step).all()):
            return f"in every {word} column, from {int(chosen[0]) % step} on"
    return ""


def column_set(words: str, columns: Tensor) -> Callable[[int], Tensor]:
    """The set that these words stand for, for any width."""
    return dict(_column_sets(columns))[words]


def _column_sets(columns: Tensor) -> Iterator[tuple[str, Callable[[int], Tensor]]]:
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
    return ", ".join(map(str, items[:8])) + (", ..." if len(items) > 8 else "")
