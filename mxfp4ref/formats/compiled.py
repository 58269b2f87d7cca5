"""MXFP4 and byte orders by compiled loops on a CPU; by torch on a GPU, and where the loops cannot be used."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mxfp4ref._compiled import as_numpy, loops
from mxfp4ref._threads import spans_in_parallel
from mxfp4ref.formats import bytewise, mxfp4, wordwise
from mxfp4ref.formats import quantize as quantizing

__all__ = ["deinterleave", "interleave", "look_up", "quantize"]

_WORDS = {4: np.int32, 8: np.int64}  # as wide as two values of bf16, of float32
_GROUPS_AT_ONCE = 1 << 15  # of 32 values, on one thread
_BLOCK = 16  # rows that a byte order mixes


def look_up(packed: Tensor, scales: Tensor, pairs: Tensor, out: Tensor) -> None:
    """As `mxfp4.look_up`."""
    word = _WORDS.get(pairs.element_size())
    aligned = out.data_ptr() % pairs.element_size() == 0
    compiled = _formats() if out.device.type == "cpu" and word is not None and aligned else None
    if compiled is None:
        mxfp4.look_up(packed, scales, pairs, out)
    else:
        _look_up(compiled, packed, scales, pairs, out)


def quantize(values: Tensor, rule: str, packed: Tensor, scales: Tensor) -> None:
    """As `quantize.by_steps`."""
    compiled = _formats() if values.device.type == "cpu" else None
    if compiled is None:
        quantizing.by_steps(values, rule, packed, scales)
    else:
        _quantize(compiled, values, rule, packed, scales)


def interleave(packed: Tensor, layout: Any) -> Tensor:
    """As `layout.interleave`, of `wordwise` or `bytewise`."""
    compiled = _layouts(packed, layout)
    return layout.interleave(packed) if compiled is None else _move(compiled.interleave, packed, layout)


def deinterleave(interleaved: Tensor, layout: Any) -> Tensor:
    """As `layout.deinterleave`, likewise."""
    compiled = _layouts(interleaved, layout)
    if compiled is None:
        logical: Tensor = layout.deinterleave(interleaved)
        return logical
    return _move(compiled.deinterleave, interleaved, layout)


def _look_up(compiled: Any, packed: Tensor, scales: Tensor, pairs: Tensor, out: Tensor) -> None:
    word = _WORDS[pairs.element_size()]
    words = as_numpy(out, word).reshape(-1, 16)
    table = as_numpy(pairs, word).reshape(256, 256)
    codes, scale_bytes = as_numpy(packed, np.uint8), as_numpy(scales, np.uint8)

    def read(groups: slice) -> None:
        compiled.dequantize(codes[groups], scale_bytes[groups], table, words[groups])

    spans_in_parallel(read, len(words), _GROUPS_AT_ONCE, out.numel())


def _quantize(compiled: Any, values: Tensor, rule: str, packed: Tensor, scales: Tensor) -> None:
    narrow = values.dtype == torch.bfloat16
    bits = as_numpy(values, np.int16) if narrow else as_numpy(values.to(torch.float32), np.int32)
    steps = [as_numpy(table, np.int32) for table in quantizing.step_tables(rule)]
    codes, scale_bytes = as_numpy(packed, np.uint8), as_numpy(scales, np.uint8)

    def write(groups: slice) -> None:
        compiled.quantize(bits[groups], 16 if narrow else 0, *steps, codes[groups], scale_bytes[groups])

    spans_in_parallel(write, len(codes), _GROUPS_AT_ONCE, values.numel())


def _formats() -> Any:
    consequence = "MXFP4 is read and written 5 to 20 times more slowly than need be"
    return loops("mxfp4ref.formats.mxfp4_loops", _try_out_formats, consequence)


def _try_out_formats(compiled: Any) -> None:
    generator = torch.Generator("cpu").manual_seed(0)
    packed = torch.randint(256, (256, 16), dtype=torch.uint8, generator=generator, device="cpu")
    scales = torch.arange(256, device="cpu").to(torch.uint8)
    for dtype in (torch.bfloat16, torch.float32):
        pairs = mxfp4.pair_table("ocp", dtype, packed.device)
        values, expected = (torch.zeros(256, 32, dtype=dtype, device="cpu") for _ in range(2))
        _look_up(compiled, packed, scales, pairs, values)
        mxfp4.look_up(packed, scales, pairs, expected)
        got, wanted = ((torch.zeros_like(packed), torch.zeros_like(scales)) for _ in range(2))
        _quantize(compiled, expected, "even", *got)
        quantizing.by_steps(expected, "even", *wanted)
        results = zip((values.view(torch.uint8), *got), (expected.view(torch.uint8), *wanted), strict=True)
        if not all(torch.equal(one, other) for one, other in results):
            raise ArithmeticError("some elements of a trial are wrong")


def _layouts(weights: Tensor, layout: ModuleType) -> Any:
    if weights.device.type != "cpu" or layout not in (wordwise, bytewise) or not weights.numel():
        return None
    consequence = "weights change their layout 3 to 12 times more slowly"
    return loops("mxfp4ref.formats.layout_loops", _try_out_layouts, consequence)


def _move(loop: Any, source: Tensor, layout: ModuleType) -> Tensor:
    experts, rows, width = source.shape
    out = torch.empty((experts, rows, width), dtype=torch.uint8, device="cpu")
    shape = (experts * rows // _BLOCK, _BLOCK, width // 16, 4)
    blocks, moved = as_numpy(source, np.uint32).reshape(shape), as_numpy(out, np.uint32).reshape(shape)

    def move(some: slice) -> None:
        loop(blocks[some].reshape(-1, *shape[2:]), moved[some].reshape(-1, *shape[2:]), layout is wordwise)

    spans_in_parallel(move, len(blocks), max(1, _GROUPS_AT_ONCE // (_BLOCK * shape[2])), 2 * source.numel())
    return out


def _try_out_layouts(compiled: Any) -> None:
    generator = torch.Generator("cpu").manual_seed(0)
    packed = torch.randint(256, (1, 32, 64), dtype=torch.uint8, generator=generator, device="cpu")
    for layout in (wordwise, bytewise):
        stored = layout.interleave(packed)
        right = torch.equal(_move(compiled.interleave, packed, layout), stored)
        if not (right and torch.equal(_move(compiled.deinterleave, stored, layout), packed)):
            raise ArithmeticError(f"weights of a trial end up elsewhere than by {layout.__name__}")
