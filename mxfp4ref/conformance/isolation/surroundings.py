"""What a kernel may leave behind in its process, and how it is put back before the next case.

Settings of torch, Python and the process are as they were when the next case starts, and for whoever called the
kit. What belongs to a thread (grad mode, autocast, torch's modes and default device, the rounding mode, flushing of
subnormal numbers) ends with the thread that the kernel ran in. What a kernel keeps for itself survives, as it does
in a server: its caches, its threads, the modules that it imported.
"""

from __future__ import annotations

import builtins
import ctypes
import dataclasses
import gc
import hashlib
import json
import locale
import logging
import math
import operator
import os
import pickle
import queue
import random
import re
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]

from mxfp4ref.conformance.isolation.plain import printable, without_modes
from mxfp4ref.conformance.isolation.standard_streams import FOR_GOOD, STREAMS, stream_of, streams_files

__all__ = ["CODE", "FUNCTIONS", "READING", "listed", "modes_of_torch", "settings_of_the_kit", "surroundings"]

_builtins, _PRINT = vars(builtins), torch._tensor_str.PRINT_OPTS  # which torch has no function to read
_Setting = tuple[str, Callable[[], Any], Callable[[Any], object]]
_MOST_NAMED = 3


def _attribute(words: str, owner: Any, name: str) -> _Setting:
    return words, lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


def _replaced(owner: dict[Any, Any] | os._Environ[str], before: dict[Any, Any]) -> None:
    for name in [name for name in owner if name not in before]:
        del owner[name]
    owner.update({name: value for name, value in before.items() if owner.get(name) is not value})


def _refilled(owner: list[Any], before: list[Any]) -> None:
    owner[:] = before


def _missing_added(owner: list[Any], before: list[Any]) -> None:
    """Put back what was removed from a list to which importing a module may add."""
    owner[:0] = [value for value in before if value not in owner]


def _umask(value: int = 0o077) -> int:
    before = os.umask(value)
    os.umask(before)
    return before


def _limits(value: dict[int, tuple[int, int]] | None = None) -> dict[int, tuple[int, int]]:
    """What the system lets this process use of memory, files and time; set where given, {} where there are none."""
    if resource is None:
        return {}
    for number, limit in (value or {}).items():
        resource.setrlimit(number, limit)
    numbers = {number for name, number in vars(resource).items() if name.startswith("RLIMIT_")}
    return {number: resource.getrlimit(number) for number in sorted(numbers)}


def _timers() -> frozenset[int]:
    """The timers that run, alarms among them, which end the process when their time is over."""
    numbers = [getattr(signal, name, None) for name in ("ITIMER_REAL", "ITIMER_VIRTUAL", "ITIMER_PROF")]
    return frozenset(number for number in numbers if number is not None and signal.getitimer(number)[0])


def _stop_timers(before: frozenset[int]) -> None:
    for number in _timers() - before:
        signal.setitimer(number, 0)


def _seed_torch(raw: bytes) -> None:
    torch.set_rng_state(torch.frombuffer(bytearray(raw), dtype=torch.uint8))


