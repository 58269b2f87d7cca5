"""Which routing weights were used, solved, and the rule by which they follow from those that were given.

GEMM2's rows are known, so that a token's sum shows the weight of each of its slots. Each may be a small linear
combination of the token's given weights, of which both are taken in some order: of slots, ids, weights, or this
rank's slots first. Or the weight of another token, or of another place in a list of all weights. A rule has to
predict every bit, as all hypotheses do, or to be told as what it is: up to roundings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, product

import torch
from torch import Tensor

from mxfp4ref.conformance.families.distances import solvable, sum_noise
from mxfp4ref.conformance.families.hypothesis import Hypothesis, SlotRows, of_slots
from mxfp4ref.conformance.families.solved.pursuit import biases_of
from mxfp4ref.conformance.families.solved.solved_weights import unsure_of
from mxfp4ref.conformance.families.solved.weight_mixtures import ORDERS, Mixture, none
from mxfp4ref.conformance.findings.index_words import Rule, map_rules
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90.fp32 import bf16_to_fp64

__all__ = ["weight_rules"]

_TOKENS, _FIRST = 64, 6  # that are solved, and before all others
_WHOLE = 0.6  # of these tokens
_QUIET = 1.6  # times the roundings, that may be left
_SMALL = 2.0**-4  # of a row, what is taken for small numbers, which are rounded less
_DETERMINED = 0.05  # of the token's largest weight, that one may be unsure by
_TIMES = 1.7  # how far off a weight may be, in what it is unsure by
_SAME = 2.0**-18
_MOST = 4  # rules of a kind
_COEFFICIENTS = torch.tensor([0, 1, -1, 0.5, 2, -0.5, -2, 0.25, 1 / 3], dtype=torch.float64, device="cpu")
_LEAST = 2.0**-6  # singular value of the given weights of tokens, from which coefficients are told


@dataclass(frozen=True)
class _Table:
    """The weights of T tokens: `[T, k] float64`, those found NaN where that is not known, and how unsure they are."""

    tokens: Tensor
    found: Tensor
    unsure: Tensor

    @property
    def known(self) -> Tensor:
        return self.found.isfinite()

    def fits(self, predicted: Tensor) -> bool:
        """Whether weights `[T, k]` are those found."""
        off = (predicted - self.found).abs() <= _TIMES * self.unsure + _SAME * predicted.abs()
        return bool((off | ~self.known).all())


# Numbers in lists of all weights: of the slot `[M, k]` where one is used, or where one lies.
_LISTS: tuple[tuple[str, Callable[[MoeCall, Tensor], Tensor]], ...] = (
    ("slot by slot", lambda call, local: torch.arange(local.numel()).view_as(local)),
    ("as [k, M]", lambda call, local: torch.arange(local.numel()).view(local.shape[1], -1).t()),
    ("by the token's number", lambda call, local: torch.arange(len(local))[:, None].expand_as(local)),
)


def weight_rules(slots: SlotRows, got: Tensor, wrong: Tensor) -> Iterator[Hypothesis]:
    """Those that give the weights that were found; none where the output is no sum of right rows.

    Args:
        slots: what the right weighted sum is made of.
        got: `[M, H] bf16`, the kernel's output.
        wrong: `[M, H] bool`.
    """
    if (table := _solved(slots, got, wrong)) is None:
        return
    yield from _of_an_expert(slots, table)
    yield from _above_a_threshold(slots, table)
    yield from islice(_within_tokens(slots, table), 2 * _MOST)
    yield from islice(_across_tokens(slots, table, ~wrong.any(1)), _MOST)


def _solved(slots: SlotRows, got: Tensor, wrong: Tensor) -> _Table | None:
    """Of wrong tokens, the weights of right rows; None where few are such sums."""
    tokens = (wrong.any(1) & got.isfinite().all(1) & (slots.local >= 0).any(1)).nonzero().flatten()
    tokens = tokens[:: max(len(tokens) // _TOKENS, 1)][:_TOKENS]
    if not len(tokens) or not solvable(bf16_to_fp64(got[tokens].contiguous())):
        return None
    found = torch.full((len(tokens), slots.local.shape[1]), torch.nan, dtype=torch.float64)
    unsure, done = torch.zeros_like(found), 0
    for at, token in enumerate(tokens.tolist()):
        here = (slots.local[token] >= 0).nonzero().flatten()
        y = bf16_to_fp64(slots.y[token, here].contiguous()) + biases_of(slots, slots.local[token, here])
        target = bf16_to_fp64(got[token].contiguous())
        terms = slots.weights[token, here, None].abs() * y
        size = target.abs().clamp(
            min=_SMALL * float(target.square().mean().sqrt())
        )  # lest few small ones decide
        noise = sum_noise(size, terms)
        rows, row = y / noise, target / noise
        if bool(rows.isfinite().all()) and 4 * len(y) <= len(target):
            weights = torch.linalg.lstsq(rows.T, row[:, None], driver="gelsd").solution[:, 0]
            off = unsure_of(rows, torch.ones_like(row))
            if float((row - weights @ rows).square().mean()) <= _QUIET**2:
                done += 1
                sure = off <= _DETERMINED * weights.abs().max()
                found[at, here[sure]], unsure[at, here[sure]] = weights[sure], off[sure]
        if at + 1 in (_FIRST, len(tokens)) and done < _WHOLE * (at + 1):
            return None
    known = found.isfinite().any(1)
    return _Table(tokens[known], found[known], unsure[known]) if bool(known.any()) else None


def _of_an_expert(slots: SlotRows, table: _Table) -> Iterator[Hypothesis]:
    """A number, or one times its own, as the weight of the only expert whose weights are others."""
    given, local = slots.weights.double()[table.tokens], slots.local[table.tokens]
    allowed = _TIMES * table.unsure + _SAME * table.found.abs()
    experts = torch.unique(local[table.known & ((table.found - given).abs() > allowed)]).tolist()
    here = table.known & torch.isin(local, torch.tensor(experts))
    if len(experts) != 1 or int(here.sum()) <= 2:
        return
    (expert,) = experts
    last = expert == slots.call.experts.num_experts - 1
    words = "the last expert's" if last else f"expert {expert}'s"
    for times, own in ((False, torch.ones_like(given)), (True, given)):
        found, off = (t[here] / own[here] for t in (table.found, allowed))
        number = _simple(float(found.median()), float(off.min()))
        if bool(((found - number).abs() <= off).all()):

            def change(rows: SlotRows, times: bool = times, number: float = number) -> SlotRows:
                its = rows.local == (rows.call.experts.num_experts - 1 if last else expert)
                new = rows.weights * number if times else torch.full_like(rows.weights, number)
                return replace(rows, weights=torch.where(its, new, rows.weights))

            told = (
                f"{words} routing weight is {number:g}{' times its own' * times}, in every token that has it"
            )
            yield of_slots("routing weights", ("finalize",), told, change, 1.05)


def _above_a_threshold(slots: SlotRows, table: _Table) -> Iterator[Hypothesis]:
    """Weights below a number taken for zero: it lies between those that were and those that were not."""
    given = slots.weights.double()[table.tokens]
    allowed = _TIMES * table.unsure + _SAME * given.abs()
    lost, kept = (table.known & ((table.found - asked).abs() <= allowed) for asked in (0 * given, given))
    if bool((table.known & ~lost & ~kept).any()):
        return
    lost, kept = lost & ~kept, kept & ~lost
    if not bool(lost.any()) or not bool(kept.any()):
        return
    number_of = {
        magnitude: _simple(float(low + high) / 2, float(high - low) / 2.01)
        for magnitude, size in ((False, given), (True, given.abs()))
        if (low := size[lost].amax()) < (high := size[kept].amin())
    }
    rules = [_left_out(number, magnitude) for magnitude, number in number_of.items()]
    if rules:
        yield replace(rules[0], variants=tuple(rules[1:]))


def _left_out(number: float, magnitude: bool) -> Hypothesis:
    def change(rows: SlotRows) -> SlotRows:
        size = rows.weights.abs() if magnitude else rows.weights
        return replace(rows, local=torch.where(size < number, -1, rows.local))

    words = f"the slots with a weight{' of magnitude' * magnitude} below {number:g} are left out of the sum"
    return of_slots("dropped slots", ("slots", "finalize"), words, change, 1.35)


def _within_tokens(slots: SlotRows, table: _Table) -> Iterator[Hypothesis]:
    given = slots.weights.double()[table.tokens]
    orders = [order(slots.call, slots.local)[table.tokens] for *_, order in ORDERS]
    seen: list[Tensor] = []
    pairs = sorted(product(range(len(ORDERS)), repeat=2), key=lambda p: (p != (0, 0), sum(map(bool, p)), p))
    for used, of in pairs:
        if any(n and torch.equal(orders[n], orders[0]) for n in (used, of)):
            continue  # which is no other order
        found, unsure = (t.gather(1, orders[used]) for t in (table.found, table.unsure))
        rows = _combinations(_Table(table.tokens, found, unsure), given.gather(1, orders[of]))
        if rows is None:
            continue
        coefficients, constants = rows
        for more in (constants, 0 * constants)[: 1 + bool(constants.any())]:  # as weights may add up to 1
            one = Mixture(used, of, coefficients + (constants - more)[:, None], more)
            weights = one.of_weights(slots).weights
            if any(torch.equal(weights, other) for other in seen):
                continue
            seen.append(weights)
            if one.constant in (1, 1 / weights.shape[1]) or one.is_factor:
                continue  # which has words of its own
            for rule in one.counted():
                words = rule.words()
                if used != of and words.count(";") > 1:
                    continue  # several slots' by chance
                cost = 1.1 + 0.05 * bool(used or of) + 0.05 * bool(used and of) + 0.15 * words.count(";")
                yield of_slots(
                    "routing weights", ("finalize",), words, rule.of_weights, cost + 0.01 * rule.back
                )
                if used:
                    words = f"{words}, and are added in that order"
                    yield of_slots("ids", ("slots", "finalize"), words, rule.of_rows, cost + 0.02)


def _combinations(table: _Table, given: Tensor) -> tuple[Tensor, Tensor] | None:
    """Coefficients and constants by which the weights found follow from these; None if no small ones do."""
    top_k = given.shape[1]
    coefficients, constants = torch.zeros(top_k, top_k, dtype=torch.float64), none(top_k)
    for n in range(top_k):
        here = table.known[:, n]
        if not bool(here.any()):
            coefficients[n, n] = 1
            continue
        found, allowed = table.found[here, n], _TIMES * table.unsure[here, n]
        near = (given[here] - found[:, None]).abs() <= (allowed + _SAME * found.abs())[:, None]
        single = near.all(0).nonzero().flatten().tolist()
        if single:
            coefficients[n, n if n in single else single[0]] = 1
            continue
        middle = float(found.median())
        if bool(((found - middle).abs() <= 2 * allowed).all()) and len(found) > 2:
            constants[n] = _simple(middle, float(allowed.min()))
            continue
        row = _small_ones(given[here], found, allowed)
        if row is None:
            return None
        coefficients[n] = row
    return coefficients, constants


def _simple(value: float, allowed: float) -> float:
    """The roundest number that near it."""
    return next(
        (n for digits in range(6) if abs((n := round(value, digits)) - value) <= allowed and n), value
    )


def _small_ones(given: Tensor, found: Tensor, allowed: Tensor) -> Tensor | None:
    """Coefficients of a set of few simple numbers, or a factor on one of the given; `[k]`."""
    if len(found) <= 2:
        return None
    for j, column in enumerate(given.unbind(1)):  # a factor
        if bool((column != 0).all()):
            ratio = float((found / column).median())
            factor = _simple(ratio, float((allowed / column.abs()).min()))
            if bool(((factor * column - found).abs() <= allowed + _SAME * found.abs()).all()):
                row = torch.zeros(given.shape[1], dtype=torch.float64)
                row[j] = factor
                return row
    if len(found) < given.shape[1] + 2 or float(torch.linalg.svdvals(given / given.norm()).min()) < _LEAST:
        return None
    solution = torch.linalg.lstsq(
        given / allowed[:, None], (found / allowed)[:, None], driver="gelsd"
    ).solution
    apart = (solution - _COEFFICIENTS).abs()
    row = _COEFFICIENTS[apart.argmin(1)]
    return row if bool(((given @ row - found).abs() <= allowed + _SAME * found.abs()).all()) else None


def _across_tokens(slots: SlotRows, table: _Table, right: Tensor) -> Iterator[Hypothesis]:
    """Of other tokens, slot for slot, or of other places in a list of all weights."""
    given, count = slots.weights.double(), len(slots.weights)
    near = (given[None] - table.found[:, None]).abs() <= (_TIMES * table.unsure)[:, None] + _SAME
    alike = (near | ~table.known[:, None]).all(2)  # [T, M]
    if bool(alike.any(1).all()) and count > 1:
        sure = alike.sum(1) == 1
        source, token = alike.double().argmax(1)[sure], table.tokens[sure]
        every = torch.arange(count)[right]
        own = torch.where(slots.local[right] >= 0, given[right], 0.0)
        for words, rule in map_rules(source, token, "token", torch.full_like(token, count)):
            others = given[rule(every, torch.full_like(every, count)).clamp(0, count - 1)]
            if bool(
                (torch.where(slots.local[right] >= 0, others, 0.0) - own).abs().gt(_SMALL * own.abs()).any()
            ):
                continue  # it would show in tokens that are right
            told = f"the routing weights are those of other tokens: {words}"
            yield _of_others(told, partial(_of_tokens, rule=rule), 1.2)
    places = [(words, of(slots.call, slots.local)) for words, of in _LISTS]
    for (used, at), (lying, place) in product(places, places[:2]):
        if at is place and used != "slot by slot":
            continue
        listed = torch.empty(given.numel(), dtype=torch.float64)
        listed[place.flatten()] = given.flatten()
        wanted = at[table.tokens]
        for shift in (0, *(d for n in range(1, slots.weights.shape[1] * 4) for d in (n, -n) if at is place)):
            index = wanted + shift
            inside = (index >= 0) & (index < len(listed))
            if int((inside & table.known).sum()) > 2 and _Table(
                table.tokens, torch.where(inside, table.found, torch.nan), table.unsure
            ).fits(listed[index.clamp(0, len(listed) - 1)]):
                if at is place and shift % slots.weights.shape[1] == 0:
                    continue  # of other tokens, or the right ones
                off = f" {abs(shift)} place{'s' * (abs(shift) > 1)} {'on' if shift > 0 else 'before'}" * bool(
                    shift
                )
                told = (
                    f"the routing weights are read {used} from a list of all, in which they lie {lying}{off}: "
                    "those of other tokens or slots"
                )
                yield _of_others(told, partial(_of_lists, used=used, lying=lying, shift=shift), 1.25)


def _of_others(words: str, change: Callable[[SlotRows], SlotRows], cost: float) -> Hypothesis:
    hypothesis = of_slots("routing weights", ("finalize",), words, change, cost)
    return replace(hypothesis, across_tokens=True)


def _of_tokens(slots: SlotRows, rule: Rule) -> SlotRows:
    token = torch.arange(len(slots.weights))
    source = rule(token, torch.full_like(token, len(token)))
    return replace(slots, weights=slots.weights[source.clamp(0, len(token) - 1)])


def _of_lists(slots: SlotRows, used: str, lying: str, shift: int) -> SlotRows:
    at, place = (dict(_LISTS)[words](slots.call, slots.local) for words in (used, lying))
    listed = torch.empty(slots.weights.numel(), dtype=torch.float32)
    listed[place.flatten()] = slots.weights.flatten()
    return replace(slots, weights=listed[(at + shift) % len(listed)])
