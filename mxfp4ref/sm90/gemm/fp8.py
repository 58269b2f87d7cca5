"""The GEMM of W4A8: FP8 tensor-core steps over all of K in ascending order, with one float32 accumulator."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mxfp4ref._compiled import as_numpy, loops
from mxfp4ref._compiler import uncompiled
from mxfp4ref._spans import spans
from mxfp4ref._threads import spans_in_parallel
from mxfp4ref.formats.humming import e4m3_table, e4m3_weights
from mxfp4ref.sm90 import fp8
from mxfp4ref.sm90.fp32 import FP32_NAN

__all__ = ["fp8_gemm", "fp8_gemm_in_order"]

_COLUMNS_AT_ONCE = 1024
_ELEMENTS_AT_ONCE = 1 << 16  # of the transcription, 32 products each
_NO_EXPONENT = -100
_NAN = fp8.E4M3_NAN


@uncompiled
def fp8_gemm(x: Tensor, packed: Tensor, offsets: Tensor) -> Tensor:
    """The float32 accumulators of one expert.

    Args:
        x: `[M, K] uint8`, E4M3.
        packed: `[N, K/2] uint8`, E2M1 codes in logical order.
        offsets: `[N, K/32] uint8`, as `formats.humming.prepare` makes them; any others are modelled too.

    Returns:
        `[M, N] float32`, never -0; NaN is 0x7FFFFFFF.
    """
    compiled = _loops(x)
    if compiled is None:
        return fp8_gemm_in_order(x, packed, offsets)
    return _gemm(compiled, x, packed, offsets)


@uncompiled
def fp8_gemm_in_order(x: Tensor, packed: Tensor, offsets: Tensor) -> Tensor:
    """The same step by step, slow and obvious."""
    out = torch.empty(len(x), len(packed), dtype=torch.float32, device=x.device)
    weights = e4m3_weights(packed, offsets)
    for columns in spans(len(packed), max(1, _ELEMENTS_AT_ONCE // max(1, len(x)))):
        accumulators = torch.zeros(len(x), columns.stop - columns.start, device=x.device)
        for start in range(0, x.shape[1], fp8.STEP_SIZE):
            some = slice(start, start + fp8.STEP_SIZE)
            accumulators = fp8.step(x[:, None, some], weights[None, columns, some], accumulators)
        out[:, columns] = accumulators
    return out


def _gemm(compiled: Any, x: Tensor, packed: Tensor, offsets: Tensor) -> Tensor:
    out = torch.empty(len(x), len(packed), dtype=torch.float32, device="cpu")
    table, values, exponents = _tables()
    arguments = as_numpy(x, np.uint8), as_numpy(packed, np.uint8), as_numpy(offsets, np.uint8)
    out_numbers = as_numpy(out, np.float32)

    def compute(columns: slice) -> None:
        bounds = np.array([columns.start, columns.stop])
        compiled.gemm(*arguments, table, values, exponents, bounds, out_numbers)

    spans_in_parallel(compute, len(packed), _COLUMNS_AT_ONCE, packed.numel() * 2)
    # A NaN among the products of an element, whatever the other factor, makes it NaN.
    nan = (x & 0x7F == _NAN).any(1, keepdim=True)
    if bool((offsets > 12).any()):
        nan = nan | (e4m3_weights(packed, offsets) & 0x7F == _NAN).any(1)
    if bool(nan.any()):
        out.view(torch.int32).masked_fill_(nan, FP32_NAN)
    return out


@cache
def _tables() -> tuple[np.ndarray[Any, Any], ...]:
    bits = torch.arange(256, device="cpu")
    exponents = ((bits >> 3) & 15).clamp(min=1) - 7
    no_number = (bits & 0x7F == 0) | (bits & 0x7F == _NAN)
    values = fp8.e4m3_values(torch.device("cpu")).masked_fill(no_number, 0.0)
    exponents = exponents.masked_fill(no_number, _NO_EXPONENT)
    return e4m3_table(torch.device("cpu")).numpy(), values.numpy(), exponents.to(torch.int16).numpy()


def _loops(x: Tensor) -> ModuleType | None:
    if x.device.type != "cpu":
        return None
    consequence = "the FP8 GEMM takes 100 times as long as need be"
    loaded: ModuleType | None = loops("mxfp4ref.sm90.gemm.fp8_loops", _try_out, consequence)
    return loaded


def _try_out(compiled: Any) -> None:
    """Raise ArithmeticError unless sums of numbers of every kind are as transcribed."""
    generator = torch.Generator("cpu").manual_seed(0)

    def random_bytes(high: int, *shape: int) -> Tensor:
        numbers = torch.randint(high, shape, generator=generator, device="cpu")
        return numbers.to(torch.uint8)

    x = random_bytes(256, 8, 256)
    x[:4] = fp8.to_e4m3(torch.randn(4, 256, generator=generator, device="cpu") * 100)
    x[6:] = x[6:].masked_fill(x[6:] & 0x7F == _NAN, 1)
    packed, offsets = random_bytes(256, 40, 128), random_bytes(12, 40, 8) + 1
    offsets[35:] = random_bytes(256, 5, 8)
    expected, got = fp8_gemm_in_order(x, packed, offsets), _gemm(compiled, x, packed, offsets)
    differing = int((got.view(torch.int32) != expected.view(torch.int32)).sum())
    if differing:
        raise ArithmeticError(f"{differing} of {got.numel()} elements of a trial are wrong")
