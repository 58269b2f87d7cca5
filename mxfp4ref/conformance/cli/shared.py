"""What the commands share: exit codes, the option for the goldens, the progress bar, how a tensor is shown."""

from __future__ import annotations

import dis
import itertools
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from safetensors import SafetensorError

from mxfp4ref._choices import DIAGNOSES, MODES
from mxfp4ref._files import printable
from mxfp4ref.conformance.cli.terminal import animated, console, echo
from mxfp4ref.conformance.heartbeat import ALL_TOGETHER, heartbeat
from mxfp4ref.conformance.memory import cause_of, not_enough, ran_out

if TYPE_CHECKING:
    from torch import Tensor

    from mxfp4ref.conformance.results import CaseResult

__all__ = [
    "INTERRUPTED",
    "NOT_EQUAL",
    "USAGE",
    "Interruption",
    "Presses",
    "Terminated",
    "UsageError",
    "case_progress",
    "check_no_swap",
    "describe",
    "diagnosis_option",
    "first_values",
    "goldens_option",
    "interrupted_once",
    "limited_jobs",
    "mode_option",
    "progress",
    "usage_errors",
]

NOT_EQUAL, USAGE, INTERRUPTED = 1, 2, 128 + 2  # exit codes, besides 0
_RAISE = dis.opmap["RAISE_VARARGS"]  # what a `raise` compiles to
_SAME = 2.0  # seconds in which a second interrupt is the first one: of a terminal and of the parent, too
_AGAIN = b"\ninterrupted before: the reports are being written; a third Ctrl-C ends at once, without them\n"

diagnosis_option = click.option(
    "--diagnosis",
    type=click.Choice(DIAGNOSES),
    default="full",
    show_default=True,
    help="Where bits differ, look for what is wrong: quick, about a second for each; full, up to a minute more; "
    "none, only compare.",
)

mode_option = click.option(
    "--mode",
    type=click.Choice(MODES),
    default="exact",
    show_default=True,
    help="exact: equal bits; bounded: within the bounds of every correct evaluation.",
)

