"""Whose tensors each row had, solved: of each group of tensors a table of experts, and the rules that give it.

A table goes by expert, by blocks of the rows of an expert, or by blocks of all sorted rows. It has to agree with most
rows that were solved, as rules have: roundings leave open which row of its token a few of them are. Tables and rules
have to predict every bit, as all hypotheses do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from mxfp4ref._words import shortened
from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.families.hypotheses.index_maps import IndexMap, expert_maps
from mxfp4ref.conformance.families.hypothesis import Hypothesis, Pipeline, SlotRows, of_slots
from mxfp4ref.conformance.families.solved.expert_rules import Rule, rules
from mxfp4ref.conformance.families.solved.other_experts import OtherExperts, with_others
from mxfp4ref.conformance.families.solved.pursuit import Rows, Solved, showing, solve, telling_tokens
from mxfp4ref.conformance.families.solved.table_words import own_words
from mxfp4ref.conformance.families.solved.tensor_groups import WHOLE, Group, groups_of, whole_experts
from mxfp4ref.conformance.findings.finding import Evidence
from mxfp4ref.conformance.findings.index_words import map_rules
from mxfp4ref.model.call import MoeCall

__all__ = ["whose_evidence", "whose_hypotheses", "whose_table"]

_BLOCKS = (128, 64, 32, 16, 8)  # rows
_AGREE = 0.8  # of the rows that were solved
_ROWS_OF_A_BLOCK = 1.5  # that are solved, on average, for a table by blocks
_LISTED = 8
_FEWEST = 3  # experts, from which their numbers may follow a rule


def whose_hypotheses(
    pipeline: Pipeline, slots: SlotRows, got: Tensor, wrong: Tensor, *, kind: str = ""
) -> Iterator[Hypothesis]:
    """For each group of tensors that explains wrong tokens, its table and the rules that may be the table's.

    Args:
        pipeline: the right one.
        slots: what its weighted sum is made of.
        got: `[M, H] bf16`, the kernel's output.
        wrong: `[M, H] bool`.
        kind: of the hypotheses; by default of all.
    """
    call = pipeline.call
    for group, rows, may, solved in _solutions(pipeline, slots, got, wrong, kind):
        known = ~may.all(1)

        def agrees(whose: Tensor, may: Tensor = may, known: Tensor = known) -> bool:
            return float(may[known, whose[known]].float().mean()) >= _AGREE

        tables = list(_tables(call, group, rows, may, solved))
        fitting = [one for one in rules() if agrees(one[1](call, rows))]
        maps = [axis for axis in expert_maps() if agrees(_mapped(axis, call, rows))]
        for axis in maps:
            yield _hypothesis(group, group.of(axis.of("expert")), partial(_mapped, axis), axis.cost)
        if tables and not fitting and not maps:
            fitting += [one for one in _by_number(call, rows, tables[0]) if agrees(one[1](call, rows))]
        for words, rule, cost in fitting:
            yield _hypothesis(group, f"{group.kind}: {words.format(has=group.has)}", rule, cost)
        for number, table in enumerate(tables):
            of_call = partial(_of_this_call if table.by_rows else _of_any_call, rows, table.whose)
            words = f"{group.kind}: {table.words}"
            yield replace(_hypothesis(group, words, of_call, 2.5 + number / 100), table=True)


def _mapped(axis: IndexMap, call: MoeCall, rows: Rows) -> Tensor:
    return axis.index(call.experts.num_experts)[rows.expert]


def whose_evidence(pipeline: Pipeline, slots: SlotRows, got: Tensor, wrong: Tensor) -> Evidence | None:
    """What follows, if other experts' tensors explain wrong tokens up to roundings; arguments as before."""
    for group, rows, may, solved in _solutions(pipeline, slots, got, wrong, ""):
        tables = _tables(pipeline.call, group, rows, may, solved)
        table = max(tables, key=lambda one: one.agreeing, default=None)
        told = _by_row(pipeline.call, rows, solved.changed) if table is None else table.words
        return Evidence.of_kind(
            group.stages, group.kind, f"{told}; all else of the tokens solved is right", 4
        )
    return None


_Solution = tuple[Group, Rows, Tensor, Solved]


