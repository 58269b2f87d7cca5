"""Comparing tensors bit by bit, and saying how they differ."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxfp4ref._validate import check_instance, no_storage
from mxfp4ref.conformance.isolation.plain import TensorError, alias, like, raw_bytes, resolved, tensor_of
from mxfp4ref.formats.mxfp4 import E2M1_VALUES, unpack_codes

__all__ = [
    "FAR",
    "Difference",
    "assert_bits_equal",
    "difference_at",
    "differing",
    "first_difference",
    "in_words",
    "plain_tensor",
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
_SIGN = -(1 << 63)


@dataclass(frozen=True)
class Difference:
    """One element that differs.

    Attributes:
        index: its coordinates.
        got_bits, expected_bits: hexadecimal bit patterns.
        got_value, expected_value: the values, NaN and signed zeros spelled out.
        ulps: representable numbers from one to the other (`FAR` with a NaN, `FAR` - 1 if there are more than that); 0
            between +0 and -0.
        whole: whether they are integers, and `ulps` is their difference.
        counts: whether they are integers that number something, as ids of experts do, which values alone tell.
    """

    index: tuple[int, ...]
    got_bits: str
    expected_bits: str
    got_value: str
    expected_value: str
    ulps: int
    whole: bool = False
    counts: bool = False

    def __str__(self) -> str:
        if self.counts:
            return f"at {list(self.index)}: got {self.got_value}, expected {self.expected_value}"
        distance = f"by {_count(self.ulps)}" if self.whole else f"{_count(self.ulps)} ulp"
        if self.ulps == FAR:
            both = self.got_value == self.expected_value == "NaN"
            distance = "NaNs of other bits" if both else "a NaN on one side"
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
    got, expected = plain_tensor("got", got), plain_tensor("expected", expected)
    if got.dtype != expected.dtype:
        raise TypeError(f"got: expected dtype {expected.dtype}, got {got.dtype}")
    if got.shape != expected.shape:
        raise ValueError(f"got: expected shape {list(expected.shape)}, got {list(got.shape)}")
    if not got.numel():  # of sizes, maybe, with which torch cannot compute
        return torch.zeros(0, dtype=torch.bool).as_strided(got.shape, [0] * got.dim())
    if got.dtype.is_complex:
        return differing(*map(_parts, (got, expected))).any(-1)
    return _bits(got) != _bits(expected).to(got.device)


def ulp_distance(got: Tensor, expected: Tensor) -> Tensor:
    """How many representable numbers lie from one to the other, int64, below `FAR`; integers: their difference.

    Both zeros are one number. Equal NaNs are 0 apart, a NaN is `FAR` from anything else. Of complex numbers the parts
    that are further apart count, of packed float4 the bytes.
    """
    differs = differing(got, expected)
    got, expected = plain_tensor("got", got), plain_tensor("expected", expected)
    if got.dtype.is_complex:
        return ulp_distance(*map(_parts, (got, expected))).amax(-1)
    distance = _apart(_ordered(got), _ordered(expected).to(got.device))
    if got.dtype not in _FLOATS:
        return distance
    nan = torch.isnan(got.to(torch.float64)) | torch.isnan(expected.to(torch.float64)).to(got.device)
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


def in_words(got: Tensor, expected: Tensor) -> str:
    """How two tensors of one dtype and shape differ: how many elements, how far, how many with a NaN, the first."""
    first = first_difference(got, expected)
    if first is None:
        return "equal"
    mask = differing(got, expected)
    distance = ulp_distance(got, expected)[mask]
    numbers = distance[distance < FAR]
    furthest = ""
    if len(numbers) and not first.counts:
        most = ("at most " if int(numbers.max()) < FAR - 1 else "") + _count(int(numbers.max()))
        furthest = f", by {most}" if first.whole else f", {most} ulp"
    if count := len(distance) - len(numbers):
        furthest += f", {count:,} of them with a NaN"
    return f"{len(distance):,} of {mask.numel():,} elements differ{furthest}; first {first}"


def difference_at(got: Tensor, expected: Tensor, index: tuple[int, ...]) -> Difference:
    """Describe one element of both tensors."""
    got, expected = plain_tensor("got", got), plain_tensor("expected", expected)
    one, other = (resolved(tensor[index]).reshape(1).cpu() for tensor in (got, expected))
    return Difference(
        index=index,
        got_bits=_hexadecimal(one),
        expected_bits=_hexadecimal(other),
        got_value=_value(one),
        expected_value=_value(other),
        ulps=int(ulp_distance(one, other)),
        whole=got.dtype in (*_WHOLE, torch.bool),
        counts=got.dtype in (torch.int16, torch.int32, torch.int64),
    )


def assert_bits_equal(got: Tensor, expected: Tensor, name: str = "output") -> None:
    """Raise AssertionError, with the first difference, unless the tensors agree in dtype, shape and every bit."""
    __tracebackhide__ = True
    got, expected = resolved(got), resolved(expected)
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


def plain_tensor(name: str, value: Tensor) -> Tensor:
    """What a tensor holds, whatever the methods of a subclass say of it."""
    check_instance(name, value, Tensor)
    tensor = alias(value)
    if kind := no_storage(tensor) or "memoryless" * (tensor.numel() > 0 and not tensor.data_ptr()):
        raise TypeError(f"{name}: expected a tensor with dense storage, got a {kind} tensor")
    return tensor


def _count(ulps: int) -> str:
    return f"{ulps:,}" + " or more" * (ulps == FAR - 1)


def _parts(tensor: Tensor) -> Tensor:
    """Real and imaginary parts of complex numbers, in a last dimension."""
    return torch.view_as_real(tensor.detach().resolve_conj().resolve_neg())


def _bits(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.detach().resolve_conj())
    return tensor.detach().resolve_neg().contiguous().view(_INTEGERS[tensor.element_size()])


def _ordered(tensor: Tensor) -> Tensor:
    """Integers in the order of the numbers, one apart where these are neighbours."""
    if tensor.dtype == torch.uint64:
        return tensor.view(torch.int64) ^ _SIGN
    if tensor.dtype in _WHOLE:
        return tensor.to(torch.int64)
    bits = _bits(tensor).to(torch.int64)
    if tensor.dtype not in _FLOATS or tensor.dtype == torch.float8_e8m0fnu:  # no sign
        return bits
    width = 8 * tensor.element_size()
    bits = bits << (64 - width) >> (64 - width)
    return torch.where(bits < 0, -(bits & ((1 << (width - 1)) - 1)), bits)


def _hexadecimal(one: Tensor) -> str:
    parts = _parts(one).unbind(-1) if one.dtype.is_complex else (one,)
    return " ".join(f"0x{raw_bytes(part)[::-1].hex().upper()}" for part in parts)


def _value(one: Tensor) -> str:
    if one.dtype == torch.float4_e2m1fn_x2:
        return " ".join(f"{E2M1_VALUES[code]:g}" for code in unpack_codes(one).tolist())
    if one.dtype not in (*_FLOATS, *_WHOLE, torch.bool, torch.complex64, torch.complex128):
        return str(one.dtype).removeprefix("torch.")  # of which torch gives no value
    value = one.item()
    if one.dtype not in _FLOATS:
        return str(value)
    digits = 17 if one.dtype == torch.float64 else 9
    return f"{value:.{digits}g}" if value == value else "NaN"
