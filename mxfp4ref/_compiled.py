"""Loops compiled by numba: how they are compiled, and what happens where they cannot be.

numba takes a third of a second to import, so modules of compiled loops are imported when they are first needed, by
`loops`, which holds them against the transcription of `docs/arithmetic.md` before anything uses them: compilers have
faults, and caches grow stale. Where numba is missing or the trial fails, the transcriptions are what is left.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import os
import re
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["LOOPS", "as_numpy", "compile_loops", "compiled", "loops", "seconds_loading"]

# All modules of loops that are asked for.
LOOPS = (
    "mxfp4ref.sm90.gemm.cpu_loops",
    "mxfp4ref.sm90.gemm.fp8_loops",
    "mxfp4ref.sm90.elementwise_loops",
    "mxfp4ref.formats.mxfp4_loops",
    "mxfp4ref.formats.layout_loops",
    "mxfp4ref.defects.variants.gemm_loops",
)

_F = TypeVar("_F", bound=Callable[..., Any])

_lock = threading.RLock()
_loaded: dict[str, ModuleType | None] = {}
_COMPILING = "mxfp4ref: its loops are compiled for this CPU, once; that takes about half a minute"
_told: list[bool] = []  # whether that has been said
_loading: list[float] = []  # seconds of the processor, of each module
_REMEMBERED = 4096  # shapes of a loop's arrays that fit together

# A fork waits for a compilation to end, as the child would have neither the compiling thread nor a way to unlock.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def compiled(*signatures: str, shapes: str = "") -> Callable[[_F], _F]:
    """Compile a loop for these signatures at once, or, without any, as a part of the loops that call it.

    A product and a sum may become one fused operation, so any product that is added to something has to be exact.
    numba's cache notices changes of the file that holds a loop only; for the files of its parts, which have to be in
    the same folder and to be called `*_loops.py`, their checksum is added to the name under which it is kept.

    Args:
        signatures: types in numba's notation.
        shapes: of the arrays, "x[M, K] weights[N, K] packed[N, 4*G] scales[N*G/4]", G/4 rounded up. Each call
            is held against them: inside of a loop no index is checked, and arrays that do not fit together would be
            read or written past their ends.
    """
    numba: Any = importlib.import_module("numba")
    if numba.config.DISABLE_JIT:
        raise ImportError("numba is told not to compile, by NUMBA_DISABLE_JIT")
    options = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}

    def compile_(function: _F) -> Any:
        if not signatures:
            return numba.njit(inline="always", **options)(function)
        parts = sorted(Path(inspect.getfile(function)).parent.glob("*_loops.py"))
        function.__qualname__ += f"_{zlib.crc32(b''.join(map(Path.read_bytes, parts))):08x}"
        try:
            loop = numba.njit(list(signatures), cache=True, **options)(function)
        except (RuntimeError, OSError):  # no folder for a cache that can be written to, or a full disk
            loop = numba.njit(list(signatures), **options)(function)
        except Exception:  # a damaged file in the cache, which is begun anew
            numba.njit(cache=True, **options)(function)._cache.flush()
            loop = numba.njit(list(signatures), cache=True, **options)(function)
        return _held_to(shapes, loop)

    return compile_


def _held_to(shapes: str, loop: Any) -> Any:
    """The loop, of which each call first has its arrays' shapes compared."""
    names = list(inspect.signature(loop.py_func).parameters)
    expected = [
        (names.index(name), name, [size.split("*") for size in sizes.split(", ")])
        for name, sizes in re.findall(r"(\w+)\[(.*?)\]", shapes)
    ]

    places = [place for place, *_ in expected]
    fit: set[tuple[tuple[int, ...], ...]] = set()  # a layer has the same few again and again

    @functools.wraps(loop)
    def checked(*arguments: Any) -> Any:
        given = tuple([arguments[place].shape for place in places])
        if given not in fit:
            compare(given)
            if len(fit) < _REMEMBERED:
                fit.add(given)
        return loop(*arguments)

    def compare(given: tuple[tuple[int, ...], ...]) -> None:
        known: dict[str, int] = {}
        for (_, name, sizes), shape in zip(expected, given, strict=True):
            for factors, size in zip(sizes, shape, strict=True):
                if len(factors) == 1 and factors[0].isalpha():
                    wanted = known.setdefault(factors[0], size)
                else:
                    wanted = math.prod(_size(factor, known) for factor in factors)
                if wanted != size:
                    of = ", ".join("*".join(factors) for factors in sizes)
                    agreed = ", ".join(f"{letter} = {value}" for letter, value in known.items())
                    message = f"expected {name} [{of}] where {agreed}, got {list(shape)}"
                    raise ValueError(f"{loop.__name__}: {message}")

    return checked


