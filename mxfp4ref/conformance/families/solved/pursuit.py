"""Which of many candidates each slot of a token has, solved: known rows, of which a token's sum is made of some.

What GEMM2 gives for a row is known in every bit, and what it would give for another input or other weights nearly so.
A token's sum then shows which of them were added up: one change after another, each that which explains most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mxfp4ref.conformance.families.distances import sum_noise
from mxfp4ref.conformance.families.hypothesis import SlotRows
from mxfp4ref.sm90.fp32 import bf16_to_fp64

__all__ = [
    "NOTHING",
    "OWN",
    "ZERO",
    "Candidates",
    "Rows",
    "Solved",
    "biases_of",
    "showing",
    "solve",
    "telling_tokens",
]

_TOKENS, _FIRST = 64, 6  # tokens that are solved, and before all others
_LOUD, _QUIET = 3.0, 1.6  # times the roundings: before, and when explained
_BETTER, _AS_WELL = 1.05, 1.2  # times less is left, as squares, by what explains more; times more, as well
_CANCELLED = 2.0**-12  # of the terms, that is left where they cancel
_BEAM = 6  # ways to go on that are kept
_FEWEST = 2  # changed rows
_WHOLE = 0.6  # of the tokens
_SHOWS = 2.0**-4  # of a row's largest weight, from which another row would show
ZERO, NOTHING, OWN = -1, -2, -3  # instead of a candidate; NOTHING where the fc2 bias is missing too

Candidates = Callable[[int], Tensor]  # of a sorted row what it may have, with the fc2 bias, `[C, H] float64`


@dataclass(frozen=True)
class Rows:
    """The R rows of a call, by expert and within an expert by token; all `[R] int64`.

    Attributes:
        flat: the slot's number in one list of all.
        token, slot, expert, position: whose they are; the last among the rows of the expert.
        counts: how many rows the expert has.
        per_token: slots of a token.
    """

    flat: Tensor
    token: Tensor
    slot: Tensor
    expert: Tensor
    position: Tensor
    counts: Tensor
    per_token: int

    @classmethod
    def of(cls, local: Tensor) -> Rows:
        """Of the experts of all slots, `[M, k]`, -1 where a slot is skipped."""
        every, k = local.flatten(), local.shape[1]
        flat = every.argsort(stable=True)
        flat = flat[every[flat] >= 0]
        expert = every[flat]
        first = torch.searchsorted(expert, expert)
        counts = torch.searchsorted(expert, expert, right=True) - first
        row = torch.arange(len(flat), device=flat.device)
        return cls(flat, flat // k, flat % k, expert, row - first, counts, k)

    def __len__(self) -> int:
        return len(self.flat)

    def per_expert(self, experts: int) -> Tensor:
        """How many rows each of so many experts has."""
        return torch.bincount(self.expert, minlength=experts)

    def numbers(self, local: Tensor) -> Tensor:
        """Of each slot its row, `[M, k]`, -1 where it is skipped."""
        number = torch.full((local.numel(),), -1)
        number[self.flat] = torch.arange(len(self))
        return number.view(local.shape)


@dataclass(frozen=True)
class Solved:
    """What rows have, of the tokens that were solved.

    Attributes:
        row: `[N] int64`.
        source: `[N] int64`, the candidate that each has, or `ZERO`, `NOTHING` or `OWN`.
        may: `[N, C] bool`, which candidates each may have, the others being as they are.
    """

    row: Tensor
    source: Tensor
    may: Tensor

    @property
    def changed(self) -> Solved:
        """Of rows that have others' only."""
        other = self.source != OWN
        return Solved(self.row[other], self.source[other], self.may[other])


def biases_of(slots: SlotRows, experts: Tensor) -> Tensor:
    """The fc2 biases of experts as they are added, `[..., H] float64`."""
    bias = slots.call.experts.fc2_biases if slots.call.tp_rank == 0 else None
    if bias is None:
        return torch.zeros(*experts.shape, slots.y.shape[2], dtype=torch.float64)
    return bf16_to_fp64(bias[experts].contiguous())


def showing(slots: SlotRows, rows: Rows, tokens: Tensor) -> Tensor:
    """Which rows of some tokens, `[M] bool`, show in their sums, `[R] bool`."""
    shares = slots.weights.abs() / slots.weights.abs().amax(1, keepdim=True)
    return tokens[rows.token] & (shares.flatten()[rows.flat] > _SHOWS)


