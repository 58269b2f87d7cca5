"""Whether the activation that GEMM2 got is another function of the right up and gate: fitted, and tried elsewhere.

What is fitted is piecewise linear in up and in gate, the same in all columns, of all experts or of each. It is tried
on tokens that it was not fitted to; only a mistake that is a function of these two numbers predicts them. What of an
error is a sum of the token's right rows, or of their biases, is left out, since other weights in the sum, a factor on
GEMM2's result or on its bias, or rows of other slots in place of these would give that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mxfp4ref.conformance.families.sampled import Sample

__all__ = ["Formula", "fitted"]

_TOKENS, _FEWEST = 24, 4
_WHOLLY = 0.95  # likewise, from which values are told
_LOUD = 2.0  # squares of errors, of those that roundings make
_HINT = 0.05  # of the errors, from which each expert's own function is tried
_EXPLAINED = 0.4  # of the errors' squares that roundings do not make; of what is no function it is below 0.05
_MOST_OF_PLANE, _LOST = 0.7, 0.02  # of the numbers, and of what is explained, to tell a part of the plane
_NOWHERE_ELSE = 0.8  # of the errors, explained by a part of the plane, to say that all else is right
_FAINT = 0.05  # squares of what is neither zero nor a part of the right activation, of the right one's
_GATES, _UPS = 12, 6  # knots
_POINTS = ((1.0, 1.0), (-1.0, 1.0), (3.0, 1.0), (0.5, 0.5), (-0.5, 0.5))  # gate, up


@dataclass(frozen=True)
class Formula:
    """A function of up and gate.

    Attributes:
        explained: which part of the errors it explains.
        by_expert: whether each expert has its own.
        values: what it gives, in words.
        where: where alone it is not the right one, in words.
    """

    explained: float
    by_expert: bool
    values: str = ""
    where: str = ""

    @property
    def proved(self) -> bool:
        return self.explained >= _EXPLAINED


def fitted(some: list[Sample], limits: Tensor | None = None) -> Formula | None:
    """The function that explains most; None of too few tokens, and where errors are sums of the right rows.

    Args:
        some: the tokens.
        limits: `[E]`, to which each expert clamps up and gate.
    """
    some = [s for s in some if float((s.beside_rows(s.error).square() / s.noise).mean()) > _LOUD][
        :: max(len(some) // _TOKENS, 1)
    ][:_TOKENS]
    if len(some) < _FEWEST:
        return None
    basis = _Basis.of(some, _GATES, _UPS)
    explained, _ = _explained(some, basis, by_expert=False)
    if explained >= _EXPLAINED:
        return Formula(explained, False, _values(some, basis), _where(some, basis, limits, explained))
    if limits is not None and (part := _beyond(some, basis, limits)) is not None:
        return part
    if explained >= _HINT and len({e for s in some for e in s.experts.tolist()}) > 1:
        return Formula(max(explained, _explained(some, _Basis.of(some, 7, 4), by_expert=True)[0]), True)
    return Formula(explained, False)


@dataclass(frozen=True)
class _Basis:
    """Functions of up and gate: products of hats between knots, up itself, and the right activation."""

    gates: Tensor
    ups: Tensor

    @classmethod
    def of(cls, some: list[Sample], gates: int, ups: int) -> _Basis:
        def knots(name: str, count: int) -> Tensor:
            values = torch.cat([getattr(s, name).flatten() for s in some])
            parts = torch.linspace(0, 1, count, dtype=values.dtype)
            found: Tensor = torch.unique(values[:1_000_000].quantile(parts))
            return found

        return cls(knots("gate", gates), knots("up", ups))

    def __call__(self, up: Tensor, gate: Tensor, activation: Tensor) -> Tensor:
        if len(self.gates) < 2 or len(self.ups) < 2:  # of numbers that are all alike
            return activation[..., None]
        rows, columns = _hats(gate, self.gates), torch.cat((_hats(up, self.ups), up[..., None]), -1)
        products = rows[..., :, None] * columns[..., None, :]
        found: Tensor = torch.cat((products.flatten(-2), activation[..., None]), -1)
        return found


def _hats(values: Tensor, knots: Tensor) -> Tensor:
    values = values.clamp(float(knots[0]), float(knots[-1]))
    left = (torch.searchsorted(knots, values.contiguous(), right=True) - 1).clamp(0, len(knots) - 2)
    part = ((values - knots[left]) / (knots[left + 1] - knots[left]))[..., None]
    found = torch.zeros(*values.shape, len(knots), dtype=values.dtype)
    found.scatter_(-1, left[..., None], 1 - part).scatter_add_(-1, left[..., None] + 1, part)
    return found


_Region = Callable[[Tensor, Tensor, Tensor], Tensor]  # of up, gate and the limit, by element


def _regions(limited: bool) -> Iterator[tuple[str, _Region]]:
    """Parts of the plane of up and gate."""
    if limited:
        yield "up is above the limit", lambda up, gate, limit: up > limit
        yield "up is below minus the limit", lambda up, gate, limit: up < -limit
        yield "up is beyond the limit, on either side", lambda up, gate, limit: up.abs() > limit
        yield "gate is above the limit", lambda up, gate, limit: gate > limit
        yield "gate is below minus the limit", lambda up, gate, limit: gate < -limit
        yield (
            "up is beyond the limit or gate above it",
            lambda up, gate, limit: (up.abs() > limit) | (gate > limit),
        )
        yield (
            "up or gate is beyond the limit",
            lambda up, gate, limit: (up.abs() > limit) | (gate.abs() > limit),
        )
    yield "gate is positive", lambda up, gate, limit: gate > 0
    yield "gate is negative", lambda up, gate, limit: gate < 0
    yield "up is positive", lambda up, gate, limit: up > 0
    yield "up is negative", lambda up, gate, limit: up < 0


def _masks(some: list[Sample], region: _Region, limits: Tensor | None) -> list[Tensor]:
    """Where each token is in a part, by each expert's own limit."""
    infinite = torch.tensor([torch.inf], dtype=torch.float64)
    limit = [infinite if limits is None else limits[s.experts].double()[:, None] for s in some]
    return [region(s.up, s.gate, most).double() for s, most in zip(some, limit, strict=True)]


