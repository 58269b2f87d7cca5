"""A progress bar at a terminal, for what is called from Python and takes long."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mxfp4ref.conformance.findings.suspects import Progress

__all__ = ["shown_progress"]


@contextmanager
def shown_progress(progress: Progress | None) -> Iterator[Progress | None]:
    """The given function to call with each step's name and their number, or else one that moves a bar on stderr.

    None where stderr is no terminal, or shows another bar of rich's.
    """
    from mxfp4ref.conformance.cli.terminal import animated, console

    if progress is not None or not animated():
        yield progress
        return
    from rich.errors import LiveError
    from rich.progress import Progress as Bar

    bar = Bar(console=console(), transient=True)
    task = bar.add_task("diagnosis", total=None)
    try:
        bar.start()
    except LiveError:
        yield None
        return
    try:
        yield lambda name, total: bar.update(task, advance=1, total=total, description=f"diagnosis: {name}")
    finally:
        bar.stop()
