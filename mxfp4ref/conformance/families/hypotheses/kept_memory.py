"""Hypotheses on memory that keeps what an earlier tile or expert left: accumulators, and workspaces that overlap."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypothesis import Hypothesis, Pipeline, SlotRows, local_of, of_slots
from mxfp4ref.conformance.families.places import concerns_what_is_wrong
from mxfp4ref.conformance.families.solved.pursuit import Rows
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import KERNEL, activate_rows
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.gemm.cpu import group_scaled_gemm

__all__ = ["kept_hypotheses"]

_TILES = (0, 8, 16, 32, 64, 128)  # rows; 0 for all of an expert's
_WRITTEN = {"GEMM1's output": 2, "the activation": 1}  # times the activation's columns, where there is a gate


@dataclass(frozen=True)
class _Kept:
    """Accumulators that are added to those of the tile after.

    Attributes:
        gemm: 0 or 1, which.
        rows: of a tile, 0 where it is all rows of an expert.
        anew: whether each expert begins without.
        all: whether those of all earlier tiles add up.
    """

    gemm: int
    rows: int
    anew: bool
    all: bool

    @property
    def words(self) -> str:
        tile = f"tile of {self.rows} rows" if self.rows else "expert"
        before = f"every {tile} before" if self.all else f"the {tile} before"
        where = (", within an expert" if self.anew else ", whichever expert's it is") * (self.rows > 0)
        return (
            f"GEMM{self.gemm + 1}'s accumulators are not cleared but kept from {tile} to {tile}: to a row's are "
            f"added those of the row at the same place of {before}{where}"
        )

    def concerned(self, counts: list[int]) -> Tensor:
        """Which sorted rows it changes, of experts that have so many."""
        kept = torch.zeros(self.rows or max(counts), 1)
        return torch.cat([self.added(torch.ones(n, 1), kept) for n in counts]).flatten() > 1

    def added(self, acc: Tensor, kept: Tensor) -> Tensor:
        """An expert's accumulators with those that are kept, which are kept anew."""
        if self.anew:
            kept.zero_()
        out = acc.clone()
        for start in range(0, len(acc), self.rows or max(len(acc), 1)):
            tile = acc[start : start + (self.rows or len(acc))]
            sums = fp32.add(tile, kept[: len(tile)].contiguous())
            out[start : start + len(tile)] = sums
            kept[: len(tile)] = sums if self.all else tile
        return out


def kept_hypotheses(call: MoeCall, wrong: Tensor) -> Iterator[Hypothesis]:
    """Those that concern the tokens that are wrong, `wrong [M] bool`, and hardly any others."""
    local = local_of(Pipeline(call))
    sorted_rows = Rows.of(local)
    order, position = sorted_rows.flat, sorted_rows.position
    if not len(order):
        return
    counts = torch.unique(local.flatten()[order], return_counts=True)[1].tolist()

    def fits(rows: Tensor) -> bool:
        tokens = torch.zeros_like(wrong)
        tokens[(order // local.shape[1])[rows]] = True
        return concerns_what_is_wrong(tokens, wrong)

    for rows in [size for size in _TILES if size < max(counts)]:
        for anew in (False, True)[: 1 + (rows > 0)]:
            for everything in (True, False):
                kept = [_Kept(gemm, rows, anew, everything) for gemm in (0, 1)]
                if not fits(kept[0].concerned(counts)):
                    continue
                for one in kept:
                    cost = 1.3 + 0.05 * (not everything) + rows / 2000
                    yield _hypothesis(("fc1", "fc2")[one.gemm], one.words, partial(_run, kept=one), cost)
    hidden, inner = call.experts.hidden_size, call.experts.intermediate_size
    for what, times in _WRITTEN.items() if call.experts.gated else ():
        first = torch.arange(len(order)) - position
        if fits(torch.arange(len(order)) * hidden < first * inner * times):
            words = (
                f"{what} is written over the sorted input, as where both begin at the same place of a workspace: an "
                "expert's first rows of input are overwritten by the experts before it"
            )
            yield replace(_hypothesis("fc1", words, partial(_run, over=times), 1.3), stages=("input", "fc1"))


def _hypothesis(stage: str, words: str, change: Callable[[SlotRows], SlotRows], cost: float) -> Hypothesis:
    one = of_slots("rows of an expert", (stage,), words, change, cost)
    return replace(one, across_tokens=True, slow=True)


def _run(slots: SlotRows, kept: _Kept | None = None, over: int = 0) -> SlotRows:
    """The layer expert by expert; with `over`, what so many times the activation's columns are is written over it."""
    call = slots.call
    found = Rows.of(slots.local)
    order, position, counts, expert = found.flat, found.position, found.counts, found.expert
    x = call.input[found.token]
    memory, hidden = x.flatten().clone(), x.shape[1]
    most = kept.rows or int(counts.max()) if kept is not None else 0
    before = torch.zeros(most, call.experts.gemm_shapes[kept.gemm if kept is not None else 0][0])
    y = slots.y.flatten(0, 1).clone()
    for one in torch.unique(expert).tolist():
        mine = (expert == one).nonzero().flatten()
        rows = position[mine][None]
        value = memory.view(-1, hidden)[mine]
        for which, name in enumerate(("fc1", "fc2")):
            tactic, generation = call.kernel.tactics[which], call.kernel.generation
            weights, scales = call.experts.weights(name, one)
            assert scales is not None
            acc = group_scaled_gemm(
                value[None], weights, scales, tactic=tactic, generation=generation, positions=rows
            )[0]
            acc = kept.added(acc, before) if kept is not None and kept.gemm == which else acc
            value = fc1 = fp32.to_bf16(acc)
            if which == 0:
                value = fp32.to_bf16(activate_rows(call, fc1, expert[mine], KERNEL.activate))
                written = (value if over == 1 else fc1).flatten() if over else fc1.new_zeros(0)
                start = int(mine[0]) * written.numel() // len(mine)
                written = written[: max(len(memory) - start, 0)]
                memory[start : start + len(written)] = written
        y[order[mine]] = value
    return replace(slots, y=y.view_as(slots.y))
