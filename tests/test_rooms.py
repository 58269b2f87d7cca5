"""The package's rooms, read from the code: imports between them point down only, and no module is too long."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "mxfp4ref"
# Bottom up; rooms of one floor do not import each other. The modules beside the rooms are below all of them.
FLOORS = (
    ("formats", "routing"),
    ("sm90",),
    ("model",),
    ("checkpoint", "defects", "goldens"),
    ("conformance",),
    ("engine",),
)
ROOMS = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MODULES = {path: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
# The command's entry point, and the names that `import mxfp4ref` offers.
DOORS = ("__init__", "__main__")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(MODULES[path])


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything of this package that a module imports, inside functions too."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name


def test_every_folder_is_a_room() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/*.py")}
    assert folders == set(ROOMS)


def test_imports_point_down() -> None:
    assert not [wrong for path in MODULES for wrong in _wrong_imports(path)]


def _wrong_imports(path: Path) -> Iterator[str]:
    inside = path.relative_to(PACKAGE)
    if len(inside.parts) == 1 and inside.stem in DOORS:
        return
    room = inside.parts[0] if len(inside.parts) > 1 else None
    for line, name in imports_of(path):
        package, _, rest = name.partition(".")
        other = rest.split(".")[0]
        if package != "mxfp4ref" or other == room:
            continue
        if other not in ROOMS:
            if not (PACKAGE / f"{other}.py").is_file():
                yield f"{inside}:{line}: {name}: imports from the package's door"
        elif room is None:
            yield f"{inside}:{line}: {name}: what lies below the rooms imports none of them"
        elif ROOMS[other] >= ROOMS[room]:
            yield f"{inside}:{line}: {name}: {room} imports from {other}"


def test_no_module_is_long() -> None:
    assert [path.name for path, text in MODULES.items() if len(text.splitlines()) > 350] == []


# Their names come out of files, and are checked where they are read.
_FROM_FILES = {
    *("goldens/generator.py: rule", "goldens/runs.py: operation", "conformance/reports/reproducer.py: kind"),
    "defects/variants/router.py: preset",
}


def test_choices_are_literal_types() -> None:
    """What is one of a few words says in its type which: an editor completes them, mypy refuses others."""
    wide = set()
    for path in (path for path, text in MODULES.items() if "check_choice" in text):
        for scope in ast.walk(tree_of(path)):
            if not isinstance(scope, ast.FunctionDef | ast.ClassDef):
                continue
            fields = [node for node in ast.iter_child_nodes(scope) if isinstance(node, ast.AnnAssign)]
            typed = {ast.unparse(field.target): field.annotation for field in fields}
            if isinstance(scope, ast.FunctionDef):
                typed = {arg.arg: arg.annotation for arg in scope.args.args + scope.args.kwonlyargs}
            for call in ast.walk(scope):
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "check_choice":
                    name = ast.literal_eval(call.args[0])
                    if (found := typed.get(name)) is not None and "str" in ast.unparse(found).split(" | "):
                        wide.add(f"{path.relative_to(PACKAGE).as_posix()}: {name}")
    assert wide == _FROM_FILES
