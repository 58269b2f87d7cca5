"""A process of its own for a kernel: what is known of it comes through a pipe, as bytes that are checked.

The kernel's process (`kernel_process`) never has the expected outputs, and this one never imports the kernel. A run
counts only when its result has come, whole; a process that ends before, in whatever way and with whatever exit code,
has crashed. It gets a group of its own, which is killed with it, and so is, on Linux, what has left the group but has
its environment. What it prints goes to this process's stderr, made printable, up to a limit.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import select
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from typing import IO, Any

import torch

from mxfp4ref._files import mismatch
from mxfp4ref.conformance.isolation.alone import Alone
from mxfp4ref.conformance.isolation.crash_dumps import before_dump, last_words
from mxfp4ref.conformance.isolation.execution import PROBLEMS, RUN, Collected, Outcome, judge, likes
from mxfp4ref.conformance.isolation.kernel_process import LOAD, LOADED, RESULT, request_of, unframed
from mxfp4ref.conformance.isolation.plain import LARGEST_STAGE, Like, printable
from mxfp4ref.conformance.isolation.processes import MARK, how_it_ended, kill, marked, python, wait
from mxfp4ref.conformance.isolation.standard_streams import FOR_GOOD
from mxfp4ref.conformance.kernels.adapters import INTERMEDIATES, Kernel, KernelError
from mxfp4ref.formats.generations import generation_named
from mxfp4ref.goldens import Case
from mxfp4ref.goldens.runs import Run
from mxfp4ref.model.call import MoeCall

__all__ = ["Worker"]

_MESSAGE = 5000  # characters, more than the process makes of an exception
_LOAD_SECONDS = 60  # for importing the kernel, if a run has less
_OWN_SECONDS = 600  # for what the kit does itself in the process: importing torch, generating weights
_END_SECONDS = 2  # for a process that was told to end, or whose pipe is closed
_DRAIN_SECONDS = 0.1  # for what an earlier run printed and has not been read yet
_SHOWN, _TAIL = 1 << 16, 1 << 13  # bytes of what the kernel prints: passed on, and kept for a crash

_RESULT = {
    **{"problem": str, "message": str, "left": str, "seconds": float | int, "runs": int},
    **{"stages": [[str, str, [int]]], "*": object},
}
_ELSE = "its process wrote something else into the pipe to the kit"

# Nothing is imported before the path is set: until then it begins with the working directory, with anybody's json.py.
_START = """\
import sys
sys.path[:] = eval(sys.argv.pop())
from mxfp4ref.conformance.isolation.kernel_process import serve
serve()
"""


class _Ended(Exception):
    """The process, or its pipe, is no more; the message says how."""


class Worker:
    """A process for a kernel given by its name, started when needed and replaced when it has hung or died.

    Use it as a context manager, or `stop` it.

    Attributes:
        kernel: what is known of the kernel here: everything but its functions.
        environment: versions and machine, as in `results.Report`.
        runs: how many cases its process has run.
        alone: failing ones that others like it run, of all processes of a run.

    Raises:
        KernelError: the kernel cannot be loaded, or not within `seconds`.
    """

    def __init__(
        self,
        spec: str,
        device: str | None = None,
        seconds: float | None = None,
        *,
        threads: int | None = None,
        alone: Alone | None = None,
    ) -> None:
        self._arguments, self._seconds = (spec, device), seconds
        self.runs, self.alone = 0, alone or Alone()
        self._threads = threads  # of torch in the process; None for as many as it takes
        self._over = False
        self._process: subprocess.Popen[bytes] | None = None
        try:
            known = self._start()
            where = {printable(name): printable(words) for name, words in known["environment"].items()}
            about = known["kernel"]
            about |= {"kinds": tuple(about["kinds"]), "generation": generation_named(about["generation"])}
            self.kernel = Kernel(**about, prepare=_elsewhere, function=_elsewhere)
        except _Ended as ended:
            raise KernelError(f"kernel: while {printable(spec, 200)} was imported, {ended}") from None
        except (KeyError, TypeError, AttributeError):
            self._stop()
            raise KernelError(f"kernel: while {printable(spec, 200)} was imported, {_ELSE}") from None
        except BaseException:
            self._stop()
            raise
        self.environment: dict[str, str] = where

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        self.stop(_END_SECONDS if kind is None else 0)

    def another(self) -> Worker:
        """One more process for the same kernel."""
        return Worker(*self._arguments, self._seconds, threads=self._threads, alone=self.alone)

    def stop(self, seconds: float = _END_SECONDS) -> None:
        """End the process, for good; it has so many seconds to end by itself."""
        self._over = True
        self._stop(seconds)

    def execute(self, seconds: float | None, case: Case, run: Run, *, repeat: bool = True) -> Outcome:
        """As `execution.execute_within`, for a run of a case."""
        expected = likes(run.expected, self.kernel.device)
        self.runs += 1
        return self._execute(seconds, request_of(case, run, expected, repeat), expected)

    def execute_call(self, seconds: float | None, call: MoeCall, *, repeat: bool = False) -> Outcome:
        """As `execute`, for any call; its output may be anything of the input's form."""
        expected = likes({"output": call.input}, self.kernel.device)
        return self._execute(seconds, pickle.dumps(("moe", call, None, expected, repeat)), expected)

    def _execute(self, seconds: float | None, request: bytes, expected: Mapping[str, Like]) -> Outcome:
        start = time.perf_counter()
        try:
            if self._over:
                raise _Ended("its process was stopped")
            if self._process is None:
                self._start()
            self._channel.ask(request)
            found = _collected(*self._channel.answer(RESULT, seconds, expected), expected)
            if FOR_GOOD in found.left:  # which the next run is not to suffer from
                self._stop()
            return judge(found, expected)
        except _Ended as ended:
            self._stop()
            problem = "timed out" if isinstance(ended, _TimedOut) else "crashed"
            return Outcome(problem=problem, message=str(ended), seconds=time.perf_counter() - start)
        except (KernelError, OSError, RuntimeError) as error:  # of a process that was started anew
            return Outcome(problem="crashed", message=f"after an earlier crash: {error}")

    def _start(self) -> dict[str, Any]:
        self.runs = 0
        self._mark = uuid.uuid4().hex
        threads = {"OMP_NUM_THREADS": str(self._threads)} if self._threads else {}
        process = subprocess.Popen(
            python(_START),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **threads, MARK: self._mark},
            start_new_session=True,  # which Windows ignores
        )
        try:
            self._channel = _Channel(process)
        except BaseException:  # no more threads
            with process:  # closes its pipes
                kill(process)
            raise
        self._process = process
        self._channel.ask(pickle.dumps(self._arguments))
        try:
            limit = None if self._seconds is None else max(self._seconds, _LOAD_SECONDS)
            header, _ = self._channel.answer(LOADED, limit, {})
        except _Ended:
            self._stop()
            raise
        if error := header.get("error"):
            self._stop(_END_SECONDS)
            raise KernelError(printable(str(error), _MESSAGE))
        return header

    def _stop(self, seconds: float = 0) -> None:
        """End the process and its group, after so many seconds in which it may end by itself."""
        if (process := self._process) is None:
            return
        self._process = None
        self._channel.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        kill(process)
        for _ in range(5):  # some may have been forked meanwhile
            for pid in (left := marked(self._mark)):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            if not left:
                break
        self._channel.join()


