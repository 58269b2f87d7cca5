"""An output that is, element by element, a function of the right one, such as a cap of what was added up."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref.conformance.families.distances import last_place
from mxfp4ref.conformance.findings.finding import Evidence
from mxfp4ref.sm90.fp32 import bf16_to_fp64

__all__ = ["function_of_output"]

_FEWEST = 64  # elements that are far off, and that are equally large
_FAR = 8.0  # times what neighbours may differ by
_TOLD = (0.25, 0.75, 0.95, 1.0)  # of the elements by size


def function_of_output(got: Tensor, want: Tensor) -> Evidence | None:
    """None of a factor, which could be anywhere, and of what differs for elements that are nearly alike.

    Args:
        got, want: `[M, H] bf16`.
    """
    if not bool((got.isfinite() & want.isfinite()).all()):
        return None
    right, order = bf16_to_fp64(want.flatten()).sort()
    value = bf16_to_fp64(got.flatten())[order]
    unit = torch.maximum(last_place(right), last_place(value))
    off = value - right
    # From one right number to the next what is off changes by roundings of both, and by the function's slope.
    allowed = 2 * (unit[1:] + unit[:-1]) + 2 * right.diff()
    if not bool((off.diff().abs() <= allowed).all()):
        return None
    factor = float(value @ right / (right @ right).clamp(min=1e-300))
    far = (off.abs() > _FAR * unit) & ((value - factor * right).abs() > _FAR * unit)
    if int(far[1:].logical_and(allowed < off.abs()[1:] / _FAR).sum()) < _FEWEST:
        return None
    if bool((value == value[0]).all()):
        words = f"every element of the output is {float(value[0]):.4g}: nothing that was computed shows in it"
        return Evidence((), words, 2, lost=True)
    size, by_size = right.abs().sort()
    points = [int(by_size[int(part * (len(size) - 1))]) for part in _TOLD]
    told = ", ".join(f"{float(right[p]):.4g} becomes {float(value[p]):.4g}" for p in points)
    capped = _capped(right, value, unit)
    words = f", as {capped:.4g} tanh(y / {capped:.4g}) gives: a soft cap" if capped else ""
    return Evidence.of_kind(
        ("finalize",),
        "each element of the output is a function of the right one, the same for all",
        f"{told}{words}; all that comes before is right",
        3,
    )


def _capped(right: Tensor, value: Tensor, unit: Tensor) -> float | None:
    """The c of c tanh(y / c), if that is the function; a short decimal if one will do."""
    low, high = float(value.abs().max()), 64 * float(right.abs().max())
    if not 0 < low < high:
        return None
    largest = int(right.abs().argmax())
    for _ in range(60):
        middle = (low * high) ** 0.5
        less = middle * float((right[largest] / middle).tanh().abs()) < float(value[largest].abs())
        low, high = (middle, high) if less else (low, middle)
    for digits in (1, 2, 3, 4, 6, 12):
        cap = float(f"{low:.{digits}g}")
        if bool((cap * (right / cap).tanh() - value).abs().le(2 * unit).all()):
            return cap
    return None
