"""Anybody's function by its name: `package.module:function`, or `path/to/adapter.py:function`."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from mxfp4ref._validate import did_you_mean
from mxfp4ref._words import shortened
from mxfp4ref.conformance.isolation.plain import of_exception
from mxfp4ref.conformance.kernels.adapters import KernelError

__all__ = ["call_form", "check_takes", "import_function"]

_Takes = tuple[int, tuple[str, ...]]
PLAIN = "x, ids, scales, w1, s1, w2, s2, **parameters"  # after plain:
# What every call hands over, the number of arguments by place and the others' names.
_PLAIN_TAKES: _Takes = (7, ())
_FLASHINFER_TAKES: _Takes = (
    0,
    (
        "input",
        "token_selected_experts",
        "token_final_scales",
        "fc1_expert_weights",
        "fc2_expert_weights",
        "output_dtype",
        "quant_scales",
        "use_w4_group_scaling",
        *("tp_size", "tp_rank", "ep_size", "ep_rank"),
    ),
)
_MOST = 8  # functions that are listed
_files: set[str] = set()  # the names of modules that are files loaded here


def import_function(path: str) -> Callable[..., Any]:
    """The function that a name leads to, in which `wrong_name` sees nothing wrong.

    Modules of the working directory are found too.

    Args:
        path: `package.module:function`, or `file.py:function`.

    Raises:
        KernelError: nothing can be imported by it, or that is no function.
    """
    module_name, _, name = path.rpartition(":")
    value: Any = _module(module_name)
    for part in name.split("."):
        try:
            value = getattr(value, part)
        except AttributeError:
            raise KernelError(f"kernel: {module_name!r} has no {name!r}{_instead(part, value)}") from None
        except Exception as error:
            raise KernelError(f"kernel: {module_name!r} has no {name!r}: {of_exception(error)}") from None
    if not callable(value):
        raise KernelError(f"kernel: {path!r} is no function but {type(value).__name__}")
    function: Callable[..., Any] = value
    return function


def _instead(name: str, owner: Any) -> str:
    """The functions that a module or another object has, as the end of a message, those spelt nearly so first."""
    found = [other for other in dir(owner) if callable(getattr(owner, other, None))]
    if hint := did_you_mean(name, found):
        return hint
    module = getattr(owner, "__name__", "")
    own = [n for n in found if n[0] != "_" and getattr(getattr(owner, n), "__module__", None) == module]
    return f"; it has {shortened(own, _MOST)}" if own else ""


def check_takes(spec: str, function: Callable[..., Any]) -> None:
    """Raise KernelError unless a function can be called as its name says, and say which name it could be called by.

    One whose signature cannot be read is called without, one that wants an `output` is given it.
    """
    try:
        signature = inspect.signature(function)
    except Exception:  # of a callable without a signature, or with one that raises
        return
    head, _, path = spec.partition(":")
    plain, path = head == "plain", path if head in ("plain", "logical") else spec
    ways = _FLASHINFER_TAKES, _PLAIN_TAKES
    if not (error := _misfit(signature, *ways[plain])):
        return
    if not _misfit(signature, *ways[not plain]):
        meant, called = (
            (path, f"f({PLAIN})") if plain else (f"plain:{path}", "with flashinfer's arguments by name")
        )
        raise KernelError(
            f"kernel: did you mean {meant}? {spec} is called {called}, and its parameters are "
            f"{shortened(signature.parameters, _MOST)}"
        )
    raise KernelError(
        f"kernel: {spec} cannot be called: {error}. Its parameters are {signature}; "
        f"{_called(*ways[plain])}. `mxfp4ref init adapter` writes one to fill in"
    )


def _misfit(signature: inspect.Signature, positional: int, names: tuple[str, ...]) -> str:
    """Why a function cannot be called with so many arguments and these by name, or ""."""
    output = ["output"] if "output" in signature.parameters and not positional else []
    try:
        signature.bind(*[None] * positional, **dict.fromkeys([*names, *output]))
    except TypeError as error:
        return str(error)
    return ""


def call_form(spec: str) -> str:
    """How a kernel of that name is called, and by which it is otherwise; "" where there is one way only."""
    head, _, rest = spec.partition(":")
    if not rest or head in ("stage", "defect"):
        return ""
    if head == "plain":
        return f"It was called f({PLAIN}); {rest} is called with flashinfer's arguments by name."
    path = rest if head == "logical" else spec
    return f"It was called with flashinfer's arguments, all by name; plain:{path} is called f({PLAIN})."


def _called(positional: int, names: tuple[str, ...]) -> str:
    if positional:
        return (
            f"with plain: before it, it is called f({PLAIN}); without plain:, or "
            "with logical: in its place, with flashinfer's arguments by name"
        )
    return (
        f"it is called with flashinfer's arguments by name: {', '.join(names)}, and those that a case has besides, "
        f"such as swiglu_limit; with plain: before it, f({PLAIN})"
    )


def _module(name: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    try:
        return _file(Path(name)) if name.endswith(".py") else importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit too
        hint = ""
        if isinstance(error, ModuleNotFoundError) and Path(*name.split(".")).with_suffix(".py").is_file():
            hint = f"; did you mean {Path(*name.split('.')).with_suffix('.py')}:...?"
        raise KernelError(f"kernel: cannot import {name!r}: {of_exception(error, __file__)}{hint}") from error


def _file(path: Path) -> ModuleType:
    """The module in a file, which may import its neighbours."""
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    # A torch.py is nobody's torch but its own.
    name = path.stem if path.stem not in sys.modules or path.stem in _files else f"kernel_{path.stem}"
    _files.add(name)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(name)
    sys.modules[name] = module  # as importing does: dataclasses and pickle look there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
        raise
    return module
