"""What names a kernel, and what is wrong with a name as far as that shows before torch is imported, or the kernel."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from mxfp4ref._words import did_you_mean, shortened, shown
from mxfp4ref.conformance.source import bound_names, defect_names, functions_in
from mxfp4ref.goldens.store import KINDS

__all__ = ["STAND_INS", "wrong_name"]

STAND_INS = ("oracle", "torch-bf16", "defect:NAME", "flashinfer", "flashinfer-w4a8")
_PREFIXES = ("plain:", "logical:", "stage:KIND:")
_MOST = 8  # functions that are listed


def wrong_name(spec: str) -> str:
    """What is wrong with a kernel's name, in words; "" if nothing is, or only importing it would tell."""
    head, _, rest = spec.partition(":")
    if spec in STAND_INS and head != "defect":
        return ""
    if head == "defect":
        known = defect_names()
        wrong = f"name: expected one of the {len(known)} defects, got {rest!r}{did_you_mean(rest, known)}"
        return "" if rest in known else f"kernel: {wrong}"
    if head in ("logical", "plain"):
        return _wrong_path(rest, f"{head}:")
    if head == "stage":
        kind, _, path = rest.partition(":")
        stages = [k for k in KINDS if k != "moe"]
        if kind in stages:
            return _wrong_path(path, f"stage:{kind}:")
        return (
            f"kernel: expected stage:KIND:package.module:function, KIND one of {', '.join(stages)}; "
            f"got {spec!r}{did_you_mean(kind, stages)}"
        )
    if ":" in rest:
        return (
            f"kernel: expected one of {', '.join(_PREFIXES)} before module:function, or nothing, "
            f"got {head + ':'!r} in {spec!r}{did_you_mean(f'{head}:', _PREFIXES)}"
        )
    return _wrong_path(spec)


def _wrong_path(path: str, before: str = "") -> str:
    """Of `package.module:function` or `file.py:function`; `before` is what stands before it, as "plain:"."""
    module, _, name = path.rpartition(":")
    if not module or not name:
        return (
            "kernel: expected package.module:function, file.py:function, one of these two after logical:, plain: or "
            f"stage:KIND:, or one of {', '.join(STAND_INS)}; got {shown(path)}{_meant(path, before)}"
        )
    file: Path | None = Path(module)
    if not module.endswith(".py"):
        if (missing := _missing_package(module)) is not None:
            return f"kernel: cannot import {module!r}: ModuleNotFoundError: No module named {missing}"
        file = _file_of(module)
    elif not Path(module).is_file():
        files = (found.stem for found in Path(module).parent.glob("*.py"))
        near = did_you_mean(Path(module).stem, files, ending=".py")
        return f"kernel: cannot import, there is no file {module!r}{near}"
    bound = None if file is None else bound_names(file)
    if file is None or bound is None or name.split(".")[0] in bound:
        return ""
    functions = functions_in(file) or []
    public = _public(functions)
    instead = did_you_mean(name, functions) or (f"; it has {shortened(public, _MOST)}" if public else "")
    return f"kernel: {module!r} has no {name!r}{instead}"


def _public(functions: Sequence[str]) -> list[str]:
    return [function for function in functions if not function.startswith("_")]


def _meant(path: str, before: str) -> str:
    """What may have been meant by what names no function, as the end of a message."""
    if path.endswith(".py"):
        functions = functions_in(Path(path))
        if functions is None:
            return f"; {path} is no file of Python here"
        meant = (f"{before}{path}:{function}" for function in _public(functions)[:_MOST] or ["FUNCTION"])
        return f"; did you mean {' or '.join(meant)}?"
    if path in defect_names():
        return f"; did you mean defect:{path}?"
    if path in STAND_INS:
        return f"; {path} stands alone, with nothing before it"
    if (hint := did_you_mean(path, STAND_INS)) or "." not in path or ":" in path:
        return hint
    return f"; did you mean {before}{':'.join(path.rsplit('.', 1))}?"


def _missing_package(module: str) -> str | None:
    """The first part of a module's name, quoted and with a hint, if there is no such thing; else None."""
    first, here = module.split(".")[0], os.getcwd()
    sys.path.append(here)
    try:
        if importlib.util.find_spec(first) is not None:
            return None
    except (ImportError, ValueError, AttributeError):  # a finder's own affair: importing tells
        return None
    finally:
        sys.path.remove(here)
    file = Path(*module.split(".")).with_suffix(".py")
    return f"{first!r}{f'; did you mean {file}:...?' if file.is_file() else ''}"


def _file_of(module: str) -> Path | None:
    """The file of a module that is no package; None where that cannot be told without importing one."""
    places: Sequence[str] = [*sys.path, os.getcwd()]
    found: ModuleSpec | None = None
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        found = PathFinder.find_spec(".".join(parts[:count]), places) if parts[count - 1] else None
        places = (found.submodule_search_locations if found is not None else None) or ()
    package = found is None or found.submodule_search_locations is not None
    return Path(found.origin) if found is not None and not package and found.origin else None