def _solutions(
    pipeline: Pipeline, slots: SlotRows, got: Tensor, wrong: Tensor, kind: str
) -> Iterator[_Solution]:
    """Groups that explain wrong tokens, with the rows, whose tensors each may have, and what was solved."""
    others = OtherExperts(pipeline, slots)
    tokens = telling_tokens(slots, got, wrong)
    if not others.usable or not len(tokens) or not bool(slots.y.isfinite().all()):
        return
    call = pipeline.call
    by_names: dict[tuple[str, ...], Solved | None] = {}
    for group in (whole_experts(call), *groups_of(call)):
        given = tuple(sorted(name for name in group.names if getattr(call.experts, name) is not None))
        if given in by_names and group.stages != WHOLE:
            continue  # but all that an expert has is taken for a slot, too
        if given not in by_names:
            wanted = kind in ("", group.kind)
            by_names[given] = solve(slots, got, tokens, others.candidates(given)) if wanted else None
        if (solved := by_names[given]) is not None:
            may = _allowed(call, slots, others.rows, solved, given, ~wrong.any(1))
            yield group, others.rows, may, solved


def _by_row(call: MoeCall, rows: Rows, solved: Solved) -> str:
    first = call.ep_rank * call.experts.num_experts
    told = [
        f"token {rows.token[row]}'s expert {int(rows.expert[row]) + first} by {source + first}"
        for row, source in zip(solved.row.tolist(), solved.source.tolist(), strict=True)
    ]
    return shortened(told, _LISTED)


def _by_number(call: MoeCall, rows: Rows, table: _Table) -> Iterator[tuple[str, Rule, float]]:
    """The rules of a table by experts as numbers, where there is one."""
    count, first = call.experts.num_experts, call.ep_rank * call.experts.num_experts
    pairs = torch.unique(torch.stack((rows.expert, table.whose)), dim=1) + first
    if len(torch.unique(pairs[0])) < pairs.shape[1] or int((pairs[0] != pairs[1]).sum()) < _FEWEST:
        return
    for words, rule in map_rules(pairs[1], pairs[0], "expert", torch.full_like(pairs[0], first + count)):
        told = words.replace("expert n is expert", "expert n {has} expert")
        yield told, partial(_numbered, rule), 1.9


def _numbered(rule: Callable[[Tensor, Tensor], Tensor], call: MoeCall, rows: Rows) -> Tensor:
    count, first = call.experts.num_experts, call.ep_rank * call.experts.num_experts
    return (rule(rows.expert + first, torch.full_like(rows.expert, first + count)) - first).clamp(
        0, count - 1
    )


@dataclass(frozen=True)
class _Table:
    """Of each sorted row whose tensors it has, `[R]`, in words; the part of those solved that agrees.

    `by_rows` is whether it goes by blocks of rows, not by experts alone.
    """

    words: str
    whose: Tensor
    agreeing: float
    by_rows: bool


def _hypothesis(group: Group, words: str, rule: Rule, cost: float) -> Hypothesis:
    def on(slots: SlotRows) -> SlotRows:
        return with_others(slots, group.names, rule(slots.call, Rows.of(slots.local)))

    one = of_slots("another expert's", group.stages, words, on, cost)
    return replace(one, across_tokens=True, kind=group.kind)


def _of_any_call(of: Rows, whose: Tensor, call: MoeCall, rows: Rows) -> Tensor:
    """A table by experts, by their numbers on a rank; those that it does not have keep their own."""
    size = call.experts.num_experts
    to = torch.arange(max(size, int(of.expert.max()) + 1))
    to[of.expert] = whose
    to = torch.where(to < size, to, torch.arange(len(to)))
    found: Tensor = to[rows.expert]
    return found


def _of_this_call(of: Rows, whose: Tensor, call: MoeCall, rows: Rows) -> Tensor:
    """The solved table, which no other call has."""
    if not torch.equal(of.flat, rows.flat) or not torch.equal(of.expert, rows.expert):
        raise ValueError("rows: expected those that were solved")
    return whose


def _allowed(
    call: MoeCall, slots: SlotRows, rows: Rows, solved: Solved, names: tuple[str, ...], right: Tensor
) -> Tensor:
    """Whose tensors each row may have, `[R, E] bool`: as solved, and the own ones or equal ones in right tokens."""
    count = call.experts.num_experts
    alike = torch.ones(count, count, dtype=torch.bool)
    for name in names:
        flat = getattr(call.experts, name).reshape(count, -1)
        alike &= torch.stack([(flat == one).all(1) for one in flat])
    may = alike[rows.expert] | ~showing(slots, rows, right)[:, None]
    may[solved.row] = solved.may
    return may