def _size(factor: str, known: dict[str, int]) -> int:
    """Of "4", "G" or "G/4", which is rounded up."""
    size, _, divisor = factor.partition("/")
    return -(-(known[size] if size in known else int(size)) // int(divisor or 1))


def loops(name: str, trial: Callable[[Any], None], consequence: str) -> Any:
    """The module of compiled loops, or None, after one warning, where they do not run or fail their trial.

    Args:
        name: the module.
        trial: is given the module, and raises unless what it computes is right.
        consequence: what the warning says of going without, "the GEMM takes 100 times as long as need be".
    """
    if name not in _loaded:
        with _lock:
            if name not in _loaded:
                start = time.thread_time() - seconds_loading()
                _loaded[name] = _load(name, trial, consequence)  # whose trial may load others
                _loading.append(time.thread_time() - seconds_loading() - start)
    return _loaded[name]


def compile_loops() -> None:
    """Compile all that this CPU has no loops of yet, or read them, so that no first call is charged with that."""
    with suppress(Exception), _lock, _told_of_compiling():  # where something is wrong, `loops` says so
        for name in LOOPS:
            importlib.import_module(name)


def seconds_loading() -> float:
    """Seconds of the processor that went into loops at their first use, of all threads: mostly into compiling."""
    return sum(_loading)


def _load(name: str, trial: Callable[[Any], None], consequence: str) -> ModuleType | None:
    if not _loaded:
        _keep_freed_memory()
    try:
        with _told_of_compiling():
            module = importlib.import_module(name)
        trial(module)
    except Exception as error:  # no numba, one that does not fit numpy, a compiler that errs on this CPU, ...
        _loaded[name] = None  # also where the warning is an error
        what = name
        if isinstance(error, ImportError):  # the same for all loops, so it is said once
            if "numba" in _loaded:
                return None
            _loaded["numba"] = None
            what, consequence = "numba", "the GEMM takes 300 times as long as need be, all else 5 to 20 times"
        message = f"{consequence}, for {what} cannot be used here: {type(error).__name__}: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=4)
        return None
    return module


@contextmanager
def _told_of_compiling() -> Iterator[None]:
    """Say once why nothing happens for a while; not of what comes out of a cache."""
    if sys.stderr is None or "pytest" in sys.modules:
        yield
        return
    event: Any = importlib.import_module("numba.core.event")

    class Telling(event.Listener):  # type: ignore[misc]
        def on_start(self, happened: Any) -> None:
            if not _told:
                _told.append(True)
                with suppress(OSError, ValueError):  # stderr is closed
                    print(_COMPILING, file=sys.stderr, flush=True)

        def on_end(self, happened: Any) -> None:
            pass

    with event.install_listener("numba:compile", Telling()):
        yield


def _keep_freed_memory() -> None:
    """Let glibc reuse freed memory, which it would hand back and then fetch page by page again.

    It takes the size of a freed block of up to 32 MiB for one that is worth keeping, and keeps twice that.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


class _Memory:
    """A tensor's memory as numpy takes it; `Tensor.numpy` forbids its owner to resize it from then on."""

    def __init__(self, tensor: Tensor, dtype: np.dtype[Any]) -> None:
        self.tensor = tensor  # which keeps it
        *rows, last = tensor.shape or (1,)
        self.__array_interface__ = {
            "shape": (*rows, last * tensor.element_size() // dtype.itemsize),
            "typestr": dtype.str,
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def as_numpy(tensor: Tensor, dtype: npt.DTypeLike) -> np.ndarray[Any, Any]:
    """The bytes of a CPU tensor as numbers of a type, in the same memory if they are in order and aligned."""
    tensor, dtype = tensor.detach(), np.dtype(dtype)
    in_order = tensor.is_contiguous() and tensor.stride(-1) == 1  # 0, of an expanded single element
    if not in_order or tensor.data_ptr() % dtype.itemsize or tensor.is_neg():
        tensor = tensor.resolve_neg().clone(memory_format=torch.contiguous_format)
    if not tensor.numel():
        return tensor.view(torch.uint8).numpy().view(dtype)
    return np.asarray(_Memory(tensor, dtype))
