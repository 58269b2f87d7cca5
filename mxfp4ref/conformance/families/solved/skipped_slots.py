"""Which rows were added for slots to be skipped, padded ones and other ranks', solved, and with which weights.

Where a token's error is a sum of few of the rows that GEMM2 gives in this call, those were added. Which of the slots
each stands for, its weight tells; and a rule on the rows has to predict every bit, as all hypotheses do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, product

import torch
from torch import Tensor

from mxfp4ref._words import shortened
from mxfp4ref.conformance.families.distances import sum_noise
from mxfp4ref.conformance.families.hypothesis import Hypothesis, SlotRows, of_slots
from mxfp4ref.conformance.families.solved.pursuit import Rows, biases_of
from mxfp4ref.conformance.findings.finding import Evidence
from mxfp4ref.conformance.findings.index_words import map_rules
from mxfp4ref.sm90.fp32 import bf16_to_fp64

__all__ = ["of_skipped_slots", "skipped_hypotheses"]

_TOKENS, _FEWEST, _WHOLE = 24, 2, 0.75  # that are solved, that have to be, and the part of them
_SIZE, _SLOTS = 1 << 24, 8  # of all rows of a call, of a token
_QUIET, _LOUD = 1.6, 4.0  # times the roundings
_SAME = 2.0**-6  # relative, of weights
_NAMED = 4
_Kind = Callable[[Tensor], Tensor]  # ids to those that are meant
_KINDS: tuple[tuple[str, _Kind], ...] = (
    ("slots to be skipped", lambda ids: ids == ids),
    ("padded slots (-1), to be skipped,", lambda ids: ids < 0),
    ("slots of other ranks, to be skipped,", lambda ids: ids >= 0),
)
_WEIGHTS = ("with their routing weights", "without a weight")


@dataclass(frozen=True)
class _Added:
    """One row that was added: for these slots of a token, the row's number among all sorted rows, how many times."""

    token: int
    slots: tuple[int, ...]
    row: int
    times: float


@dataclass(frozen=True)
class _Solved:
    """All that was found, and whether it goes by the routing weights."""

    added: tuple[_Added, ...]
    weighted: bool


def skipped_hypotheses(slots: SlotRows, got: Tensor, wrong: Tensor) -> Iterator[Hypothesis]:
    """Those that give what was found; none where errors are no sums of rows, or tokens without such slots are wrong.

    Args:
        slots: what the right weighted sum is made of.
        got: `[M, H] bf16`, the kernel's output.
        wrong: `[M, H] bool`.
    """
    if (solved := _solved(slots, got, wrong)) is None:
        return
    for words, rows in _rules(slots, solved):
        for kind, which in _kinds(slots, solved):
            weights = _WEIGHTS[not solved.weighted]
            change = partial(_adding, which=which, rows=rows, weighted=solved.weighted)
            told = f"{kind} add {words}, {weights}, as where a map of rows is not filled for them"
            hypothesis = of_slots("ranks", ("slots", "finalize"), told, change, 1.15)
            yield replace(hypothesis, across_tokens=True)


def of_skipped_slots(slots: SlotRows, got: Tensor, wrong: Tensor) -> Evidence | None:
    """The same in words, row by row where there is no rule; arguments as of `skipped_hypotheses`."""
    if (solved := _solved(slots, got, wrong)) is None:
        return None
    flat = Rows.of(slots.local).flat
    first = slots.call.ep_rank * slots.call.experts.num_experts
    told = []
    for one in solved.added:
        token, slot = divmod(int(flat[one.row]), slots.local.shape[1])
        expert = int(slots.local[token, slot]) + first
        which = f"slot{'s' * (len(one.slots) > 1)} {', '.join(map(str, one.slots))} of token {one.token}"
        told.append(f"{which} {one.times:.3g} x sorted row {one.row}, token {token}'s of expert {expert}")
    rule = next((f"{words}: " for words, _ in _rules(slots, solved)), "")
    # Of a token's only row, its own weight is not told from those of slots that add it once more.
    alone = all(
        int(flat[one.row]) // slots.local.shape[1] == one.token
        and int((slots.local[one.token] >= 0).sum()) == 1
        for one in solved.added
    )
    or_weights = "; or that row's weight is that much larger, as if normalised over this rank's slots" * alone
    return Evidence.of_kind(
        ("slots", "finalize"),
        "slots that are padded or another rank's add rows of other slots",
        f"{rule}{shortened(told, _NAMED, '; ')}{or_weights}; all else of these tokens is right",
        3,
    )


