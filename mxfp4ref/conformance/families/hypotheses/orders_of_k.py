"""Hypotheses on the order in which a GEMM sums its K groups: a grammar of parts, of their order and of their sum.

The K groups are dealt out to parts, such as slices of K or accumulators that take turns. Each part is summed as the
kernel sums, and the parts are added, rounded to some type or not. A group may be in no part, or in one twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, groupby, product

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypotheses.regions import k_regions, or_operand
from mxfp4ref.conformance.families.hypothesis import Hypothesis, Pipeline
from mxfp4ref.conformance.findings.reduction import is_heavy
from mxfp4ref.defects.variants.gemm import GemmVariant, Term, accumulate
from mxfp4ref.defects.variants.rounding import bf16, half, keep
from mxfp4ref.defects.variants.sums import in_turn, pairwise
from mxfp4ref.formats.generations import Generation
from mxfp4ref.formats.mxfp4 import GROUP_SIZE, dequantize
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.gemm.cpu import group_scaled_gemm
from mxfp4ref.sm90.gemm.order import group_order
from mxfp4ref.sm90.tactics import Tactic

__all__ = ["GemmOfParts", "order_hypotheses", "repeat_hypotheses"]

_TILE = 128  # of K, in the kernel's mainloop
_GROUPS = _TILE // GROUP_SIZE
_Parts = Callable[[int], list[list[int]]]  # of the number of K groups
# Of a part, and the kernel's order of all groups; None: as the kernel orders a GEMM of the part's groups alone.
_Order = Callable[[list[int], list[int]], list[int]] | None
_Round = Callable[[Tensor], Tensor]


def _as_all(part: list[int], kernel: list[int]) -> list[int]:
    """As the kernel orders them among all; a group that is in the part twice comes again at the end."""
    first = sorted(set(part), key=kernel.index)
    again = [group for group in kernel if part.count(group) > 1]
    return first + again


def _as_given(part: list[int], kernel: list[int]) -> list[int]:
    return part


def _backwards(part: list[int], kernel: list[int]) -> list[int]:
    return kernel[::-1]


# All of K in another order, in words, and the orders of the kernel that this may be.
_WALKS: tuple[tuple[str, Callable[[int], list[int]], tuple[_Order, ...]], ...] = (
    (
        "K groups are summed in descending order",
        lambda n: list(range(n))[::-1],
        (_backwards, None, _as_given),
    ),
    ("K groups are summed in ascending order", lambda n: list(range(n)), (_as_given,)),
    (
        f"K tiles of {_TILE} are summed in descending order",
        lambda n: [
            g for start in reversed(range(0, n, _GROUPS)) for g in range(start, min(start + _GROUPS, n))
        ],
        (None, _as_given),
    ),
    (
        "the first and the second half of K change places",
        lambda n: [*range(n // 2, n), *range(n // 2)],
        (None, _as_given),
    ),
)


def _stored(which: slice) -> Callable[[list[Tensor], _Round], Tensor]:
    """Some of the parts' sums wait in memory as bf16 for the others; they are added in float32."""

    def add(parts: list[Tensor], rounded: _Round) -> Tensor:
        waiting = {*range(len(parts))[which]}
        return in_turn([bf16(p) if i in waiting else p for i, p in enumerate(parts)], rounded)

    return add


def _from_the_last(parts: list[Tensor], rounded: _Round) -> Tensor:
    return in_turn(parts[::-1], rounded)