class _TimedOut(_Ended):
    """It was killed, since it took too long."""


def _elsewhere(*arguments: object, **keywords: object) -> Any:
    raise RuntimeError("a kernel that runs in a process of its own was called in this one")


class _Channel:
    """The pipes of a process: requests go in, answers come out, what it prints is passed on."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._answers: queue.SimpleQueue[tuple[dict[str, Any], list[bytes]] | _Ended] = queue.SimpleQueue()
        self._largest = 0  # bytes of an answer
        self._tail, self._limit, self._over = b"", "", threading.Event()
        streams = ((self._print, process.stderr), (self._read, process.stdout))
        self._printing, self._reading = self._threads = [
            threading.Thread(target=work, args=(stream,), daemon=True) for work, stream in streams
        ]
        for thread in self._threads:
            thread.start()
        threading.Thread(target=self._wait, daemon=True).start()

    def ask(self, request: bytes) -> None:
        """Send a request, in a thread: a process that hangs does not read. What it printed before is kept no more."""
        waited, printed = time.monotonic() + _DRAIN_SECONDS, self._process.stderr
        assert printed is not None
        with contextlib.suppress(OSError, ValueError):  # closed, or no pipes that can be waited for
            while select.select([printed], [], [], 0)[0] and time.monotonic() < waited:
                time.sleep(0.001)
        self._tail = b""
        threading.Thread(target=self._write, args=(request,), daemon=True).start()

    def answer(
        self, wanted: str, seconds: float | None, expected: Mapping[str, Like]
    ) -> tuple[dict[str, Any], list[bytes]]:
        """Wait for the answer of that name; `seconds` is the limit for each time that the kernel is at work."""
        self._largest = 2 * sum(want.size for want in expected.values()) + len(INTERMEDIATES) * LARGEST_STAGE
        doing = ""
        while True:
            limit = seconds if doing in (RUN, LOAD) else _OWN_SECONDS
            try:
                found = self._answers.get(timeout=limit)
            except queue.Empty:
                raise _TimedOut(f"no result within {limit:g} s; its process was killed") from None
            if isinstance(found, _Ended):
                raise found
            header, blobs = found
            if header["name"] == wanted:
                return header, blobs
            doing = header["name"]

    def close(self) -> None:
        """Tell the process that there are no more requests."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def join(self) -> None:
        """Wait for what a process that has ended has written; a copy that it left behind may hold the pipes open."""
        for thread in self._threads:
            thread.join(0.2)

    def _write(self, request: bytes) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it has ended: it does not answer
            self._process.stdin.write(request)
            self._process.stdin.flush()

    def _read(self, stream: IO[bytes]) -> None:
        with stream:
            try:
                while (found := unframed(stream, lambda: self._largest)) is not None:
                    self._answers.put(found)
            except ValueError:
                self._answers.put(_Ended(_ELSE))
                while stream.read(1 << 16):
                    pass
        self._over.wait(_END_SECONDS)
        self._answers.put(self._ended())

    def _wait(self) -> None:
        """A process that has forked may end without the end of its pipe."""
        self._limit = wait(self._process)
        self._over.set()
        self._reading.join(1)
        self._answers.put(self._ended())

    def _ended(self) -> _Ended:
        code = self._process.poll()
        if code is None:
            return _Ended("its process closed the pipe to the kit")
        self._printing.join(0.2)
        ended = f"{how_it_ended(code, self._limit)}{last_words(self._tail)}"
        return _Ended(f"the kernel's process ended without a result: {ended}")

    def _print(self, stream: IO[bytes]) -> None:
        shown = 0
        with stream:
            while chunk := stream.read1(1 << 16):  # type: ignore[attr-defined]
                kept = slice(-_TAIL, None) if before_dump(self._tail, b"_") else slice(2 * _TAIL)
                self._tail = (self._tail + chunk)[kept]
                if shown < _SHOWN:
                    text = before_dump(self._tail, chunk)[: _SHOWN - shown].decode(
                        "utf-8", "backslashreplace"
                    )
                    lines = [printable(line, _SHOWN) for line in text.split("\n")]
                    shown += len(chunk)
                    lines += ["[what else the kernel prints is not shown]\n"] * (shown >= _SHOWN)
                    with contextlib.suppress(Exception):  # stderr may be closed
                        sys.stderr.write("\n".join(lines))


