"""What the commands share: exit codes, the option for the goldens, the progress bar, how a tensor is shown."""

from __future__ import annotations

import itertools
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click
from safetensors import SafetensorError

from mxfp4ref._choices import DIAGNOSES
from mxfp4ref._files import printable
from mxfp4ref.conformance.cli.terminal import animated, console, echo
from mxfp4ref.conformance.memory import cause_of, not_enough, ran_out

if TYPE_CHECKING:
    from torch import Tensor

    from mxfp4ref.conformance.results import CaseResult

__all__ = [
    "INTERRUPTED",
    "NOT_EQUAL",
    "USAGE",
    "Presses",
    "UsageError",
    "case_progress",
    "check_no_swap",
    "describe",
    "diagnosis_option",
    "first_values",
    "goldens_option",
    "interrupted_once",
    "limited_jobs",
    "progress",
    "usage_errors",
]

NOT_EQUAL, USAGE, INTERRUPTED = 1, 2, 128 + 2  # exit codes, besides 0
_SAME = (
    2.0  # seconds in which a second interrupt is taken for the first: of a terminal and of the parent, too
)
_AGAIN = b"\ninterrupted before: the reports are being written; a third Ctrl-C ends at once, without them\n"

diagnosis_option = click.option(
    "--diagnosis",
    type=click.Choice(DIAGNOSES),
    default="full",
    show_default=True,
    help="Where bits differ, look for what is wrong: quick, about a second for each; full, up to a minute more; "
    "none, only compare.",
)

goldens_option = click.option(
    "--goldens",
    "root",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the goldens; by default $MXFP4REF_GOLDENS, ./goldens here or above, or the built-in few.",
)


class UsageError(click.ClickException):
    """Wrong usage, or something missing in the environment."""

    exit_code = USAGE

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def check_no_swap() -> None:
    """Refuse to look at flashinfer's kernel while `mxfp4ref.engine` lets the oracle answer for it.

    Raises:
        UsageError: the environment says so.
    """
    if (mode := os.environ.get("MXFP4REF")) == "swap":
        raise UsageError(
            f"MXFP4REF: expected it not to be set here, got {mode!r} in the environment: the oracle would answer in "
            "the place of flashinfer's kernel"
        )


@contextmanager
def usage_errors() -> Iterator[None]:
    """What goes wrong before or beside the comparison is wrong usage or environment: exit code 2."""
    try:
        yield
    except ImportError as error:
        raise UsageError(cause_of(error)) from error
    except (TypeError, ValueError, OSError, SafetensorError, RuntimeError, MemoryError) as error:
        raise UsageError(not_enough(error) if ran_out(error) else str(error)) from error


@contextmanager
def progress(
    *, lines: bool = False, first: str = "", total: int | None = None
) -> Iterator[Callable[[str, int], None]]:
    """A function to call after each step, with its name and the number of steps.

    It moves a progress bar on stderr, which shows `first` and `total` until then. Where stderr is no terminal it does
    nothing, or prints a line, if `lines`.
    """
    if animated():
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=console(), transient=True) as bar:
            task = bar.add_task(first, total=total)
            yield lambda name, total: bar.update(task, advance=1, total=total, description=name)
        return
    done = itertools.count(1)

    def line(name: str, total: int) -> None:
        if lines:
            echo(f"[{next(done):3}/{total}] {name}", err=True)

    yield line


@contextmanager
def case_progress(names: Sequence[str]) -> Iterator[Callable[[CaseResult], None]]:
    """`progress` of a conformance run over these cases: how many have failed, and which one is running.

    On a terminal a case that fails is also told at once, in a line, and in a second one what is known of it.
    """
    from mxfp4ref.conformance.report_text import headline

    done = failed = 0
    with progress(first=names[0] if names else "", total=len(names)) as step:

        def advance(result: CaseResult) -> None:
            nonlocal done, failed
            done, failed = done + 1, failed + (not result.ok)
            if not result.ok and sys.stderr.isatty():
                echo(headline(result).split("\n")[0], err=True)
                if (found := result.diagnosis) is not None:
                    said = str(found.finding) or found.stage or f"first: {found.output} {found.first}"
                    echo(f"    {said}", err=True)
            step(f"{failed} failed  {names[done] if done < len(names) else 'diagnosis'}", len(names))

        yield advance


def limited_jobs(jobs: int, cases: int | None = None) -> int:
    """As many jobs as have cases and cores, and a line if that is fewer than were asked for."""
    limits = {"cores": os.cpu_count() or 1} | ({} if cases is None else {"cases": max(cases, 1)})
    what = min(limits, key=lambda name: limits[name])
    if jobs <= limits[what]:
        return jobs
    echo(f"--jobs: {jobs} are more than there are {what}: {limits[what]} are used", err=True)
    return limits[what]


class Presses:
    """Ctrl-C, as often as it is pressed."""

    def __init__(self) -> None:
        self._count, self._last = 0, -math.inf

    def take(self) -> int:
        """Which one this is, from 1; 0 if it is the last one once more."""
        if (now := time.monotonic()) - self._last <= _SAME:
            return 0
        self._last = now
        self._count += 1
        return self._count


@contextmanager
def interrupted_once() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt; the second only says that the first is being answered, the third raises."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    presses = Presses()

    def handle(number: int, frame: object) -> None:
        if (which := presses.take()) == 2:
            with suppress(OSError):
                os.write(2, _AGAIN)
        elif which:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def first_values(tensor: Tensor) -> str:
    import torch

    first = tensor.flatten()[:8]
    if first.dtype == torch.float4_e2m1fn_x2:
        first = first.view(torch.uint8)
    wide = torch.complex128 if first.is_complex() else torch.float64
    shown = ", ".join(f"{value:.6g}" for value in first.to(wide).tolist())
    return f"{shown}{', ...' if tensor.numel() > 8 else ''}"
