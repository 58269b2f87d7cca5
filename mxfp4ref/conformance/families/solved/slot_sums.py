"""How a token's weighted rows are added up: a grammar of orders, types of the products and types of the sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypothesis import Hypothesis, of_sum
from mxfp4ref.defects.finalize import finalize_by_expert, finalize_by_weight, finalize_slots_reversed
from mxfp4ref.defects.variants.finalize import FinalizeVariant, as_they_come
from mxfp4ref.defects.variants.rounding import bf16, half, keep
from mxfp4ref.defects.variants.sums import in_turn, pairwise
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.finalize import finalize

__all__ = ["slot_sum_hypotheses"]

_Round = Callable[[Tensor], Tensor]
_Order = Callable[[Tensor, Tensor], Tensor]


# Words, the rounding of what is float32, how much it assumes.
_TYPES: tuple[tuple[str, _Round, float], ...] = (
    ("float32", keep, 0.0),
    ("bf16", bf16, 0.05),
    ("float16", half, 0.1),
)
_ORDERS: tuple[tuple[str, _Order, float], ...] = (
    ("", as_they_come, 0.0),
    (", from the last slot to the first", finalize_slots_reversed, 0.1),
    (", expert by expert, in ascending order of their ids", finalize_by_expert, 0.1),
    (
        ", expert by expert, in descending order of their ids",
        lambda local, w: local.argsort(dim=1, descending=True, stable=True),
        0.15,
    ),
    (", from the smallest weight to the largest", finalize_by_weight, 0.15),
    (
        ", from the largest weight to the smallest",
        lambda local, w: w.argsort(dim=1, descending=True, stable=True),
        0.15,
    ),
)
_Shape = Callable[[list[Tensor], _Round], Tensor]


def _halves(terms: list[Tensor], rounding: _Round) -> Tensor:
    """Each with the one that is half as many further on, as lanes of a warp exchange theirs."""
    while len(terms) > 1:
        apart = -(-len(terms) // 2)
        pairs = [rounding(fp32.add(a, b)) for a, b in zip(terms, terms[apart:], strict=False)]
        terms = pairs + terms[len(pairs) : apart]
    return terms[0]


def _two(terms: list[Tensor], rounding: _Round) -> Tensor:
    parts = [in_turn(part, rounding) for part in (terms[::2], terms[1::2]) if part]
    return in_turn(parts, rounding)


_SHAPES: tuple[tuple[str, _Shape, float], ...] = (
    ("as a tree of neighbours", pairwise, 0.1),
    ("as a tree of those that are half of all slots apart", _halves, 0.15),
    ("in two sums, of the even and of the odd ones, that are added at the end", _two, 0.2),
)


@dataclass(frozen=True)
class _InShape:
    """A weighted sum of rounded products, called as `finalize`; a slot that is skipped is a product of zero."""

    shape: _Shape
    order: _Order
    products: _Round
    sums: _Round

    def __call__(self, y: Tensor, local: Tensor, weights: Tensor, bias: Tensor | None = None) -> Tensor:
        order = self.order(local, weights)
        y = y.gather(1, order[..., None].expand_as(y))
        local, weights = local.gather(1, order), weights.gather(1, order)
        terms = []
        for row, expert, weight in zip(y.unbind(1), local.unbind(1), weights.unbind(1), strict=True):
            value = fp32.widen(row.contiguous())
            if bias is not None:
                value = fp32.add(value, fp32.widen(bias[expert.clamp(min=0)]))
            term = self.products(fp32.mul(weight[:, None].expand_as(value).contiguous(), value))
            terms.append(torch.where(expert[:, None] >= 0, term, 0.0))
        return self.shape(terms, self.sums)


@dataclass(frozen=True)
class _ByOwner:
    """A weighted sum of which each owner of experts forms its part, called as `finalize`; the parts are rounded."""

    owner: Callable[[Tensor], Tensor]
    owners: int
    parts: _Round
    sums: _Round

    def __call__(self, y: Tensor, local: Tensor, weights: Tensor, bias: Tensor | None = None) -> Tensor:
        of = self.owner(local)
        own = (torch.where(of == n, local, -1) for n in range(self.owners))
        return in_turn([self.parts(finalize(y, one, weights, bias)) for one in own], self.sums)


def _owners(experts: int) -> Iterator[tuple[str, Callable[[Tensor], Tensor], int]]:
    for owners in (2, 4, 8):
        if owners <= experts // 2:
            share = -(-experts // owners)
            yield f"each of {owners} owners of {share} experts", lambda local, n=share: local // n, owners
            yield (
                f"each of {owners} owners of every {owners}. expert",
                lambda local, n=owners: local % n,
                owners,
            )


_NAMED = (finalize_slots_reversed, finalize_by_expert, finalize_by_weight)
# The kernel's own, and those that are named defects: order, type of the products (none: one FMA), type of the sums.
_KNOWN = (
    *(("", products, "float32") for products in ("", "float32", "bf16")),
    *((order, "", "float32") for order, by, _ in _ORDERS if by in _NAMED),
    ("", "bf16", "bf16"),
)


def slot_sum_hypotheses(experts: int) -> Iterator[Hypothesis]:
    """All that are no named defect, of a rank with so many experts."""
    for (name, rounding, more), (order, by, cost) in product(_TYPES, _ORDERS):
        sums = "formed in float32" if rounding is keep else f"kept in {name}, rounded to it after each slot"
        for products, first, further in (("", None, 0.0), *_TYPES):
            if (order, products, name) in _KNOWN:
                continue
            of = f", of weighted rows that are rounded to {products} first" * bool(products)
            of += ", as by atomic additions" * (first is rounding is not keep)
            words = f"the sum over the slots is {sums}{order}{of}"
            variant = FinalizeVariant(_step(first, rounding), by)
            yield of_sum("sum of slots", ("finalize",), words, variant, 1 + more + cost + further)
    for (name, rounding, more), (products, first, further), (how, shape, extra) in product(
        _TYPES, _TYPES, _SHAPES
    ):
        for order, by, cost in _ORDERS[:3:2]:
            if shape is not pairwise or order or not products == name == "float32":
                words = f"the weighted rows, rounded to {products}, are added in {name} {how}{order}"
                total = _InShape(shape, by, first, rounding)
                yield of_sum("sum of slots", ("finalize",), words, total, 1.1 + more + further + cost + extra)
    for (who, whose, owners), (held, parts, more) in product(_owners(experts), _TYPES):
        for added, rounded, further in _TYPES[:2]:
            if owners == 2 or not held == added == "float32":
                words = f"{who} sums its own slots, the sums are rounded to {held} and added in {added}"
                of_owners = _ByOwner(whose, owners, parts, rounded)
                yield of_sum("sum of slots", ("finalize",), words, of_owners, 1.2 + more + further)


def _step(first: _Round | None, rounding: _Round) -> Callable[..., Tensor]:
    """One slot's, with a product that is rounded first, or in one FMA."""
    if first is None:
        return lambda acc, w, y, b: rounding(fp32.fma(w, fp32.add(y, b), acc))
    return lambda acc, w, y, b: rounding(fp32.add(acc, first(fp32.mul(w, fp32.add(y, b)))))