def _collected(header: dict[str, Any], blobs: list[bytes], expected: Mapping[str, Like]) -> Collected:
    """An answer, if it is one that `collect` may have given."""
    if mismatch(header, _RESULT, "result"):
        raise _Ended(_ELSE)
    try:
        count = header["runs"]
        first, second, *_ = (dict(zip(expected, blobs[i * len(expected) :], strict=False)) for i in range(2))
        kinds = [(name, Like(getattr(torch, dtype), tuple(shape))) for name, dtype, shape in header["stages"]]
        stages = {
            name: (kind, blob)
            for (name, kind), blob in zip(kinds, blobs[count * len(expected) :], strict=True)
        }
        found = Collected(
            (first, second)[:count],
            stages,
            header["problem"],
            printable(header["message"], _MESSAGE),
            header["seconds"],
            printable(header["left"]),
        )
        sizes = [len(one[name]) == want.size for one in found.runs for name, want in expected.items()]
        sizes += [len(blob) == kind.size and name in INTERMEDIATES for name, (kind, blob) in stages.items()]
        known = found.problem in PROBLEMS if found.problem else count in (1, 2)
    except (TypeError, ValueError, AttributeError, IndexError):
        raise _Ended(_ELSE) from None
    if not all(sizes) or not known:
        raise _Ended(_ELSE)
    return found
