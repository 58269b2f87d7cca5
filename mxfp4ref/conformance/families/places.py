"""Where a change applies: kinds of slots, tokens or columns, and their words."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mxfp4ref.conformance.families.slots import attributes
from mxfp4ref.model.call import MoeCall

__all__ = ["columns_in_words", "fitting_attributes", "tokens_in_words"]


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


def _kinds(call: MoeCall, local: Tensor, wrong: Tensor) -> Iterator[tuple[str, Tensor, _MaskOf]]:
    in_right = local[~wrong]
    suspects = sorted(set(local[wrong].flatten().tolist()) - set(in_right.flatten().tolist()) - {-1})
    if 0 < len(suspects) <= 8 and len(suspects) < call.experts.num_experts:
        ids = [s + call.ep_rank * call.experts.num_experts for s in suspects]
        words = f"of expert{'s' if len(ids) > 1 else ''} {_listed(ids)}"

        def of_experts(call: MoeCall, local: Tensor) -> Tensor:
            return torch.isin(local, torch.tensor(suspects, device=local.device))

        yield words, of_experts(call, local), of_experts
    for words, mask in attributes(call, local):

        def of_kind(call: MoeCall, local: Tensor, words: str = words) -> Tensor:
            found = dict(attributes(call, local)).get(words)
            return torch.zeros_like(local, dtype=torch.bool) if found is None else found

        yield words, mask, of_kind


def tokens_in_words(call: MoeCall, local: Tensor, chosen: Tensor, among: Tensor) -> str:
    """Words for the tokens `chosen [M] bool` among those of `among`; "" if they are too many to name."""
    for words, mask, _ in _kinds(call, local, chosen | ~among):
        tokens = mask.any(1)
        if bool(tokens.any()) and torch.equal(tokens & among, chosen & among):
            return f"for tokens with slots {words}"
    rows = chosen.nonzero().flatten().tolist()
    return f"for token{'s' if len(rows) > 1 else ''} {_listed(rows)}" if len(rows) <= 8 else ""


def columns_in_words(columns: Tensor, among: Tensor | None = None) -> str:
    """Words for a set of output columns, `[H] bool`, among those of `among`; "" if there are none for it."""
    width = len(columns)
    among = torch.ones_like(columns) if among is None else among
    index = torch.arange(width, device=columns.device)
    chosen = columns.nonzero().flatten()
    if not len(chosen):
        return ""
    first, last = int(chosen[0]), int(chosen[-1])
    if first == last:
        return f"in column {first}"
    for size in (128, 64, 32, 16, 8):
        for step, word in ((2, "second"), (4, "fourth"), (8, "eighth")):
            for at in range(step):
                if width >= size * step and torch.equal(index // size % step == at, columns) and size * step < width + size:
                    if width > size * step or step == 2:
                        return f"in every {word} block of {size} columns, from {at * size} on"
    for step, word in ((2, "second"), (4, "fourth"), (8, "eighth"), (16, "sixteenth"), (32, "thirty-second")):
        for at in range(step):
            if width >= 2 * step and torch.equal((index % step == at) & among, columns):
                return f"in every {word} column, from {at} on"
    inside = (index >= first) & (index <= last)
    if torch.equal(inside & among, columns) or float(columns[first : last + 1].float().mean()) > 0.95:
        low, high = _rounded(first, last, width, columns, among)
        return f"in columns {low} to {high} of {width}"
    return ""


def _rounded(first: int, last: int, width: int, columns: Tensor, among: Tensor) -> tuple[int, int]:
    """The ends moved out to multiples of 8 where columns in between were right by chance."""
    low, high = first // 8 * 8, min(last // 8 * 8 + 7, width - 1)
    gap = int((among[low:first] & ~columns[low:first]).sum()) + int((among[last + 1 : high + 1]).sum())
    return (low, high) if gap == 0 or (first - low) + (high - last) <= 2 else (first, last)


def _listed(items: list[int]) -> str:
    return ", ".join(map(str, items[:8])) + (", ..." if len(items) > 8 else "")
