"""What a kernel may replace in the kit's own process so that a wrong result passes, and how that is undone."""

from __future__ import annotations

import builtins
import gc
import os
import sys
from collections.abc import Callable
from operator import attrgetter, is_
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch.library import Library

from mxfp4ref.conformance.isolation.surroundings import CODE, FUNCTIONS, READING, listed

__all__ = ["interference"]


class _Parts(NamedTuple):
    """What a module or a class of this package has: a copy of all, and what of it is looked into."""

    members: dict[str, Any]
    classes: list[type]
    functions: list[FunctionType]
    containers: list[tuple[str, Any]]


# Of the last time, since most have not changed, and to see that takes a tenth of the time of looking at each.
_KNOWN: dict[Any, _Parts] = {}


def _parts(owner: Any) -> _Parts:
    now, known = vars(owner), _KNOWN.get(owner)
    if known is not None and _same(now, known.members):
        return known
    members = dict(now)
    return _Parts(
        members,
        [
            value
            for value in members.values()
            if isinstance(value, type) and value.__module__ == owner.__name__
        ],
        [value for value in members.values() if type(value) is FunctionType],
        [(name, value) for name, value in members.items() if type(value) in _CONTAINERS and name.isupper()],
    )


def _same(now: Any, before: dict[str, Any]) -> bool:
    return list(now) == list(before) and all(map(is_, now.values(), before.values()))


def interference() -> Callable[[], str]:
    """Take note of functions, classes and constants that a verdict rests on; what is returned undoes replacements.

    They are this package's, functions with their code and constants with what they hold, and torch's. It says in
    words what a kernel had replaced.
    """
    every = list(sys.modules.items())
    ours = [module for name, module in every if name.startswith("mxfp4ref.") or name == "mxfp4ref"]
    parts: dict[Any, _Parts] = {module: _parts(module) for module in ours}
    parts |= {owner: _parts(owner) for found in list(parts.values()) for owner in found.classes}
    _KNOWN.clear()  # of modules that are gone
    _KNOWN.update(parts)
    # Copies, since a kernel finds the others under a name.
    noted: dict[Any, dict[str, Any]] = {owner: dict(found.members) for owner, found in parts.items()}
    functions = [*{function for found in parts.values() for function in found.functions}]
    bodies = [(one, [*map(one, functions)]) for one in map(attrgetter, ("__code__", "__defaults__"))]
    held = {
        f"{owner.__name__}.{name}": (value, value.copy())
        for owner, found in parts.items()
        for name, value in found.containers
    }
    noted |= {owner: _code_of(owner, FUNCTIONS) for owner in (torch, torch.Tensor, *READING)}
    operators = _operators_of_python()

    def restore() -> str:
        changed = []
        for owner, found in noted.items():
            now = vars(owner)
            if [*now] == [*found] and all(map(is_, now.values(), found.values())):
                continue
            for name, value in found.items():
                if (new := now.get(name)) is value:
                    continue
                matters = (
                    issubclass(type(value), CODE) or callable(value) or name.isupper() or name not in now
                )
                # torch replaces some functions by its own when it imports its compiler.
                if matters and not (_is_torchs(value) and _is_torchs(new)):
                    setattr(owner, name, value)
                    changed.append(f"{found.get('__name__') or owner.__name__}.{name}")
        for owner in parts:
            for name in _hiding(owner, noted[owner]):
                _take_away(owner, name)
                changed.append(f"{vars(owner).get('__name__') or owner.__name__}.{name}")
        for name in vars(torch.Tensor).keys() & _INHERITED - noted[torch.Tensor].keys():
            delattr(torch.Tensor, name)
            changed.append(f"Tensor.{name}")
        if new_ones := frozenset(filter(_on_the_cpu, _operators_of_python() - operators)):
            for library in [one for one in gc.get_objects() if type(one) is Library]:
                if library._op_impls & new_ones:
                    library._destroy()  # type: ignore[no-untyped-call]
            changed += [f"torch's operator {one}" for one in sorted(new_ones)]
        for name, (value, before) in held.items():
            if _other(value, before):
                value.clear()
                value.extend(before) if type(value) is list else value.update(before)
                changed.append(name)
        if all(all(map(is_, map(now, functions), before)) for now, before in bodies):
            return listed(changed)
        for function, code, defaults in zip(functions, *(before for _, before in bodies), strict=True):
            if function.__code__ is code and function.__defaults__ is defaults:
                continue
            if _package_of(function) == "mxfp4ref":
                function.__code__, function.__defaults__ = code, defaults
                changed.append(f"{function.__module__}.{function.__qualname__}")
        return listed(changed)

    return restore


def _hiding(owner: Any, before: dict[str, Any]) -> list[str]:
    """New names that hide others: a class's hide its instances' fields, a module's hide Python's builtins."""
    if len(now := vars(owner)) == len(before):
        return []
    new = [name for name in now if name not in before]
    return new if isinstance(owner, type) else [name for name in new if name in _BUILTINS]


def _take_away(owner: Any, name: str) -> None:
    delattr(owner, name)
    if name == "__new__":  # without one Python does not make objects of such a class as before any more
        make = owner.__new__

        def new(cls: type, *arguments: object, **named: object) -> Any:
            return make(cls) if make is object.__new__ else make(cls, *arguments, **named)

        owner.__new__ = new


_BUILTINS = frozenset(vars(builtins))


def _operators_of_python() -> frozenset[str]:
    """Operators that somebody has replaced by functions of Python: aten/mul.Tensor/CPU."""
    return frozenset(getattr(torch.library, "_impls", ()))


def _on_the_cpu(operator: str) -> bool:
    """Whether it is torch's own, for the CPU."""
    return operator.startswith("aten/") and operator.rpartition("/")[2] in _ON_THE_CPU


_ON_THE_CPU = ("CPU", "AutogradCPU", "CompositeExplicitAutograd", "CompositeImplicitAutograd")
_INHERITED = frozenset(dir(torch._C.TensorBase)) - frozenset(vars(torch.Tensor))


def _is_torchs(value: Any) -> bool:
    """Whether a function lives in a module of torch and was written in a file of it, whatever it says itself."""
    if type(value) is not FunctionType or not value.__code__.co_filename.startswith(_TORCH):
        return False
    module = sys.modules.get(value.__globals__.get("__name__", ""))
    return module is not None and value.__globals__ is vars(module)


_TORCH = f"{Path(torch.__file__).parent}{os.sep}"


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
