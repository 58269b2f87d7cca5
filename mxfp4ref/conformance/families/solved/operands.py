"""Which operands a GEMM took, K group by K group, solved: one change after another, each that which explains most.

Weights, scales and inputs are known. A kernel that takes a stale tile, another expert's weights or a neighbour's row
for some K groups has other products there and the right ones elsewhere. How the errors of some tokens grow with each
product (their derivative) tells which of all such changes may explain them; those that seem to are computed, and the
best is kept. What is found has to explain tokens that it was not sought on, up to roundings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from mxfp4ref._spans import runs
from mxfp4ref._words import shortened
from mxfp4ref.conformance.families.hypothesis import Pipeline, local_of
from mxfp4ref.conformance.families.places import fitting_attributes
from mxfp4ref.conformance.families.sampled import Sample
from mxfp4ref.conformance.families.solved.gemm_operands import Change, Gemm, block_of, gained_by, gemms
from mxfp4ref.conformance.findings.finding import Evidence
from mxfp4ref.formats.mxfp4 import GROUP_SIZE

__all__ = ["other_operands"]

_LOUD, _QUIET = 4.0, 1.6  # times the roundings: before, and when explained
_ROWS, _FEWEST = 24, 3  # rows that are sought on, tokens of which there have to be as many others
_PROGRESS = 0.04  # of the errors' squares, that a change has to explain
_OF_A_KIND = 1.02  # times as much may be left by a change of the kind of those before
_KINDS = 4  # of slots
_COMPUTED, _SEVERAL = 8, 5  # changes at each step, of one K group and of several
_MOST = 10  # changes
_SIZE = 1 << 25  # weights, and what they are multiplied with
_LISTED = 4


def other_operands(pipeline: Pipeline, some: Sequence[Sample], wrong: Tensor) -> Evidence | None:
    """What follows, if other operands of one of the GEMMs explain the errors.

    Args:
        pipeline: the right one.
        some: tokens that are wrong.
        wrong: `[M] bool`, all of them.
    """
    call, experts = pipeline.call, pipeline.call.experts
    loud = [s for s in some if s.loudness > _LOUD]
    if len(loud) < 2 * _FEWEST or experts.fc1_scales is None or len(loud[0].error) != experts.hidden_size:
        return None
    if experts.num_experts * experts.hidden_size * experts.intermediate_size * 2 > _SIZE:
        return None
    local = local_of(pipeline)
    kinds = [
        ("", local >= 0),
        *((words, mask) for words, mask, _ in fitting_attributes(call, local, wrong)[:_KINDS]),
    ]
    for gemm in gemms(pipeline):
        for words, mask in kinds:
            if found := _sought(gemm, mask, loud):
                return _told(gemm, found, f", for slots {words}" * bool(words))
    return None


def _sought(gemm: Gemm, mask: Tensor, loud: Sequence[Sample]) -> list[Change]:
    """Changes of slots `[M, k] bool` that explain tokens, those they were sought on and others; or none."""
    chosen: list[Sample] = []
    for sample in loud:
        if sum(len(s.experts) for s in (*chosen, sample)) <= _ROWS or len(chosen) < _FEWEST:
            chosen.append(sample)
    others = [s for s in loud if all(s is not c for c in chosen)][: len(chosen)]
    if len(others) < _FEWEST:
        chosen, others = chosen[::2], chosen[1::2]
    state = _State(gemm, mask, chosen)
    found: list[Change] = []
    while state.left > _QUIET:
        best = state.best(found)
        if best is None or len(found) == _MOST:
            return []
        found.append(best)
    tried = _State(gemm, mask, others)
    for change in found:
        tried.take(change)
    return found if tried.left <= _QUIET else []


class _State:
    """Some tokens, with the changes of slots `[M, k] bool` that were found so far."""

    def __init__(self, gemm: Gemm, mask: Tensor, samples: Sequence[Sample]) -> None:
        self.gemm = gemm
        mine = [((gemm.token == s.token) & mask[gemm.token, gemm.slot]).nonzero().flatten() for s in samples]
        self.rows = torch.cat(mine)
        self.place = torch.arange(len(mine)).repeat_interleave(torch.tensor(list(map(len, mine))))
        self.weights = gemm.weight[self.rows]
        self.unit = torch.stack([s.roundings.sqrt() for s in samples])
        self.parts = gemm.right(self.rows)
        self.sums = self.parts.double().sum(1)
        self.error = torch.stack([s.error for s in samples])
        self.target = self.error + self._output(self.sums)
        self.size = float(self._rest(self.sums).square().sum())

    def _output(self, sums: Tensor) -> Tensor:
        added = self.gemm.output(self.rows, sums) * self.weights[:, None]
        return torch.zeros_like(self.error).index_add_(0, self.place, added)

    def _rest(self, sums: Tensor) -> Tensor:
        """The errors that are left, in roundings."""
        return (self.target - self._output(sums)) / self.unit

    @property
    def left(self) -> float:
        return float(self._rest(self.sums).square().mean().sqrt())

    def _gain(self, change: Change) -> tuple[slice, Tensor]:
        """What the change adds to the sums, `[r, G, n]` by the groups that it concerns, and to which columns."""
        inside = self.gemm.parts[change.part].nonzero()
        columns = slice(int(inside[0]), int(inside[-1]) + 1)
        groups = range(change.first, change.last + 1)
        given = (self.gemm.products(self.rows, change.source, g, columns) for g in groups)
        products, there = zip(*given, strict=True)
        now = self.parts[:, change.first : change.last + 1, columns]
        return columns, torch.where(there[0][:, None, None], torch.stack(products, 1) - now, 0.0)

    def take(self, change: Change) -> None:
        columns, gain = self._gain(change)
        self.parts[:, change.first : change.last + 1, columns] += gain
        self.sums = self._with(columns, gain)

    def _with(self, columns: slice, gain: Tensor) -> Tensor:
        sums = self.sums.clone()
        sums[:, columns] += gain.double().sum(1)
        return sums

    def best(self, before: Sequence[Change]) -> Change | None:
        """The change that leaves least, if it leaves less by far than there is; it is taken."""
        rest = self._rest(self.sums)
        size = float(rest.square().sum())
        sizes = {
            change: float(self._rest(self._with(*self._gain(change))).square().sum())
            for change in self._promising(rest)
            if not any(
                change.part == c.part and change.first <= c.last and c.first <= change.last for c in before
            )
        }
        alike = {(c.source.what, c.source.along) for c in before}

        def unlikely(change: Change) -> float:
            return sizes[change] * (1 if (change.source.what, change.source.along) in alike else _OF_A_KIND)

        change = min(sizes, key=unlikely, default=None)
        if change is None or size - sizes[change] < _PROGRESS * self.size:
            return None
        self.take(change)
        return change

    def _promising(self, rest: Tensor) -> Iterator[Change]:
        """Changes that go the right way, by the derivative."""
        back = (rest / self.unit)[self.place] * self.weights[:, None]
        slope = self.gemm.slope(self.rows, self.sums, back).float()
        masks = torch.stack(list(self.gemm.parts.values()))
        blocks = masks.view(len(masks), -1, block_of(masks[0])).all(2).to(slope.dtype)
        found: list[tuple[float, Change]] = []
        for source, gained, there in gained_by(self.gemm, self.rows, self.parts, slope):
            by_block = gained[there].sum(0)
            at = torch.arange(by_block.shape[1]) + source.by * (source.along == "K")
            exists = (at >= 0) & (at < len(at))
            every = torch.where(exists, blocks @ by_block, -torch.inf).tolist()
            for part, scores in zip(self.gemm.parts, every, strict=True):
                found += [(s, Change(source, g, g, part)) for g, s in enumerate(scores) if s > 0]
                total, first, last = _best_run(scores)
                if last > first:
                    found.append((total, Change(source, first, last, part)))
        found.sort(key=lambda pair: -pair[0])
        seen: Counter[tuple[bool, str]] = Counter()
        for _, change in found:
            part, several = (
                "rows" if change.part.startswith("rows") else change.part,
                change.last > change.first,
            )
            kind = several, part * (several or part == "rows")
            seen[kind] += 1
            if seen[kind] <= (_SEVERAL if several else _COMPUTED):
                yield change


def _best_run(scores: Sequence[float]) -> tuple[float, int, int]:
    """The largest sum of numbers that follow each other, and the first and last of them."""
    best, total, start = (-float("inf"), 0, 0), 0.0, 0
    for place, score in enumerate(scores):
        if total <= 0:
            total, start = 0.0, place
        total += score
        best = max(best, (total, start, place))
    return best


def _told(gemm: Gemm, found: list[Change], slots: str) -> Evidence:
    def order(change: Change) -> tuple[str, str, str, int]:
        return change.part, change.source.what, change.source.along, change.source.by

    said = []
    for (part, *_), alike in groupby(sorted(_in_order(found), key=lambda c: (*order(c), c.first)), key=order):
        changes = list(alike)
        groups = sorted(g for c in changes for g in range(c.first, c.last + 1))
        said += [(first, part, _in_words(gemm, changes[0], first, last)) for first, last in runs(groups)]
    shown = [words for *_, words in sorted(said)]
    of_weights, of_input = gemm.stages
    # Another input shows in all parts.
    own = all(c.source.what in ("weights", "scales") or c.part for c in found)
    more = ""
    if gemm.name == "GEMM2":
        more = (
            "; what it gets is right"
            if own
            else "; as GEMM1's columns or the activation are stored, or GEMM2 reads them"
        )
    return Evidence.of_kind(
        of_weights if own else of_input,
        f"in {gemm.name} operands are others along K{slots}",
        f"{shortened(shown, _LISTED, '; ')}{more}",
        4,
    )


def _in_order(found: list[Change]) -> list[Change]:
    """Groups that have both operands of others, of which any order gives the same sums, in the order of these."""
    whole = [c for c in found if c.source.what == "operands"]
    rest = [c for c in found if c.source.what != "operands"]
    for part in {c.part for c in whole}:
        each = [(g, g + c.source.by) for c in whole if c.part == part for g in range(c.first, c.last + 1)]
        groups, others = (sorted(column) for column in zip(*each, strict=True))
        for group, other in zip(groups, others, strict=True):
            rest.append(Change(replace(whole[0].source, by=other - group), group, group, part))
    return rest


def _in_words(gemm: Gemm, change: Change, first: int, last: int) -> str:
    source, part = change.source, change.part
    rows = part.startswith("rows")
    whole = first == 0 and last == gemm.x.shape[1] - 1
    here = "all of K" if whole else f"K {first * GROUP_SIZE} to {(last + 1) * GROUP_SIZE - 1}"
    here = f"{part}: {here}" if rows else f"{here}{part}"
    if source.what in ("left out", "twice"):
        return f"{here} {'is' if source.what == 'left out' else 'counts'} {source.what}"
    what = {"input": gemm.reads, "operands": "both operands"}.get(source.what, f"the {source.what}")
    way = "further on" if source.by > 0 else "before"
    away = f"{abs(source.by)} {way}" if abs(source.by) > 1 else ("after" if source.by > 0 else "before")
    among = " among those sorted by expert" * (source.what == "input")
    there = {
        "K": f"K {(first + source.by) * GROUP_SIZE} to {(last + source.by + 1) * GROUP_SIZE - 1}",
        "rows": f"the row {away}{among}",
        "tokens": f"the token {away}",
        "experts": f"the expert {away}",
        "expert": f"expert {source.by + gemm.first}",
    }[source.along]
    return f"{here} has {what} of {there}"
