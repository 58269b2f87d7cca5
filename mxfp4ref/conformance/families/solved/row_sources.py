"""Whose rows slots have, solved among all rows of a call: results, rows of the activation, or tokens' input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from mxfp4ref._words import shortened
from mxfp4ref.conformance.families.hypothesis import Pipeline, SlotRows, slot_outputs
from mxfp4ref.conformance.families.solved.pursuit import (
    NOTHING,
    Rows,
    Solved,
    biases_of,
    solve,
    telling_tokens,
)
from mxfp4ref.conformance.findings.finding import Evidence
from mxfp4ref.conformance.findings.reduction import by_every_expert
from mxfp4ref.formats.mxfp4 import dequantize
from mxfp4ref.model.forward import trace
from mxfp4ref.sm90.fp32 import bf16_to_fp64, to_bf16

__all__ = ["RowSource", "row_sources", "taken_evidence"]

_ROWS = 8192  # of a call
_WORK = 1 << 29  # multiplications of all rows or tokens with all experts
_LISTED = 6


@dataclass(frozen=True)
class RowSource:
    """What rows have of others.

    Attributes:
        what: "result", "added" (a result beside the own one), "activation" or "input".
        solved: of the rows that have others', which row or, of the input, token.
        words: for what they have.
        stages: of hypotheses.
    """

    what: str
    solved: Solved
    words: str
    stages: tuple[str, ...]


def row_sources(
    pipeline: Pipeline, slots: SlotRows, got: Tensor, wrong: Tensor, rows: Rows
) -> Iterator[RowSource]:
    """What explains wrong tokens, the plainest first; arguments as of `taken_hypotheses`, and the slots' rows."""
    call, experts = pipeline.call, pipeline.call.experts
    tokens = telling_tokens(slots, got, wrong)
    if not len(tokens) or not 0 < len(rows) <= _ROWS or not bool(slots.y.isfinite().all()):
        return

    def solved_by(
        others: Callable[[int], Tensor], zeros: bool = True, own: Tensor | None = None
    ) -> Solved | None:
        def candidates(row: int) -> Tensor:
            found = others(int(rows.expert[row])) + biases_of(slots, rows.expert[row])
            return found if own is None else found + own[row]

        found = solve(slots, got, tokens, candidates, zeros=zeros)
        return None if found is None else found.changed

    results = bf16_to_fp64(slots.y.contiguous()).flatten(0, 1)[rows.flat]
    solved = solved_by(lambda expert: results)
    if solved is not None:
        source = solved.source.clamp(min=0)
        same = bool((rows.expert[solved.row] == rows.expert[source]).all())
        stages = ("input", "fc2") if same else ("finalize", "fc2")  # and what is between them, as well
        words = "a row's input, or its result at any stage," if same else "GEMM2's row that is added up"
        yield RowSource("result", solved, words, stages)
        if bool((solved.source >= 0).any()):
            return
    solved = solved_by(lambda expert: results, zeros=False, own=results)
    if solved is not None and bool((rows.expert[solved.row] == rows.expert[solved.source]).all()):
        added = "added to their own as by sums not cleared"
        words = f"rows have, {added}, what GEMM2 gives for another row of their expert"
        yield RowSource("added", solved, words, ("fc2", "finalize"))
        return
    work = len(rows) * experts.num_experts * experts.hidden_size * experts.intermediate_size
    if experts.quantized and work <= _WORK:
        solved = solved_by(_second_of(pipeline))
        if solved is not None and bool((solved.source != NOTHING).all()):
            words = "GEMM2's input, a row of the activation,"
            yield RowSource("activation", solved, words, ("fc2", "activation"))
            return
    size = call.num_tokens * experts.num_experts * 3 * experts.hidden_size * experts.intermediate_size
    if size > _WORK or call.num_tokens == 1:
        return
    every = by_every_expert(call, torch.arange(call.num_tokens))
    grid = bf16_to_fp64(slot_outputs(replace(pipeline, call=every)).contiguous())
    if bool(grid.isfinite().all()):
        solved = solved_by(lambda expert: grid[:, expert], zeros=False)
        if solved is not None:
            yield RowSource("input", solved, "GEMM1's input rows", ("input", "slots"))


def _second_of(pipeline: Pipeline) -> Callable[[int], Tensor]:
    """Of an expert, what its GEMM2 gives for every row's activation, `[R, H] float64`."""
    experts, activation = pipeline.call.experts, trace(pipeline.call).activation.double()
    assert experts.fc2_scales is not None
    scales = experts.fc2_scales

    @cache
    def of(expert: int) -> Tensor:
        some = slice(expert, expert + 1)
        dense = dequantize(experts.fc2_weights[some], scales[some], convention="sm90", dtype=torch.float32)
        products = activation @ dense[0].double().T  # autocast would take float32 for bf16
        return bf16_to_fp64(to_bf16(products.float()))

    return of


def taken_evidence(pipeline: Pipeline, slots: SlotRows, got: Tensor, wrong: Tensor) -> Evidence | None:
    """What follows, if rows of others explain wrong tokens up to roundings, whether by a rule or not."""
    rows, call = Rows.of(slots.local), pipeline.call
    first = call.ep_rank * call.experts.num_experts
    for one in row_sources(pipeline, slots, got, wrong, rows):
        row, source = one.solved.row, one.solved.source
        if not bool((source >= 0).any()):
            continue
        token = source if one.what == "input" else rows.token[source]
        same = one.what == "input" or bool((rows.expert[row] == rows.expert[source])[source >= 0].all())
        kind = f"{one.words} are other {'tokens' if same else 'rows'}'" if one.what != "added" else one.words
        told = []
        for r, s, t in zip(row.tolist(), source.tolist(), token.tolist(), strict=True):
            own = f"token {rows.token[r]}, expert {int(rows.expert[r]) + first}"
            whose = f"token {t}" if same else f"token {t}, expert {int(rows.expert[s]) + first}"
            told.append(f"{own} has that of {whose}" if s >= 0 else f"{own} has zeros")
        by = set((token - rows.token[row]).tolist())
        further = f" (always {by.pop():+d} tokens on)" if len(by) == 1 else ""
        along = set((row - source).tolist()) if one.what != "input" else set()
        by_row = len(along) == 1 and len(row) > 1 and not further
        if by_row:
            away = along.pop()
            way = "before" if away > 0 else "after"
            further = f" (always the row {abs(away)} {way} it among those sorted by expert)"
        at_the_end = _at_the_end(rows, row)
        of_a_gemm = same and (by_row or at_the_end)  # which has its own order of rows
        stages = one.stages
        if one.what in ("result", "input") and not of_a_gemm:
            stages = ("slots", "input" if same else "finalize")
        further += at_the_end
        words = f"{shortened(told, _LISTED, '; ')}{further}; all else of the tokens solved is right"
        return Evidence.of_kind(stages, kind, words, 4)
    return None


def _at_the_end(rows: Rows, row: Tensor) -> str:
    """Whether these rows are all the first, or all the last, of their expert."""
    if len(torch.unique(rows.expert[row])) < 2:
        return ""
    if bool((rows.position[row] == rows.counts[row] - 1).all()):
        return "; each of these is the last row of its expert"
    return "; each of these is the first row of its expert" if not bool(rows.position[row].any()) else ""
