"""Comparing tensors bit by bit, and saying how they differ."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "FAR",
    "Difference",
    "assert_bits_equal",
    "difference_at",
    "differing",
    "first_difference",
    "ulp_distance",
]

FAR = 1 << 40  # the distance between a NaN and anything with other bits
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Difference:
    """One element that differs.

    Attributes:
        index: its coordinates.
        got_bits, expected_bits: hexadecimal bit patterns.
        got_value, expected_value: the values, NaN and signed zeros spelled out.
        ulps: representable numbers from one to the other (`FAR` with a NaN); 0 between +0 and -0.
    """

    index: tuple[int, ...]
    got_bits: str
    expected_bits: str
    got_value: str
    expected_value: str
    ulps: int

    def __str__(self) -> str:
        distance = "a NaN on one side" if self.ulps >= FAR else f"{self.ulps:,} ulp"
        return (
            f"at {list(self.index)}: got {self.got_bits} ({self.got_value}), "
            f"expected {self.expected_bits} ({self.expected_value}), {distance}"
        )


def differing(got: Tensor, expected: Tensor) -> Tensor:
    """Where two tensors of one dtype and shape differ in any bit, as bool.

    Raises:
        TypeError: they have different dtypes.
        ValueError: they have different shapes.
    """
    if got.dtype != expected.dtype:
        raise TypeError(f"got: expected dtype {expected.dtype}, got {got.dtype}")
    if got.shape != expected.shape:
        raise ValueError(f"got: expected shape {list(expected.shape)}, got {list(got.shape)}")
    return _bits(got) != _bits(expected).to(got.device)


def ulp_distance(got: Tensor, expected: Tensor) -> Tensor:
    """How many representable numbers lie from one to the other, int64; integers: their difference.

    Both zeros are one number. Equal NaNs are 0 apart, a NaN is `FAR` from anything else.
    """
    differs = differing(got, expected)
    if not got.dtype.is_floating_point:
        return (got.to(torch.int64) - expected.to(torch.int64)).abs()
    distance = (_ordered(got) - _ordered(expected)).abs()
    nan = torch.isnan(got) | torch.isnan(expected)
    return torch.where(nan, torch.where(differs, FAR, 0), distance)


def first_difference(got: Tensor, expected: Tensor) -> Difference | None:
    """The first element in C order that differs, or None."""
    where = differing(got, expected).nonzero()
    return None if len(where) == 0 else difference_at(got, expected, tuple(where[0].tolist()))


def difference_at(got: Tensor, expected: Tensor, index: tuple[int, ...]) -> Difference:
    """Describe one element of both tensors."""
    one, other = got[index].reshape(1).cpu(), expected[index].reshape(1).cpu()
    return Difference(
        index=index,
        got_bits=_hexadecimal(one),
        expected_bits=_hexadecimal(other),
        got_value=_value(one),
        expected_value=_value(other),
        ulps=int(ulp_distance(one, other)),
    )


def assert_bits_equal(got: Tensor, expected: Tensor, name: str = "output") -> None:
    """Raise AssertionError, with the first difference, unless the tensors agree in dtype, shape and every bit."""
    __tracebackhide__ = True
    if not isinstance(got, Tensor) or not isinstance(expected, Tensor):
        wrong = got if not isinstance(got, Tensor) else expected
        raise AssertionError(f"{name}: expected two tensors, got {type(wrong).__name__}")
    if (got.dtype, got.shape) != (expected.dtype, expected.shape):
        raise AssertionError(
            f"{name}: expected {expected.dtype} {list(expected.shape)}, got {got.dtype} {list(got.shape)}"
        )
    first = first_difference(got.cpu(), expected.cpu())
    if first is not None:
        count = int(differing(got.cpu(), expected.cpu()).sum())
        raise AssertionError(f"{name}: {count:,} of {got.numel():,} elements differ; first {first}")


def _bits(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.bool:
        return tensor
    return tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])


def _ordered(tensor: Tensor) -> Tensor:
    """Integers in the order of the numbers, one apart where these are neighbours."""
    bits = _bits(tensor).to(torch.int64)
    magnitude = bits & ((1 << (8 * tensor.element_size() - 1)) - 1)
    return torch.where(bits < 0, -magnitude, magnitude)


def _hexadecimal(one: Tensor) -> str:
    bits = int(_bits(one.to(torch.uint8) if one.dtype == torch.bool else one)[0])
    digits = 2 * one.element_size()
    return f"0x{bits & ((1 << (4 * digits)) - 1):0{digits}X}"


def _value(one: Tensor) -> str:
    if not one.dtype.is_floating_point:
        return str(one.item())
    value = one.item()
    return f"{value:.9g}" if value == value else "NaN"
