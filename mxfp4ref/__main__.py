"""The `mxfp4ref` command, also as `python -m mxfp4ref`: the commands of all rooms in one group."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

from mxfp4ref._version import __version__

_INTERRUPTED, _NOT_READ = 128 + 2, 128 + 13  # as of a process that SIGINT or SIGPIPE ended

try:
    from mxfp4ref.conformance import memory
    from mxfp4ref.conformance.cli import COMMANDS as CONFORMANCE
    from mxfp4ref.conformance.cli import supervised
    from mxfp4ref.conformance.cli.command import Group
    from mxfp4ref.conformance.cli.shared import Terminated, UsageError, terminable
    from mxfp4ref.conformance.isolation.processes import KERNEL_THREAD
    from mxfp4ref.engine.cli import COMMANDS as ENGINE
except KeyboardInterrupt:
    print("interrupted: nothing was run", file=sys.stderr)
    sys.exit(_INTERRUPTED)
except (
    ValueError,
    ImportError,
    MemoryError,
    OSError,
) as error:  # of a variable, or what is installed; no room
    print(f"Error: {' '.join(str(error).split()) or 'there is not enough memory'}", file=sys.stderr)
    sys.exit(2)

__all__ = ["commands", "main"]


@contextmanager
def _ended_from_outside() -> Iterator[None]:
    """Ctrl-C, a reader that has gone away, a full disk and an error of ours are no verdict: not exit code 1."""
    try:
        try:
            yield
        finally:
            if not getattr(sys.stdout, "closed", True):
                sys.stdout.flush()
    except KeyboardInterrupt as interrupted:
        first: BaseException | None = interrupted
        while not (
            first is None or isinstance(first, Terminated)
        ):  # `Interrupted`, with a report, came of it
            first = first.__context__
        sys.exit(_INTERRUPTED if first is None else first.exit_code)
    except OSError as error:
        for name in ("stdout", "stderr"):  # Python flushes them once more at its end, and fails again
            try:
                getattr(sys, name).flush()
            except (AttributeError, OSError):
                setattr(sys, name, None)
        if isinstance(error, BrokenPipeError):
            sys.exit(_NOT_READ)
        words = "stdout is closed" if error.errno == errno.EBADF else f"{type(error).__name__}: {error}"
        raise UsageError(words) from error
    except (click.ClickException, click.exceptions.Exit, click.Abort):
        raise
    except Exception as error:
        if memory.ran_out(error):
            raise UsageError(memory.not_enough(error)) from error
        if isinstance(error, ImportError) and (error.name or "").partition(".")[0] != "mxfp4ref":
            raise UsageError(f"what is installed cannot be imported: {memory.cause_of(error)}") from error
        if isinstance(error, ValueError) and getattr(sys.stdout, "closed", False):  # by a script
            raise UsageError("stdout is closed") from error
        # Nobody's fault but this package's.
        traceback.print_exc()
        raise UsageError(
            "an error of mxfp4ref itself, no verdict; please report what stands above"
        ) from error


class _Commands(Group):
    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        with _ended_from_outside():
            return super().make_context(*arguments, **options)

    def invoke(self, context: click.Context) -> Any:
        with _ended_from_outside(), terminable():
            return super().invoke(context)

    def _main_shell_completion(self, *arguments: Any, **options: Any) -> None:
        """As click's, which leaves variables that no shell of ours has set to a traceback, or to exit code 1."""
        try:
            with _ended_from_outside():
                try:
                    return super()._main_shell_completion(*arguments, **options)
                except (LookupError, ValueError) as error:  # COMP_WORDS is missing, or no number
                    wrong = f"{type(error).__name__} {error}"
                except SystemExit as done:
                    if not done.code:
                        raise
                    wrong = f"{os.environ['_MXFP4REF_COMPLETE']!r} is none"
                raise UsageError(
                    f"_MXFP4REF_COMPLETE: expected what the scripts of `mxfp4ref completion` set for bash, zsh or "
                    f"fish, and with it COMP_WORDS and the like: {wrong}"
                )
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="mxfp4ref")
def commands() -> None:
    """Bit-exact reference of the SM90 W4A16 and W4A8 MXFP4 mixture-of-experts kernels.

    \b
    mxfp4ref conform oracle                      see what success looks like, no GPU needed
    mxfp4ref conform defect:limit_ignored        see what a diagnosis looks like
    mxfp4ref conform flashinfer                  the installed flashinfer, on this machine's GPU
    mxfp4ref conform mypackage.moe:fused_moe     your kernel, with flashinfer's signature
    mxfp4ref replay flashinfer_dumps             calls that a running server recorded
    mxfp4ref checkpoint DeepSeek-V4-Flash        what is in a checkpoint, and what would be refused
    mxfp4ref show gemm/ordinary                  what is in a golden case, and why
    mxfp4ref explain limit_ignored               what a named defect does, and where it was seen

    Exit codes: 0 conforms, equal or done; 1 does not; 2 wrong usage, or something is missing; 130, 143 and
    141 interrupted, by Ctrl-C or SIGTERM, or nobody reads the output.

    NO_COLOR, FORCE_COLOR, CLICOLOR, TERM and COLUMNS are obeyed; into a pipe go whole lines. `mxfp4ref completion`
    lets a shell complete all names.
    """


for _command in (*CONFORMANCE, *ENGINE):
    commands.add_command(_command)


def main(verdict: str | None = None) -> None:
    """Entry point of the console script; `verdict` is a file for the exit code, besides it."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed; its number would be that of the next file, such as a report
            # What is written to a stdout that is closed fails, as on a full disk; what is wrong can be told nowhere.
            opener = _only_to_read if name == "stdout" and sys.argv[1:2] != ["record"] else None
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8", opener=opener))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that its encoding lacks is no reason to stop
            stream.reconfigure(errors="backslashreplace")
    if words := memory.few_files() or _wrong_variable():
        print(f"Error: {words}", file=sys.stderr)
        sys.exit(2)
    if verdict is not None or supervised.needed(sys.argv[1:]):
        _run(lambda: supervised.main(commands, verdict))
    _run(lambda: commands(prog_name="mxfp4ref"))


def _wrong_variable() -> str:
    """In words; "" if none is wrong of those that are read while a kernel computes, whose fault it would seem."""
    found = os.environ.get("MXFP4REF_GPU_GEMM") or "emulated"
    expected = "MXFP4REF_GPU_GEMM: expected 'emulated' in the environment, or nothing"
    return "" if found == "emulated" else f"{expected}, got {found[:80]!r}"


def _only_to_read(path: str, flags: int) -> int:
    return os.open(path, os.O_RDONLY)


def _run(command: Callable[[], Any]) -> None:
    """Run what ends the process; Ctrl-C while Python cleans up, which takes a while, changes no exit code.

    Nor does a kernel's run that was given up: a thread that Python ends in C++ code, as of torch, aborts the process.
    """
    try:
        command()
    except SystemExit as done:
        with suppress(ValueError):  # in another thread than the main one
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if any(thread.name == KERNEL_THREAD for thread in threading.enumerate()):
            for stream in filter(None, (sys.stdout, sys.stderr)):
                with suppress(OSError, ValueError):
                    stream.flush()
            os._exit(done.code if isinstance(done.code, int) else 0)
        raise


if __name__ == "__main__":
    main()
