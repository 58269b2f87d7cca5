"""Python source that is read and not run. Nothing here needs torch, which takes seconds to import."""

from __future__ import annotations

import ast
from pathlib import Path

from mxfp4ref._files import read_file

__all__ = ["functions_in"]


def functions_in(file: Path) -> list[str] | None:
    """The functions that a file of Python defines at its top; None where it is none."""
    try:
        body = ast.parse(read_file(file)).body
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return [node.name for node in body if isinstance(node, ast.FunctionDef)]