def _solved(slots: SlotRows, got: Tensor, wrong: Tensor) -> _Solved | None:
    skipped = slots.local < 0
    tokens = (wrong.any(1) & got.isfinite().all(1)).nonzero().flatten()
    flat = Rows.of(slots.local).flat
    if not (
        len(tokens) >= _FEWEST
        and 0 < len(flat) * got.shape[1] <= _SIZE
        and bool(skipped[tokens].any(1).all())
    ):
        return None
    tokens = tokens[:: -(-len(tokens) // _TOKENS)]
    results = bf16_to_fp64(slots.y.contiguous()) + biases_of(slots, slots.local.clamp(min=0))
    terms = torch.where(skipped, 0.0, slots.weights).double()[..., None] * results
    rows = results.flatten(0, 1)[flat]
    if not bool(rows.isfinite().all()):
        return None
    explained: list[tuple[int, list[int], Tensor]] = []
    for token in tokens.tolist():
        target = bf16_to_fp64(got[token].contiguous())
        size = target.abs().clamp(min=float(target.square().mean().sqrt()))
        noise = sum_noise(size, terms[token])
        error = (target - terms[token].sum(0)) / noise
        most = min(int(skipped[token].sum()), _SLOTS)
        if (
            float(error.square().mean()) > _LOUD**2
            and (found := _pursued(error, rows / noise, most)) is not None
        ):
            explained.append((token, *found))
    if len(explained) < max(_WHOLE * len(tokens), _FEWEST):
        return None
    for weighted in (True, False):
        added = [_assigned(slots, weighted, *one) for one in explained]
        if all(added):
            return _Solved(tuple(one for some in added for one in some), weighted)
    return None


def _pursued(error: Tensor, rows: Tensor, most: int) -> tuple[list[int], Tensor] | None:
    """Which few rows `[R, H]` an error `[H]` is the sum of, and how many times each; in roundings, both."""
    left, chosen = error, list[int]()
    units = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-300)
    for _ in range(most):
        best = int((units @ left).abs().argmax())
        if best in chosen:
            return None
        chosen.append(best)
        factors = torch.linalg.lstsq(rows[chosen].T, error[:, None], driver="gelsd").solution[:, 0]
        left = error - factors @ rows[chosen]
        if float(left.square().mean()) <= _QUIET**2:
            return chosen, factors
    return None


def _assigned(slots: SlotRows, weighted: bool, token: int, rows: list[int], times: Tensor) -> list[_Added]:
    """Which skipped slots stand for which row, by the sums of their weights; none if none do."""
    skipped = (slots.local[token] < 0).nonzero().flatten().tolist()
    given = slots.weights[token].double() if weighted else torch.ones_like(slots.weights[token]).double()
    for owners in islice(product(range(len(rows) - 1, -2, -1), repeat=len(skipped)), 1 << 14):
        which = torch.tensor(owners)
        sums = torch.stack([given[skipped][which == n].sum() for n in range(len(rows))])
        if bool(((sums - times).abs() <= _SAME * times.abs()).all()):
            return [
                _Added(
                    token,
                    tuple(s for s, o in zip(skipped, owners, strict=True) if o == n),
                    row,
                    float(times[n]),
                )
                for n, row in enumerate(rows)
            ]
    return []


def _kinds(slots: SlotRows, solved: _Solved) -> Iterator[tuple[str, _Kind]]:
    """Which of the slots that are skipped, as far as those found are all of a kind."""
    tokens = sorted({one.token for one in solved.added})
    found = torch.zeros_like(slots.local, dtype=torch.bool)
    for one in solved.added:
        found[one.token, list(one.slots)] = True
    for words, kind in _KINDS:
        some = (slots.local < 0) & kind(slots.call.token_selected_experts)
        if torch.equal(some[tokens], found[tokens]):
            yield words, kind


# Of slots' numbers in one list of all, which sorted row each has.
_Rows = Callable[[SlotRows, Tensor], Tensor]


def _rules(slots: SlotRows, solved: _Solved) -> Iterator[tuple[str, _Rows]]:
    """Which rows, as far as one rule gives all of them."""
    top_k = slots.local.shape[1]
    number = torch.tensor([one.token * top_k + slot for one in solved.added for slot in one.slots])
    row = torch.tensor([one.row for one in solved.added for _ in one.slots])
    count = int((slots.local >= 0).sum())
    flat = Rows.of(slots.local).flat
    if bool((row == row[0]).all()):
        own = int(row[0])
        first = " (the first one)" * (own == 0)
        yield f"row {own} of all rows, sorted by expert{first}", lambda slots, number: number * 0 + own
        if own == count - 1:
            yield "the last of all rows, sorted by expert", _last
        return
    for words, rule in islice(
        map_rules(row, number, "row", torch.full_like(number, slots.local.numel())), _NAMED
    ):
        yield (
            f"sorted rows by their own number among all slots ({words})",
            lambda slots, number, rule=rule: rule(number, torch.full_like(number, slots.local.numel())),
        )
    for words, last in (("first", False), ("last", True)):
        if torch.equal(flat[row] // top_k, number // top_k) and torch.equal(_own(slots, number, last), row):
            yield f"the row of their token's {words} slot that is computed", partial(_own, last=last)


def _last(slots: SlotRows, number: Tensor) -> Tensor:
    return torch.full_like(number, int((slots.local >= 0).sum()) - 1)


def _own(slots: SlotRows, number: Tensor, last: bool) -> Tensor:
    """The sorted row of the first or last slot of a slot's token that is computed; -1 without any."""
    top_k = slots.local.shape[1]
    row, here = Rows.of(slots.local).numbers(slots.local), (slots.local >= 0).to(torch.int8)
    slot = top_k - 1 - here.flip(1).argmax(1) if last else here.argmax(1)
    token = number // top_k
    return row[token, slot[token]]


def _adding(slots: SlotRows, which: _Kind, rows: _Rows, weighted: bool) -> SlotRows:
    flat = Rows.of(slots.local).flat
    here = ((slots.local < 0) & which(slots.call.token_selected_experts)).flatten().nonzero().flatten()
    row = rows(slots, here)
    here, row = here[(row >= 0) & (row < len(flat))], row[(row >= 0) & (row < len(flat))]
    local, weights = slots.local.flatten().clone(), slots.weights.flatten().clone()
    local[here] = local[flat[row]]
    if not weighted:
        weights[here] = 1.0
    added = slots.placing(here, slots.y.flatten(0, 1)[flat[row]])
    return replace(added, local=local.view_as(slots.local), weights=weights.view_as(slots.weights))