@dataclass(frozen=True)
class GemmOfParts:
    """A GEMM that sums parts of K by themselves, called like `group_scaled_gemm`.

    Attributes:
        parts: the K groups of each.
        order: in which a part's groups are summed.
        add: the parts' sums, and how the result of each addition is rounded.
        rounded: what becomes of each sum.
    """

    parts: _Parts
    order: _Order = None
    add: Callable[[list[Tensor], _Round], Tensor] = in_turn
    rounded: _Round = keep

    def __call__(
        self,
        x: Tensor,
        packed: Tensor,
        scales: Tensor,
        *,
        tactic: Tactic,
        generation: Generation,
        positions: Tensor,
    ) -> Tensor:
        kernel = group_order(scales.shape[-1], tactic.tile_k, generation)
        how = {"tactic": tactic, "generation": generation, "positions": positions}
        sums = []
        for part in filter(None, self.parts(len(kernel))):
            places = torch.tensor(part)
            if self.order is not None:  # where the kernel puts it so that it is summed in this order
                places[group_order(len(part), tactic.tile_k, generation)] = torch.tensor(
                    self.order(part, kernel)
                )
            taken = (
                _groups(t, places, n) for t, n in ((x, GROUP_SIZE), (packed, GROUP_SIZE // 2), (scales, 1))
            )
            sums.append(self.rounded(group_scaled_gemm(*taken, **how)))  # type: ignore[arg-type]
        return self.add(sums, self.rounded)


def _groups(tensor: Tensor, places: Tensor, size: int) -> Tensor:
    """Some of the K groups, of so many elements each."""
    parted = tensor.unflatten(-1, (-1, size))  # type: ignore[no-untyped-call]
    found: Tensor = parted.index_select(-2, places.to(tensor.device)).flatten(-2)
    return found


def _slices(ends: Callable[[int], list[int]]) -> _Parts:
    """Of K, which end there."""

    def parts(n: int) -> list[list[int]]:
        inside = sorted({end for end in ends(n) if 0 < end < n})
        return [list(range(a, b)) for a, b in zip([0, *inside], [*inside, n], strict=True)]

    return parts


def _taking_turns(count: int, size: int) -> _Parts:
    return lambda n: [[g for g in range(n) if g // size % count == turn] for turn in range(count)]


def _all_parts(depth: int) -> Iterator[tuple[str, _Parts, float]]:
    """Ways to deal out the K groups, with a cost."""
    for count in (2, 3, 4, 8):
        for unit, units, more in ((_GROUPS, f"tiles of {_TILE}", 0.0), (1, "groups", 0.05)):
            for last, longer in enumerate(("first", "last")):

                def ends(n: int, count: int = count, unit: int = unit, last: int = last) -> list[int]:
                    up = 0 if last else count - 1
                    return [(i * (n // unit) + up) // count * unit for i in range(1, count)]

                words = f"split in {count} slices of whole {units} (the {longer} ones longer if not alike)"
                yield words, _slices(ends), 1.1 + more + 0.02 * last
        for size, units in ((1, "groups"), (_GROUPS, f"tiles of {_TILE}")):
            which = "even and odd" if count == 2 else f"every {count}"
            words = f"summed by {count} accumulators that take turns (interleaved, {which} K {units}) and are added"
            yield words, _taking_turns(count, size), 1.15 + 0.01 * count + 0.05 * (size > 1)
    for size in (1, 2, _GROUPS, 8, 16):
        if size * GROUP_SIZE < depth:
            words = (
                f"summed in parts of {size * GROUP_SIZE} ({size} K group{'s' * (size > 1)}), each from zero,"
            )
            yield words, _slices(lambda n, s=size: list(range(0, n, s))), 1.2
    for end in range(_TILE, depth, _TILE):
        words = f"split in 2 slices (K 0 to {end - 1} and the rest)"
        yield words, _slices(lambda n, end=end: [end // GROUP_SIZE]), 1.25


_ROUNDINGS: tuple[tuple[str, _Round, float], ...] = (
    ("in float32", keep, 0.0),
    ("in bf16, each part and sum rounded", bf16, 0.15),
    ("in float16, each part and sum rounded", half, 0.2),
)
_SUMS = (
    ("one after the other", in_turn, 0.0),
    ("as a tree", pairwise, 0.1),
    ("from the last on", _from_the_last, 0.2),
)
_STORED = (
    ("all sums but the last part's stored in bf16 before they are added", _stored(slice(None, -1)), 0.15),
    ("the last part's sum stored in bf16 before it is added", _stored(slice(-1, None)), 0.2),
    ("each part's sum stored in bf16 before they are added", _stored(slice(None)), 0.15),
)


def _gemms(depth: int) -> Iterator[tuple[str, GemmOfParts, float]]:
    """GEMMs of parts, in words."""
    for words, parts, cost in _all_parts(depth):
        several = len(parts(depth // GROUP_SIZE)) > 2
        for how, rounded, more in _ROUNDINGS if "accumulators" not in words else _ROUNDINGS[:1]:
            ways = (*(_SUMS if several else _SUMS[:1]), *_STORED) if rounded is keep else _SUMS[:1]
            for sums, add, extra in ways:
                told = f"K is {words} {how}{f', {sums}' * (add is not in_turn)}"
                yield told, GemmOfParts(parts, None, add, rounded), cost + more + extra
            if rounded is keep and depth > 2 * _TILE:  # only then the kernel's order is another one
                told = f"K is {words} {how}, the groups in the order that they have among all"
                yield told, GemmOfParts(parts, _as_all), cost + more + 0.1
    for words, part, orders in _WALKS:
        for number, order in enumerate(orders):
            yield words, GemmOfParts(lambda n, part=part: [part(n)], order), 1 + 0.1 * number


def repeat_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """Some of K, of which each run comes twice, as given or since sums are not cleared; of one GEMM."""
    experts = call.experts
    for fcs in (("fc1",), ("fc2",)):
        for size in (_GROUPS, 2, 2 * _GROUPS, 0):
            tile = f" of its {size * GROUP_SIZE} of K" if size else ""
            words = (
                f"sums are not cleared by K group: to each are added those before it{tile}, whose products so count "
                "again, with its scale"
            )
            yield _hypothesis(fcs, words, GemmVariant(accumulate=_not_cleared(size)), 1.3)
    for fc, depth in (("fc2", experts.intermediate_size), ("fc1", experts.hidden_size)):
        orders = (None, _as_all) if depth > 2 * _TILE else (None,)
        stages, also = or_operand(call, fc, zero=False)
        for (words, where, cost), (number, order) in product(
            k_regions(depth // GROUP_SIZE), enumerate(orders)
        ):
            verb = "count" if " K groups (" in words else "counts"
            gemm = GemmOfParts(_twice(where), order)
            one = _hypothesis((fc,), f"{words} {verb} twice{also}", gemm, cost + 0.3 + 0.1 * number)
            yield replace(one, stages=stages)


def _not_cleared(size: int) -> Callable[[list[Term]], Tensor]:
    """Each K group's sum with those before it, of every so many groups, or of all (0)."""

    def accumulated(terms: list[Term]) -> Tensor:
        kept: list[Term] = []
        for number, term in enumerate(terms):
            start = not kept or (size and number % size == 0)
            kept.append(term if start else replace(term, t=fp32.add(term.t, kept[-1].t)))
        return accumulate(kept)

    return accumulated


def _twice(where: Callable[[int], Tensor]) -> _Parts:
    def parts(n: int) -> list[list[int]]:
        part: list[int] = []
        for there, run in groupby(range(n), key=where(n).tolist().__getitem__):
            part += [*run] * (2 if there else 1)
        return [part]

    return parts


def _one_by_one(dtype: torch.dtype) -> Callable[..., Tensor]:
    """A GEMM of scaled weights that adds one product after the other, in a type."""

    def gemm(x: Tensor, packed: Tensor, scales: Tensor, **how: object) -> Tensor:
        weights = dequantize(packed, scales, convention="sm90", dtype=torch.float32)
        total = torch.zeros(*x.shape[:2], weights.shape[1], dtype=dtype, device=x.device)
        for k in range(x.shape[2]):
            product = fp32.widen(x[:, :, k].contiguous())[:, :, None] * weights[:, None, :, k]
            total = (total.float() + product).to(dtype)
        return total.float()

    return gemm


def _running(rounded: _Round, every: int = 1) -> Callable[[list[Term]], Tensor]:
    def run(terms: list[Term]) -> Tensor:
        total = torch.zeros_like(terms[0].t)
        for number, term in enumerate(terms, 1):
            total = fp32.fma(term.t, term.scale, total)
            total = total if number % every else rounded(total)
        return total

    return run


def _rounded() -> Iterator[tuple[str, Callable[..., Tensor], float]]:
    """Other roundings within the sum."""
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "float16"), (torch.float32, "float32")):
        yield f"products are added one by one in {name}", _one_by_one(dtype), 1.2
    for name, rounded in (("bf16", bf16), ("float16", half)):
        yield f"the sum of K groups is kept in {name}", GemmVariant(accumulate=_running(rounded)), 1
        for every in (_GROUPS, 2, 2 * _GROUPS):
            words = f"the accumulators are rounded to {name} after each {every * GROUP_SIZE} of K (spilled)"
            yield words, GemmVariant(accumulate=_running(rounded, every)), 1.1
    short = GemmVariant(accumulate=lambda terms: accumulate([replace(t, t=half(t.t)) for t in terms]))
    yield "K groups' sums are scaled after a rounding to float16", short, 1.2


def order_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """In one GEMM or in both."""
    experts = call.experts
    depths = {("fc1",): experts.hidden_size, ("fc2",): experts.intermediate_size}
    for fcs, depth in (*depths.items(), (("fc1", "fc2"), max(depths.values()))):
        gemms: Iterable[tuple[str, Callable[..., Tensor], float]] = () if is_heavy(call) else _gemms(depth)
        for words, gemm, cost in chain(_rounded(), gemms):
            yield _hypothesis(fcs, words, gemm, cost + 0.1 * (len(fcs) - 1))


def _hypothesis(fcs: tuple[str, ...], words: str, gemm: Callable[..., Tensor], cost: float) -> Hypothesis:
    where = f"in GEMM{fcs[0][-1]}" if len(fcs) == 1 else "in both GEMMs"

    def on(pipeline: Pipeline) -> Pipeline:
        return pipeline.staging(**{f"{fc}_gemm": gemm for fc in fcs})

    slow = not isinstance(gemm, GemmOfParts)
    return Hypothesis("order of sums", fcs, f"{where} {words}", on, cost, slow=slow)
