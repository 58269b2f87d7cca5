"""Comparing tensors bit by bit, and saying how they differ."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxfp4ref.conformance.plain import TensorError, like, raw_bytes, tensor_of

__all__ = [
    "FAR",
    "Difference",
    "assert_bits_equal",
    "difference_at",
    "differing",
    "first_difference",
    "ulp_distance",
]

FAR = (1 << 63) - 1  # the distance between a NaN and anything with other bits; numbers are nearer
_WHOLE = (
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
)
_FLOATS = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
)
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
        distance = "a NaN on one side" if self.ulps == FAR else f"{self.ulps:,} ulp"
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
    if got.dtype.is_complex:
        return differing(torch.view_as_real(got), torch.view_as_real(expected)).any(-1)
    return _bits(got) != _bits(expected).to(got.device)


def ulp_distance(got: Tensor, expected: Tensor) -> Tensor:
    """How many representable numbers lie from one to the other, int64, below `FAR`; integers: their difference.

    Both zeros are one number. Equal NaNs are 0 apart, a NaN is `FAR` from anything else. Of complex numbers it is the
    larger one of the two parts'.
    """
    if got.dtype.is_complex:
        return ulp_distance(torch.view_as_real(got), torch.view_as_real(expected)).amax(-1)
    differs = differing(got, expected)
    distance = _apart(_ordered(got), _ordered(expected))
    if got.dtype not in _FLOATS:
        return distance
    nan = torch.isnan(got) | torch.isnan(expected)
    return torch.where(nan, torch.where(differs, FAR, 0), distance)


def _apart(one: Tensor, other: Tensor) -> Tensor:
    """The distance of two int64, at most `FAR - 1`."""
    low, high = torch.minimum(one, other), torch.maximum(one, other)
    apart = high - low  # wraps around to a negative number where it is 2^63 or more
    return torch.where(apart < 0, FAR - 1, apart).clamp(max=FAR - 1)


def first_difference(got: Tensor, expected: Tensor) -> Difference | None:
    """The first element in C order that differs, or None."""
    where = differing(got, expected).nonzero()
    return None if len(where) == 0 else difference_at(got, expected, tuple(where[0].tolist()))


def difference_at(got: Tensor, expected: Tensor, index: tuple[int, ...]) -> Difference:
    """Describe one element of both tensors."""
    one, other = got[index].detach().reshape(1).cpu(), expected[index].detach().reshape(1).cpu()
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
    try:
        kinds = like(got), like(expected)
        raw = raw_bytes(got), raw_bytes(expected)
    except TensorError as error:
        raise AssertionError(f"{name}: expected two tensors, got {error}") from None
    one, other = kinds
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        raise AssertionError(
            f"{name}: expected {other.dtype} {list(other.shape)}, got {one.dtype} {list(one.shape)}"
        )
    if raw[0] != raw[1]:
        got, expected = (tensor_of(part, one) for part in raw)
        count = int(differing(got, expected).sum())
        raise AssertionError(
            f"{name}: {count:,} of {got.numel():,} elements differ; first {first_difference(got, expected)}"
        )


def _bits(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.bool:
        return tensor
    return tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])


def _ordered(tensor: Tensor) -> Tensor:
    """Integers in the order of the numbers, one apart where these are neighbours."""
    if tensor.dtype in _WHOLE:
        return tensor.to(torch.int64)
    bits = _bits(tensor).to(torch.int64)
    if tensor.dtype not in _FLOATS:
        return bits
    magnitude = bits & ((1 << (8 * tensor.element_size() - 1)) - 1)
    return torch.where(bits < 0, -magnitude, magnitude)


def _hexadecimal(one: Tensor) -> str:
    return f"0x{raw_bytes(one)[::-1].hex().upper()}"


def _value(one: Tensor) -> str:
    if one.dtype not in (*_FLOATS, *_WHOLE, torch.bool, torch.complex64, torch.complex128):
        return str(one.dtype).removeprefix("torch.")  # of which torch gives no value
    value = one.item()
    if one.dtype not in _FLOATS:
        return str(value)
    return f"{value:.9g}" if value == value else "NaN"
