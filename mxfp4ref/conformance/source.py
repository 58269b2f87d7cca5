"""Python source that is read and not run. Nothing here needs torch, which takes seconds to import."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from mxfp4ref._files import read_file

__all__ = ["WrittenDefect", "bound_names", "defect_names", "functions_in", "written_defects"]

_DEFECT = re.compile(r"^@defect\((?:.|\n)*?^def (\w+)", re.MULTILINE)
# In the order of `DEFECTS`.
_MODULES = (
    *(
        "weights",
        "arguments",
        "gemm",
        "rounding",
        "activation",
        "step_and_situ",
        "ungated",
        "finalize",
        "routing",
    ),
    *("dequantize", "humming"),
)
_TARGETS = {"router": "routing", "routing": "routing", "dequantize": "dequantize", "w4a8": "w4a8"}
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


@dataclass(frozen=True)
class WrittenDefect:
    """A named defect as it is written: its module, and `name`, `seen_in`, `kind` and `target` as of a `Defect`.

    Attributes:
        said: its summary; the name of a generation in braces stands for its releases.
    """

    name: str
    module: str
    said: str
    seen_in: tuple[str, ...]
    kind: str
    target: str

    @property
    def summary(self) -> str:
        """As of the `Defect`; one that names releases takes as long as importing it."""
        if "{" not in self.said:
            return self.said
        from mxfp4ref.defects import DEFECTS

        return DEFECTS[self.name].summary


@cache
def written_defects() -> dict[str, WrittenDefect]:
    """What `mxfp4ref.defects.DEFECTS` has, which takes seconds to import."""
    folder = files("mxfp4ref") / "defects"
    texts = {module: (folder / f"{module}.py").read_text("utf-8") for module in _MODULES}
    return {one.name: one for module, text in texts.items() for one in _written(module, text)}


def _written(module: str, text: str) -> Iterator[WrittenDefect]:
    texts: dict[str, str] = {}

    def text_of(node: ast.expr) -> str:
        """Of a literal, or of a module's name for one; "" of what is computed."""
        name = texts.get(node.id, "") if isinstance(node, ast.Name) else ""
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else name

    for node in ast.parse(text).body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                texts[name] = text_of(value)
            case ast.FunctionDef(decorator_list=[ast.Call(func=ast.Name(id="defect")) as how]):
                changes, *seen_in = map(text_of, how.args)
                kind = next((text_of(one.value) for one in how.keywords if one.arg == "kind"), "defect")
                said = " ".join((ast.get_docstring(node) or "").split())
                target = _TARGETS.get(changes.partition(".")[0], "moe")
                yield WrittenDefect(node.name, module, said, tuple(seen_in), kind, target)


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
