"""What the commands share: exit codes, the option for the goldens, signals, how a tensor is shown."""

from __future__ import annotations

import dis
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from safetensors import SafetensorError

from mxfp4ref._choices import DIAGNOSES, MODES
from mxfp4ref._files import printable
from mxfp4ref.conformance.cli.terminal import echo
from mxfp4ref.conformance.memory import cause_of, not_enough, ran_out

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "INTERRUPTED",
    "NOT_EQUAL",
    "USAGE",
    "Interruption",
    "Presses",
    "Terminated",
    "UsageError",
    "check_no_swap",
    "describe",
    "diagnosis_option",
    "first_values",
    "goldens_option",
    "interrupted_once",
    "limited_jobs",
    "mode_option",
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
    """What has come from outside: `signal`, the first, or 0; whether a case `ran`; once all is `done` none raises.

    It began with the command, before torch was imported, which may take longer than all cases.
    """

    signal: int = 0
    ran: bool = False
    done: bool = False
    start: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Since the command began."""
        return time.perf_counter() - self.start

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
