"""Which row's result each slot has, solved among all rows of a call, and the one map that says so.

What GEMM2 gives for each row is known in every bit, so that a token's sum shows which rows were added up, or which
are missing. Those that were moved suggest rules on their place: among their expert's rows, among all sorted rows,
their token or their expert. A rule has to predict every bit, as all hypotheses do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from mxfp4ref.conformance.families.distances import last_place
from mxfp4ref.conformance.families.hypothesis import Hypothesis, Pipeline, SlotRows, of_slots, slot_outputs
from mxfp4ref.conformance.families.places import stage_before_gemm2
from mxfp4ref.conformance.families.row_offsets import sorted_rows
from mxfp4ref.conformance.finding import counted
from mxfp4ref.conformance.index_words import Rule, map_rules
from mxfp4ref.conformance.reduction import by_every_expert
from mxfp4ref.sm90.fp32 import bf16_to_fp64

__all__ = ["taken_hypotheses"]

_TOKENS, _FIRST = 64, 6  # that are solved, and before all others
_ROWS = 8192  # of a call
_WORK = 1 << 29  # multiplications of all tokens with all experts
_LOUD, _QUIET = 3.0, 1.6  # times the roundings: before, and when explained
_CANCELLED = 2.0**-12  # of the terms, that is left where they cancel
_SUM = 2.0**-21  # of the terms, that float32 may round off in their sum
_BEAM = 6  # ways to go on that are kept
_SHOWS = 2.0**-4  # of a row's largest weight, from which another row would show
_FEWEST = 2  # moved rows
_MOST = 4  # rules of one numbering
_WHOLE = 0.6  # of the tokens


@dataclass(frozen=True)
class _Rows:
    """The R rows of a call, by expert and within an expert by token; all `[R] int64`.

    Attributes:
        flat: the slot's number in one list of all.
        token, expert, position: whose they are; the last among the rows of the expert.
        counts: how many rows the expert has.
    """

    flat: Tensor
    token: Tensor
    expert: Tensor
    position: Tensor
    counts: Tensor

    @classmethod
    def of(cls, local: Tensor, experts: int) -> _Rows:
        flat, position, counts = sorted_rows(local, experts)
        return cls(flat, flat // local.shape[1], local.flatten()[flat], position, counts)

    def __len__(self) -> int:
        return len(self.flat)

    def index(self, what: str) -> tuple[Tensor, Tensor]:
        """Each row's number among what is counted, and how many of it there are."""
        if what == "row":
            return self.position, self.counts
        number = {"sorted row": torch.arange(len(self)), "token": self.token, "expert": self.expert}[what]
        return number, torch.full_like(number, int(number.max()) + 1)

    def at(self, what: str, index: Tensor) -> Tensor:
        """Which row each one becomes, if its number becomes another one; -1 where there is none."""
        if what == "sorted row":
            return torch.where((index >= 0) & (index < len(self)), index, -1)
        place = self.token if what == "token" else self.position
        expert, wanted = (index, place) if what == "expert" else (self.expert, index)
        size = int(torch.maximum(place.max(), wanted.max())) + 2
        keys = self.expert * size + place  # which ascend
        key = expert * size + wanted.clamp(min=-1)
        found = torch.searchsorted(keys, key).clamp(max=len(keys) - 1)
        return torch.where((keys[found] == key) & (wanted >= 0) & (expert >= 0), found, -1)


_NUMBERINGS = (
    ("row", "among the rows of an expert (its tokens in order)"),
    ("sorted row", "among all rows, sorted by expert"),
    ("token", "among the tokens"),
    ("expert", "at the same place of another expert's rows"),
)


@dataclass(frozen=True)
class _Solved:
    """Of the tokens that were solved, which rows have which others' results: `[N] int64` each."""

    row: Tensor
    source: Tensor  # or `_ZERO`, or `_NOTHING` where the bias is missing too


_ZERO, _NOTHING = -1, -2
_Candidates = Callable[[int], Tensor]  # of an expert, what a row of it may have, `[C, H] float64`


