"""The command `init`: files to begin with."""

from __future__ import annotations

from collections.abc import Mapping
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
    mxfp4ref init router
    """


@init.command()
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path), default="adapter.py")
@click.option(
    "--like",
    type=click.Choice(("plain", "flashinfer")),
    default="plain",
    show_default=True,
    help="The arguments that it gets: a few with weights in logical layout, or those of flashinfer's "
    "cutlass_fused_moe with weights in SM90 layout.",
)
def adapter(path: Path, like: str) -> None:
    """Write an adapter: a function that hands the golden cases to a kernel of yours.

    PATH is a new Python file, by default adapter.py; nothing is written over.

    \b
    mxfp4ref init adapter my_adapter.py
    mxfp4ref conform plain:my_adapter.py:fused_moe
    mxfp4ref init adapter like_flashinfer.py --like flashinfer

    Exit codes: 0 written; 2 the file exists, or cannot be written.
    """
    from mxfp4ref.sm90.activation import ACTIVATIONS

    listed = {
        which: ", ".join(f"{one.id} {one.name}" for one in ACTIVATIONS.values() if one.gated is gated)
        for which, gated in (("gated", True), ("ungated", False))
    }
    plain = like == "plain"
    _write("adapter" if plain else "flashinfer", path, listed)
    echo(f"Wrote {path}. It runs as it is, with the reference in the kernel's place:")
    echo(f"  mxfp4ref conform {'plain:' * plain}{path}:fused_moe")


@init.command()
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path), default="router.py")
def router(path: Path) -> None:
    """Write an adapter for a router: a function that hands the routing cases to yours.

    PATH is a new Python file, by default router.py; nothing is written over.

    \b
    mxfp4ref init router my_router.py
    mxfp4ref conform stage:routing:my_router.py:route --mode bounded

    Exit codes: 0 written; 2 the file exists, or cannot be written.
    """
    from mxfp4ref.routing import ROUTERS, RoutedScaling

    scalings = " or ".join(repr(one.value) for one in RoutedScaling)
    _write("router", path, {"presets": ", ".join(ROUTERS), "scalings": scalings})
    echo(f"Wrote {path}. It runs as it is, with the reference in the router's place:")
    echo(f"  mxfp4ref conform stage:routing:{path}:route --mode bounded")


def _write(template: str, path: Path, listed: Mapping[str, str]) -> None:
    """Write a new file from a template, with its name and what else is to be filled in."""
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise UsageError(
            f"PATH: expected the name of a Python module, as in {template}.py, got {str(path)!r}"
        )
    if path.exists():
        raise UsageError(f"PATH: {path} exists, and nothing is written over it")
    text = (files("mxfp4ref.conformance") / "templates" / f"{template}.py.txt").read_text(encoding="utf-8")
    with usage_errors():
        name = printable(str(path).replace("\\", "\\\\").replace('"', '\\"'), lines=False)  # in a docstring
        write_file(path, text.format(name=name, **listed).encode())
