"""Hypotheses on the activation's clamps, one of up and one of gate, and on sigmoids that go wrong on one side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypotheses.activation_steps import activation_hypothesis
from mxfp4ref.conformance.families.hypothesis import Hypothesis
from mxfp4ref.defects.variants.swiglu import SwigluVariant, clamp_both
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.activation import SWIGLU, SWIGLU_BIAS, sigmoid

__all__ = ["formula_part_hypotheses"]

_Of = Callable[[Tensor, Tensor], Tensor]  # of a number and the limit
_min, _max = fp32.minimum, fp32.maximum
_ABOVE, _BELOW, _EITHER = "above the limit", "below minus the limit", "beyond the limit, on either side,"


def _clamps() -> Iterator[tuple[str, _Of]]:
    """What may become of up or of gate at the limit."""
    yield "is not clamped", lambda t, limit: t
    yield "is clamped from above only", _min
    yield "is clamped from below only", lambda t, limit: _max(t, -limit)
    yield "is clamped to [-L, L]", lambda t, limit: _max(_min(t, limit), -limit)
    yield "is clamped to [0, L]", lambda t, limit: _max(_min(t, limit), torch.zeros_like(t))
    yield "is clamped to [-L, 0]", lambda t, limit: _max(_min(t, torch.zeros_like(t)), -limit)
    yield "is at least the limit (max taken for min)", _max
    yield (
        "is capped smoothly, L tanh(x / L)",
        lambda t, limit: torch.where(limit.isfinite(), limit * torch.tanh(t / limit), t),
    )
    for what, value in (("zero", 0.0), ("one", 1.0), ("NaN", torch.nan)):
        for where, beyond in _regions():
            yield (
                f"becomes {what} {where} instead of the limit",
                lambda t, limit, v=value, b=beyond: t.masked_fill(b(t, limit), v),
            )
    yield (
        "becomes zero above the limit and is clamped below",
        lambda t, limit: _max(t.masked_fill(t > limit, 0.0), -limit),
    )
    yield (
        "gets the limit with the wrong sign where it is beyond",
        lambda t, limit: torch.where(t.abs() > limit, -limit * t.sign(), t),
    )
    yield (
        "gets plus the limit where it is beyond, below minus the limit too",
        lambda t, limit: torch.where(t.abs() > limit, limit, t),
    )


def _regions() -> Iterator[tuple[str, Callable[[Tensor, Tensor], Tensor]]]:
    yield _ABOVE, lambda t, limit: t > limit
    yield _BELOW, lambda t, limit: t < -limit
    yield _EITHER, lambda t, limit: t.abs() > limit


def _both_clamps() -> Iterator[tuple[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]], float]]:
    """Of up and of gate, which are right where up is clamped to [-L, L] and gate from above."""
    for (of_up, up_clamp), (of_gate, gate_clamp) in product(_clamps(), _clamps()):
        right = of_up == "is clamped to [-L, L]", of_gate == "is clamped from above only"
        if not any(right) and of_up.split()[:2] != of_gate.split()[:2]:
            continue  # two mistakes that have nothing to do with each other
        both = zip(("up", "gate"), (of_up, of_gate), right, strict=True)
        if said := [f"{what} {how}" for what, how, fine in both if not fine]:
            yield (
                " and ".join(said),
                lambda u, g, limit, a=up_clamp, b=gate_clamp: (a(u, limit), b(g, limit)),
                1.0 + 0.3 * len(said),
            )
    masks: tuple[tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor]], ...] = (
        ("up is beyond the limit", lambda u, g, limit: u.abs() > limit),
        ("gate is above the limit", lambda u, g, limit: g > limit),
        ("gate is beyond the limit, on either side", lambda u, g, limit: g.abs() > limit),
        ("up is beyond the limit or gate above it", lambda u, g, limit: (u.abs() > limit) | (g > limit)),
        ("up or gate is beyond the limit", lambda u, g, limit: (u.abs() > limit) | (g.abs() > limit)),
    )
    for where, mask in masks:

        def zero(
            u: Tensor, g: Tensor, limit: Tensor, mask: Callable[..., Tensor] = mask
        ) -> tuple[Tensor, Tensor]:
            up, gate = clamp_both(u, g, limit)
            return up, gate.masked_fill(mask(u, g, limit), 0.0)

        yield f"the product becomes zero where {where}", zero, 1.5


def _sigmoids() -> Iterator[tuple[str, Callable[[Tensor], Tensor], float]]:
    """One of the two branches of a sigmoid that does not overflow is wrong, or used for both signs."""
    branches: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
        ("that of its magnitude |x|", lambda z: sigmoid(z.abs())),
        ("that of -|x|", lambda z: sigmoid(-z.abs())),
        ("1", torch.ones_like),
        ("0", torch.zeros_like),
        ("1/2", lambda z: torch.full_like(z, 0.5)),
        ("e^x", torch.exp),
        ("e^-|x|", lambda z: torch.exp(-z.abs())),
        ("NaN", lambda z: torch.full_like(z, torch.nan)),
    )
    signs: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
        ("of a negative argument", lambda z: z < 0),
        ("of a positive argument", lambda z: z > 0),
        ("of any argument", lambda z: z == z),
    )
    for (what, branch), (where, of) in product(branches, signs):
        if (what, where) != (
            "that of its magnitude |x|",
            "of any argument",
        ):  # which is that of negative ones
            yield (
                f"the sigmoid {where} is {what}, as of one branch for both signs",
                lambda z, b=branch, of=of: torch.where(of(z), b(z), sigmoid(z)),
                1.3,
            )
    yield "the sigmoid is a hard one, clamp(x / 5 + 1/2, 0, 1)", lambda z: (z / 5 + 0.5).clamp(0, 1), 1.4
    yield "the sigmoid is a hard one, clamp(x / 4 + 1/2, 0, 1)", lambda z: (z / 4 + 0.5).clamp(0, 1), 1.4
    yield "the sigmoid is 1/2 + x / (2 + 2 |x|) (softsign)", lambda z: 0.5 + z / (2 + 2 * z.abs()), 1.4
    yield "the sigmoid is a tanh", torch.tanh, 1.4
    yield (
        "the sigmoid is the tanh of softplus (Mish)",
        lambda z: torch.tanh(torch.nn.functional.softplus(z)),
        1.4,
    )
    yield "the sigmoid is its derivative, s (1 - s)", lambda z: sigmoid(z) * (1 - sigmoid(z)), 1.5


def formula_part_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """Of a SwiGLU."""
    if call.activation.id not in (SWIGLU, SWIGLU_BIAS):
        return
    for words, function, cost in _sigmoids():
        yield activation_hypothesis(words, SwigluVariant(sigmoid=function), cost)
    if call.experts.swiglu_limit is not None:
        for words, clamp, cost in _both_clamps():
            yield activation_hypothesis(words, SwigluVariant(clamp=clamp), cost)
