"""Weights that were solved for: which of them an output determines, to how many digits, and what they share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mxfp4ref._words import shortened

__all__ = ["Weights", "digits", "in_common", "powers_of", "unsure_of"]

_SIGMAS = 3.0
_LEAST = 2.0**-5  # singular value of rows of length 1, below which their own roundings decide
_DIGITS = 4  # told at most
_POWERS = {2.0: "the squares", 3.0: "the cubes", 0.5: "the square roots", -1.0: "the reciprocals"}
_FEWEST = 3  # weights that have to be so
_LISTED = 4  # weights
_SAME = 2.0**-6  # relative, that a right weight may be off
_DETERMINED = 0.05  # of the token's largest weight, that one may be unsure by


def unsure_of(rows: Tensor, noise: Tensor) -> Tensor:
    """How far the weights `[n]` of rows in a sum can be off that are solved for; infinite where nothing is told.

    Args:
        rows: `[n, H] float64`.
        noise: `[H]`, the variance of the roundings in the sum.
    """
    if len(rows) > rows.shape[1]:
        return torch.full_like(rows[:, 0], torch.inf)
    lengths = rows.norm(dim=1).clamp(min=1e-300)  # of a row of zeros nothing is told
    columns, sizes, directions = torch.linalg.svd((rows / lengths[:, None]).T, full_matrices=False)
    unknown = sizes < _LEAST
    inverse = directions.T @ (columns / torch.where(unknown, 1.0, sizes)).T  # of unit rows, by weight
    unsure = _SIGMAS * (inverse.square() @ noise).sqrt() / lengths
    untold = (directions[unknown].abs() > _LEAST).any(0)
    return torch.where(untold, torch.inf, unsure)


@dataclass(frozen=True)
class Weights:
    """A token's weights, in the order of its slots.

    Attributes:
        token: its number.
        slots, experts: `[n]`; -1 for no slot, and experts as they are numbered over all ranks.
        asked, found: `[n]`, the weights.
        unsure: `[n]`, how far those found may be off.
    """

    token: int
    slots: tuple[int, ...]
    experts: tuple[int, ...]
    asked: tuple[float, ...]
    found: tuple[float, ...]
    unsure: tuple[float, ...]

    @property
    def undetermined(self) -> tuple[int, ...]:
        """The experts whose weights the output does not tell."""
        most = _DETERMINED * max(map(abs, (*self.asked, *self.found)), default=0.0)
        return tuple(e for e, u in zip(self.experts, self.unsure, strict=True) if not u <= most)

    @property
    def left_out(self) -> list[int] | None:
        """The slots that have no weight where all others have theirs; None where others differ, too."""
        each = list(zip(self.slots, self.asked, self.found, self.unsure, strict=True))
        lost = [
            slot for slot, asked, found, unsure in each if asked and abs(found) <= unsure < abs(asked) / 8
        ]
        right = all(
            abs(found - asked) <= max(unsure, _SAME * abs(asked))
            for slot, asked, found, unsure in each
            if slot not in lost
        )
        return lost if right else None

    def __str__(self) -> str:
        each = zip(self.experts, self.found, self.unsure, strict=True)
        told = " + ".join(f"{digits(f, u)} x expert {e}" for e, f, u in each if f) or "nothing"
        each = zip(self.experts, self.asked, self.slots, strict=True)
        asked = " + ".join(f"{a:.4g} x expert {e}" for e, a, slot in each if slot >= 0)
        return f"token {self.token} is {told}, asked was {asked}"


def in_common(tokens: Sequence[Weights]) -> tuple[str, set[int]]:
    """What the weights that are wrong share, in words, and the experts if it is a factor.

    That is one factor, for one expert or slot, one weight for all slots, or that they are of one slot.
    """
    factor = _one_factor(tokens)
    return factor if factor[0] else (_one_for_all(tokens) or _of_one_slot(tokens), set())


def powers_of(tokens: Sequence[Weights]) -> str:
    """Which power of those that were asked for all weights are, and surely not one multiple of them; "" if none."""
    each = [one for w in tokens for one in zip(w.asked, w.found, w.unsure, strict=True)]
    known = [(a, f, u) for a, f, u in each if a > 0]
    ratios = [f / a for a, f, _ in known]
    if len(known) < max(len(each), _FEWEST) or max(ratios) - min(ratios) < 2.0**-3 * max(map(abs, ratios)):
        return ""
    for power, words in _POWERS.items():
        if all(abs(f - a**power) <= u + 2.0**-7 * a**power for a, f, u in known):
            more = ", as where they are applied twice" * (power == 2)
            return f"they are {words} of those asked for in each of the tokens solved{more}"
    return ""


def _one_for_all(tokens: Sequence[Weights]) -> str:
    """Whether each token has one weight for all of its slots, where others were asked for; "" if not."""
    several = [w for w in tokens if len(w.slots) > 1 and len(set(w.asked)) > 1]
    alike = all(
        max(w.found) - min(w.found) <= 2 * max(w.unsure) + 2.0**-8 * max(map(abs, w.found))
        and not w.undetermined
        for w in several
    )
    return "all slots of a token have one weight" if several and alike else ""


def _of_one_slot(tokens: Sequence[Weights]) -> str:
    """Which slot's weights alone are wrong, and what they are; "" if there are several."""
    wrong = [(w, slot) for w in tokens for _, slot, *_ in _wrong(w)]
    slots = {slot for _, slot in wrong}
    if len(slots) != 1 or not any(set(w.slots) - slots for w in tokens):
        return ""
    told = []
    for w, slot in wrong:
        n = w.slots.index(slot)
        told.append(f"{digits(w.found[n], w.unsure[n])} for {w.asked[n]:.4g} in token {w.token}")
    return f"those of slot {slots.pop()} alone are wrong, {shortened(told, _LISTED)}"


