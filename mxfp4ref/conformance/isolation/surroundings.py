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
import threading
import time
import warnings
from collections.abc import Callable
from operator import is_
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch.library import Library
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]

from mxfp4ref.conformance.isolation.plain import printable, without_modes
from mxfp4ref.conformance.isolation.standard_streams import FOR_GOOD, STREAMS, stream_of, streams_files

__all__ = ["interference", "modes_of_torch", "settings_of_the_kit", "surroundings"]

_builtins = vars(builtins)
_Setting = tuple[str, Callable[[], Any], Callable[[Any], object]]
_MOST_NAMED = 3


def _attribute(words: str, owner: Any, name: str) -> _Setting:
    return words, lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


def _replaced(owner: dict[Any, Any] | os._Environ[str], before: dict[Any, Any]) -> None:
    for name in [name for name in owner if name not in before]:
        del owner[name]
    owner.update({name: value for name, value in before.items() if owner.get(name) is not value})


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
    *(stream_of(name, number) for number, name in enumerate(STREAMS)),
    _attribute("sys.excepthook", sys, "excepthook"),
    _attribute("threading.excepthook", threading, "excepthook"),
    ("threads' trace function", threading.gettrace, threading.settrace),
    ("threads' profile function", threading.getprofile, threading.setprofile),
    ("sys.path", lambda: list(sys.path), lambda before: sys.path.__setitem__(slice(None), before)),
    _attribute("logging's threshold", logging.root.manager, "disable"),
)
# By whose functions goldens are read, and others that the kit's process needs for the next case.
_READING = (hashlib, json, json.JSONDecoder, json.JSONEncoder, re, safetensors.torch)
_NEEDED = (
    *_READING,
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
    ("sys.meta_path", lambda: list(sys.meta_path), lambda v: _missing_added(sys.meta_path, v)),
    ("sys.path_hooks", lambda: list(sys.path_hooks), lambda v: _missing_added(sys.path_hooks, v)),
    _attribute("warnings.showwarning", warnings, "showwarning"),
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
                if name not in vars(owner) or (isinstance(value, _CODE) and vars(owner)[name] is not value):
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
        return _listed(changed)

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
    modes = [
        *_get_current_dispatch_mode_stack(),
        *_get_current_function_mode_stack(),  # type: ignore[no-untyped-call]
    ]
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


def interference() -> Callable[[], str]:
    """Take note of functions, classes and constants that a verdict rests on; what is returned undoes replacements.

    They are this package's, functions with their code and constants with what they hold, and torch's. It says in
    words what a kernel had replaced.
    """
    ours = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "mxfp4ref"]
    # Copies of all that they have, since these take less time than to choose what is code.
    noted: dict[Any, dict[str, Any]] = {module: dict(vars(module)) for module in ours}
    # Most of it is imported into many modules: it is looked at once, since looking takes longer than anything here.
    every = {id(value): value for found in noted.values() for value in found.values()}
    names = {module.__name__ for module in ours}
    classes = [value for value in every.values() if isinstance(value, type) and value.__module__ in names]
    noted |= {owner: dict(vars(owner)) for owner in classes}
    every |= {id(value): value for owner in classes for value in noted[owner].values()}
    bodies = [(f, f.__code__, f.__defaults__) for f in every.values() if type(f) is FunctionType]
    containers = {key for key, value in every.items() if type(value) in _CONTAINERS}
    held = {
        f"{owner.__name__}.{name}": (value, value.copy())
        for owner, found in noted.items()
        for name, value in found.items()
        if id(value) in containers and name.isupper()
    }
    noted |= {owner: _code_of(owner, _FUNCTIONS) for owner in (torch, torch.Tensor, *_READING)}
    operators = _operators_of_python()

    def restore() -> str:
        changed = []
        for owner, found in noted.items():
            now = vars(owner)
            if len(now) == len(found) and all(map(is_, now.values(), found.values())):
                continue
            for name, value in found.items():
                new = now.get(name)
                matters = issubclass(type(value), _CODE) or name.isupper() or name not in now
                # torch replaces some functions by its own when it imports its compiler.
                if new is not value and matters and {_package_of(value), _package_of(new)} != {"torch"}:
                    setattr(owner, name, value)
                    changed.append(f"{found.get('__name__') or owner.__name__}.{name}")
        for name in [name for name in vars(torch.Tensor) if name in _INHERITED - noted[torch.Tensor].keys()]:
            delattr(torch.Tensor, name)
            changed.append(f"Tensor.{name}")
        if new_ones := _operators_of_python() - operators:
            for library in [one for one in gc.get_objects() if type(one) is Library]:
                if library._op_impls & new_ones:
                    library._destroy()  # type: ignore[no-untyped-call]
            changed += [f"torch's operator {one}" for one in sorted(new_ones)]
        for name, (value, before) in held.items():
            if _other(value, before):
                value.clear()
                value.extend(before) if type(value) is list else value.update(before)
                changed.append(name)
        for function, code, defaults in bodies:
            if function.__code__ is code and function.__defaults__ is defaults:
                continue
            if _package_of(function) == "mxfp4ref":
                function.__code__, function.__defaults__ = code, defaults
                changed.append(f"{function.__module__}.{function.__qualname__}")
        return _listed(changed)

    return restore


def _operators_of_python() -> frozenset[str]:
    """torch's own operators that somebody has replaced on the CPU by functions of Python: aten/mul.Tensor/CPU."""
    every = getattr(torch.library, "_impls", ())
    return frozenset(
        one for one in every if one.startswith("aten/") and one.rpartition("/")[2] in _ON_THE_CPU
    )


_ON_THE_CPU = ("CPU", "AutogradCPU", "CompositeExplicitAutograd", "CompositeImplicitAutograd")
_INHERITED = frozenset(dir(torch._C.TensorBase)) - frozenset(vars(torch.Tensor))


def _package_of(value: Any) -> str:
    """The package that something says it is from; what `exec` made may say nothing."""
    return str(getattr(value, "__module__", "")).partition(".")[0]


def _code_of(owner: Any, kinds: tuple[type, ...]) -> dict[str, Any]:
    return {name: value for name, value in vars(owner).items() if issubclass(type(value), kinds)}


def _other(value: Any, before: Any) -> bool:
    """Whether something in a container was replaced or removed; a module that is imported later may add to a dict."""
    if type(value) is dict:
        return any(value.get(name) is not item for name, item in before.items())
    if type(value) is set:  # of which a copy may have another order
        return bool(value != before)
    return len(value) != len(before) or not all(map(is_, value, before))


_CONTAINERS = frozenset((dict, list, set))
_FUNCTIONS = (FunctionType, BuiltinFunctionType)
_CODE = (*_FUNCTIONS, type, property, staticmethod, classmethod)


def _listed(names: list[str]) -> str:
    shown = ", ".join(printable(name, 120) for name in names[:_MOST_NAMED])
    return shown if len(names) <= _MOST_NAMED else f"{shown} and {len(names) - _MOST_NAMED} more"
