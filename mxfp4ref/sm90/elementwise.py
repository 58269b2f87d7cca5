"""`activate`, `finalize` and `to_bf16` by compiled loops on a CPU; as transcribed, where those cannot be used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mxfp4ref._compiled import as_numpy, loops
from mxfp4ref._compiler import uncompiled
from mxfp4ref._threads import spans_in_parallel
from mxfp4ref._validate import check_ids, check_tensor
from mxfp4ref.sm90 import activation as transcribed_activation
from mxfp4ref.sm90 import finalize as transcribed_finalize
from mxfp4ref.sm90 import fp32, mufu
from mxfp4ref.sm90.activation import ACTIVATIONS, SWIGLU_BIAS, Activation

__all__ = [
    "activate",
    "activated",
    "elementwise_loops",
    "finalize",
    "parameter_rows",
    "rounded",
    "to_bf16",
    "weighted_sum",
]

Array = np.ndarray[Any, Any]

_CPU = torch.device("cpu")
_ROWS_AT_ONCE = 16  # the share of a thread
_BIASES = (torch.bfloat16, torch.float16, torch.float32)
_OPERATIONS = 16  # of an element, each about as long as one weight of a GEMM


@uncompiled
def activate(
    activation: Activation, fc1_output: Tensor, bias: Tensor | None, parameters: Sequence[Tensor | None]
) -> Tensor:
    """As `sm90.activation.activate`; compiled for bf16 and parameters that do not vary along the last dimension."""
    for name, parameter in zip(activation.defaults, parameters, strict=True):
        if parameter is not None:
            check_tensor(name, parameter, dtype=torch.float32, shape=("...",))
    if bias is not None:
        check_tensor("bias", bias, dtype=_BIASES, shape=("...",))
    compiled = _loops_for(fc1_output)
    vary = any(p is not None and p.dim() > 0 and p.shape[-1] != 1 for p in parameters)
    if (
        compiled is None
        or vary
        or not _all_bf16(fc1_output, bias)
        or activation.id not in compiled.ACTIVATIONS
    ):
        return transcribed_activation.activate(activation, fc1_output, bias, parameters)
    *leading, width = fc1_output.shape
    x = as_numpy(fc1_output, np.int16).reshape(-1, width)
    added = None if bias is None else as_numpy(bias.expand_as(fc1_output), np.int16).reshape(x.shape)
    out = activated(compiled, activation.id, x, added, parameter_rows(activation, parameters, (*leading, 1)))
    return torch.from_numpy(out.view(np.float32)).view(*leading, out.shape[1])


@uncompiled
def finalize(fc2_output: Tensor, local: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `sm90.finalize.finalize`; compiled for bf16."""
    sizes = dict(zip("MkH", fc2_output.shape, strict=True))
    check_tensor("local", local, dtype=torch.int64, shape=("M", "k"), sizes=sizes)
    check_tensor("scales", scales, dtype=torch.float32, shape=("M", "k"), sizes=sizes)
    if bias is not None:
        check_tensor("bias", bias, dtype=_BIASES, shape=("E", "H"), sizes=sizes)
        check_ids("local", local, minimum=-1, maximum=len(bias) - 1)
    compiled = _loops_for(fc2_output)
    if compiled is None or not _all_bf16(fc2_output, bias):
        return transcribed_finalize.finalize(fc2_output, local, scales, bias)
    given = as_numpy(fc2_output, np.int16), as_numpy(local, np.int64), as_numpy(scales, np.int32)
    out = weighted_sum(compiled, *given, None if bias is None else as_numpy(bias, np.int16))
    return torch.from_numpy(out.view(np.float32))


@uncompiled
def to_bf16(x: Tensor) -> Tensor:
    """As `fp32.to_bf16`."""
    check_tensor("x", x, dtype=torch.float32, shape=("...",))
    compiled = _loops_for(x)
    if compiled is None or not x.dim():
        return fp32.to_bf16(x)
    return torch.from_numpy(rounded(compiled, as_numpy(x, np.int32))).view(torch.bfloat16)


def parameter_rows(
    activation: Activation, parameters: Sequence[Tensor | None], shape: tuple[int, ...]
) -> Array:
    """Each parameter, or what is compiled in for None, in as many rows as the shape has: `[P, R] float32`."""
    rows = np.empty((len(parameters), math.prod(shape)), np.float32)
    for row, parameter, default in zip(rows, parameters, activation.defaults.values(), strict=True):
        row[:] = default if parameter is None else as_numpy(parameter.expand(shape), np.float32).reshape(-1)
    return rows


