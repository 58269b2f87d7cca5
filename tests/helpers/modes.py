"""Modes of torch, numpy and the CPU that a caller may be in, none of which may change a bit."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch


@contextmanager
def setting(change: Callable[[Any], Any], value: Any, before: Any) -> Iterator[None]:
    change(value)
    try:
        yield
    finally:
        change(before)


def flushing_subnormals() -> Any:
    if not torch.set_flush_denormal(False):
        pytest.skip("this CPU cannot flush subnormals")
    return setting(torch.set_flush_denormal, True, False)


def threads(count: int) -> Any:
    return setting(torch.set_num_threads, count, torch.get_num_threads())


def default_dtype(dtype: torch.dtype) -> Any:
    return setting(torch.set_default_dtype, dtype, torch.get_default_dtype())


MODES: dict[str, Callable[[], Any]] = {
    "flushed subnormals": flushing_subnormals,
    "default float64": lambda: default_dtype(torch.float64),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device": lambda: setting(torch.set_default_device, "meta", None),
    "device context": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    # The same flags as of `use_deterministic_algorithms`, which imports torch's compiler, for 3 s.
    "deterministic algorithms": lambda: setting(torch.set_deterministic_debug_mode, "error", "default"),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "one thread": lambda: threads(1),
    "two threads": lambda: threads(2),
    "three threads": lambda: threads(3),
    "medium matmul precision": lambda: setting(
        torch.set_float32_matmul_precision, "medium", torch.get_float32_matmul_precision()
    ),
    "numpy raises": lambda: np.errstate(all="raise"),
}


@contextmanager
def all_modes() -> Iterator[None]:
    """All modes at once."""
    with ExitStack() as stack:
        for mode in MODES.values():
            stack.enter_context(mode())
        yield


def forget_constants() -> None:
    """Empty every cache of the package, so that constants are made anew."""
    for name, module in list(sys.modules.items()):
        if name.startswith("mxfp4ref."):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