def taken_hypotheses(pipeline: Pipeline, slots: SlotRows, got: Tensor, wrong: Tensor) -> Iterator[Hypothesis]:
    """Those that give the rows that were found in wrong tokens; none where these are no sums of right rows.

    Args:
        pipeline: the right one.
        slots: what its weighted sum is made of.
        got: `[M, H] bf16`, the kernel's output.
        wrong: `[M, H] bool`.
    """
    call, experts = pipeline.call, pipeline.call.experts
    tokens = (wrong.any(1) & got.isfinite().all(1)).nonzero().flatten()
    rows = _Rows.of(slots.local, experts.num_experts)
    if not len(tokens) or not 0 < len(rows) <= _ROWS or not bool(slots.y.isfinite().all()):
        return
    weights = torch.where(slots.local < 0, torch.nan, slots.weights).sort(1).values
    alike = (weights.diff(dim=1) == 0).any(1)[tokens]  # of which it does not show which slot has which row
    tokens = tokens if bool(alike.all()) else tokens[~alike]
    tokens = tokens[:: -(-len(tokens) // _TOKENS)]
    results = bf16_to_fp64(slots.y.contiguous()).flatten(0, 1)[rows.flat]
    solved = _solved(pipeline, slots, got, tokens, lambda expert: results)
    if solved is not None:
        source = solved.source
        if bool((source < 0).all()):
            yield from _left_out(slots, rows, solved, wrong)
        elif bool((source >= 0).all()):
            same = bool((rows.expert[solved.row] == rows.expert[source]).all())
            stages = ("input", "fc2") if same else ("finalize", "fc2")  # and what is between them, as well
            what = "a row's input, or its result at any stage," if same else "GEMM2's row that is added up"
            right = _weighing(slots, rows, ~wrong.any(1))
            for cost, (name, where) in enumerate(_NUMBERINGS):
                index, count = rows.index(name)
                rules = (
                    (words, rule)
                    for words, rule in map_rules(index[source], index[solved.row], name, count[solved.row])
                    if torch.equal(rule(index, count)[right], index[right])
                )
                for number, (words, rule) in enumerate(islice(rules, _MOST)):
                    beyond = bool((rows.at(name, rule(index, count)) < 0).any())
                    for own, more in ((False, ""), (True, ", where there is none its own"))[: 1 + beyond]:
                        yield _hypothesis(
                            stages,
                            f"{where} {what} is another row's: {words}{more}",
                            partial(_results, name=name, rule=rule, own=own),
                            1.2 + cost / 20 + number / 100 + own / 200,
                        )
        return
    size = call.num_tokens * experts.num_experts * 3 * experts.hidden_size * experts.intermediate_size
    if size > _WORK or call.num_tokens == 1:
        return
    every = by_every_expert(call, torch.arange(call.num_tokens))
    grid = bf16_to_fp64(slot_outputs(replace(pipeline, call=every)).contiguous())
    if not bool(grid.isfinite().all()):
        return
    solved = _solved(pipeline, slots, got, tokens, lambda expert: grid[:, expert])
    if solved is None or not bool((solved.source >= 0).all()):
        return
    token = rows.token[solved.row]
    others = map_rules(solved.source, token, "token", torch.full_like(token, call.num_tokens))
    for number, (words, rule) in enumerate(islice(others, _MOST)):
        yield _hypothesis(
            ("input", "slots"),
            f"GEMM1's input rows are other tokens': {words}",
            partial(_inputs, rule=rule),
            1.3 + number / 100,
        )


def _weighing(slots: SlotRows, rows: _Rows, tokens: Tensor) -> Tensor:
    """Which rows of some tokens, `[M] bool`, show in their sums, `[R] bool`."""
    shares = slots.weights.abs() / slots.weights.abs().amax(1, keepdim=True)
    return tokens[rows.token] & (shares.flatten()[rows.flat] > _SHOWS)


def _hypothesis(
    stages: tuple[str, ...], words: str, change: Callable[[SlotRows], SlotRows], cost: float
) -> Hypothesis:
    return replace(of_slots("rows of an expert", stages, words, change, cost), across_tokens=True)


def _solved(
    pipeline: Pipeline, slots: SlotRows, got: Tensor, tokens: Tensor, candidates: _Candidates
) -> _Solved | None:
    """The rows, or tokens, that wrong tokens' rows have the results of; None if few are explained by such."""
    order, _, _ = sorted_rows(slots.local, pipeline.call.experts.num_experts)
    number = torch.empty(slots.local.numel(), dtype=torch.int64)
    number[order] = torch.arange(len(order))
    number = number.view(slots.local.shape)
    bias = pipeline.call.experts.fc2_biases if pipeline.call.tp_rank == 0 else None
    found: list[tuple[int, int]] = []
    done = 0
    for at, token in enumerate(tokens.tolist()):
        here = ((slots.local[token] >= 0) & (slots.weights[token] != 0)).nonzero().flatten()
        experts = slots.local[token, here]
        y, weights = bf16_to_fp64(slots.y[token, here].contiguous()), slots.weights[token, here].double()
        more = torch.zeros_like(y) if bias is None else bf16_to_fp64(bias[experts].contiguous())
        target = bf16_to_fp64(got[token].contiguous())
        terms = weights[:, None] * (y + more)
        size = target.abs().clamp(min=float(target.square().mean().sqrt()))  # lest few small ones decide
        size = torch.maximum(size, _CANCELLED * terms.abs().sum(0))
        noise = (last_place(size).square() / 12 + (_SUM * terms).square().sum(0)).sqrt()
        others = [
            torch.cat((candidates(e), torch.zeros_like(y[:1]), -more[i : i + 1])) / noise
            for i, e in enumerate(experts.tolist())
        ]
        chosen = _pursued((target - terms.sum(0)) / noise, y / noise, weights, others)
        if chosen is not None:
            done += 1
            for slot, source in chosen.items():
                ends = source - len(others[slot])
                found.append((int(number[token, here[slot]]), source if ends < -2 else -3 - ends))
        if at + 1 in (_FIRST, len(tokens)) and done < _WHOLE * (at + 1):
            return None
    pairs = torch.tensor(found, dtype=torch.int64).view(-1, 2)
    return _Solved(pairs[:, 0], pairs[:, 1]) if len(pairs) >= _FEWEST else None


def _pursued(error: Tensor, own: Tensor, weights: Tensor, others: list[Tensor]) -> dict[int, int] | None:
    """Which slots have which of the other rows, at most one of each, if that leaves no more than roundings.

    Args:
        error: `[H]`, in roundings.
        own: `[n, H]`, the slots' own rows, in these units.
        weights: `[n]`.
        others: for each slot `[C, H]`.
    """
    limit = _QUIET**2 * len(error)
    size = float(error.square().sum())
    squares = [rows.square().sum(1) for rows in others]
    states = [(size, error, dict[int, int]())] if size > _LOUD**2 * len(error) else []
    for _ in own:
        further = []
        for _, left, chosen in states:
            for slot, (row, weight) in enumerate(zip(own, weights, strict=True)):
                if slot in chosen:
                    continue
                rest = left + weight * row
                sizes = rest.square().sum() - weight * (2 * others[slot] @ rest - weight * squares[slot])
                for place in sizes.topk(min(_BEAM, len(sizes)), largest=False).indices.tolist():
                    now = rest - weight * others[slot][place]
                    further.append((float(sizes[place]), now, {**chosen, slot: place}))
        states = sorted(further, key=lambda state: state[0])[:_BEAM]
        if states and float(states[0][1].square().sum()) <= limit:
            return states[0][2]
    return None


def _results(slots: SlotRows, name: str, rule: Rule, own: bool) -> SlotRows:
    """With the rows of GEMM2 that a rule says; where there is none a row's own, or zeros."""
    rows = _Rows.of(slots.local, slots.call.experts.num_experts)
    source = rows.at(name, rule(*rows.index(name)))
    if own:
        source = torch.where(source < 0, torch.arange(len(rows)), source)
    moved = slots.y.flatten(0, 1).clone()
    moved[rows.flat] = torch.cat((moved[rows.flat], torch.zeros_like(moved[:1])))[source]
    return replace(slots, y=moved.view_as(slots.y))


def _inputs(slots: SlotRows, rule: Rule) -> SlotRows:
    call = slots.call
    token = torch.arange(call.num_tokens)
    taken = rule(token, torch.full_like(token, call.num_tokens)).clamp(0, call.num_tokens - 1)
    x = call.input[taken][:, None].expand(-1, call.top_k, -1)
    return replace(slots, y=slot_outputs(Pipeline(call), x))


def _left_out(slots: SlotRows, rows: _Rows, solved: _Solved, wrong: Tensor) -> Iterator[Hypothesis]:
    """The first or last rows of experts, of all or of those with some numbers of rows."""
    kept, counts = _weighing(slots, rows, ~wrong.any(1)), rows.counts
    bare = slots.call.experts.fc2_biases is None or slots.call.tp_rank > 0
    zero = bool((solved.source == _ZERO).all())
    stages = (
        (stage_before_gemm2(slots.call), "fc2") if bare else (("fc2", "activation") if zero else ("slots",))
    )
    but = ", or zero: not computed" if bare else ", but for the fc2 bias" * zero
    least, right = int(solved.row.min()), kept.nonzero().flatten()
    after = int(right.max()) + 1 if len(right) else 0
    if after <= least:
        aligned = (least // size * size for size in (128, 64, 32, 16, 8))
        from_ = next((n for n in aligned if n >= after > 0), least)
        words = f"of all rows, sorted by expert, those from number {from_} on are left out{but}"
        yield _hypothesis(stages, words, partial(_beyond, first=from_, zero=zero and not bare), 1.15)
    for which in ("last", "first"):
        place = _place(rows, which)
        least = int(place[solved.row].max()) + 1
        for size in sorted({least, 1 << (least - 1).bit_length()}):
            lost, right = counts[solved.row], counts[kept & (place < size)]
            if bool((lost <= size).all()):
                continue  # it is whole experts
            for cost, (words, holds) in enumerate(_conditions(int(lost.min()), int(lost.max()))):
                if bool(holds(lost).all()) and not bool(holds(right).any()):
                    yield _hypothesis(
                        stages,
                        f"the {which} {counted(size, 'row')} of each expert{words} {'is' if size == 1 else 'are'} "
                        f"left out{but}",
                        partial(_without, which=which, size=size, holds=holds, zero=zero and not bare),
                        1.2 + cost / 50,
                    )
                    if not words:
                        break  # which the numbers of rows do not decide


def _place(rows: _Rows, which: str) -> Tensor:
    return rows.position if which == "first" else rows.counts - 1 - rows.position


_Holds = Callable[[Tensor], Tensor]


def _conditions(least: int, most: int) -> Iterator[tuple[str, _Holds]]:
    """Words for numbers of rows, and which they are; `least` and `most` are those with rows that are left out."""
    yield "", lambda n: n > 0
    for size in (8, 16, 32, 64, 128, 4, 2, 256):
        yield f" that has a multiple of {size} rows", lambda n, s=size: n % s == 0
        yield f" whose number of rows is no multiple of {size}", lambda n, s=size: n % s != 0
    yield f" that has {least} rows or more", lambda n: n >= least
    yield f" that has {most} rows or fewer", lambda n: n <= most


def _without(slots: SlotRows, which: str, size: int, holds: _Holds, zero: bool) -> SlotRows:
    rows = _Rows.of(slots.local, slots.call.experts.num_experts)
    return _lost(slots, rows.flat[(_place(rows, which) < size) & holds(rows.counts)], zero)


def _beyond(slots: SlotRows, first: int, zero: bool) -> SlotRows:
    return _lost(slots, _Rows.of(slots.local, slots.call.experts.num_experts).flat[first:], zero)


def _lost(slots: SlotRows, lost: Tensor, zero: bool) -> SlotRows:
    """Without these slots, or, if `zero`, with rows of zeros for them."""
    if zero:
        y = slots.y.flatten(0, 1).clone()
        y[lost] = 0
        return replace(slots, y=y.view_as(slots.y))
    local = slots.local.flatten().clone()
    local[lost] = -1
    return replace(slots, local=local.view_as(slots.local))
