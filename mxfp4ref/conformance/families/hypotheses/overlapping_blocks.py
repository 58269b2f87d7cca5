"""Hypotheses on a last block of columns that is shifted back to be whole: what it shares is done twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypothesis import Hypothesis, Pipeline, of_output
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.fp32 import to_bf16

__all__ = ["overlapping_block_hypotheses"]

_BLOCKS = (32, 64, 96, 128, 192, 256, 384, 512, 1024)


def _shared(size: int) -> Iterator[tuple[str, slice]]:
    """Columns that the last two blocks of so many share, and all of them."""
    yield "every column", slice(0, size)
    for block in _BLOCKS:
        if block < size and size % block:
            columns = slice(size - block, size // block * block)
            which = f"columns {columns.start} to {columns.stop - 1}"
            how = f"which the last block of {block}, shifted back to be whole, shares with the one before"
            yield f"{which}, {how}", columns


def _put(fc1: Tensor, result: Tensor, columns: slice, half: int) -> Tensor:
    """GEMM1's output with the activation's columns in the place of up (half 0) or of gate (1)."""
    memory = fc1.clone()
    memory.chunk(2, -1)[half][..., columns] = to_bf16(result)[..., columns].to(memory.dtype)
    return memory


def overlapping_block_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """Of the activation and of the output."""
    experts = call.experts
    for words, columns in _shared(experts.intermediate_size):
        for half, place in ((0, "up"), (1, "gate")) if experts.gated else ():
            for biased in (True, False) if experts.fc1_biases is not None else (True,):
                yield Hypothesis(
                    "activation",
                    ("activation",),
                    f"the activation is computed twice in {words}: its result lies in the place of {place}, and is "
                    f"taken for it the second time{'' if biased else ', without the fc1 bias'}",
                    lambda p, c=columns, h=half, b=biased: p.staging(activate=_twice(p, c, h, biased=b)),
                    1.3 + 0.1 * half + 0.05 * (not biased),
                )
    for words, columns in _shared(experts.hidden_size):
        if words != "every column":

            def doubled(output: Tensor, columns: slice = columns) -> Tensor:
                twice, part = output.clone(), fp32.widen(output[:, columns].contiguous())
                twice[:, columns] = to_bf16(fp32.add(part, part))
                return twice

            told = f"the output is added twice in {words}"
            yield of_output("output", ("finalize", "fc2"), told, doubled, 1.3)


def _twice(pipeline: Pipeline, columns: slice, half: int, *, biased: bool) -> Callable[..., Tensor]:
    right = pipeline.stages.activate

    def activate(activation: Any, fc1: Tensor, bias: Tensor | None, parameters: Any) -> Tensor:
        first = right(activation, fc1, bias, parameters)
        memory = _put(fc1, first, columns, half)
        again = right(activation, memory, bias if biased else None, parameters)
        return torch.cat(
            (first[..., : columns.start], again[..., columns], first[..., columns.stop :]), dim=-1
        )

    return activate
