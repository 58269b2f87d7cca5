"""Hypotheses on fc1 biases that are indexed along the rows: that of a column is another column's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypothesis import Hypothesis, SlotRows, of_slots
from mxfp4ref.conformance.families.solved.second_products import second_products
from mxfp4ref.conformance.findings.reduction import is_heavy
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import MoeTrace, trace
from mxfp4ref.sm90.elementwise import activate, to_bf16

__all__ = ["row_parameter_hypotheses"]

_TILES, _SHARED = (256, 128, 64), (8, 16, 32, 64, 128)  # columns of a tile; rows of which each has its own
_Number = Callable[[MoeTrace], Tensor]
_NUMBERS: tuple[tuple[str, _Number], ...] = (
    ("the token's number", lambda rows: rows.token),
    ("the row's number among those of its expert", lambda rows: _position(rows)),
    ("the row's number in the sorted order", lambda rows: torch.arange(len(rows.token))),
)


def row_parameter_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """For each tile of columns, numbers of rows and their modulus."""
    if call.experts.fc1_biases is None or is_heavy(call) or not call.experts.quantized:
        return
    for words, number in _NUMBERS:
        for tile in (2 * call.experts.intermediate_size, *_TILES):
            for rows in sorted({r for r in (*_SHARED, tile) if r <= tile}):
                told = (
                    f"the fc1 bias is indexed along the rows: all columns of each {tile} get that of the column "
                    f"whose number among them is {words}, modulo {rows}"
                )
                one = of_slots(
                    "activation", ("activation", "fc1"), told, _along_rows(tile, rows, number), 1.5
                )
                yield replace(one, across_tokens=True)


def _along_rows(tile: int, modulus: int, number: _Number) -> Callable[[SlotRows], SlotRows]:
    def run(rows: SlotRows) -> SlotRows:
        call, right = rows.call, trace(rows.call)
        bias = call.experts.fc1_biases
        assert bias is not None
        columns = torch.arange(bias.shape[1]) // tile * tile + number(right)[:, None] % modulus
        taken = bias[right.expert].gather(1, columns.clamp(max=bias.shape[1] - 1))
        tensors = [getattr(call.experts, name) for name in call.activation.defaults]
        given = [None if t is None else t[right.expert, None] for t in tensors]
        activation = to_bf16(activate(call.activation, right.fc1_output, taken, given))
        y = rows.y.clone()
        y[right.token, right.slot] = second_products(call, activation, right.expert)
        return replace(rows, y=y)

    return run


def _position(rows: MoeTrace) -> Tensor:
    return torch.arange(len(rows.expert)) - torch.searchsorted(rows.expert, rows.expert)