goldens_option = click.option(
    "--goldens",
    "root",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the goldens; by default $MXFP4REF_GOLDENS; else all those of the checkout, if this is run in one "
    "or from its environment (a folder goldens here, above, or beside the package); else the few in the wheel.",
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
    """What goes wrong before or beside the comparison is wrong usage or environment: exit code 2, in a line."""
    try:
        yield
    except ImportError as error:
        raise UsageError(cause_of(error)) from error
    except (TypeError, ValueError, OSError, SafetensorError, RuntimeError, MemoryError) as error:
        if ran_out(error):
            raise UsageError(not_enough(error)) from error
        if isinstance(error, TypeError | RuntimeError) and not _said(error):
            raise  # a mistake of this package: told as one, with the traceback
        raise UsageError(str(error)) from error


def _said(error: BaseException) -> bool:
    """Whether it says what is wrong with an argument or with CUDA: a `raise` of this package raised it, or a GPU."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or type(error).__name__ == "AcceleratorError":
        return True
    ours = str(last.tb_frame.f_globals.get("__name__")).partition(".")[0] == "mxfp4ref"
    return ours and last.tb_frame.f_code.co_code[last.tb_lasti] == _RAISE


@contextmanager
def progress(
    *, lines: bool = False, first: str = "", total: int | None = None, before: bool = False
) -> Iterator[Callable[..., None]]:
    """A function to call after each step, or `before` it, with its name and the number of steps; 0 if unknown.

    A third argument is whether the steps to come may take as long as those done.

    It moves a progress bar on stderr, which shows `first` and `total` until then. Where none can be drawn it prints a
    line, if `lines`; and how far it has come, after each so many seconds that pass in silence.
    """
    done = itertools.count(0 if before else 1)
    if animated():
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=console(), transient=True) as bar:
            task = bar.add_task(first, total=total)
            yield lambda name, total, rate=True: bar.update(
                task, completed=next(done), total=total or None, description=name
            )
        return

    def say(words: str) -> None:
        with suppress(OSError, ValueError):  # stderr is closed
            echo(words, err=True)

    start = time.monotonic()
    with heartbeat(say) as now:
        now(partial(_so_far, 0, total, 0.0, first))

        def line(name: str, total: int, rate: bool = True) -> None:
            count = next(done)
            if lines:
                echo(f"[{count:3}/{total}] {name}", err=True)
            words = f"now {name}" if before and total else name
            if lines:  # which has told the name
                words = "now the end of the run" if count == total else ""
            moment = time.monotonic()
            end = moment + (moment - start) / count * (total - count) * rate if total and count else 0.0
            now(partial(_so_far, count, total, end, words))

        yield line


def _so_far(count: int, total: int | None, end: float, now: str) -> str:
    """ "12 of 69 done, about 40 s more; 3 failed; now gemm/ordinary", where that ends at a moment to come."""
    left = end - time.monotonic()
    rate = f", about {left:.0f} s more" if left >= 1 else ""
    return "; ".join(filter(None, (f"{count} of {total} done{rate}" if total else "", now)))


@contextmanager
def case_progress(
    names: Sequence[str], max_failures: int | None = None
) -> Iterator[Callable[[CaseResult], None]]:
    """`progress` of a conformance run over these cases: how many have failed, and which one is running.

    After the last case, or so many failures, that is the diagnosis of those that failed.

    On a terminal a case that fails is also told at once, in a line, and in a second one what is known of it.
    """
    from mxfp4ref.conformance.findings.finding import listed
    from mxfp4ref.conformance.reports.report_text import headline

    done = failed = outright = 0
    skipped = False  # which takes no time, and says nothing of how long the others take
    with progress(first=f"now {names[0]}" if names else "", total=len(names)) as step:

        def advance(result: CaseResult) -> None:
            nonlocal done, failed, outright, skipped
            skipped |= result.status == "skipped"
            done, failed, outright = done + 1, failed + (not result.ok), outright + result.fails_outright
            if not result.ok and sys.stderr.isatty():
                echo(headline(result).split("\n")[0], err=True)
                found = result.diagnosis
                if found is not None and (found.finding.exact or not result.within_bounds):
                    said = (
                        listed(str(found.finding))[0] or found.stage or f"first: {found.output} {found.first}"
                    )
                    echo(f"    {said}", err=True)
            ended = done == len(names) or outright == max_failures
            last = ALL_TOGETHER if failed else "the end of the run"
            words = f"{failed} failed; now {last if ended else names[done]}"
            if ended and done < len(names):  # there is no rate: the other cases are not run
                step(f"{done} of {len(names)} done; {words}", 0)
            else:
                step(words, len(names), not skipped)

        yield advance


def limited_jobs(jobs: int, cases: int | None = None) -> int:
    """As many jobs as have cases and cores, and a line if that is fewer than were asked for."""
    limits = {"cores": os.cpu_count() or 1} | ({} if cases is None else {"cases": max(cases, 1)})
    what = min(limits, key=lambda name: limits[name])
    if jobs <= limits[what]:
        return jobs
    echo(f"--jobs: {jobs} are more than there are {what}: {limits[what]} are used", err=True)
    return limits[what]


class Terminated(KeyboardInterrupt):
    """SIGTERM, as `timeout` and CI send it, or a terminal that is gone; it is answered as Ctrl-C is."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__()
        self.exit_code = 128 + number


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


# Of the signals that end a process from outside.
USUAL_HANDLERS = {signal.SIGINT: signal.default_int_handler} | {
    getattr(signal, name): signal.SIG_DFL for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)
}
_changed: dict[int, Any] = {}  # the handlers that `terminable` has set


@contextmanager
def terminable() -> Iterator[None]:
    """Inside, what would end the process where it stands raises `Terminated`: no half of a file is left behind.

    An interrupt that comes twice, of a terminal and of the parent, does so once: it is not to end the tidying up.
    """
    presses = Presses()

    def end(number: int, frame: object) -> None:
        if presses.take():
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)

    if threading.current_thread() is threading.main_thread():
        for number, handler in USUAL_HANDLERS.items():
            if signal.getsignal(number) is handler:
                signal.signal(number, end)
                _changed[number] = end
    try:
        yield
    finally:
        not_terminable()


def not_terminable() -> None:
    """Signals end the process as they usually do: a script or a kernel is to find them so."""
    for number in [*_changed] if threading.current_thread() is threading.main_thread() else ():
        if signal.getsignal(number) is _changed[number]:  # else another's, which puts this one back
            signal.signal(number, USUAL_HANDLERS[number])
            del _changed[number]


@dataclass
class Interruption:
    """What has come from outside: `signal`, the first, or 0; whether a case `ran`; once all is `done` none raises."""

    signal: int = 0
    ran: bool = False
    done: bool = False

    @property
    def exit_code(self) -> int:
        return 128 + self.signal


@contextmanager
def interrupted_once() -> Iterator[Interruption]:
    """Ctrl-C raises KeyboardInterrupt, SIGTERM and SIGHUP `Terminated`; the second is only told, the third raises."""
    found = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield found
        return
    presses = Presses()

    def handle(number: int, frame: object) -> None:
        which = presses.take()
        found.signal = found.signal or number
        if which == 2:
            with suppress(OSError):
                os.write(2, _AGAIN)
        elif which > 2 or (which and not found.done):
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)

    answered = [number for number in USUAL_HANDLERS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in {*answered, signal.SIGINT, signal.SIGTERM}}
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
