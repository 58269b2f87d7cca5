"""A command that runs a kernel in its own process succeeds if it says so, and not by ending with exit code 0."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from mxfp4ref.conformance.cli.shared import INTERRUPTED, NOT_EQUAL, USAGE, Presses
from mxfp4ref.conformance.processes import how_it_ended

__all__ = ["main"]

_START = """\
import sys
sys.path[:] = eval(sys.argv.pop(1))
verdict = sys.argv.pop(1)
from mxfp4ref.__main__ import main
main(verdict)
"""
_PATIENCE = 3  # so many interrupts end the process at once, as it says itself
_NONE = b"none"  # instead of an exit code, as long


def main(commands: click.Group, verdict: str | None) -> None:
    """Run the command of `sys.argv` in a process of its own or, in that process, itself; never returns.

    Args:
        verdict: in that process, the file that the command's exit code is written to.
    """
    if verdict is None:
        try:
            sys.exit(_supervise())
        except OSError as error:
            print(f"Error: {type(error).__name__}: {error}", file=sys.stderr)
            sys.exit(USAGE)
    try:
        commands(prog_name="mxfp4ref")
    except SystemExit as done:
        with Path(verdict).open("r+b") as file:
            file.write(f"{done.code!s:4.4}".encode())
        raise


def _supervise() -> int:
    with tempfile.TemporaryDirectory() as folder:
        verdict = Path(folder, "verdict")
        verdict.write_bytes(_NONE)  # written over in place, for which even a full disk has room
        command = [sys.executable, "-c", _START, repr(sys.path), str(verdict), *sys.argv[1:]]
        process, presses, interrupts = subprocess.Popen(command), Presses(), 0

        def pass_on(number: int, frame: object) -> None:
            nonlocal interrupts
            if which := presses.take():  # it writes its reports and ends, if its kernel lets it
                interrupts = which
                process.send_signal(signal.SIGINT if which < _PATIENCE else signal.SIGKILL)

        before = signal.signal(signal.SIGINT, pass_on)
        try:
            process.wait()
        finally:
            signal.signal(signal.SIGINT, before)
        if verdict.is_file() and (code := verdict.read_bytes().strip()).isdigit():
            return int(code)
        if interrupts:
            return INTERRUPTED
    how = how_it_ended(process.returncode)
    click.echo(
        f"The kernel does not conform: it ended its process ({how}) before there was a verdict. Without --no-isolate "
        "the report tells on which case.",
        err=True,
    )
    return NOT_EQUAL