def _tables(call: MoeCall, group: Group, rows: Rows, may: Tensor, solved: Solved) -> Iterator[_Table]:
    """Those that agree with all that was solved, the plainest first."""
    first, taken, known = call.ep_rank * call.experts.num_experts, solved.changed, ~may.all(1)
    at, size = torch.arange(len(rows)), int(rows.counts.max())
    own = f" (expert {first} is the rank's first)" * (first > 0)
    ways: list[tuple[Tensor, Callable[[Tensor, Tensor], str]]] = [
        (rows.expert, lambda cells, whose: _pairs(group, cells + first, whose + first) + own)
    ]
    for block in (b for b in _BLOCKS if b < size):
        ways.append(
            (
                rows.expert + (rows.position // block << 32),
                lambda cells, whose, b=block: _by_block(group, cells, whose + first, b, first),
            )
        )
    for block in (b for b in _BLOCKS if b < len(rows)):
        ways.append((at // block, lambda cells, whose, b=block: _sorted_blocks(cells, whose + first, b)))
    for number, (cell, told) in enumerate(ways):
        which, inverse = torch.unique(cell, return_inverse=True)
        agreeing = torch.zeros(len(which), may.shape[1]).index_add_(0, inverse[known], may[known].float())
        kept = torch.zeros(len(which)).index_add_(0, inverse[known], may[known, rows.expert[known]].float())
        chosen = torch.zeros_like(agreeing)  # how often, where several are possible
        chosen.index_put_((inverse[taken.row], taken.source), torch.ones(len(taken.row)), accumulate=True)
        other = (agreeing + chosen / (1 + len(rows))).argmax(1)
        keeps = kept >= agreeing.amax(1)
        whose = torch.where(keeps[inverse], rows.expert, other[inverse])
        agree = float(may[known, whose[known]].float().mean())
        if agree < _AGREE:
            continue
        if number and len(taken.row) < _ROWS_OF_A_BLOCK * int((~keeps).sum()):
            continue
        yield _Table(told(which[~keeps], other[~keeps]), whose, agree, number > 0)


def _pairs(group: Group, experts: Tensor, whose: Tensor) -> str:
    """ "expert 1 has those of 0, 2 of 1"."""
    pairs = list(zip(experts.tolist(), whose.tolist(), strict=True))
    of = group.has.split()[-1]
    told = [f"{a} {of} {b}" for a, b in pairs[1:]]
    start = f"expert {pairs[0][0]} {group.has} expert {pairs[0][1]}"
    if len(pairs) == 2 and pairs[0] == pairs[1][::-1]:
        start = f"experts {pairs[0][0]} and {pairs[0][1]} are exchanged, {start}"
    return shortened([start, *told], _LISTED)


def _by_block(group: Group, cells: Tensor, whose: Tensor, size: int, first: int) -> str:
    """What each block of rows of an expert has, where it is not its own."""
    block, expert = cells >> 32, cells % (1 << 32) + first
    told = []
    for b in torch.unique(block).tolist():
        pairs = _pairs(group, expert[block == b], whose[block == b])
        told.append(f"in its rows {size * b} to {size * b + size - 1} {pairs}")
    return shortened(told, _LISTED // 2, "; ")


def _sorted_blocks(cells: Tensor, whose: Tensor, size: int) -> str:
    told = [
        f"{size * b} to {size * b + size - 1} those of expert {e}"
        for b, e in zip(cells.tolist(), whose.tolist(), strict=True)
    ]
    return f"rows, sorted by expert, {shortened(told, _LISTED)}"


def whose_table(pipeline: Pipeline, got: Tensor, wrong: Tensor, kind: str) -> str:
    """The table of a call, in words, where tensors of that kind predict every bit; "" where they do not."""
    for one in whose_hypotheses(pipeline, SlotRows.of(pipeline), got, wrong, kind=kind):
        output = one.run(pipeline) if one.table else None
        if output is not None and not bool(differing(output, got).any()):
            return own_words(one.words, kind)
    return ""
