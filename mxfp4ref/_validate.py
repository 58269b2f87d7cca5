"""Argument checks: every refusal names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["check_choice", "check_int", "check_same_device", "check_tensor"]


def check_tensor(
    name: str,
    value: object,
    *,
    dtype: torch.dtype | Sequence[torch.dtype],
    shape: Sequence[int | str | None],
    sizes: Mapping[str, int] | None = None,
    contiguous: bool = False,
) -> Tensor:
    """Return `value` if it is a dense tensor of one of the dtypes and of the shape, else raise.

    Args:
        name: the argument's name, for the message.
        dtype: the allowed dtype or dtypes.
        shape: one entry per dimension: an int is required exactly, a string is a symbol that is looked up
            in `sizes` (free when absent there), None is free. A leading `...` entry allows any number of
            dimensions before the rest.
        sizes: the values of symbols that are already known.
        contiguous: require a contiguous tensor.

    Raises:
        TypeError: not a tensor, a meta or sparse tensor, or another dtype.
        ValueError: another shape, or not contiguous where that is required.
    """
    dtypes = (dtype,) if isinstance(dtype, torch.dtype) else tuple(dtype)
    wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
    expected = f"a {wanted} tensor of shape {_describe(shape, sizes)}"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    got = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected {expected}, got {got}")
    if value.is_meta or value.layout != torch.strided or value.is_quantized:
        kind = "meta" if value.is_meta else str(value.layout)
        raise TypeError(f"{name}: expected {expected} with dense storage, got a {kind} tensor")
    any_prefix = len(shape) > 0 and shape[0] == "..."
    tail = list(shape[1:] if any_prefix else shape)
    got_tail = list(value.shape[value.dim() - len(tail) :]) if value.dim() >= len(tail) else None
    fits = got_tail is not None and (any_prefix or value.dim() == len(tail))
    for want, have in zip(tail, got_tail or (), strict=False):
        size = (sizes or {}).get(want) if isinstance(want, str) else want
        fits = fits and (size is None or size == have)
    if not fits:
        raise ValueError(f"{name}: expected {expected}, got {got}")
    if contiguous and not value.is_contiguous():
        raise ValueError(f"{name}: expected {expected}, contiguous, got strides {list(value.stride())}")
    return value


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
        raise ValueError(f"{name}: expected one of {listed}, got {value!r}")


def check_int(name: str, value: object, *, minimum: int, maximum: int | None = None) -> int:
    """Return `value` if it is an int (not a bool) within the limits.

    Raises:
        TypeError: not an int.
        ValueError: out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__} {value!r}")
    if value < minimum or (maximum is not None and value > maximum):
        limits = f"at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise ValueError(f"{name}: expected an int {limits}, got {value}")
    return value


def _describe(shape: Sequence[int | str | None], sizes: Mapping[str, int] | None) -> str:
    words = []
    for entry in shape:
        known = (sizes or {}).get(entry) if isinstance(entry, str) else None
        words.append(f"{entry}={known}" if known is not None else "any" if entry is None else str(entry))
    return "[" + ", ".join(words) + "]"
