"""Hypotheses on matrix fragments: square blocks that are transposed on their way into a GEMM."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypotheses.tensors import mapped
from mxfp4ref.conformance.families.hypothesis import Hypothesis, SlotRows, of_slots, slot_outputs
from mxfp4ref.conformance.families.slot_kinds import position_in_expert
from mxfp4ref.formats.mxfp4 import pack_codes, unpack_codes
from mxfp4ref.model.call import MoeCall

__all__ = ["fragment_hypotheses"]

_SIZES = (8, 16)
_UNFILLED = (
    (False, ""),
    (True, ", the last, unfilled rows of an expert apart"),
)


def fragment_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """Blocks of 8 x 8 (`ldmatrix` with or without `.trans`) and 16 x 16, of either operand of either GEMM."""
    for size in _SIZES:
        of = f"blocks of {size} x {size}"
        for fc in ("fc1", "fc2"):
            yield Hypothesis(
                "values",
                (fc,),
                f"GEMM{fc[-1]}'s weights (codes without the scales) are transposed in {of}",
                mapped((f"{fc}_weights",), lambda _, t, s=size: _codes_transposed(t, s)),
                1.6,
            )
        for apart, words in _UNFILLED:
            for what, stages, change in (
                ("input rows", ("input", "fc1"), _input),
                ("activation", ("activation", "fc2"), _activation),
            ):
                yield of_slots(
                    "rows of an expert",
                    stages,
                    f"an expert's {what} (rows x columns) are transposed in {of}{words}",
                    lambda rows, s=size, a=apart, c=change: replace(rows, y=c(rows, _Block(s, a))),
                    1.6 + 0.1 * apart,
                )


class _Block:
    """Blocks of an expert's rows, transposed; of a last block that is not full the rows stay, or count as zeros."""

    def __init__(self, size: int, apart: bool) -> None:
        self.size, self.apart = size, apart

    def transposed(self, values: Tensor, position: Tensor, count: Tensor) -> Tensor:
        """Of `values [R, n]`, expert by expert, where `position` and `count [R]` are among the rows of the expert."""
        size, (rows, width) = self.size, values.shape
        if width % size:
            raise ValueError(f"values: expected a multiple of {size} columns")
        column = torch.arange(width, device=values.device)
        first = torch.arange(rows, device=values.device) - position % size
        source_row = first[:, None] + column % size
        source_column = column // size * size + (position % size)[:, None]
        inside = (position - position % size)[:, None] + column % size < count[:, None]
        made = torch.where(inside, values[source_row.clamp(max=rows - 1), source_column], 0)
        if self.apart:
            made = torch.where((position // size * size + size <= count)[:, None], made, values)
        return made


def _sorted(rows: SlotRows) -> tuple[Tensor, Tensor, Tensor]:
    """The slots in the order of their rows, and each row's position and count."""
    flat = rows.local.flatten()
    order = torch.where(flat < 0, flat.max() + 1, flat).argsort(stable=True)[: int((flat >= 0).sum())]
    position, count = (t.flatten()[order] for t in position_in_expert(rows.local))
    return order, position, count


def _activation(rows: SlotRows, block: _Block) -> Tensor:
    _, position, count = _sorted(rows)

    def rounded(t: Tensor) -> Tensor:
        return block.transposed(rows.pipeline.stages.round_activation(t), position, count)

    return slot_outputs(rows.pipeline.staging(round_activation=rounded))


def _input(rows: SlotRows, block: _Block) -> Tensor:
    order, position, count = _sorted(rows)
    x = rows.call.input[:, None].expand(-1, rows.call.top_k, -1).clone()
    flat = x.flatten(0, 1)
    flat[order] = block.transposed(flat[order], position, count)
    return slot_outputs(rows.pipeline, flat.view(x.shape))


def _codes_transposed(packed: Tensor, size: int) -> Tensor:
    blocks = unpack_codes(packed).unflatten(2, (-1, size)).unflatten(1, (-1, size))  # type: ignore[no-untyped-call]
    return pack_codes(blocks.transpose(2, 4).flatten(3).flatten(1, 2).contiguous())
