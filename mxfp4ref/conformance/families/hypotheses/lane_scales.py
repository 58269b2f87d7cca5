"""Hypotheses on scales picked by a thread's lane: rows of weights and of the input decide on them together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypotheses.tensors import mapped
from mxfp4ref.conformance.families.hypothesis import Hypothesis, SlotRows, of_slots, slot_outputs
from mxfp4ref.conformance.families.slot_kinds import position_in_expert
from mxfp4ref.model.call import MoeCall

__all__ = ["lane_scale_hypotheses"]

_FRAGMENT = 8  # rows of weights, and of the input
# Of the numbers of a row of weights and of a row of the input in their fragment, the lane that holds their product:
# four threads a row, with two columns each. With the operands exchanged rows of weights are the fragment's rows.
_LAYOUTS: tuple[tuple[str, Callable[[Tensor, int], Tensor]], ...] = (
    ("rows of weights along the lanes", lambda row, token: 4 * row + token // 2),
    ("rows of the input along the lanes", lambda row, token: row // 2 + 4 * token),
)
_PICKED: tuple[tuple[str, int, Callable[[Tensor], Tensor]], ...] = (
    ("lane % 8", 8, lambda lane: lane % 8),
    ("lane / 4", 8, lambda lane: lane // 4),
    ("lane % 4", 8, lambda lane: lane % 4),
    ("lane / 8", 8, lambda lane: lane // 8),
    ("2 (lane % 4)", 8, lambda lane: 2 * (lane % 4)),
    ("lane % 16", 16, lambda lane: lane % 16),
    ("lane / 2", 16, lambda lane: lane // 2),
    ("lane", 32, lambda lane: lane),
)


@dataclass(frozen=True)
class _ByLane:
    """Scales of one GEMM: of so many rows of weights together, that which is picked by the lane."""

    fc: str
    size: int
    lane: Callable[[Tensor, int], Tensor]
    picked: Callable[[Tensor], Tensor]

    def index(self, rows: int, token: int) -> Tensor:
        row = torch.arange(rows)
        found: Tensor = row // self.size * self.size + self.picked(self.lane(row % _FRAGMENT, token))
        return found

    def __call__(self, slots: SlotRows) -> SlotRows:
        position, y = position_in_expert(slots.local)[0], slots.y.clone()
        for token in range(_FRAGMENT):
            mine = (slots.local >= 0) & (position % _FRAGMENT == token)
            if bool(mine.any()):
                local = torch.where(mine, slots.local, -1)
                change = mapped((f"{self.fc}_scales",), lambda _, t, n=token: t[:, self.index(t.shape[1], n)])
                part = change(slots.pipeline.staging(select_local=lambda *_, chosen=local: chosen))
                y = torch.where(mine[..., None], slot_outputs(part), y)
        return replace(slots, y=y)


def lane_scale_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """Those in which they depend on the row of the input, which maps of rows do not know."""
    if not call.experts.quantized:
        return
    token, row = torch.arange(_FRAGMENT), torch.arange(_FRAGMENT)
    for fc in ("fc1", "fc2"):
        for where, lane in _LAYOUTS:
            for words, size, picked in _PICKED:
                places = torch.stack([picked(lane(row, int(t))) for t in token])
                if bool((places == places[0]).all()):
                    continue
                told = (
                    f"GEMM{fc[-1]}'s scales are picked by the thread's lane ({where} of a fragment): of each {size} "
                    f"rows of weights that of row {words}, which depends on the token's place among its expert's rows"
                )
                change = of_slots("rows", (fc,), told, _ByLane(fc, size, lane, picked), 1.6)
                yield replace(change, across_tokens=True)
