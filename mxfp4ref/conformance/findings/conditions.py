"""Which things are wrong, told by an interval of some quantity that exactly those lie in."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["condition", "indices_words"]

_MOST_LISTED = 8
_LEAST = 4  # wrong and right ones from which a condition is told: fewer lie in some interval by chance


def condition(wrong: Tensor, quantities: Mapping[str, Tensor]) -> str:
    """What exactly the wrong ones have in common: "whose largest magnitude is at most 1e-05"; "" if nothing.

    An interval of a quantity that holds all wrong ones and no right one, bounded on one side sooner than on two.

    Args:
        wrong: `[N] bool`.
        quantities: `[N]` each, by the words before "at most ...".
    """
    if int(wrong.sum()) < _LEAST or int((~wrong).sum()) < _LEAST:
        return ""
    best: tuple[int, str] | None = None
    for name, quantity in quantities.items():
        low, high = quantity[wrong].min(), quantity[wrong].max()
        right = quantity[~wrong]
        if bool(((right >= low) & (right <= high)).any()):
            continue
        below, above = bool((right < low).any()), bool((right > high).any())
        shown = (_number(low), _number(high))
        if below and above:
            words = f"{name} {shown[0]}" if low == high else f"{name} {shown[0]} to {shown[1]}"
        else:
            words = f"{name} at least {shown[0]}" if below else f"{name} at most {shown[1]}"
        if best is None or below + above < best[0]:
            best = below + above, words
    return best[1] if best is not None else ""


def indices_words(chosen: Tensor, name: str) -> str:
    """ "rows 3 to 7 of 8", "experts 1, 3, 5 of 6": which of them are chosen, `[N] bool`."""
    places = chosen.nonzero().flatten().tolist()
    total = len(chosen)
    if len(places) == 1:
        return f"{name} {places[0]} of {total}"
    if places[-1] - places[0] + 1 == len(places):
        return f"{name}s {places[0]} to {places[-1]} of {total}"
    step = places[1] - places[0]
    if len(places) > 2 and places == list(range(places[0], total, step)):
        return f"every {step}{ {2: 'nd', 3: 'rd'}.get(step, 'th') } {name} of {total}, from {places[0]} on"
    shown = ", ".join(map(str, places[:_MOST_LISTED]))
    return f"{name}s {shown}{', ...' if len(places) > _MOST_LISTED else ''} ({len(places)} of {total})"


def _number(value: Tensor) -> str:
    return f"{int(value)}" if not torch.is_floating_point(value) else f"{float(value):.4g}"
