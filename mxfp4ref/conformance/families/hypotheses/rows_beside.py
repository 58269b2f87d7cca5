"""Hypotheses on GEMM1's output among an expert's rows: up, gate or both are those of a row beside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypothesis import (
    Hypothesis,
    Pipeline,
    SlotRows,
    local_of,
    of_slots,
    slot_outputs,
)
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90.gemm.cpu import group_scaled_gemm

__all__ = ["beside_hypotheses"]

_Source = Callable[[Tensor], Tensor]  # from positions among an expert's rows to those taken there


def _sources() -> Iterator[tuple[str, _Source, float]]:
    for n in (1, 2, 4, 8, 16, 64):
        pairs = "rows 2i and 2i + 1" if n == 1 else f"rows {n} apart within {2 * n}"
        yield f"those of the row beside: {pairs} are exchanged", lambda p, n=n: p ^ n, 1.2
    for n in (1, 8):
        rows = "row" if n == 1 else f"{n} rows"
        yield f"those of the {rows} before", lambda p, n=n: p - n, 1.3
        yield f"those of the {rows} after", lambda p, n=n: p + n, 1.3
    for n in (8, 64):
        yield f"those of the first row of each {n}", lambda p, n=n: p // n * n, 1.4
    yield "those of the expert's first row", torch.zeros_like, 1.3


def beside_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """For a layer with a gate; what lies beyond an expert's rows is zero, or the row keeps its own."""
    if not call.experts.gated:
        return
    local = local_of(Pipeline(call))
    most = int(torch.bincount(local[local >= 0].flatten()).max()) if bool((local >= 0).any()) else 0
    own = torch.arange(most, device=local.device)
    for part, halves in (("gate", (False, True)), ("up", (True, False)), ("up and gate", (True, True))):
        seen = {_key(own)}
        for words, source, cost in _sources():
            taken = source(own)
            there = (taken >= 0) & (taken < most)
            for zeros in (True, False):
                moved = torch.where(there, taken, -1 if zeros else own)
                if _key(moved) in seen:
                    continue
                seen.add(_key(moved))

                def on(
                    rows: SlotRows, take: _Source = source, halves: Any = halves, zeros: bool = zeros
                ) -> SlotRows:
                    pipeline = Pipeline(rows.call).staging(fc1_gemm=_Moved(take, halves, zeros))
                    return replace(rows, y=slot_outputs(pipeline))

                one = of_slots(
                    "some rows",
                    ("fc1", "activation"),
                    f"in GEMM1's output, among the rows (tokens) of an expert, {part} "
                    f"{'are' if ' ' in part else 'is'} {words}{', with zeros beyond the last' if zeros else ''}",
                    on,
                    cost + 0.05 * (not zeros),
                )
                yield replace(one, across_tokens=True)


def _key(index: Tensor) -> tuple[int, ...]:
    return tuple(index.tolist())


class _Moved:
    """GEMM1, after which the halves (up, gate) are taken from other rows of the expert."""

    def __init__(self, source: _Source, halves: tuple[bool, bool], zeros: bool) -> None:
        self.source, self.halves, self.zeros = source, halves, zeros

    def __call__(self, x: Tensor, weights: Tensor, scales: Tensor, **more: Any) -> Tensor:
        right = group_scaled_gemm(x, weights, scales, **more)
        count = right.shape[1]
        index = torch.arange(count, device=right.device)
        source = self.source(index)
        there = (source >= 0) & (source < count)
        moved = right[:, torch.where(there, source, index)]
        if self.zeros:
            moved = torch.where(there[:, None], moved, 0)
        both = zip(moved.chunk(2, 2), right.chunk(2, 2), self.halves, strict=True)
        return torch.cat([new if change else old for new, old, change in both], 2)
