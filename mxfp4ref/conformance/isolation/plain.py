"""What a kernel hands over, as plain bytes and plain words, whatever its objects say of themselves.

A kernel may return tensors whose methods lie, replace methods of torch's classes, leave torch's modes switched on,
or raise exceptions whose text is 50 MB of escape sequences. So nothing here calls a method of a kernel's object:
tensors are read through functions of torch's C classes, which cannot be replaced and were bound when this module was
imported, and `str` is asked once, in a `try`.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from mxfp4ref import _compiler
from mxfp4ref._files import printable as escaped

__all__ = [
    "LARGEST_STAGE",
    "PACKAGE",
    "Like",
    "TensorError",
    "address",
    "alias",
    "fill_new_memory",
    "geometry",
    "like",
    "of_exception",
    "printable",
    "raw_bytes",
    "resolved",
    "stage_bytes",
    "tensor_of",
    "without_modes",
]

MESSAGE = 2000  # characters of a message, at most
LARGEST_STAGE = 1 << 30  # bytes of an intermediate

_string_at = ctypes.string_at
_class_of = type
_name_of = vars(type)["__name__"].__get__
_traceback_of = vars(BaseException)["__traceback__"].__get__
_cause_of = vars(BaseException)["__cause__"].__get__
_members_of, _DEEPEST = vars(BaseExceptionGroup)["exceptions"].__get__, 100  # groups in groups
_base = torch._C.TensorBase
_detach, _contiguous, _to, _size, _stride = _base.detach, _base.contiguous, _base.to, _base.size, _base.stride
_data_ptr, _offset, _element_size, _storage = (
    _base.data_ptr,
    _base.storage_offset,
    _base.element_size,
    _base.untyped_storage,
)
_storage_bytes = torch._C.StorageBase.nbytes  # type: ignore[attr-defined]
_dtype, _device, _layout, _requires_grad = (
    vars(_base)[name].__get__ for name in ("dtype", "device", "layout", "requires_grad")
)
_nested, _meta, _quantized = (vars(_base)[name].__get__ for name in ("is_nested", "is_meta", "is_quantized"))
_negated, _conjugated = _base.is_neg, _base.is_conj
_resolve_negated, _resolve_conjugated = _base.resolve_neg, _base.resolve_conj
_no_functions, _no_dispatch = torch._C.DisableTorchFunction, torch._C._DisableTorchDispatch


class TensorError(ValueError):
    """It is no tensor whose bytes can be read; the message says what it is instead."""


@dataclass(frozen=True)
class Like:
    """What a tensor has to be: its dtype, its shape, and the kind of device ("cpu", "cuda")."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    device: str = "cpu"

    @property
    def size(self) -> int:
        """In bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


@contextmanager
def without_modes() -> Iterator[None]:
    """Inside, no subclass and no mode that a kernel has left switched on sees what torch does."""
    with _no_functions(), _no_dispatch():
        yield


def fill_new_memory(byte: int) -> None:
    """From now on glibc fills what it hands out, unless `byte` is 0: a kernel may count on zeros, which is luck."""
    _mallopt(_PERTURB, byte)


_PERTURB = -6
_ROOM = __file__.removesuffix("plain.py")
PACKAGE = str(Path(__file__).parents[2] / "_")[:-1]  # with which files begin that tell nothing about a kernel
_mallopt = (getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None) or (
    lambda option, value: 0
)


def like(value: object) -> Like:
    """What a tensor is.

    Raises:
        TensorError: no tensor, or one whose storage does not hold its elements as they are.
    """
    kind = _class_of(value)
    if not issubclass(kind, _base):
        raise TensorError(printable(_name_of(kind), 80))
    try:
        with without_modes():
            return _like(value)
    except TensorError:
        raise
    except Exception as error:
        raise TensorError(f"a tensor that cannot be read ({of_exception(error)})") from None


def _like(tensor: Any) -> Like:
    if _nested(tensor):
        raise TensorError("a nested tensor")
    found = Like(_dtype(tensor), tuple(map(int, _size(tensor))), _device(tensor).type)
    kinds = (
        ("a meta", _meta(tensor)),
        ("a quantized", _quantized(tensor)),
        (f"a {str(_layout(tensor)).removeprefix('torch.')}", _layout(tensor) != torch.strided),
        ("a lazily negated", _negated(tensor)),
        ("a lazily conjugated", _conjugated(tensor)),
    )
    for words, applies in kinds:
        if applies:
            raise TensorError(f"{words} {found} tensor")
    if found.size:
        reach = (
            _offset(tensor) + sum((n - 1) * s for n, s in zip(found.shape, _stride(tensor), strict=True)) + 1
        )
        if not _data_ptr(tensor) or reach * _element_size(tensor) > _storage_bytes(_storage(tensor)):
            raise TensorError(f"a {found} tensor without the memory for it")
    return found


def resolved(value: Any) -> Any:
    """A tensor that is lazily negated or conjugated as one that holds its elements; anything else as it is."""
    if not issubclass(_class_of(value), _base):
        return value
    with without_modes():
        lazy = (
            not _nested(value) and _layout(value) == torch.strided and (_negated(value) or _conjugated(value))
        )
        return _resolve_negated(_resolve_conjugated(value)) if lazy else value


def raw_bytes(value: object) -> bytes:
    """The elements of a tensor on any device in C order, as they lie in memory.

    Raises:
        TensorError: as of `like`.
    """
    found = like(value)
    if not found.size:
        return b""
    tensor: Any = value
    try:
        with without_modes():
            tensor = _contiguous(_to(_detach(tensor), "cpu"))
            return _string_at(_data_ptr(tensor), found.size)
    except Exception as error:  # such as no room for it, or a dtype that torch cannot copy
        raise TensorError(f"a {found} tensor that cannot be read ({of_exception(error)})") from None


def stage_bytes(name: str, value: object) -> tuple[Like, bytes]:
    """What an intermediate is, and its bytes.

    Raises:
        TensorError: as of `like`, with the name; or it is so large that it is none.
    """
    try:
        found = like(value)
        if found.size <= LARGEST_STAGE:
            return found, raw_bytes(value)
    except TensorError as error:
        raise TensorError(f"{name}: expected a tensor, got {error}") from None
    raise TensorError(f"{name}: expected at most {LARGEST_STAGE:,} bytes, got {found} of {found.size:,}")


def alias(value: Any) -> Tensor:
    """A plain tensor that lies where another does, and does not keep that one alive."""
    with without_modes():
        found: Tensor = _detach(value)
        return found


def address(value: object) -> int:
    """Where a tensor's first element lies in memory."""
    like(value)
    return _data_ptr(value)  # type: ignore[arg-type]


