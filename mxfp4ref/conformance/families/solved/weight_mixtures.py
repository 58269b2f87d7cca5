"""A rule by which routing weights follow from those that were given: a small linear combination for each slot.

The slots whose weights are used, and those whose are given, are each taken in some order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypothesis import SlotRows
from mxfp4ref.model.call import MoeCall

__all__ = ["ORDERS", "Mixture", "none"]


def _order_of_slots(call: MoeCall, local: Tensor) -> Tensor:
    return torch.arange(local.shape[1], device=local.device).expand_as(local)


# How slots are ordered, `[M, k] int64`: words, and those for one slot, counted from the first and the last.
ORDERS: tuple[tuple[str, tuple[str, str], Callable[[MoeCall, Tensor], Tensor]], ...] = (
    ("as they come", ("slot {n}", "the {nth}last slot"), _order_of_slots),
    (
        "in ascending order of ids",
        ("the slot with the {nth}lowest id", "the slot with the {nth}highest id"),
        lambda call, local: call.token_selected_experts.long().argsort(dim=1, stable=True),
    ),
    (
        "from the largest weight to the smallest",
        ("the slot with the {nth}largest weight", "the slot with the {nth}smallest weight"),
        lambda call, local: call.token_final_scales.argsort(dim=1, descending=True, stable=True),
    ),
    (
        "in ascending order of local ids, -1 first",
        ("the slot with the {nth}lowest local id", "the slot with the {nth}highest local id"),
        lambda call, local: local.argsort(dim=1, stable=True),
    ),
    (
        "with this rank's first",
        ("this rank's slot {n}", "the {nth}last slot, this rank's taken first"),
        lambda call, local: (local < 0).long().argsort(dim=1, stable=True),
    ),
)


@dataclass(frozen=True)
class Mixture:
    """The weight of each slot, of those in one order, as a combination of the given ones in another order.

    Attributes:
        used, given: which of `ORDERS`.
        coefficients: `[k, k] float64`.
        constants: `[k]`, added.
        back: whether slots are counted from the last, which shows in calls with another k.
    """

    used: int
    given: int
    coefficients: Tensor
    constants: Tensor
    back: bool = False

    @property
    def whole(self) -> str:
        """Words for a rule of all slots alike; "" for one of single slots."""
        for words, matrix in _MATRICES.items():
            if torch.equal(self.coefficients, matrix(len(self.constants))) and not bool(self.constants.any()):
                return words
        return ""

    @property
    def changed(self) -> list[int]:
        """The slots whose weight is not their own."""
        if self.used != self.given:
            return list(range(len(self.constants)))
        other = self.coefficients != torch.eye(len(self.constants))
        return (other.any(1) | (self.constants != 0)).nonzero().flatten().tolist()

    @property
    def constant(self) -> float:
        """What all weights are, whatever was given; 0 where they are none such."""
        same = not bool(self.coefficients.any()) and bool((self.constants == self.constants[0]).all())
        return float(self.constants[0]) if same else 0.0

    @property
    def is_factor(self) -> bool:
        """Whether all weights are their own, by one factor."""
        factor = torch.eye(len(self.constants), dtype=torch.float64) * self.coefficients[0, 0]
        return (
            self.used == self.given
            and torch.equal(self.coefficients, factor)
            and not bool(self.constants.any())
        )

    def counted(self) -> list[Mixture]:
        """As it is, and where the last slot alone is concerned, counted from the last."""
        late = not self.whole and self.changed == [len(self.constants) - 1] != [0]
        return [self, *([replace(self, back=True)] if late else [])]

    def of(self, top_k: int) -> tuple[Tensor, Tensor]:
        """Coefficients and constants for so many slots."""
        known = len(self.constants)
        if top_k == known or (whole := self.whole):
            return (
                (self.coefficients, self.constants)
                if top_k == known
                else (_MATRICES[whole](top_k), none(top_k))
            )
        shift = top_k - known if self.back else 0
        coefficients, constants = torch.eye(top_k, dtype=torch.float64), none(top_k)
        for n in self.changed:
            row, at = self.coefficients[n], n + shift
            sources = row.nonzero().flatten()
            if not 0 <= at < top_k:
                continue
            constants[at], coefficients[at] = self.constants[n], 0
            if len(sources) > max(known - 2, 1):  # all, or all others
                coefficients[at] = row[sources[0]]
                coefficients[at, at] *= int(row[n] != 0)
            else:
                inside = sources[(sources + shift >= 0) & (sources + shift < top_k)]
                coefficients[at, inside + shift] = row[inside]
        return coefficients, constants

    def weights(self, slots: SlotRows) -> Tensor:
        """`[M, k] float32`, in the order in which they are used."""
        given = slots.weights.gather(1, ORDERS[self.given][2](slots.call, slots.local))
        columns = []
        for row, constant in zip(*(t.float() for t in self.of(given.shape[1])), strict=True):
            total = constant.expand_as(given[:, 0])
            for j in row.nonzero().flatten().tolist():
                total = total + row[j] * given[:, j]
            columns.append(total)
        return torch.stack(columns, 1)

    def of_weights(self, slots: SlotRows) -> SlotRows:
        order = ORDERS[self.used][2](slots.call, slots.local)
        return replace(slots, weights=slots.weights.scatter(1, order, self.weights(slots)))

    def of_rows(self, slots: SlotRows) -> SlotRows:
        """With the slots in the order in which the weights are used, which is that of the sum, too."""
        order = ORDERS[self.used][2](slots.call, slots.local)
        y = slots.y.gather(1, order[..., None].expand_as(slots.y))
        return replace(slots, y=y, local=slots.local.gather(1, order), weights=self.weights(slots))

    def words(self) -> str:
        (used, *_), (given, *_) = ORDERS[self.used], ORDERS[self.given]
        if self.whole and self.used == self.given:
            return f"the routing weights are {self.whole}{f', slots taken {used}' * bool(self.used)}"
        if self.whole in ("its own", "those of the slots in reverse"):
            way = " in reverse" * (self.whole != "its own")
            which = " (the weights are sorted, the ids are not)" * (self.used == 0)
            which += " (the ids are sorted, the weights are not)" * (self.given == 0)
            return f"the routing weights of a token's slots {given}{way} are used for its slots {used}{which}"
        told = [(self._slot(self.used, n), self._source(n)) for n in self.changed]
        if len(told) == len(self.constants) and len({source for _, source in told}) == 1:
            return f"the routing weight of all slots of a token is {told[0][1]}"
        words = "; ".join(f"{slot}'s routing weight is {source}" for slot, source in told)
        if len(told) > 1 and {f"{slot}'s" for slot, _ in told} == {source for _, source in told}:
            words += ": they are exchanged" if len(told) == 2 else ": they are permuted"
        return words

    def _slot(self, order: int, n: int) -> str:
        n = len(self.constants) - 1 - n if self.back else n
        nth = ("", "2nd ", "3rd ")[n] if n < 3 else f"{n + 1}th "
        return ORDERS[order][1][self.back].format(n=n, nth=nth)

    def _source(self, n: int) -> str:
        """Words for one combination."""
        row, constant = self.coefficients[n], float(self.constants[n])
        used, same = row.nonzero().flatten().tolist(), self.used == self.given
        if not used:
            return f"{constant:.6g}"
        values = set(row[used].tolist())
        if len(values) > 1:
            return " + ".join(f"{row[j]:.4g} x {self._slot(self.given, j)}'s" for j in used)
        factor = {1.0: "", -1.0: "minus "}.get(value := values.pop(), f"{value:.6g} times ")
        if len(used) == 1:
            return factor + ("its own" if same and used == [n] else f"{self._slot(self.given, used[0])}'s")
        if len(used) == len(row):
            return f"{factor}the sum of the token's weights"
        if same and len(used) == len(row) - 1 and n not in used:
            return f"{factor}the sum of the other slots' weights"
        return f"{factor}the sum of those of {' and '.join(self._slot(self.given, j) for j in used)}"


def none(top_k: int) -> Tensor:
    return torch.zeros(top_k, dtype=torch.float64)


def _all_from(n: int) -> Callable[[int], Tensor]:
    return lambda k: torch.eye(k, dtype=torch.float64)[n].expand(k, k)


_MATRICES: dict[str, Callable[[int], Tensor]] = {
    "its own": lambda k: torch.eye(k, dtype=torch.float64),
    "those of the next slot": lambda k: torch.eye(k, dtype=torch.float64).roll(1, 1),
    "those of the previous slot": lambda k: torch.eye(k, dtype=torch.float64).roll(-1, 1),
    "those of the slots in reverse": lambda k: torch.eye(k, dtype=torch.float64).flip(1),
    "that of the first slot, for all": _all_from(0),
    "that of the last slot, for all": _all_from(-1),
    "accumulated over the slots": lambda k: torch.ones(k, k, dtype=torch.float64).tril(),
}