def _beyond(some: list[Sample], basis: _Basis, limits: Tensor) -> Formula | None:
    """A function that is another one beyond each expert's own limit only."""
    found = []
    for words, region in _regions(limited=True):
        masks = _masks(some, region, limits)
        size = float(torch.cat([mask.flatten() for mask in masks]).mean())
        if "limit" in words and 0 < size <= _MOST_OF_PLANE:
            explained, solution = _explained(some, basis, by_expert=False, masks=masks)
            found.append((explained, -size, words, _what(some, basis, masks, solution)))
    explained, _, words, what = max(found, default=(0.0, 0.0, "", ""))
    if explained < _EXPLAINED:
        return None
    near = [one for one in found if one[0] >= explained - _LOST]
    explained, _, words, what = max(near, key=lambda one: one[1])
    return Formula(explained, False, "", (words + what) * (explained >= _NOWHERE_ELSE))


def _what(some: list[Sample], basis: _Basis, masks: list[Tensor], solution: Tensor) -> str:
    """What the function gives there, if it is nothing or a part of the right one."""
    right, value = [], []
    for s, mask in zip(some, masks, strict=True):
        inside = mask > 0
        own = s.activation[inside]
        right.append(own)
        value.append(own + basis(s.up[inside], s.gate[inside], own) @ solution)
    wanted, got = torch.cat(right), torch.cat(value)
    power = float(wanted.square().sum())
    if not power:
        return ""
    factor = float(got @ wanted) / power
    rest = float((got - factor * wanted).square().sum()) / power
    if rest > _FAINT or abs(factor - 1) < 0.1:
        return ""
    return (
        ", and is about 0 there" if abs(factor) < 0.1 else f", and is about {factor:.2g}x the right one there"
    )


