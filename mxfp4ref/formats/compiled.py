"""Formats and layouts on a CPU by compiled loops; where those cannot be used, as the other modules have them."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mxfp4ref._compiled import as_numpy, loops
from mxfp4ref._compiler import uncompiled
from mxfp4ref.formats import bytewise, mxfp4, wordwise
from mxfp4ref.formats import quantize as transcribed

__all__ = ["deinterleave", "dequantize", "interleave", "quantize"]

_PAIRS = {torch.bfloat16: np.int32, torch.float32: np.int64}  # as wide as two values
_CPU = torch.device("cpu")


@uncompiled
def dequantize(
    packed: Tensor,
    scales: Tensor,
    *,
    convention: str = "ocp",
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    """As `mxfp4.dequantize` for uint8 tensors on a CPU; compiled for bfloat16 and float32."""
    compiled = _formats() if dtype in _PAIRS else None
    if compiled is None:
        return mxfp4.dequantize(packed, scales, convention=convention, dtype=dtype, out=out)
    return _dequantize(compiled, packed, scales, convention, dtype, out)


@uncompiled
def quantize(values: Tensor, *, rule: str = "floor") -> tuple[Tensor, Tensor]:
    """As `quantize.quantize` on a CPU."""
    compiled = _formats()
    return transcribed.quantize(values, rule=rule) if compiled is None else _quantize(compiled, values, rule)


def _dequantize(
    compiled: Any,
    packed: Tensor,
    scales: Tensor,
    convention: str,
    dtype: torch.dtype,
    out: Tensor | None,
) -> Tensor:
    if out is None:
        out = torch.empty((*packed.shape[:-1], 2 * packed.shape[-1]), dtype=dtype, device="cpu")
    codes, scale_bytes = as_numpy(packed, np.uint8).reshape(-1, 16), as_numpy(scales, np.uint8).reshape(-1)
    table = as_numpy(mxfp4.pair_table(convention, dtype, _CPU), _PAIRS[dtype]).reshape(256, 256)
    target = out if out.data_ptr() % (2 * out.element_size()) == 0 else torch.empty_like(out)
    pairs = as_numpy(target, _PAIRS[dtype]).reshape(-1, 16)
    compiled.dequantize(codes, scale_bytes, table, pairs)
    return out if target is out else out.copy_(target)


def _quantize(compiled: Any, values: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    *batch, length = values.shape
    packed = torch.empty((*batch, length // 2), dtype=torch.uint8, device="cpu")
    scales = torch.empty((*batch, length // 32), dtype=torch.uint8, device="cpu")
    narrow = values.dtype == torch.bfloat16
    bits = as_numpy(values if narrow else values.to(torch.float32), np.int16 if narrow else np.int32).reshape(
        -1, 32
    )
    steps = [as_numpy(table, np.int32) for table in transcribed.step_tables(rule)]
    codes, scale_bytes = as_numpy(packed, np.uint8).reshape(-1, 16), as_numpy(scales, np.uint8).reshape(-1)
    compiled.quantize(bits, 16 if narrow else 0, *steps, codes, scale_bytes)
    return packed, scales


def _formats() -> Any:
    consequence = "MXFP4 is read and written 5 to 20 times more slowly than need be"
    return loops("mxfp4ref.formats.mxfp4_loops", _try_out_formats, consequence)


def _try_out_formats(compiled: Any) -> None:
    generator = torch.Generator("cpu").manual_seed(0)
    packed = torch.randint(256, (256, 16), dtype=torch.uint8, generator=generator, device="cpu")
    scales = torch.arange(256, device="cpu").to(torch.uint8).view(256, 1)
    results = []
    for dtype in _PAIRS:
        values = mxfp4.dequantize(packed, scales, dtype=dtype)
        results += [
            (
                _dequantize(compiled, packed, scales, "ocp", dtype, None).view(torch.uint8),
                values.view(torch.uint8),
            )
        ]
        results += list(
            zip(_quantize(compiled, values, "even"), transcribed.quantize(values, rule="even"), strict=True)
        )
    if not all(torch.equal(got, expected) for got, expected in results):
        raise ArithmeticError("some elements of a trial are wrong")


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