def activated(
    compiled: Any, activation: int, fc1_output: Array, bias: Array | None, parameters: Array
) -> Array:
    """As `activate`, of the bits of `[R, 2I]`, of a bias like it and of `[P, R] float32`."""
    num_rows, width = fc1_output.shape
    out = np.empty((num_rows, width // 2 if ACTIVATIONS[activation].gated else width), np.int32)
    added = fc1_output[:0] if bias is None else bias
    scaled = activation == SWIGLU_BIAS and (parameters[0] != 1).any()  # by alpha
    of_bf16 = np.empty(0, np.int32) if scaled or bias is not None else _sigmoids(compiled)

    def compute(rows: slice) -> None:
        given = np.ascontiguousarray(parameters[:, rows]).view(np.int32)
        compiled.activate(activation, fc1_output[rows], added[rows], given, of_bf16, *_tables(), out[rows])

    spans_in_parallel(compute, num_rows, _ROWS_AT_ONCE, out.size * _OPERATIONS)
    return out


def weighted_sum(compiled: Any, fc2_output: Array, local: Array, scales: Array, bias: Array | None) -> Array:
    """As `finalize`, of bits."""
    num_tokens, _, hidden_size = fc2_output.shape
    out = np.empty((num_tokens, hidden_size), np.int32)
    added = np.empty((0, hidden_size), np.int16) if bias is None else bias

    def compute(tokens: slice) -> None:
        compiled.finalize(fc2_output[tokens], local[tokens], scales[tokens], added, out[tokens])

    spans_in_parallel(compute, num_tokens, _ROWS_AT_ONCE, fc2_output.size * _OPERATIONS)
    return out


def rounded(compiled: Any, bits: Array) -> Array:
    """As `to_bf16`, of bits."""
    out = np.empty(bits.shape, np.int16)
    compiled.to_bf16(bits.reshape(-1), out.reshape(-1))
    return out


@cache
def _sigmoids(compiled: Any) -> np.ndarray[Any, Any]:
    out = np.empty(1 << 16, np.int32)
    compiled.sigmoids(*_tables(), out)
    return out


@cache
def _tables() -> tuple[np.ndarray[Any, Any], ...]:
    """Of EX2 and RCP: rows of three int64, and squares, which fit into 16 bits."""
    tables: list[np.ndarray[Any, Any]] = []
    for unit in ("ex2", "rcp"):
        *rows, squares = mufu.constants(unit, _CPU)
        tables += [torch.stack(rows, 1).numpy(), squares.numpy().astype(np.uint16)]
    return tuple(tables)


def _all_bf16(x: Tensor, bias: Tensor | None) -> bool:
    """Else the loops would read bits of another type as those of bf16."""
    return x.dtype == torch.bfloat16 and (bias is None or bias.dtype == torch.bfloat16)


def _loops_for(x: Tensor) -> Any:
    return elementwise_loops() if x.device.type == "cpu" else None


def elementwise_loops() -> ModuleType | None:
    """The loops, or None, after one warning, where they cannot be used."""
    consequence = "the activation and the weighted sum take 10 times as long as need be"
    loaded: ModuleType | None = loops("mxfp4ref.sm90.elementwise_loops", _try_out, consequence)
    return loaded


def _try_out(compiled: Any) -> None:
    """Raise ArithmeticError unless 512 activations and sums of any bits are as transcribed."""
    generator = torch.Generator("cpu").manual_seed(0)

    def any_bits(*shape: int, near_one: bool = False) -> Tensor:
        x = torch.randint(-(1 << 15), 1 << 15, shape, generator=generator, device="cpu").to(torch.int16)
        return (
            torch.where(x % 4 != 0, x & -0x7000 | 0x3E00, x).view(torch.bfloat16)
            if near_one
            else x.view(torch.bfloat16)
        )

    def bits(tensor: Tensor) -> Array:
        return as_numpy(tensor, np.int16 if tensor.element_size() == 2 else np.int32)

    x, bias = any_bits(8, 128, near_one=True), any_bits(8, 128, near_one=True)
    parameters = tuple(any_bits(8, 1, near_one=True).to(torch.float32) for _ in range(3))
    results: list[tuple[Array, Tensor]] = []
    for activation in (ACTIVATIONS[id] for id in compiled.ACTIVATIONS):
        given = parameters[: len(activation.defaults)]
        for some, added in (([None] * len(given), None), ([None, *given][: len(given)], None), (given, bias)):
            expected = transcribed_activation.activate(activation, x, added, some)
            rows, added_bits = (
                parameter_rows(activation, some, (8, 1)),
                None if added is None else bits(added),
            )
            results += [(activated(compiled, activation.id, bits(x), added_bits, rows), expected)]
            results += [(rounded(compiled, bits(expected)), fp32.to_bf16(expected))]
    local = torch.arange(-1, 7, device="cpu").view(4, 2)
    weighted = (x.view(4, 2, 128), local, parameters[0].view(4, 2))
    arrays = bits(weighted[0]), local.numpy(), bits(weighted[2])
    for added in (None, bias):
        got = weighted_sum(compiled, *arrays, None if added is None else bits(added))
        results += [(got, transcribed_finalize.finalize(*weighted, added))]
    if not all(np.array_equal(got, bits(expected)) for got, expected in results):
        raise ArithmeticError("some elements of a trial are wrong")