def _where(some: list[Sample], basis: _Basis, limits: Tensor | None, explained: float) -> str:
    """The smallest part of the plane in which another function explains as much; "" if none does."""
    if bool((some[0].up == 1).all()):
        return ""
    found = []
    for words, region in _regions(limits is not None):
        masks = _masks(some, region, limits)
        size = float(torch.cat([mask.flatten() for mask in masks]).mean())
        if 0 < size <= _MOST_OF_PLANE:
            part, solution = _explained(some, basis, by_expert=False, masks=masks)
            if part >= explained - _LOST:
                found.append((size, words + _what(some, basis, masks, solution)))
    return min(found)[1] if found else ""


def _explained(
    some: list[Sample],
    basis: _Basis,
    *,
    by_expert: bool,
    without_rows: bool = True,
    masks: list[Tensor] | None = None,
) -> tuple[float, Tensor]:
    """The part that is predicted of tokens that were not fitted to, and the solution for one half of them."""
    ids = sorted({e for s in some for e in s.experts.tolist()})
    systems, targets, quiet = [], [], 0.0
    for number, s in enumerate(some):
        functions = basis(s.up, s.gate, s.activation)
        functions = functions if masks is None else functions * masks[number][..., None]
        given = torch.einsum("s,shi,sij->shj", s.weights, s.second, functions)
        if by_expert:
            place = torch.tensor([ids.index(e) for e in s.experts.tolist()])
            given = given.new_zeros(len(ids), *given.shape[1:]).index_add_(0, place, given)
            given = given.permute(1, 0, 2).flatten(1)
        else:
            given = given.sum(0)
        error = s.error
        if without_rows:
            error, given = s.beside_rows(error), s.beside_rows(given)
        size = error.square().mean().sqrt()  # each token counts alike
        systems.append(given / size)
        targets.append(error / size)
        quiet += float((s.noise / size.square()).sum())
    rest = total = 0.0
    solution = torch.empty(0)
    for start in (0, 1):
        matrix, target = torch.cat(systems[start::2]), torch.cat(targets[start::2])
        normal = matrix.T @ matrix
        diagonal = normal.diagonal()
        diagonal += (1e-3 if by_expert else 1e-4) * diagonal.mean() + 1e-12 * diagonal.max() + 1e-300
        solution = torch.linalg.solve(normal, matrix.T @ target)
        others, wanted = torch.cat(systems[1 - start :: 2]), torch.cat(targets[1 - start :: 2])
        rest += float((wanted - others @ solution).square().sum())
        total += float(wanted.square().sum())
    return (total - rest) / max(total - quiet, 1e-300), solution


def _values(some: list[Sample], basis: _Basis) -> str:
    """What the function gives where there is much to fit it to, if it explains all of the error."""
    explained, solution = _explained(some, basis, by_expert=False, without_rows=False)
    if explained < _WHOLLY:
        return ""
    up, gate, right = (
        torch.cat([getattr(s, n).flatten() for s in some]) for n in ("up", "gate", "activation")
    )
    gated = not bool((up == 1).all())  # without a gate the only value goes by its name, beside ones
    told = []
    for at_gate, at_up in _POINTS if gated else {(at_gate, 1): None for at_gate, _ in _POINTS}:
        distance = (gate - at_gate).square() + (up - at_up).square()
        near = int(distance.argmin())
        if float(distance[near]) < 0.01:
            change = basis(up[near][None], gate[near][None], right[near][None]) @ solution
            where = (
                f"gate {float(gate[near]):.2g} and up {float(up[near]):.2g}"
                if gated
                else f"{float(gate[near]):.2g}"
            )
            told.append(f"{float(right[near] + change):.2g} for {where} (right is {float(right[near]):.2g})")
    return ", ".join(told[:3])
