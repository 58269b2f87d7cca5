"""Python source that is read and not run. Nothing here needs torch, which takes seconds to import."""

from __future__ import annotations

import ast
import re
from importlib.resources import files
from pathlib import Path

from mxfp4ref._files import read_file

__all__ = ["bound_names", "defect_names", "functions_in"]

_DEFECT = re.compile(r"^@defect\((?:.|\n)*?^def (\w+)", re.MULTILINE)
# What gives a module names that do not stand in it.
_DYNAMIC = {
    *("globals", "locals", "vars", "exec", "eval", "setattr", "modules"),
    "__dict__",
    "__getattr__",
    "*",
}


def defect_names() -> list[str]:
    """The keys of `mxfp4ref.defects.DEFECTS`, read from the source: importing it takes seconds."""
    folder = files("mxfp4ref") / "defects"
    texts = (path.read_text("utf-8") for path in folder.iterdir() if path.name.endswith(".py"))
    return sorted(name for text in texts for name in _DEFECT.findall(text))


def functions_in(file: Path) -> list[str] | None:
    """The functions that a file of Python defines at its top; None where it is none."""
    tree = _tree(file)
    return None if tree is None else [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


def bound_names(file: Path) -> set[str] | None:
    """All names that a file may give to something, wherever they stand in it; None where others may come to be."""
    tree = _tree(file)
    if tree is None:
        return None
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.Constant(value=str(name)):
                found.add(name)
            case ast.alias(name=name, asname=other):
                found.add(other or name.split(".")[0])
    return None if found & _DYNAMIC else found


def _tree(file: Path) -> ast.Module | None:
    try:
        return ast.parse(read_file(file))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None
