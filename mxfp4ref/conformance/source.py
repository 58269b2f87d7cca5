"""Python source that is read and not run. Nothing here needs torch, which takes seconds to import."""

from __future__ import annotations

import ast
from pathlib import Path

from mxfp4ref._files import read_file
from mxfp4ref._words import did_you_mean

__all__ = ["functions_in", "missing_file"]


def missing_file(kernel: str) -> str:
    """That a kernel's name has a file of Python that is not there, in words; "" if it has none, or it is."""
    name = kernel.rpartition(":")[0].rpartition(":")[2]
    path = Path(name)
    if not name.endswith(".py") or path.is_file():
        return ""
    near = did_you_mean(path.stem, (found.stem for found in path.parent.glob("*.py")), ending=".py")
    return f"kernel: cannot import, there is no file {name!r}{near}"


def functions_in(file: Path) -> list[str] | None:
    """The functions that a file of Python defines at its top; None where it is none."""
    try:
        body = ast.parse(read_file(file)).body
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return [node.name for node in body if isinstance(node, ast.FunctionDef)]