def geometry(value: object) -> str:
    """Everything about a tensor but its elements, in words: what else a caller sees of it."""
    found, tensor = like(value), value
    with without_modes():
        words = f"{found}, strides {list(_stride(tensor))}"  # type: ignore[call-overload]
        return words + (", requires a gradient" if _requires_grad(tensor) else "")


def tensor_of(raw: bytes, like: Like) -> Tensor:
    """A new tensor on the CPU that holds these bytes."""
    if not raw:
        return torch.empty(like.shape, dtype=like.dtype, device="cpu")
    return torch.frombuffer(bytearray(raw), dtype=like.dtype).reshape(like.shape)


def printable(value: object, limit: int = MESSAGE) -> str:
    """Any text on one line that a terminal, XML, JSON and HTML take as it is, cut in the middle if it is long.

    Control characters, escape sequences, lone surrogates and what else is not printable are written as escapes.
    """
    try:
        text = str.__getitem__(str(value), slice(None))  # of `str` itself, where it was of a subclass
    except BaseException as error:
        if _class_of(error) is KeyboardInterrupt:
            raise
        return "(its text cannot be had)"
    if len(text) > limit:
        half = limit // 2
        text = f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
    return escaped(text, lines=False)


def of_exception(error: BaseException, without: str = "") -> str:
    """An exception, its innermost frames, but those of importing and of `uncompiled`, and its cause.

    `without`: a file or a folder whose frames are told only where there are no others, and those of this room never.
    """
    words = printable(_name_of(_class_of(error)), 80)
    if text := printable(error).strip():
        words += f": {text}"
    aside = (importlib.__file__, _compiler.__file__)
    frames = [
        f for f in _frames(_traceback_of(error)) if f[0] not in aside and not f[0].startswith("<frozen")
    ]
    if without:
        frames = [f for f in frames if not f[0].startswith(_ROOM)]
        frames = [f for f in frames if not f[0].startswith(without)] or frames
    where = "; ".join(
        f"{printable(file, 200)}:{line} in {printable(name, 80)}" for file, line, name in frames[-3:]
    )
    words += f" ({where})" if where else ""
    inner, which, depth = error, "the first of them", 0
    while issubclass(_class_of(inner), BaseExceptionGroup) and depth < _DEEPEST:
        inner, depth = _members_of(inner)[0], depth + 1
    if inner is error:
        inner, which = _cause_of(error), "its cause"
    if inner is None or inner is error:
        return words
    text = printable(inner).strip()
    return f"{words}; {which}: {printable(_name_of(_class_of(inner)), 80)}{f': {text}' if text else ''}"


def _frames(traceback: TracebackType | None) -> Iterator[tuple[str, int, str]]:
    while traceback is not None:
        code = traceback.tb_frame.f_code
        yield code.co_filename, traceback.tb_lineno, code.co_name
        traceback = traceback.tb_next
