"""Which row's result, activation or input each slot has, solved among all rows of a call, and the map that says so.

What GEMM2 gives for each row is known in every bit, so that a token's sum shows which rows were added up, or which
are missing. Those that were moved suggest rules on their place: among their expert's rows, among all sorted rows, all
slots, their token or their expert. A rule has to predict every bit, as all hypotheses do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypothesis import Hypothesis, Pipeline, SlotRows, of_slots, slot_outputs
from mxfp4ref.conformance.families.places import stage_before_gemm2
from mxfp4ref.conformance.families.solved.pursuit import ZERO, Rows, Solved, showing
from mxfp4ref.conformance.families.solved.row_sources import RowSource, row_sources
from mxfp4ref.conformance.findings.finding import counted
from mxfp4ref.conformance.findings.index_words import Rule, map_rules
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import trace
from mxfp4ref.sm90.elementwise import to_bf16
from mxfp4ref.sm90.gemm.cpu import group_scaled_gemm

__all__ = ["second_products", "taken_hypotheses"]

_MOST = 4  # rules of one numbering


def _index(rows: Rows, what: str) -> tuple[Tensor, Tensor]:
    """Each row's number among what is counted, and how many of it there are."""
    if what == "row":
        return rows.position, rows.counts
    numbers = {
        "sorted row": torch.arange(len(rows)),
        "slot": rows.flat,
        "token": rows.token,
        "expert": rows.expert,
    }
    number = numbers[what]
    last = (
        int(rows.token.max()) * rows.per_token + rows.per_token - 1 if what == "slot" else int(number.max())
    )
    return number, torch.full_like(number, last + 1)


def _at(rows: Rows, what: str, index: Tensor) -> Tensor:
    """Which row each one becomes, if its number becomes another one; -1 where there is none."""
    if what == "sorted row":
        return torch.where((index >= 0) & (index < len(rows)), index, -1)
    if what == "slot":
        keys, key = rows.flat, index
        there, order = index >= 0, rows.flat.argsort()
    else:
        place = rows.token if what == "token" else rows.position
        expert, wanted = (index, place) if what == "expert" else (rows.expert, index)
        size = int(torch.maximum(place.max(), wanted.max())) + 2
        keys, key = rows.expert * size + place, expert * size + wanted.clamp(min=-1)
        there, order = (wanted >= 0) & (expert >= 0), torch.arange(len(rows))
    found = torch.searchsorted(keys[order], key).clamp(max=len(keys) - 1)
    return torch.where((keys[order][found] == key) & there, order[found], -1)


_NUMBERINGS = (
    ("row", "among the rows of an expert (its tokens in order)"),
    ("sorted row", "among all rows, sorted by expert"),
    ("slot", "among the slots of all tokens (token by token)"),
    ("token", "among the tokens"),
    ("expert", "at the same place of another expert's rows"),
)


def taken_hypotheses(pipeline: Pipeline, slots: SlotRows, got: Tensor, wrong: Tensor) -> Iterator[Hypothesis]:
    """Those that give the rows that were found in wrong tokens; none where these are no sums of right rows.

    Args:
        pipeline: the right one.
        slots: what its weighted sum is made of.
        got: `[M, H] bf16`, the kernel's output.
        wrong: `[M, H] bool`.
    """
    call, rows = pipeline.call, Rows.of(slots.local)
    right = showing(slots, rows, ~wrong.any(1))
    for one in row_sources(pipeline, slots, got, wrong, rows):
        zero = one.solved.source < 0
        if one.what == "added":
            continue  # no rule on rounded rows gives every bit of what accumulators hold
        if one.what == "input":
            yield from _of_tokens(call, rows, one, right)
        elif one.what == "activation" or not bool(zero.any()):
            yield from _moved(call, rows, one, right)
        elif bool(zero.all()):
            yield from _left_out(slots, rows, one.solved, wrong)


def _of_tokens(call: MoeCall, rows: Rows, taken: RowSource, right: Tensor) -> Iterator[Hypothesis]:
    """Rules on which token's input each row has."""
    for name, where in _NUMBERINGS[:4]:
        index, count = _index(rows, name)
        if name == "token":
            count = torch.full_like(count, call.num_tokens)
        row = taken.solved.row
        others = _with_sizes(call, map_rules(taken.solved.source, index[row], name, count[row]))
        for number, (words, rule) in enumerate(islice(others, _MOST)):
            if not bool((rule(call, index, count) == rows.token)[right].all()):
                continue
            told = words if name == "token" else f"{words.replace(f'is {name} n', 'has token n')} {where}"
            yield _hypothesis(
                taken.stages,
                f"{taken.words} are other tokens': {told}",
                partial(_inputs, name=name, rule=rule),
                1.3 + number / 100 + 0.1 * (name != "token"),
            )


_SIZES: dict[str, Callable[[MoeCall], int]] = {
    "top_k": lambda call: call.top_k,
    "the number of tokens": lambda call: call.num_tokens,
    "the number of experts": lambda call: call.experts.num_experts,
}
_OfCall = Callable[[MoeCall, Tensor, Tensor], Tensor]  # a `Rule` in which sizes of the call may be


