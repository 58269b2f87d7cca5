"""The command `init`: files to begin with."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import click

from mxfp4ref._files import printable, write_file
from mxfp4ref.conformance.cli.command import Group
from mxfp4ref.conformance.cli.shared import UsageError, usage_errors
from mxfp4ref.conformance.cli.terminal import echo

__all__ = ["init"]


@click.group(cls=Group)
def init() -> None:
    """Write a file to begin with.

    \b
    mxfp4ref init adapter
    """


@init.command()
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path), default="adapter.py")
def adapter(path: Path) -> None:
    """Write an adapter: a function that hands the golden cases to a kernel of yours.

    PATH is a new Python file, by default adapter.py; nothing is written over.

    \b
    mxfp4ref init adapter my_adapter.py
    mxfp4ref conform plain:my_adapter.py:fused_moe

    Exit codes: 0 written; 2 the file exists, or cannot be written.
    """
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise UsageError(f"PATH: expected the name of a Python module, as in adapter.py, got {str(path)!r}")
    if path.exists():
        raise UsageError(f"PATH: {path} exists, and nothing is written over it")
    from mxfp4ref.sm90.activation import ACTIVATIONS

    listed = {
        which: ", ".join(f"{one.id} {one.name}" for one in ACTIVATIONS.values() if one.gated is gated)
        for which, gated in (("gated", True), ("ungated", False))
    }
    text = (files("mxfp4ref.conformance") / "templates" / "adapter.py.txt").read_text(encoding="utf-8")
    with usage_errors():
        name = printable(str(path).replace("\\", "\\\\").replace('"', '\\"'), lines=False)  # in a docstring
        write_file(path, text.format(name=name, **listed).encode())
    echo(f"Wrote {path}. It runs as it is, with the reference in the kernel's place:")
    echo(f"  mxfp4ref conform plain:{path}:fused_moe")