_TOLD: tuple[_Setting, ...] = (
    ("torch's default dtype", torch.get_default_dtype, torch.set_default_dtype),
    ("torch's threads", torch.get_num_threads, torch.set_num_threads),
    (
        "torch's deterministic mode",
        torch.get_deterministic_debug_mode,
        torch.set_deterministic_debug_mode,
    ),
    (
        "torch's float32 matmul precision",
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    _attribute("torch.backends.cudnn.enabled", torch.backends.cudnn, "enabled"),
    _attribute("torch.backends.mkldnn.enabled", torch.backends.mkldnn, "enabled"),
    ("torch's print options", lambda: dict(vars(_PRINT)), lambda before: vars(_PRINT).update(before)),
    ("torch's repeated warnings", torch.is_warn_always_enabled, torch.set_warn_always),
    ("torch's anomaly mode", torch.is_anomaly_enabled, torch.set_anomaly_enabled),
    ("the working directory", os.getcwd, os.chdir),
    ("the environment", lambda: dict(os.environ), lambda before: _replaced(os.environ, before)),
    ("the limits of resources", _limits, _limits),
    ("the timers", _timers, _stop_timers),
    ("the umask", _umask, os.umask),
    ("the locale", lambda: locale.setlocale(locale.LC_ALL), lambda v: locale.setlocale(locale.LC_ALL, v)),
    ("the recursion limit", sys.getrecursionlimit, sys.setrecursionlimit),
    ("threads' stack size", threading.stack_size, threading.stack_size),
    _attribute("sys.executable", sys, "executable"),
    # In whole microseconds, which a kernel's rounding mode does not change.
    (
        "the switch interval",
        lambda: int(sys.getswitchinterval() * 1e6 + 0.5),
        lambda v: sys.setswitchinterval(v / 1e6),
    ),
    ("garbage collection", gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
    ("garbage collection's debugging", gc.get_debug, gc.set_debug),
    ("garbage collection's thresholds", gc.get_threshold, lambda numbers: gc.set_threshold(*numbers)),
    ("garbage collection's callbacks", lambda: list(gc.callbacks), lambda v: _refilled(gc.callbacks, v)),
    ("the digits of an int", sys.get_int_max_str_digits, sys.set_int_max_str_digits),
    *(stream_of(name, number) for number, name in enumerate(STREAMS)),
    _attribute("sys.excepthook", sys, "excepthook"),
    _attribute("sys.unraisablehook", sys, "unraisablehook"),
    _attribute("threading.excepthook", threading, "excepthook"),
    ("threads' trace function", threading.gettrace, threading.settrace),
    ("threads' profile function", threading.getprofile, threading.setprofile),
    ("sys.path", lambda: list(sys.path), lambda before: _refilled(sys.path, before)),
    _attribute("logging's threshold", logging.root.manager, "disable"),
)
# By whose functions goldens are read, and others that the kit's process needs for the next case.
READING = (hashlib, json, json.JSONDecoder, json.JSONEncoder, re, safetensors.torch)
_NEEDED = (
    *READING,
    ctypes,
    dataclasses,
    math,
    operator,
    os,
    pickle,
    queue,
    threading,
    threading.Thread,
    threading.Event,
    time,
)
# Used by many kernels as they should be, and put back without a word.
_UNTOLD: tuple[_Setting, ...] = (
    ("torch's random numbers", lambda: torch.get_rng_state().numpy().tobytes(), _seed_torch),
    ("Python's random numbers", random.getstate, random.setstate),
    ("numpy's random numbers", lambda: np.random.get_state(legacy=True), lambda s: np.random.set_state(s)),  # noqa: NPY002
    ("logging's level", lambda: logging.root.level, logging.root.setLevel),
    (
        "logging's handlers",
        lambda: list(logging.root.handlers),
        lambda v: _refilled(logging.root.handlers, v),
    ),
    ("logging's records", logging.getLogRecordFactory, logging.setLogRecordFactory),
    ("sys.meta_path", lambda: list(sys.meta_path), lambda v: _missing_added(sys.meta_path, v)),
    ("sys.path_hooks", lambda: list(sys.path_hooks), lambda v: _missing_added(sys.path_hooks, v)),
    _attribute("warnings.showwarning", warnings, "showwarning"),
    _attribute("tempfile.tempdir", tempfile, "tempdir"),
    ("warnings' filters", lambda: list(warnings.filters), lambda v: setattr(warnings, "filters", v)),
)


def surroundings() -> Callable[[], str]:
    """Take note of all settings; the function that is returned puts them back and says in words which had changed.

    Those that cannot be put back end with `FOR_GOOD`.
    """
    with without_modes():
        before = [(setting, setting[1]()) for setting in (*_TOLD, *_UNTOLD)]
    modules, names, put_back_files = dict(sys.modules), _builtins.copy(), streams_files()
    needed = [(owner, owner.__name__, dict(vars(owner))) for owner in _NEEDED]

    def restore() -> str:
        found = _builtins.copy()
        _builtins.update(names)  # this needs none of them, and what follows does
        changed = put_back_files()
        if any(found.get(name) is not value for name, value in names.items() if name != "_"):
            changed.append("Python's builtins")
        for name, module in modules.items():
            if sys.modules.get(name) is not module:
                changed.append(f"sys.modules[{name!r}]")
                sys.modules[name] = module
        for owner, whose, members in needed:
            for name, value in members.items():
                if name not in vars(owner) or (isinstance(value, CODE) and vars(owner)[name] is not value):
                    setattr(owner, name, value)
                    changed.append(f"{whose}.{name}")
        with without_modes():
            for setting, value in before:
                told = setting in _TOLD
                if told and not _differs(setting, value):
                    continue
                try:
                    setting[2](value)
                    changed += [setting[0]] * told
                except Exception:  # a lowered hard limit, a working directory that was removed
                    changed.append(f"{setting[0]}{FOR_GOOD}")
        return listed(changed)

    return restore


def settings_of_the_kit() -> Callable[[], None]:
    """Take note of what the kit itself needs to read and write files; the function that is returned puts it back."""
    before = [(setting, setting[1]()) for setting in _TOLD if setting[0] in _OF_THE_KIT]

    def restore() -> None:
        for setting, value in before:
            if _differs(setting, value):
                setting[2](value)

    return restore


_OF_THE_KIT = ("the working directory", "the umask", "sys.stdin", "sys.stdout", "sys.stderr")


def modes_of_torch() -> list[str]:
    """The names of torch's modes that are switched on in this thread, but for that of a default device."""
    modes = _get_current_dispatch_mode_stack() + _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return [type(mode).__name__ for mode in modes if not isinstance(mode, DeviceContext)]


def _differs(setting: _Setting, value: Any) -> bool:
    try:
        found = setting[1]()
    except Exception:  # such as a working directory that was removed
        return True
    if type(value) is frozenset:  # of what may end by itself
        return not found <= value
    return bool(found is not value if type(value).__module__ not in _PLAIN else found != value)


_PLAIN = ("builtins", "torch")


FUNCTIONS = (FunctionType, BuiltinFunctionType, torch.dtype)
CODE = (*FUNCTIONS, type, property, staticmethod, classmethod)


def listed(names: list[str]) -> str:
    names = sorted(names, key=lambda name: not name.endswith(FOR_GOOD))  # which is always told
    shown = ", ".join(printable(name, 120) for name in names[:_MOST_NAMED])
    return shown if len(names) <= _MOST_NAMED else f"{shown} and {len(names) - _MOST_NAMED} more"
