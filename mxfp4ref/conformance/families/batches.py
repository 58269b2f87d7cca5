"""Many hypotheses on one token, computed together: what several of them share is computed once.

Most change one stage: what comes before it is the right one's, and what comes after is computed of all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypothesis import FAILURES, Hypothesis, Pipeline, local_of, unchecked
from mxfp4ref.formats.experts import Experts
from mxfp4ref.model.forward import KERNEL, activate_rows, check_stage

__all__ = ["each", "one_thread", "tried"]

_T = TypeVar("_T")
_AT_ONCE = 32
_BYTES = 1 << 24  # of the experts that are computed at once
_ROWS = 256  # which the activation takes at once
_NAMES = tuple(field.name for field in fields(Experts))
_BY_EXPERT = ("values", "K groups", "rows")  # families that change each expert's tensors by themselves


@contextmanager
def one_thread() -> Iterator[None]:
    """Small tensors are computed faster by one thread than by many that wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def each(
    part: Pipeline, hypotheses: Iterable[Hypothesis], look: Callable[[Tensor], Sequence[_T]]
) -> Iterator[tuple[Hypothesis, Tensor | None, _T | None]]:
    """Each hypothesis, its output `[M, H]`, and what is seen in GEMM2's rows of it; None where not defined.

    Args:
        part: the right pipeline; hypotheses on one token are computed some at a time, and rows seen of these alone.
        hypotheses: any.
        look: gets the rows of several, `[P, k, H]`, zeros where a slot is skipped, and gives something of each.
    """
    local = local_of(part)
    usual = part.rows is None and part.stages.select_local is KERNEL.select_local
    if len(local) != 1 or not usual or not bool((local >= 0).any()):
        for one in hypotheses:
            yield one, one.run(part), None
        return
    token = _Token(part, local)
    rest = iter(hypotheses)
    while some := list(islice(rest, token.at_once)):
        changed = [token.changed(one) for one in some]
        try:
            outputs = iter(token.outputs([c for c in changed if c], look))
        except FAILURES:  # one of them, of numbers that nobody has thought of
            outputs, changed = iter(()), [None] * len(some)
        for one, known in zip(some, changed, strict=True):
            yield one, *(next(outputs) if known else (one.run(part), None))


@dataclass(frozen=True)
class _Changed:
    """A changed pipeline that has the experts of the token's slots only, and the fc2 biases that `local` indexes."""

    pipeline: Pipeline
    biases: Tensor | None
    local: Tensor

    def __getitem__(self, name: str) -> Any:
        """A tensor of the experts."""
        return getattr(self.pipeline.call.experts, name)


_Rows = list[Tensor | None]  # of each hypothesis; None where it is not defined


def _shared(x: _Rows, keys: Sequence[tuple[object, ...]], usual: Sequence[Hashable], compute: Any) -> _Rows:
    """What a stage gives for rows `x`, once for those of the same rows and objects `keys`.

    `compute` gets the places of those that are `usual` alike together, and of others (None) one by one.
    """
    names = [(id(rows), *map(id, key)) for rows, key in zip(x, keys, strict=True)]
    first = {name: i for i, name in reversed(list(enumerate(names))) if x[i] is not None}
    alike: dict[Hashable, list[int]] = {}
    for i in sorted(first.values()):
        alike.setdefault(("alone", i) if usual[i] is None else usual[i], []).append(i)
    found: dict[int, Tensor] = {}
    for places in alike.values():
        try:
            found |= zip(places, compute(places), strict=True)
        except FAILURES:
            if len(places) > 1:
                raise
    return [found.get(first[name]) if name in first else None for name in names]