def _one_factor(tokens: Sequence[Weights]) -> tuple[str, set[int]]:
    """The factor in words; and these experts.

    "" where there are several factors, experts and slots, or where all weights of all tokens have the factor.
    """
    wrong = [one for w in tokens for one in _wrong(w)]
    ratios = [ratio for *_, ratio, _ in wrong]
    if not wrong or len(wrong) == sum(len(w.slots) for w in tokens):
        return "", set()
    if max(ratios) - min(ratios) > 2.0**-6 * max(map(abs, ratios)):
        return "", set()
    experts, slots = {expert for expert, *_ in wrong}, {slot for _, slot, *_ in wrong}
    where = [f"expert {e}" for e in experts if len(experts) == 1] + [
        f"slot {s}" for s in slots if len(slots) == 1
    ]
    if not where:
        return "", set()
    count = sum(bool(_wrong(w)) for w in tokens)
    each = "of the token" if len(tokens) == 1 else f"in each of the {count} tokens solved"
    if 1 < len(tokens) != count:
        each = f"in {count} of the {len(tokens)} tokens solved"
    *_, ratio, unsure = min(wrong, key=lambda one: one[3])
    return f"{digits(ratio, unsure)} times the asked weight for {' in '.join(where)} {each}", experts


def _wrong(weights: Weights) -> list[tuple[int, int, float, float]]:
    """Expert, slot, and the ratio of found to asked with how unsure it is, where it is surely not 1."""
    w = weights
    each = zip(w.experts, w.slots, w.asked, w.found, w.unsure, strict=True)
    return [
        (e, s, f / a, u / abs(a)) for e, s, a, f, u in each if a and abs(f - a) > max(u, 2.0**-7 * abs(a))
    ]


def digits(value: float, unsure: float) -> str:
    """As many digits as are determined, four at most."""
    if 0 < abs(value) <= unsure:
        return "about 0"
    if not value or not unsure:
        return f"{value:.{_DIGITS}g}"
    sure = 1 + math.floor(math.log10(abs(value))) - math.ceil(math.log10(unsure))
    return f"{value:.{min(max(sure, 1), _DIGITS)}g}"