def _with_sizes(call: MoeCall, rules: Iterable[tuple[str, Rule]]) -> Iterator[tuple[str, _OfCall]]:
    """Rules, with sizes of the call that are their numbers before these."""
    for words, rule in rules:
        start, sign, number = words.rpartition("// ") if "// " in words else words.rpartition("modulo ")
        for name, size in _SIZES.items() if sign else ():
            if number == str(size(call)):
                yield f"{start}{sign}{name}", partial(_by_size, divided=sign == "// ", size=size)
        yield words, lambda _, n, of, rule=rule: rule(n, of)


def _by_size(call: MoeCall, n: Tensor, _: Tensor, *, divided: bool, size: Callable[[MoeCall], int]) -> Tensor:
    return n // size(call) if divided else n % size(call)


def _moved(call: MoeCall, rows: Rows, taken: RowSource, right: Tensor) -> Iterator[Hypothesis]:
    """Rules on which other row each one has, or none, that agree with those that are right."""
    moving = _results if taken.what == "result" else _activations
    row, source = (t[taken.solved.source >= 0] for t in (taken.solved.row, taken.solved.source))
    for cost, (name, where) in enumerate(_NUMBERINGS):
        index, count = _index(rows, name)
        rules = (
            one
            for one in _with_sizes(call, map_rules(index[source], index[row], name, count[row]))
            if torch.equal(one[1](call, index, count)[right], index[right])
        )
        for number, (words, rule) in enumerate(islice(rules, _MOST)):
            beyond = bool((_at(rows, name, rule(call, index, count)) < 0).any())
            for own, more in ((False, ""), (True, ", where there is none its own"))[: 1 + beyond]:
                yield _hypothesis(
                    taken.stages,
                    f"{where} {taken.words} is another row's: {words}{more}",
                    partial(moving, name=name, rule=rule, own=own),
                    1.2 + cost / 20 + number / 100 + own / 200,
                )


def _hypothesis(
    stages: tuple[str, ...], words: str, change: Callable[[SlotRows], SlotRows], cost: float
) -> Hypothesis:
    return replace(of_slots("rows of an expert", stages, words, change, cost), across_tokens=True)


def _taken(call: MoeCall, rows: Rows, name: str, rule: _OfCall, own: bool) -> Tensor:
    """The row that a rule says for each; where there is none a row's own, or -1."""
    source = _at(rows, name, rule(call, *_index(rows, name)))
    return torch.where(source < 0, torch.arange(len(rows)), source) if own else source


def _results(slots: SlotRows, name: str, rule: _OfCall, own: bool) -> SlotRows:
    """With the rows of GEMM2 that a rule says, or zeros."""
    rows = Rows.of(slots.local)
    y = slots.y.flatten(0, 1)[rows.flat]
    taken = torch.cat((y, torch.zeros_like(y[:1])))[_taken(slots.call, rows, name, rule, own)]
    return slots.placing(rows.flat, taken)


def _activations(slots: SlotRows, name: str, rule: _OfCall, own: bool) -> SlotRows:
    """With GEMM2 of the rows of the activation that a rule says, or of zeros."""
    rows, right = Rows.of(slots.local), trace(slots.call).activation
    taken = torch.cat((right, torch.zeros_like(right[:1])))[_taken(slots.call, rows, name, rule, own)]
    return slots.placing(rows.flat, second_products(slots.call, taken, rows.expert))


def second_products(call: MoeCall, activation: Tensor, expert: Tensor) -> Tensor:
    """Rounded, `[R, H] bf16`, of rows of the activation `[R, I] bf16` and their experts `[R]`."""
    y = activation.new_zeros(len(activation), call.experts.hidden_size)
    for number in torch.unique(expert).tolist():
        mine = expert == number
        codes, scales = call.experts.weights("fc2", number)
        assert scales is not None
        product = group_scaled_gemm(
            activation[None, mine],
            codes,
            scales,
            tactic=call.kernel.tactics[1],
            generation=call.kernel.generation,
        )
        y[mine] = to_bf16(product[0])
    return y


def _inputs(slots: SlotRows, name: str, rule: _OfCall) -> SlotRows:
    call, rows = slots.call, Rows.of(slots.local)
    index, count = _index(rows, name)
    if name == "token":
        count = torch.full_like(count, call.num_tokens)
    token = torch.arange(call.num_tokens).repeat_interleave(call.top_k)
    token[rows.flat] = rule(call, index, count).clamp(0, call.num_tokens - 1)
    return replace(slots, y=slot_outputs(slots.pipeline, call.input[token.view(slots.local.shape)]))


def _left_out(slots: SlotRows, rows: Rows, solved: Solved, wrong: Tensor) -> Iterator[Hypothesis]:
    """The first or last rows of experts, of all or of those with some numbers of rows."""
    kept, counts = showing(slots, rows, ~wrong.any(1)), rows.counts
    bare = slots.call.experts.fc2_biases is None or slots.call.tp_rank > 0
    zero = bool((solved.source == ZERO).all())
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


def _place(rows: Rows, which: str) -> Tensor:
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
    rows = Rows.of(slots.local)
    return _lost(slots, rows.flat[(_place(rows, which) < size) & holds(rows.counts)], zero)


def _beyond(slots: SlotRows, first: int, zero: bool) -> SlotRows:
    return _lost(slots, Rows.of(slots.local).flat[first:], zero)


def _lost(slots: SlotRows, lost: Tensor, zero: bool) -> SlotRows:
    """Without these slots, or, if `zero`, with rows of zeros for them."""
    if zero:
        return slots.placing(lost, 0)
    local = slots.local.flatten().clone()
    local[lost] = -1
    return replace(slots, local=local.view_as(slots.local))