class _Token:
    """One token of a pipeline; its `n` slots that are computed are in the order of their experts."""

    def __init__(self, part: Pipeline, local: Tensor) -> None:
        self.part, self.local = part, local
        slots = (local[0] >= 0).nonzero().flatten()
        self.slots = slots[local[0, slots].argsort(stable=True)]
        self.used = local[0, self.slots]
        self.right = {
            n: None if (t := getattr(part.call.experts, n)) is None else t[self.used] for n in _NAMES
        }
        ids = torch.full_like(local, -1, dtype=torch.int32)
        ids[0, self.slots] = torch.arange(len(slots), dtype=torch.int32, device=local.device)
        call = part.having(**self.right).call
        self.numbers = ids.to(torch.int64)
        self.few = replace(part, call=unchecked(call, token_selected_experts=ids, ep_size=1, ep_rank=0))
        size = sum(t.nbytes for t in self.right.values() if t is not None)
        self.at_once = max(1, min(_AT_ONCE, _BYTES // size, _ROWS // len(slots)))

    def changed(self, hypothesis: Hypothesis) -> _Changed | None:
        """None where more is changed than experts' tensors of the same shapes, the input and stages."""
        if hypothesis.family in _BY_EXPERT and not hypothesis.across_experts:
            known = self._changed(hypothesis, self.few)
            # A parameter or bias may be that of an expert which is not among these.
            if known and all(t is None or t.dim() == 3 or known[n] is t for n, t in self.right.items()):
                return known
        return self._changed(hypothesis, self.part)

    def _changed(self, hypothesis: Hypothesis, base: Pipeline) -> _Changed | None:
        right, tensors = base.call, dict[str, Tensor | None]()
        try:
            changed = hypothesis.change(base)
            call = changed.call
            for name in _NAMES:
                old, new = getattr(right.experts, name), getattr(call.experts, name)
                if new is old or new is None:
                    tensors[name] = self.right[name] if new is old else None
                elif old is None or not _alike(old, new):
                    return None
                else:
                    tensors[name] = new if base is self.few else new[self.used]
        except FAILURES:
            return None
        names = [f.name for f in fields(right) if f.name not in ("input", "experts")]
        others = [(getattr(call, name), getattr(right, name)) for name in names]
        simple = (
            changed.run_call is None
            and changed.rows is None
            and changed.stages.select_local is KERNEL.select_local
            and type(call) is type(right)
            and _alike(call.input, right.input)
            and all(a is b or (not isinstance(a, Tensor) and a == b) for a, b in others)
        )
        biases = call.experts.fc2_biases
        local = self.numbers if base is self.few else self.local
        return _Changed(changed.having(**tensors), biases, local) if simple else None

    def outputs(
        self, changed: list[_Changed], look: Callable[[Tensor], Sequence[_T]]
    ) -> Iterator[tuple[Tensor | None, _T | None]]:
        """Of each its output `[1, H]`, and what is seen in what GEMM2 gives for each slot."""
        inputs = {id(c.pipeline.call.input): c.pipeline.call.input for c in changed}
        inputs = {number: row.expand(len(self.slots), -1) for number, row in inputs.items()}
        x: _Rows = [inputs[id(c.pipeline.call.input)] for c in changed]
        x = self._rounded("round_fc1", changed, self._gemm(0, changed, x))
        x = self._rounded("round_activation", changed, self._activated(changed, x))
        x = self._rounded("round_fc2", changed, self._gemm(1, changed, x))
        some = [i for i, rows in enumerate(x) if rows is not None]
        seen = dict(zip(some, look(self._by_slot(x, some)), strict=True)) if some else {}
        return zip(self._summed(changed, x), (seen.get(i) for i in range(len(x))), strict=True)

    def _gemm(self, which: int, changed: list[_Changed], x: _Rows) -> _Rows:
        name, count = ("fc1", "fc2")[which], len(self.slots)
        pairs = [(c[f"{name}_weights"], c[f"{name}_scales"]) for c in changed]
        gemms = [getattr(c.pipeline.stages, f"{name}_gemm") for c in changed]
        num_columns, kernel = self.part.call.experts.gemm_shapes[which][0], self.part.call.kernel
        how = {"tactic": kernel.tactics[which], "generation": kernel.generation}

        def sums(places: list[int]) -> list[Tensor]:
            gemm, pair, rows = gemms[places[0]], pairs[places[0]], _stacked(x, places).transpose(0, 1)
            found = gemm(rows, *pair, **how, positions=rows.new_zeros(rows.shape[:2], dtype=torch.int64))
            check_stage(f"{name}_gemm", found, (count, len(places), num_columns))
            return list(found.transpose(0, 1).contiguous())

        ours = getattr(KERNEL, f"{name}_gemm")  # takes all rows of the same weights together
        usual = [
            tuple(map(id, pair)) if gemm is ours else None for pair, gemm in zip(pairs, gemms, strict=True)
        ]
        return _shared(x, [(*pair, gemm) for pair, gemm in zip(pairs, gemms, strict=True)], usual, sums)

    def _rounded(self, stage: str, changed: list[_Changed], x: _Rows) -> _Rows:
        stages = [getattr(c.pipeline.stages, stage) for c in changed]

        def rounded(places: list[int]) -> list[Tensor]:
            rows = _stacked(x, places)
            found = stages[places[0]](rows.flatten(0, 1))
            check_stage(stage, found, rows.flatten(0, 1).shape)
            return list(found.view(rows.shape))

        usual = [True if one is getattr(KERNEL, stage) else None for one in stages]
        return _shared(x, [(one,) for one in stages], usual, rounded)

    def _activated(self, changed: list[_Changed], x: _Rows) -> _Rows:
        stages = [c.pipeline.stages.activate for c in changed]
        names = ("fc1_biases", *self.part.call.activation.defaults)
        given = [tuple(c[name] for name in names) for c in changed]

        def activated(places: list[int]) -> list[Tensor]:
            rows = _stacked(x, places)
            joined = {n: _joined([changed[i][n] for i in places]) for n in names}
            call, number = (
                self.part.having(**joined).call,
                torch.arange(rows.shape[0] * rows.shape[1], device=rows.device),
            )
            found = activate_rows(call, rows.flatten(0, 1), number, stages[places[0]])
            return list(found.view(*rows.shape[:2], -1))

        usual = [
            tuple(t is None for t in tensors) if stage is self.part.stages.activate else None
            for stage, tensors in zip(stages, given, strict=True)
        ]
        keys = [(stage, *tensors) for stage, tensors in zip(stages, given, strict=True)]
        return _shared(x, keys, usual, activated)

    def _by_slot(self, x: _Rows, places: list[int]) -> Tensor:
        """`[P, k, H]`, zeros where a slot is skipped."""
        rows = _stacked(x, places)
        found = rows.new_zeros(len(rows), self.part.call.top_k, rows.shape[2])
        return found.index_copy_(1, self.slots, rows)

    def _summed(self, changed: list[_Changed], x: _Rows) -> _Rows:
        call, count = self.part.call, len(self.slots)
        stages = [(c.pipeline.stages.finalize, c.pipeline.stages.round_output) for c in changed]
        biases = [c.biases if call.tp_rank == 0 else None for c in changed]
        usual = [
            b is None if s == (KERNEL.finalize, KERNEL.round_output) else None
            for s, b in zip(stages, biases, strict=True)
        ]

        def summed(places: list[int]) -> list[Tensor]:
            finalize, rounding = stages[places[0]]
            local, bias = changed[places[0]].local, biases[places[0]]
            if usual[places[0]] is not None:  # each has experts of its own
                numbers = torch.arange(len(places) * count, device=local.device).view(-1, count)
                local = numbers.new_full((len(places), call.top_k), -1).index_copy_(1, self.slots, numbers)
                bias = None if bias is None else _joined([changed[i]["fc2_biases"] for i in places])
            weights = call.token_final_scales.expand(len(places), -1).contiguous()
            return list(rounding(finalize(self._by_slot(x, places), local, weights, bias))[:, None])

        sums = _shared(x, [(*s, b) for s, b in zip(stages, biases, strict=True)], usual, summed)
        return [
            y if y is None or c.pipeline.after is None else tried(c.pipeline.after, y)
            for y, c in zip(sums, changed, strict=True)
        ]


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


def _stacked(x: _Rows, places: Iterable[int]) -> Tensor:
    return torch.stack([x[i] for i in places])


def _joined(tensors: list[Any]) -> Tensor | None:
    return None if tensors[0] is None else torch.cat(tensors)


def tried(compute: Callable[[_T], Tensor], given: _T) -> Tensor | None:
    """None where it is not defined."""
    try:
        return compute(given)
    except FAILURES:
        return None
