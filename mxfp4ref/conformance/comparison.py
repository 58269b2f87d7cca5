"""Comparing tensors bit by bit, and saying how they differ."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxfp4ref._validate import no_storage
from mxfp4ref.formats.mxfp4 import E2M1_VALUES, unpack_codes

__all__ = [
    "FAR",
    "Difference",
    "assert_bits_equal",
    "difference_at",
    "differing",
    "first_difference",
    "ulp_distance",
]

FAR = (1 << 63) - 1  # the distance between a NaN and anything with other bits; beyond any other distance
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SIGN = -(1 << 63)
_FLOAT4 = torch.float4_e2m1fn_x2


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
        TypeError: they have different dtypes, or one has no bits of its elements: meta, quantized, sparse, nested.
        ValueError: they have different shapes.
    """
    for name, tensor in (("got", got), ("expected", expected)):
        if kind := no_storage(tensor):
            raise TypeError(f"{name}: expected a tensor with dense storage, got a {kind} tensor")
    if got.dtype != expected.dtype:
        raise TypeError(f"got: expected dtype {expected.dtype}, got {got.dtype}")
    if got.shape != expected.shape:
        raise ValueError(f"got: expected shape {list(expected.shape)}, got {list(got.shape)}")
    differs = _bits(got) != _bits(expected).to(got.device)
    return differs.any(-1) if got.is_complex() else differs


def ulp_distance(got: Tensor, expected: Tensor) -> Tensor:
    """How many representable numbers lie from one to the other, int64; integers: their difference.

    Both zeros are one number. Equal NaNs are 0 apart, a NaN is `FAR` from anything else, and the most of two numbers
    is `FAR` - 1. Of complex numbers the parts that are further apart count, of packed float4 the bytes.
    """
    differs = differing(got, expected)
    if got.is_complex():
        parts = (torch.view_as_real(t.resolve_conj()) for t in (got, expected))
        return ulp_distance(*parts).amax(-1)
    one, other = _ordered(got), _ordered(expected).to(got.device)
    distance = torch.maximum(one, other) - torch.minimum(one, other)
    distance = torch.where(distance < 0, FAR - 1, distance)  # which wraps once at most
    if not got.dtype.is_floating_point or got.dtype == _FLOAT4:
        return distance
    nan = torch.isnan(got.to(torch.float64)) | torch.isnan(expected.to(torch.float64)).to(got.device)
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
    for tensor in (got, expected):
        if kind := no_storage(tensor):
            raise AssertionError(f"{name}: expected tensors with dense storage, got a {kind} one")
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
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.detach().resolve_conj())
    return tensor.detach().resolve_neg().contiguous().view(_INTEGERS[tensor.element_size()])


def _ordered(tensor: Tensor) -> Tensor:
    """Integers in the order of the numbers, one apart where these are neighbours."""
    if tensor.dtype in (torch.bool, torch.float8_e8m0fnu, _FLOAT4):  # no sign
        return tensor.view(torch.uint8).to(torch.int64)
    if tensor.dtype == torch.uint64:
        return tensor.view(torch.int64) ^ _SIGN
    if not tensor.dtype.is_floating_point:
        return tensor.to(torch.int64)
    width = 8 * tensor.element_size()
    bits = _bits(tensor).to(torch.int64) << (64 - width) >> (64 - width)
    return torch.where(bits < 0, -(bits & ((1 << (width - 1)) - 1)), bits)


def _hexadecimal(one: Tensor) -> str:
    parts = _bits(one.to(torch.uint8) if one.dtype == torch.bool else one).flatten().tolist()
    digits = 2 * one.element_size() // len(parts)
    return " ".join(f"0x{bits & ((1 << (4 * digits)) - 1):0{digits}X}" for bits in parts)


def _value(one: Tensor) -> str:
    if one.dtype == _FLOAT4:
        return " ".join(f"{E2M1_VALUES[code]:g}" for code in unpack_codes(one).tolist())
    if not one.dtype.is_floating_point:
        return str(one.item())
    value = one.item()
    digits = 17 if one.dtype == torch.float64 else 9
    return f"{value:.{digits}g}" if value == value else "NaN"
