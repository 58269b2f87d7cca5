"""A command that may end at any place, with any exit code, has the one that it wrote before: no other is a verdict.

That is one that runs a kernel in its own process; one that maps files into memory, which ends it where they become
shorter; and any where memory, threads or time are limited: C libraries that get none, such as OpenBLAS and libgomp,
end the process, and with the exit code of a kernel that does not conform.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import click

from mxfp4ref.conformance.cli.shared import (
    INTERRUPTED,
    NOT_EQUAL,
    USAGE,
    USUAL_HANDLERS,
    Presses,
    not_terminable,
)
from mxfp4ref.conformance.isolation.processes import end_with_parent, how_it_ended, python, wait
from mxfp4ref.conformance.memory import limits, time_limit

__all__ = ["begin", "end", "main", "needed", "others_code_begins", "supervise"]

_START = """\
import sys
sys.path[:] = eval(sys.argv.pop(1))
verdict = sys.argv.pop(1)
from mxfp4ref.__main__ import main
main(verdict)
"""
_PASSED_ON = tuple(USUAL_HANDLERS)
_MAPPING = ("checkpoint", "checkpoint-report", "invariance", "layer", "replay")  # commands that map files
_PATIENCE = 3  # so many interrupts end the process at once, as it says itself
_NONE, _BEGUN = (
    b"none",
    b"code",
)  # instead of an exit code, as long: from the start, and while others' code runs
_verdict: Path | None = None  # in the process that is watched
_others_code = False  # whether it has begun


def needed(arguments: Sequence[str]) -> bool:
    """Whether a command with these arguments has to be watched."""
    command = "".join(arguments[:1])
    return (
        command in _MAPPING
        or (command == "conform" and "--no-isolate" in arguments)
        or bool(limits() or time_limit())
    )


def others_code_begins() -> None:
    """From here on a kernel or a script runs in this process: how that ends is its doing."""
    global _others_code
    _others_code = True
    not_terminable()
    if _verdict is not None:
        _write(_verdict, _BEGUN)


def _write(verdict: Path, code: bytes) -> None:
    with verdict.open("r+b") as file:
        file.write(code)


def begin(verdict: str) -> None:
    """From here on this is the process that is watched, by that file."""
    global _verdict
    _verdict = Path(verdict)
    end_with_parent()


def end(code: object) -> None:
    """Write the exit code with which this process is going to end, if it is watched."""
    if _verdict is not None:
        _write(_verdict, f"{code or 0!s:4.4}".encode())


def main(commands: click.Group, verdict: str | None) -> None:
    """Run the command of `sys.argv` in a process of its own or, in that process, itself; never returns.

    Args:
        verdict: in that process, the file that the command's exit code is written to.
    """
    if verdict is None:
        script = sys.argv[1] == "record"
        try:
            sys.exit(supervise(_START, sys.argv[1:], None if script else "--no-isolate"))
        except OSError as error:
            print(f"Error: {type(error).__name__}: {error}", file=sys.stderr)
            sys.exit(USAGE)
    begin(verdict)
    try:
        commands(prog_name="mxfp4ref")
    except SystemExit as done:
        if done.code or not _others_code:  # with 0 a kernel may end it, in this thread too
            end(done.code)
        raise


def _limit(number: int) -> str:
    """The limit at which the system sends that signal, as far as it is known, or all of memory and threads."""
    return time_limit() if number == getattr(signal, "SIGXCPU", 0) else limits()


def supervise(start: str, arguments: Sequence[str], without: str | None) -> int:
    """Run Python in a process of its own, with the exit code that it writes by `end`; returns that.

    Args:
        start: the code; `sys.argv` has `repr(sys.path)`, the file to `begin` with, and the `arguments`.
        without: the option without which a kernel that ends its process is told in the report; None if it is a
            script, whose exit code is its own.
    """
    with tempfile.TemporaryDirectory() as folder:
        verdict = Path(folder, "verdict")
        verdict.write_bytes(_NONE)  # written over in place, for which even a full disk has room
        process = subprocess.Popen(python(start, str(verdict), *arguments))
        presses, interrupts, passed = Presses(), 0, set()

        def pass_on(number: int, frame: object) -> None:
            nonlocal interrupts
            passed.add(number)
            if number != signal.SIGINT:
                process.send_signal(number)
            elif which := presses.take():  # it writes its reports and ends, if its kernel lets it
                interrupts = which
                process.send_signal(signal.SIGINT if which < _PATIENCE else signal.SIGKILL)

        # In another thread nothing can be passed on; this process answers signals as it did.
        here = threading.current_thread() is threading.main_thread()
        before = {number: signal.signal(number, pass_on) for number in _PASSED_ON if here}
        try:
            limit = wait(process)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        state = verdict.read_bytes().strip() if verdict.is_file() else _NONE
    if state.isdigit():
        return int(state)
    if interrupts:
        return INTERRUPTED
    if -process.returncode in (passed if here else _PASSED_ON):  # others are the kernel's doing
        return 128 - process.returncode
    how = how_it_ended(process.returncode, limit)
    if state != _BEGUN:
        words = f"Error: the process ended ({how}) before it was done, and there is no verdict"
        print("; ".join(filter(None, (words, _limit(-process.returncode)))), file=sys.stderr)
        return USAGE
    if without is None:
        return process.returncode if process.returncode >= 0 else 128 - process.returncode
    click.echo(
        f"The kernel does not conform: it ended its process ({how}) before there was a verdict. Without {without} "
        "the report tells on which case.",
        err=True,
    )
    return NOT_EQUAL