def telling_tokens(slots: SlotRows, got: Tensor, wrong: Tensor) -> Tensor:
    """Wrong tokens to solve: those without equal weights, which leave open which slot has what, if there are any."""
    tokens = (wrong.any(1) & got.isfinite().all(1)).nonzero().flatten()
    weights = torch.where(slots.local < 0, torch.nan, slots.weights).sort(1).values
    alike = (weights.diff(dim=1) == 0).any(1)[tokens]
    tokens = tokens if bool(alike.all()) else tokens[~alike]
    return tokens[:: max(-(-len(tokens) // _TOKENS), 1)]


def solve(
    slots: SlotRows, got: Tensor, tokens: Tensor, candidates: Candidates, *, zeros: bool = False
) -> Solved | None:
    """What rows of wrong tokens have; None if few tokens are explained by the candidates.

    Args:
        slots: what the right sum is made of.
        got: `[M, H] bf16`, the kernel's output.
        tokens: those to solve.
        candidates: what a row may have.
        zeros: whether also zeros, with the fc2 bias and without.
    """
    number = Rows.of(slots.local).numbers(slots.local)
    found: list[tuple[int, int]] = []
    may: list[Tensor] = []
    done = loud = 0
    for token in tokens.tolist():
        here = ((slots.local[token] >= 0) & (slots.weights[token] != 0)).nonzero().flatten()
        more = biases_of(slots, slots.local[token, here])
        own = bf16_to_fp64(slots.y[token, here].contiguous()) + more
        weights = slots.weights[token, here].double()
        target = bf16_to_fp64(got[token].contiguous())
        terms = weights[:, None] * own
        size = target.abs().clamp(min=float(target.square().mean().sqrt()))  # lest few small ones decide
        size = torch.maximum(size, _CANCELLED * terms.abs().sum(0))
        noise = sum_noise(size, terms)
        error = (target - terms.sum(0)) / noise
        if float(error.square().mean()) <= _LOUD**2:
            continue
        loud += 1
        rows = number[token, here].tolist()
        ends = torch.stack((more, torch.zeros_like(more)), 1)[:, : zeros * (1 + bool(more.any()))]
        others = [torch.cat((candidates(row), end)) / noise for row, end in zip(rows, ends, strict=True)]
        solved = _pursued(error, own / noise, weights, others)
        if solved is not None:
            done += 1
            left, chosen = solved
            for slot, row in enumerate(rows):
                count = len(others[slot]) - ends.shape[1]
                place = chosen.get(slot)
                found.append((row, OWN if place is None else place if place < count else count - 1 - place))
                now = own[slot] / noise if place is None else others[slot][place]
                rest = left + weights[slot] * (now - others[slot][:count])
                may.append(rest.square().sum(1) <= _AS_WELL * left.square().sum())
        if loud - done > (1 - _WHOLE) * max(loud, _FIRST):
            return None
    if done < _WHOLE * loud or sum(source != OWN for _, source in found) < _FEWEST:
        return None
    pairs = torch.tensor(found)
    return Solved(pairs[:, 0], pairs[:, 1], torch.stack(may))


def _pursued(
    error: Tensor, own: Tensor, weights: Tensor, others: list[Tensor]
) -> tuple[Tensor, dict[int, int]] | None:
    """What is left, and which slots have which of the other rows, at most one each, if no more than roundings are.

    Args:
        error: `[H]`, in roundings.
        own: `[n, H]`, the slots' own rows, in these units.
        weights: `[n]`.
        others: for each slot `[C, H]`.
    """
    if not len(own):
        return None
    limit = _QUIET**2 * len(error)
    if sum(map(len, others)) < len(error) / 2:  # no sum of changes may leave more
        changes = torch.cat([rows - row for rows, row in zip(others, own, strict=True)])
        axes = torch.linalg.qr(changes.T).Q
        if float((error - axes @ (axes.T @ error)).square().sum()) > limit:
            return None
    squares = [rows.square().sum(1) for rows in others]
    states = [(float(error.square().sum()), error, dict[int, int]())]
    best: tuple[float, Tensor, dict[int, int]] | None = None
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
                    further.append((float(now.square().sum()), now, {**chosen, slot: place}))
        states = sorted(further, key=lambda state: state[0])[:_BEAM]
        if best is not None and (not states or states[0][0] * _BETTER > best[0]):
            break
        if states and states[0][0] <= limit:
            best = states[0]
    return None if best is None else best[1:]
