"""Tensors from bit patterns and back, and comparisons of bits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.int64: torch.int64,
    torch.int32: torch.int32,
    torch.uint8: torch.uint8,
}


def fp32(patterns: Sequence[int] | np.ndarray) -> Tensor:
    """The float32 tensor of these bits, given as unsigned numbers."""
    return torch.from_numpy(np.asarray(patterns, dtype=np.uint32).view(np.int32)).view(torch.float32)


def bf16(patterns: Sequence[int] | np.ndarray) -> Tensor:
    """The bf16 tensor of these bits, given as unsigned numbers."""
    return torch.from_numpy(np.asarray(patterns, dtype=np.uint16).view(np.int16)).view(torch.bfloat16)


def bits_of(x: Tensor) -> np.ndarray:
    """The bits of a tensor as unsigned numbers in int64 (signed ones of float64)."""
    width = 8 * x.element_size()
    integers = x.cpu().contiguous().view(INTEGERS[x.dtype]).numpy().astype(np.int64)
    return integers if width == 64 else integers & ((1 << width) - 1)


def assert_same(got: Tensor, expected: Tensor) -> None:
    """Same dtype, shape and bits; else say where the first difference is."""
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    a, b = bits_of(got), bits_of(expected)
    wrong = np.argwhere(a != b)
    if len(wrong):
        at = tuple(wrong[0].tolist())
        raise AssertionError(
            f"{len(wrong)} of {a.size} differ, first at {at}: {a[at]:#x}, expected {b[at]:#x}"
        )
