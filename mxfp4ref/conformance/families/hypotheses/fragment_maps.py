"""Hypotheses on matrices of an expert's rows whose elements lie at other places: registers of a fragment exchanged,
another swizzle, tiles of the rows or columns before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, combinations, product

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypotheses.tensors import mapped
from mxfp4ref.conformance.families.hypothesis import (
    Hypothesis,
    Pipeline,
    SlotRows,
    local_of,
    of_slots,
    slot_outputs,
)
from mxfp4ref.conformance.families.places import concerns_what_is_wrong
from mxfp4ref.conformance.families.slot_kinds import position_in_expert
from mxfp4ref.conformance.families.solved.pursuit import Rows
from mxfp4ref.model.call import MoeCall

__all__ = [
    "ACTIVATION",
    "INPUT",
    "Matrix",
    "fragment_map_hypotheses",
    "moved_elements",
    "swizzled_weights",
]

# From the rows' places in their expert `[R, 1]` and the columns `[1, n]` to those that are read: rows, columns.
_Change = Callable[[Tensor], Tensor]  # of the sorted rows
_Map = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
_Swizzle = Callable[[Tensor, Tensor], Tensor]
# From rows and columns (of 2 bytes) to the number that a chunk of 16 bytes is exchanged by: address bits from 7 on.
_SWIZZLES: tuple[tuple[str, _Swizzle], ...] = (
    ("128 bytes", lambda row, column: row % 8),
    ("64 bytes", lambda row, column: row // 2 % 4),
    ("32 bytes", lambda row, column: row // 4 % 2),
    ("none", lambda row, column: row * 0),
    ("64 bytes in rows of 128", lambda row, column: row % 4),
    ("32 bytes in rows of 128", lambda row, column: row % 2),
    ("32 bytes in rows of 64", lambda row, column: row // 2 % 2),
    ("128 bytes in rows of 256", lambda row, column: (2 * row + column // 64 % 2) % 8),
)
_CHUNK = 8  # bf16 numbers of 16 bytes


@dataclass(frozen=True)
class Matrix:
    """A matrix of the sorted rows: in words, its stages, how it is changed."""

    words: str
    stages: tuple[str, ...]
    change: Callable[[SlotRows, _Change, Tensor], SlotRows]


def _input(rows: SlotRows, moved: _Change, order: Tensor) -> SlotRows:
    x = rows.call.input[:, None].expand(-1, rows.call.top_k, -1).clone()
    flat = x.flatten(0, 1)
    flat[order] = moved(flat[order])
    return replace(rows, y=slot_outputs(rows.pipeline, flat.view(x.shape)))


def _staged(stage: str) -> Callable[[SlotRows, _Change, Tensor], SlotRows]:
    return lambda rows, moved, _: replace(rows, y=slot_outputs(rows.pipeline.behind(stage, moved)))


def _result(rows: SlotRows, moved: _Change, order: Tensor) -> SlotRows:
    return rows.placing(order, moved(rows.y.flatten(0, 1)[order]))


_RESULT = Matrix("GEMM2's result", ("fc2", "finalize"), _result)
ACTIVATION = Matrix("the activation", ("activation", "fc2"), _staged("round_activation"))
INPUT = Matrix("the matrix of GEMM1's input rows", ("input", "fc1"), _input)
_FC1 = Matrix("GEMM1's result", ("fc1", "activation"), _staged("round_fc1"))


def moved_elements(
    matrix: Matrix, words: str, of: _Map, cost: float, *, whole: int = 1, own: bool = False
) -> Hypothesis:
    """Zeros, or a row's `own` numbers, stand for a row that the expert does not have.

    Its last ones that fill no `whole` block stay.
    """

    def on(rows: SlotRows) -> SlotRows:
        found = Rows.of(rows.local)
        order, position, count = found.flat, found.position, found.counts
        row = torch.arange(len(order), device=order.device)

        def moved(values: Tensor) -> Tensor:
            if len(values) != len(order):
                raise ValueError("values: expected one row of each slot")
            column = torch.arange(values.shape[1], device=values.device)[None]
            source, other = of(position[:, None], column)
            source, other = source + 0 * other, other + 0 * source
            if bool(((other < 0) | (other >= values.shape[1])).any()):
                raise ValueError("columns: not of whole blocks")
            there = (source >= 0) & (source < count[:, None])
            taken = values[(row - position)[:, None] + torch.where(there, source, position[:, None]), other]
            filled = (position // whole * whole + whole <= count)[:, None]
            return torch.where(filled, torch.where(there, taken, values if own else 0), values)

        return matrix.change(rows, moved, order)

    return replace(of_slots("rows of an expert", matrix.stages, words, on, cost), across_tokens=True)


def fragment_map_hypotheses(call: MoeCall, wrong: Tensor) -> Iterator[Hypothesis]:
    """Those that concern the tokens that are wrong, `wrong [M, H] bool`, and hardly any others.

    Elements whose places differ in a bit of the row and one of the column, chunks in another swizzle, stale tiles.
    """
    local, tokens = local_of(Pipeline(call)), wrong.any(1)
    position, _ = position_in_expert(local)
    for late, hypothesis in chain(_stale(call), ((lambda r: r >= 0, h) for h in _exchanges())):
        if concerns_what_is_wrong(late(position).any(1), tokens):
            yield hypothesis


def _exchanges() -> Iterator[Hypothesis]:
    for matrix, more in ((_RESULT, 0.0), (ACTIVATION, 0.1), (_FC1, 0.2), (INPUT, 0.2)):
        for row in (1, 2, 4, 8):
            for column in (1, 2, 4, 8, 16, 32, 64):
                yield moved_elements(
                    matrix,
                    f"in {matrix.words} elements of a fragment are exchanged (as registers taken for each other): in "
                    f"each tile of {2 * row} rows of an expert x {2 * column} columns, row r + {row}, column c and "
                    f"row r, column c + {column} have each other's place",
                    lambda r, c, i=row, j=column: _exchanged(r, c, i, j),
                    1.6 + more + 0.01 * (row * column != 8),
                )
        yield from _swizzled(matrix, more)
    for matrix in (ACTIVATION, _RESULT):  # of GEMM1's result, of gate and of up: rows_beside
        for row in (1, 8, 2, 4):
            yield moved_elements(
                matrix,
                f"in {matrix.words} rows r and r + {row} of each {2 * row} rows of an expert have each other's "
                "numbers, which are another token's",
                lambda r, c, i=row: (r ^ i, c),
                1.5,
            )


def _exchanged(row: Tensor, column: Tensor, i: int, j: int) -> tuple[Tensor, Tensor]:
    """The places with bit `i` of the row and bit `j` of the column exchanged."""
    differ = ((row & i) != 0) ^ ((column & j) != 0)
    return torch.where(differ, row ^ i, row), torch.where(differ, column ^ j, column)


def _swizzled(matrix: Matrix, more: float) -> Iterator[Hypothesis]:
    for number, ((one, first), (other, second)) in enumerate(combinations(_SWIZZLES, 2)):
        yield moved_elements(
            matrix,
            f"{matrix.words} lies in shared memory with one swizzle and is read with another, {one} and {other}: "
            "chunks of 8 columns (16 bytes) are permuted within a row, by the row",
            lambda r, c, f=first, g=second: (r + 0 * c, c ^ _CHUNK * (f(r, c) ^ g(r, c))),
            1.5 + more + number / 1000,
        )


def swizzled_weights(call: MoeCall) -> Iterator[Hypothesis]:
    """Codes of which chunks lie at other places of their row: 16 bytes of packed codes, or of bf16 made of them."""
    pairs = list(enumerate(combinations(_SWIZZLES, 2)))
    for fc, size in product(("fc1", "fc2"), (16, 4)):
        columns = "32 codes (16 bytes)" if size == 16 else "8 codes (16 bytes in bf16)"
        for number, ((one, first), (other, second)) in pairs:

            def on(
                _: str, codes: Tensor, size: int = size, f: _Swizzle = first, g: _Swizzle = second
            ) -> Tensor:
                row, byte = torch.arange(codes.shape[1])[:, None], torch.arange(codes.shape[2])[None]
                column = byte * _CHUNK // size  # as if chunks were of 8
                return codes[:, row, byte ^ size * (f(row, column) ^ g(row, column))]

            yield Hypothesis(
                "K groups",
                (fc,),
                f"GEMM{fc[-1]}'s weights (codes without the scales) lie in shared memory with one swizzle and are "
                f"read with another, {one} and {other}: chunks of {columns} are permuted within a row, by the row",
                mapped((f"{fc}_weights",), on),
                1.6 + number / 1000,
            )


def _stale(call: MoeCall) -> Iterator[tuple[_Change, Hypothesis]]:
    """Row tiles that hold in some tiles of K what the tile before held; first which rows these are."""
    for matrix in (INPUT, ACTIVATION, _RESULT):
        kind = "columns" if matrix is _RESULT else "K"
        for size in (8, 16, 32, 64, 128):
            if size >= call.num_tokens:
                continue
            for words, inside in _blocks(matrix, call):
                for which, late in (
                    (f"each tile of {size} rows of an expert after the first", lambda r, s=size: r >= s),
                    (f"the second tile of {size} rows of an expert", lambda r, s=size: r // s == 1),
                ):
                    yield (
                        late,
                        moved_elements(
                            matrix,
                            f"in {matrix.words} {which} has the tile before's numbers in {words} of {kind} "
                            "(a stale tile of other rows)",
                            lambda r, c, s=size, i=inside, late=late: (
                                torch.where(late(r) & i(c), r - s, r),
                                c,
                            ),
                            1.6,
                        ),
                    )


def _blocks(matrix: Matrix, call: MoeCall) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    experts = call.experts
    width = experts.intermediate_size if matrix is ACTIVATION else experts.hidden_size
    for size in (64, 32, 128):
        if size < width:
            yield f"the last {size}", lambda c, n=width - size: c >= n
            yield f"the first {size}", lambda c, n=size: c < n
