"""Argument checks: every refusal names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mxfp4ref._words import did_you_mean, shown

__all__ = [
    "INT32_MAX",
    "check_below",
    "check_bool",
    "check_choice",
    "check_float",
    "check_function",
    "check_ids",
    "check_instance",
    "check_int",
    "check_output",
    "check_same_device",
    "check_tensor",
    "did_you_mean",
    "no_storage",
    "shown",
]

INT32_MAX = (1 << 31) - 1
_FLOAT32_MAX = float.fromhex("0x1.fffffep+127")
_FLOAT32_UNDERFLOW = 2.0**-150  # rounds to 0, as all below


def check_instance(name: str, value: object, wanted: type, *, exact: bool = False) -> None:
    """Raise TypeError unless `value` is a `wanted`; `exact` refuses subclasses, too."""
    if not isinstance(value, wanted) or (exact and type(value) is not wanted):
        raise TypeError(f"{name}: expected {wanted.__name__}, got {type(value).__name__}")


def check_function(name: str, value: object) -> None:
    """Raise TypeError unless `value` can be called, or is None."""
    if value is not None and not callable(value):
        raise TypeError(f"{name}: expected a function, got {shown(value)}")


def check_tensor(
    name: str,
    value: object,
    *,
    dtype: torch.dtype | Sequence[torch.dtype] | None,
    shape: Sequence[int | str | None],
    sizes: Mapping[str, int] | None = None,
    contiguous: bool = False,
    cast: bool = False,
) -> Tensor:
    """Return `value` if it is a dense tensor of one of the dtypes and of the shape, else raise.

    Args:
        name: the argument's name, for the message.
        dtype: the allowed dtype or dtypes; None allows all.
        shape: one entry per dimension: an int is required exactly, a string is a symbol that is looked up
            in `sizes` (free when absent there), None is free. A leading `...` entry allows any number of
            dimensions before the rest.
        sizes: the values of symbols that are already known.
        contiguous: require a contiguous tensor.
        cast: where an int came for an int of another dtype, or a float for a float, say how to cast it.

    Raises:
        TypeError: not a tensor, a meta or sparse tensor, or another dtype.
        ValueError: another shape, or not contiguous where that is required.
    """
    dtypes = (dtype,) if isinstance(dtype, torch.dtype) else dtype or ()

    def expected() -> str:  # written out for a message only: a call checks some fifteen tensors
        wanted = " or ".join(_short(d) for d in dtypes) + " " * bool(dtypes)
        article = "an" if wanted.startswith("int") else "a"
        return f"{name}: expected {article} {wanted}tensor of shape {_describe(shape, sizes)}"

    def got(tensor: Tensor) -> str:
        return f"{_short(tensor.dtype)} {list(tensor.shape)}"

    if not isinstance(value, Tensor):
        raise TypeError(f"{expected()}, got {type(value).__name__}")
    if value.is_nested:  # has no shape
        raise TypeError(f"{expected()}, got a nested tensor")
    if dtypes and value.dtype not in dtypes:
        castable = cast and value.dtype.is_floating_point == dtypes[0].is_floating_point
        how = f"; write {name}.to({dtypes[0]})" if castable and value.dtype != torch.bool else ""
        raise TypeError(f"{expected()}, got {got(value)}{how}")
    if kind := no_storage(value) or "lazily negated" * value.is_neg():
        raise TypeError(f"{expected()} with dense storage, got a {kind} tensor")
    any_prefix = len(shape) > 0 and shape[0] == "..."
    tail = shape[1:] if any_prefix else shape
    fits = value.dim() >= len(tail) if any_prefix else value.dim() == len(tail)
    if fits:
        for want, have in zip(tail, value.shape[value.dim() - len(tail) :], strict=True):
            size = (sizes or {}).get(want) if isinstance(want, str) else want
            fits = fits and (size is None or size == have)
    if not fits:
        raise ValueError(f"{expected()}, got {got(value)}")
    if contiguous and not value.is_contiguous():
        raise ValueError(f"{expected()}, contiguous, got strides {list(value.stride())}")
    return value


def check_output(
    name: str,
    value: object,
    *,
    dtype: torch.dtype,
    shape: Sequence[int | str | None],
    inputs: Mapping[str, Tensor | None],
    contiguous: bool = False,
) -> Tensor:
    """Return `value` if it is a tensor as `check_tensor` wants it and can be written into, else raise.

    No two of its elements and no element of an input may lie in the same place, and autograd may not watch it.

    Raises:
        TypeError, ValueError: as `check_tensor`; ValueError where it cannot be written into.
    """
    tensor = check_tensor(name, value, dtype=dtype, shape=shape, contiguous=contiguous)
    if obstacle := _no_writing(tensor, inputs):
        wanted = f"a {_short(dtype)} tensor of shape {_describe(shape, None)} to be written into"
        raise ValueError(f"{name}: expected {wanted}, got one {obstacle}")
    return tensor


def check_same_device(tensors: Mapping[str, Tensor | None]) -> torch.device:
    """Return the one device all given tensors are on; None entries are skipped.

    Raises:
        ValueError: the tensors are on more than one device.
    """
    present = {name: t for name, t in tensors.items() if t is not None}
    first_name, first = next(iter(present.items()))
    for name, tensor in present.items():
        if tensor.device != first.device:
            raise ValueError(
                f"{name}: expected a tensor on {first.device} like {first_name}, got one on {tensor.device}"
            )
    return first.device


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        listed = ", ".join(repr(choice) for choice in choices)
        hint = did_you_mean(value, [choice for choice in choices if isinstance(choice, str)])
        raise ValueError(f"{name}: expected one of {listed}, got {shown(value)}{hint}")


def check_bool(name: str, value: object) -> bool:
    """Return `value` if it is True or False itself, else raise TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__} {shown(value)}")
    return value


