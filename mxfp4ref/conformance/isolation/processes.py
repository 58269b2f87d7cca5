"""Starting Python for a kernel, ending it with all that it has started, and how it has ended, in words."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

from mxfp4ref.conformance.memory import KILLED, time_limit

__all__ = ["KERNEL_THREAD", "MARK", "end_with_parent", "how_it_ended", "kill", "marked", "python", "wait"]

KERNEL_THREAD = "kernel"  # the name of a thread that runs one
MARK = "MXFP4REF_WORKER"  # the environment's variable that tells the processes of a kernel
_HINTS = {
    "SIGKILL": KILLED,
    "SIGBUS": ", as of a file that became shorter while it was read",
    "SIGXCPU": ", as at a limit of a processor's time (ulimit -t)",
}


def python(start: str, *arguments: str) -> list[str]:
    """The command that runs code as this interpreter does; `sys.argv` has `repr(sys.path)` and the arguments.

    What is no text in `sys.path`, as a `Path` that a conftest.py puts there, Python passes over.
    """
    path = [str(entry) for entry in sys.path if isinstance(entry, str)]
    options = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # -W, -X, -O, ...
    return [sys.executable, *options, "-c", start, repr(path), *arguments]


def end_with_parent() -> None:
    """Let the system kill this process when its parent ends, be it killed; on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and its group, and wait for it."""
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def marked(mark: str) -> list[int]:
    """The processes that have a mark in the environment that they were started with, or were forked with."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def wait(process: subprocess.Popen[bytes]) -> str:
    """Wait for a process; the limit of a processor's time that it had reached, which may be its own, in words."""
    limit = ""
    with contextlib.suppress(AttributeError, OSError):  # no Linux, or it was waited for elsewhere
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        limit = time_limit(process.pid, _seconds_used(process.pid) + 1)
    process.wait()
    return limit


def _seconds_used(pid: int) -> float:
    """Of a processor's time; on Linux."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def how_it_ended(code: int, limit: str = "") -> str:
    """A process's exit code, or the signal that killed it, in words.

    `limit` is that of a processor's time which it had reached.
    """
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:  # a real-time signal, of which few have names
        return f"signal {-code}"
    hint = _HINTS.get(name, "")
    if hint == KILLED and limit:
        hint = f", as the system does it at a limit; {limit}"
    return f"signal {name}{hint}"
