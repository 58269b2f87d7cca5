"""GEMM1's or GEMM2's input of which a part of K comes from another row: which part, and how far away the row lies.

What each row would give with a part of another one's numbers is computed for a few rows, and solved for in the sums
of their tokens; what all changed rows agree on is tried on the whole call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypotheses.fragment_maps import ACTIVATION, INPUT, Matrix, moved_elements
from mxfp4ref.conformance.families.hypothesis import Hypothesis, Pipeline, SlotRows, slot_outputs
from mxfp4ref.conformance.families.solved.pursuit import Rows, Solved, biases_of, solve, telling_tokens
from mxfp4ref.conformance.families.solved.taken_rows import second_products
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import trace
from mxfp4ref.sm90.fp32 import bf16_to_fp64

__all__ = ["mixed_row_hypotheses"]

_AWAY = tuple(sign * by for by in (1, 2, 4, 8, 16, 32, 64, 128) for sign in (1, -1))
_TILES = (64, 128, 32)
_WORK = 1 << 31  # multiplications for the rows of one token
_MOST_ROWS = 8192


@dataclass(frozen=True)
class _Part:
    """Some of K: in words, and from where to where."""

    words: str
    start: int
    stop: int

    def of(self, column: Tensor) -> Tensor:
        return (column >= self.start) & (column < self.stop)


def _parts(depth: int) -> Iterator[_Part]:
    yield _Part("the second half", depth // 2, depth)
    yield _Part("the first half", 0, depth // 2)
    yield _Part("the last quarter", depth - depth // 4, depth)
    yield _Part("the first quarter", 0, depth // 4)
    for size in _TILES:
        if 4 * size < depth:
            yield _Part(f"the last {size}", depth - size, depth)
            yield _Part(f"the first {size}", 0, size)


def mixed_row_hypotheses(
    pipeline: Pipeline, slots: SlotRows, got: Tensor, wrong: Tensor
) -> Iterator[Hypothesis]:
    """Those that explain a few wrong tokens; arguments as of `taken_hypotheses`."""
    call, rows = pipeline.call, Rows.of(slots.local)
    experts, tokens = call.experts, telling_tokens(slots, got, wrong)
    size = experts.hidden_size * experts.intermediate_size * call.top_k * len(_AWAY) * 30
    if not len(tokens) or not 1 < len(rows) <= _MOST_ROWS or size > _WORK or not experts.quantized:
        return
    for matrix, depth, products in (
        (INPUT, experts.hidden_size, _of_input(pipeline, rows)),
        (ACTIVATION, experts.intermediate_size, _of_activation(call, rows)),
    ):
        parts = list(_parts(depth))

        def candidates(row: int, parts: list[_Part] = parts, products: _Products = products) -> Tensor:
            return products(row, parts) + biases_of(slots, rows.expert[row])

        solved = solve(slots, got, tokens, candidates)
        if solved is not None:
            yield from _agreed(matrix, parts, rows, solved.changed)
            return


_Products = Callable[[int, list[_Part]], Tensor]


def _mixed(matrix: Tensor, row: int, parts: list[_Part]) -> Tensor:
    """The row with each part of each other row, `[parts * _AWAY, K]`."""
    column = torch.arange(matrix.shape[1])
    others = matrix[(row + torch.tensor(_AWAY)).clamp(0, len(matrix) - 1)]
    return torch.cat([torch.where(part.of(column), others, matrix[row]) for part in parts])


def _of_input(pipeline: Pipeline, rows: Rows) -> _Products:
    call = pipeline.call
    sorted_input = call.input[rows.token]

    def products(row: int, parts: list[_Part]) -> Tensor:
        x = _mixed(sorted_input, row, parts)
        expert = torch.full((len(x), 1), int(rows.expert[row]) + call.ep_rank * call.experts.num_experts)
        one = replace(
            call,
            input=x,
            token_selected_experts=expert.to(torch.int32),
            token_final_scales=torch.ones(len(x), 1),
        )
        return bf16_to_fp64(slot_outputs(replace(pipeline, call=one)).contiguous())[:, 0]

    return products


def _of_activation(call: MoeCall, rows: Rows) -> _Products:
    right: list[Tensor] = []

    def products(row: int, parts: list[_Part]) -> Tensor:
        if not right:
            right.append(trace(call).activation)
        mixed = _mixed(right[0], row, parts)
        return bf16_to_fp64(second_products(call, mixed, rows.expert[row].expand(len(mixed))))

    return products


def _agreed(matrix: Matrix, parts: list[_Part], rows: Rows, solved: Solved) -> Iterator[Hypothesis]:
    """What every changed row may have."""
    for choice in solved.may.all(0).nonzero().flatten().tolist():
        if choice >= len(parts) * len(_AWAY):
            continue
        part, away = parts[choice // len(_AWAY)], _AWAY[choice % len(_AWAY)]
        which = f"{abs(away)} row{'s' * (abs(away) > 1)} {'further on' if away > 0 else 'before'}"
        for own, more in ((True, "its own where there is none"), (False, "zeros where there is none")):
            yield moved_elements(
                matrix,
                f"in {matrix.words} {part.words} of K is that of another row of the expert, {which}, {more}; the "
                "rest of K is right",
                lambda r, c, p=part, d=away: (torch.where(p.of(c), r + d, r), c),
                1.4 + 0.1 * (not own),
                own=own,
            )