def check_int(name: str, value: object, *, minimum: int, maximum: int | None = None) -> int:
    """Return `value` if it is an int (not a bool) within the limits.

    Without a `maximum` it is that of int32: ids, and what counts experts, ranks, rows and columns.

    Raises:
        TypeError: not an int.
        ValueError: out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__} {shown(value)}")
    limit = INT32_MAX if maximum is None else maximum
    if not minimum <= value <= limit:
        at_least = maximum is None and value < minimum
        limits = f"at least {minimum}" if at_least else f"from {minimum} to {limit}"
        raise ValueError(f"{name}: expected an int {limits}, got {shown(value)}")
    return value


def check_float(name: str, value: object, *, minimum: float = -math.inf) -> float:
    """Return `value` as a float if it is a float or an int (not a bool) that float32 has room for.

    Raises:
        TypeError: not a number.
        ValueError: NaN, Inf, beyond float32, so small that float32 makes it 0, or below `minimum`.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__} {shown(value)}")
    if not max(minimum, -_FLOAT32_MAX) <= value <= _FLOAT32_MAX:
        least = "" if minimum == -math.inf else f" of at least {minimum}"
        raise ValueError(f"{name}: expected a finite float32 number{least}, got {shown(value)}")
    if 0 < abs(value) <= _FLOAT32_UNDERFLOW:
        raise ValueError(f"{name}: expected 0 or a float32 number, from 2^-149 up, got {shown(value)}")
    return float(value)


def check_below(name: str, value: float | None, limit: float, wanted: str) -> None:
    """Raise ValueError unless `value` is None or a number above 0 and below `limit`, which is `wanted` in words."""
    if value is not None and not 0 < check_float(name, value) < limit:
        raise ValueError(f"{name}: expected {wanted}, or None, got {shown(value)}")


def check_ids(name: str, ids: Tensor, *, minimum: int = 0, maximum: int) -> None:
    """Raise ValueError, with the first that is wrong, unless all ids are within the limits."""
    outside = (ids < minimum) | (ids > maximum)
    if bool(outside.any()):
        index = outside.nonzero()[0].tolist()
        raise ValueError(
            f"{name}: expected ids from {minimum} to {maximum}, got {int(ids[tuple(index)])} at {index}"
        )


def no_storage(tensor: Tensor) -> str:
    """What kind of tensor it is, if its storage does not hold its elements as they are; else ""."""
    if tensor.is_nested:
        return "nested"
    if tensor.is_meta:
        return "meta"
    if tensor.is_quantized:
        return "quantized"
    if tensor.layout != torch.strided:
        return str(tensor.layout)
    length = tensor.numel()
    if length and not tensor.is_contiguous():
        length = (
            sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        )
    freed = (tensor.storage_offset() + length) * tensor.element_size() > tensor.untyped_storage().nbytes()
    return "partly or wholly freed" if length and freed else ""  # as sharded weights are between their uses


def _no_writing(tensor: Tensor, inputs: Mapping[str, Tensor | None]) -> str:
    """Why a tensor cannot be written into; "" if it can."""
    if _overlaps_itself(tensor):
        return f"whose elements overlap: strides {list(tensor.stride())}"
    for name, other in inputs.items():
        if other is not None and _share_memory(tensor, other):
            return f"that shares memory with {name}"
    if tensor.requires_grad and torch.is_grad_enabled():
        return "that requires a gradient"
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return "of inference mode"
    return ""


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements of a tensor lie in the same place."""
    if tensor.numel() < 2:
        return False
    steps = sorted(
        (stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1
    )
    reach, nested = 0, True
    for stride, size in steps:
        nested = nested and stride > reach  # all that varies faster lies within one step
        reach += stride * (size - 1)
    if nested or tensor.numel() > reach + 1:
        return not nested
    places = torch.zeros(
        1, dtype=torch.int64, device="cpu"
    )  # rows that interlock, or do not: every place counts
    for stride, size in steps:
        places = (places[:, None] + torch.arange(size, device="cpu") * stride).flatten()
    return bool((places.sort().values.diff() == 0).any())


def _share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether an element of one tensor lies where one of another does."""
    if one.device != other.device or not (one.numel() and other.numel()):
        return False
    (start, stop), (other_start, other_stop) = _extent(one), _extent(other)
    if stop <= other_start or other_stop <= start:
        return False
    try:  # numpy looks at addresses and strides only, which may be a GPU's
        memory = np.asarray(_Memory(one)), np.asarray(_Memory(other))
        return np.shares_memory(*memory, max_work=1 << 20)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The address of a tensor's first byte, and of the one after its last."""
    last = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


class _Memory:
    """Where a tensor lies, in numpy's terms."""

    def __init__(self, tensor: Tensor) -> None:
        size = tensor.element_size()
        self.__array_interface__ = {
            "version": 3,
            "data": (tensor.data_ptr(), True),
            "typestr": f"|V{size}",
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * size for stride in tensor.stride()),
        }


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe(shape: Sequence[int | str | None], sizes: Mapping[str, int] | None) -> str:
    words = []
    for entry in shape:
        known = (sizes or {}).get(entry) if isinstance(entry, str) else None
        words.append(f"{entry}={known}" if known is not None else "any" if entry is None else str(entry))
    return "[" + ", ".join(words) + "]"
