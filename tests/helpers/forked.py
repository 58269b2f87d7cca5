"""Python processes that begin as copies of one that has imported torch, which takes 2 s of a CPU each time otherwise.

They are processes like any other: with pipes, a working directory, an environment and a group of their own, children
of this process, ended and waited for as all are. Not for tests of what a fresh interpreter does, such as its imports
and its path. Where there is no Linux, or an environment variable is another that is read at the start, all are fresh.
"""

from __future__ import annotations

import array
import atexit
import ctypes
import gc
import inspect
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["BeforeFirstUse", "ForkingPopen", "original"]

CHECKOUT = Path(__file__).resolve().parents[2]


def _read_at_start(environment: Mapping[str, str]) -> dict[str, str]:
    """What Python, numba and torch read when they start.

    A copy extends its path by itself; the other is set by torch's compiler at its first use, for itself.
    """
    names, later = ("PYTHON", "NUMBA", "OMP", "MKL", "TORCH"), ("PYTHONPATH", "TORCHINDUCTOR_CACHE_DIR")
    return {k: v for k, v in environment.items() if k.startswith(names) and k not in later}


_Fresh = subprocess.Popen  # which tests replace by the class below
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of all processes that tests start
_AT_START = _read_at_start(os.environ)
_START = "from tests.helpers.forked import serve; serve({fd}, {parent}, {used})"
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def _prctl(option: int, value: int) -> None:
    assert ctypes.CDLL(None).prctl(option, value, 0, 0, 0) == 0


class ForkingPopen(_Fresh[Any]):
    """`subprocess.Popen`, by a copy for `[sys.executable, "-c" or "-m", what, ...]`.

    Attributes:
        used: whether the package's compiled loops have been used in what is copied.
    """

    used = True

    def _execute_child(self, args: Any, *rest: Any) -> None:
        names = list(inspect.signature(super()._execute_child).parameters)[1:]  # type: ignore[misc]
        given = dict(zip(names, rest, strict=True))
        environment = dict(os.environ if given["env"] is None else given["env"])
        options = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # which a copy has
        if list(args[1 : len(options) + 1]) == options:
            args = [args[0], *args[len(options) + 1 :]]
        of_python = args[0] == sys.executable and args[1][:2] in ("-c", "-m")
        if (
            sys.platform != "linux"
            or not of_python
            or given["preexec_fn"]
            or _read_at_start(environment) != _AT_START
        ):
            super()._execute_child(args, *rest)  # type: ignore[misc]
            return
        wanted = {
            "option": args[1][:2],
            "arguments": [os.fspath(argument) for argument in (*filter(None, [args[1][2:]]), *args[2:])],
            "folder": os.fspath(given["cwd"] or os.getcwd()),
            "environment": environment,
            "session": given["start_new_session"],
        }
        pipes = (given[name] for name in ("p2cread", "c2pwrite", "errwrite"))
        self.pid = _copy(
            original(self.used), wanted, [n if pipe == -1 else pipe for n, pipe in enumerate(pipes)]
        )
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[name] for name in ends))  # type: ignore[attr-defined]


class BeforeFirstUse(ForkingPopen):
    used = False


_one_at_a_time = threading.Lock()


def _copy(channel: socket.socket, wanted: dict[str, Any], streams: list[int]) -> int:
    """A new child of this process, with these files as stdin, stdout and stderr; its id."""
    request = pickle.dumps(wanted)
    with _one_at_a_time:
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # the copy's parent ends at once, and this process takes its place
        try:
            channel.sendmsg(
                [len(request).to_bytes(8, "little")],
                [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", streams))],
            )
            channel.sendall(request)
            return int.from_bytes(_received(channel, 8), "little")
        finally:
            _prctl(_PR_SET_CHILD_SUBREAPER, 0)


@cache
def original(used: bool) -> socket.socket:
    """The process that is copied, which does nothing else."""
    here, there = socket.socketpair()
    with there:
        process = _Fresh(
            [sys.executable, "-c", _START.format(fd=there.fileno(), parent=os.getpid(), used=used)],
            pass_fds=[there.fileno()],
            stdin=subprocess.DEVNULL,
            cwd=CHECKOUT,
        )
    atexit.register(process.wait)
    atexit.register(here.close)
    return here


def _received(channel: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = channel.recv(size - len(data))
        assert part, "the process that is copied has ended"
        data += part
    return data


def serve(fd: int, parent: int, used: bool) -> None:
    """The original returns when `parent` ends, and a copy when it has run what it is for."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    import mxfp4ref.conformance.cli.conform
    import mxfp4ref.conformance.isolation.kernel_process

    if used:
        from tests.helpers import layers

        experts = layers.random_experts(1, num_experts=2)
        mxfp4ref.forward(layers.random_call(1, experts, tokens=2, top_k=1))
    channel = socket.socket(fileno=fd)
    gc.freeze()  # else the end of each copy takes 0.3 s
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False  # each takes an operator of torch away
    while True:
        head, streams, _, _ = socket.recv_fds(channel, 8, 3)
        if not head:
            return
        wanted = pickle.loads(_received(channel, int.from_bytes(head, "little")))
        its_id, told = os.pipe()
        between = os.fork()
        if not between:
            copy = os.fork()
            if copy:
                os.write(told, copy.to_bytes(8, "little"))
                os._exit(0)
            for used in (its_id, told):
                os.close(used)
            channel.close()
            while os.getppid() != parent:
                time.sleep(1e-4)
            _become(wanted, streams)
            return
        os.waitpid(between, 0)
        channel.sendall(os.read(its_id, 8))
        for used in (its_id, told, *streams):
            os.close(used)


def _become(wanted: dict[str, Any], streams: list[int]) -> None:
    """What Python does at its start, and then what it is to run."""
    if wanted["session"]:
        os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    for stream in streams:
        os.close(stream)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]
    os.chdir(wanted["folder"])
    os.environ.clear()
    os.environ.update(wanted["environment"])
    more = wanted["environment"].get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [path for path in more if path and path not in sys.path]
    what, *arguments = wanted["arguments"]
    sys.argv[:] = [wanted["option"], *arguments]
    code: Any = None
    try:
        if wanted["option"] == "-c":
            exec(compile(what, "<string>", "exec"), vars(sys.modules["__main__"]))
        else:
            sys.path[0] = os.getcwd()
            runpy.run_module(what, run_name="__main__", alter_sys=True)
    except SystemExit as done:
        code = done.code
        if not isinstance(code, int | None):
            raise
    _end(code or 0)


def _end(code: int) -> None:
    """What Python does at its end, but for taking modules apart: memory would be copied for it, which takes 0.3 s."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        if not stream.closed:
            stream.flush()
    os._exit(code & 0xFF)
