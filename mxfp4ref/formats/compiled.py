"""The kernel's byte orders by compiled loops; by `wordwise` and `bytewise` themselves, where those cannot be used."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mxfp4ref._compiled import as_numpy, loops
from mxfp4ref.formats import bytewise, wordwise

__all__ = ["deinterleave", "interleave"]


def interleave(packed: Tensor, layout: ModuleType) -> Tensor:
    """`layout.interleave`, of `wordwise` or `bytewise`, for `[E, R, K/2] uint8` on a CPU."""
    compiled = _loops()
    return layout.interleave(packed) if compiled is None else _move(compiled.interleave, packed, layout)


def deinterleave(interleaved: Tensor, layout: ModuleType) -> Tensor:
    """`layout.deinterleave`, likewise."""
    compiled = _loops()
    return (
        layout.deinterleave(interleaved)
        if compiled is None
        else _move(compiled.deinterleave, interleaved, layout)
    )


def _move(loop: Any, source: Tensor, layout: ModuleType) -> Tensor:
    experts, rows, width = source.shape
    out = torch.empty((experts, rows, width), dtype=torch.uint8, device="cpu")
    shape = (experts * rows, width // 16, 4)
    loop(
        as_numpy(source, np.uint32).reshape(shape),
        as_numpy(out, np.uint32).reshape(shape),
        layout is wordwise,
    )
    return out


def _loops() -> Any:
    return loops(
        "mxfp4ref.formats.layout_loops", _try_out, "weights change their layout 3 to 12 times more slowly"
    )


def _try_out(compiled: Any) -> None:
    generator = torch.Generator("cpu").manual_seed(0)
    packed = torch.randint(256, (1, 32, 64), dtype=torch.uint8, generator=generator, device="cpu")
    for layout in (wordwise, bytewise):
        stored = layout.interleave(packed)
        right = torch.equal(_move(compiled.interleave, packed, layout), stored)
        if not (right and torch.equal(_move(compiled.deinterleave, stored, layout), packed)):
            raise ArithmeticError(f"weights of a trial end up elsewhere than by {layout.__name__}")
