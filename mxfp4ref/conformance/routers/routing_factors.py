"""Factors between the weights of a router and the right ones: one for all, or one for each token, slot or expert."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref.conformance.routers.routing_hypotheses import View, near

__all__ = ["factor_between", "factor_words", "factors_by_part"]

_FEWEST = 4  # weights from which a factor is told
_RATIO = 2.0**-19


def factor_between(weights: Tensor, made: Tensor, view: View, rounding: float) -> float | None:
    """The one factor between them, if there is one: a known one, or that of the largest weight."""
    usable = made.isfinite() & (made.abs() > 2.0**-100)
    if not bool(usable.any()):
        return None
    largest = int(torch.where(usable, made.abs(), 0.0).flatten().argmax())
    solved = float(weights.flatten()[largest] / made.flatten()[largest])
    relative = 8 * 2.0**-23 + rounding
    known = [view.factor, 1.0, view.given, view.factor**2, 1 / view.factor]
    factor = next((c for c in known if abs(c - solved) <= relative * abs(c)), solved)
    if factor == solved and int(usable.sum()) < _FEWEST:
        return None
    fits = near(weights, made * factor, relative * (1 if factor != solved else 2))
    return factor if factor and bool(fits.all()) else None


def factor_words(factor: float, view: View, *, plain: bool) -> list[str]:
    """How a factor that is not the right one comes about."""
    times = factor / view.factor
    if factor == view.factor:
        return []
    said = f"all weights are {times:.4g}x the right ones" if plain else f"and {times:.4g}x"
    if view.factor != 1.0:
        if factor == 1.0:
            before = ", or multiplied in before the normalisation" if plain else ""
            return [f"{said}: the routed scaling factor {view.factor:g} is left out{before}"]
        if factor == view.factor**2:
            return [f"{said}: the routed scaling factor {view.factor:g} is applied twice"]
        if factor == 1 / view.factor:
            return [f"{said}: the weights are divided by the routed scaling factor {view.factor:g}"]
    elif factor == view.given != 1.0:
        return [
            f"{said}: the routed scaling factor {view.given:g} is in the weights and belongs to the output"
        ]
    return [said]


def factors_by_part(experts: Tensor, weights: Tensor, right: Tensor) -> tuple[list[str], bool] | None:
    """A factor for each token, slot or expert."""
    ratio = weights / right
    if not bool(ratio.isfinite().all()):
        return None
    tokens, slots = ratio[:, :1].expand_as(ratio), ratio[:1].expand_as(ratio)
    if ratio.shape[1] > 1 and bool(near(ratio, tokens, _RATIO).all()):
        low, high = float(ratio.min()), float(ratio.max())
        return [
            f"each token's weights are the right ones times a factor of its own, {low:.4g} to {high:.4g}"
        ], False
    if len(ratio) >= _FEWEST and bool(near(ratio, slots, _RATIO).all()):
        factors = ", ".join(f"{c:.4g}" for c in slots[0].tolist())
        return [f"weights are the right ones times {factors} by slot"], False
    by_expert: dict[int, float] = {}
    for expert, one in zip(experts.flatten().tolist(), ratio.flatten().tolist(), strict=True):
        if abs(by_expert.setdefault(expert, one) - one) > _RATIO * abs(one):
            return None
    if ratio.numel() < 2 * len(by_expert):
        return None
    shown = ", ".join(f"{e} ({c:.4g}x)" for e, c in sorted(by_expert.items()) if abs(c - 1) > _RATIO)
    return [f"weights are right up to a factor of each expert: {shown}"], False
