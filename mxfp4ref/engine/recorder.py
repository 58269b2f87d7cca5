"""A recorder for Python scripts whose flashinfer has none, or one that leaves out lists: before 0.6.12.

It writes the folders that flashinfer's own recorder writes (`mxfp4ref.engine.recordings`), always as safetensors.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
import threading
import traceback
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import thread as pools
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mxfp4ref.engine.arguments import capturing
from mxfp4ref.engine.dump import Stored, write_inputs, write_outputs
from mxfp4ref.engine.install import Kernel, take_over
from mxfp4ref.engine.recordings import FUNCTIONS, Unreadable, find_recordings
from mxfp4ref.model.forward import MoeTrace

__all__ = ["Recorder", "run_script"]

_WHERE = (
    "flashinfer.fused_moe.core",
    "mxfp4ref.model.flashinfer",
)  # of the functions, in the order of `FUNCTIONS`


@dataclass
class Recorder:
    """Writes calls into a folder; use it as a context manager around the calls.

    Attributes:
        folder: where each call becomes a folder of its own; made if it is missing, and added to if it is not.
        max_calls, max_bytes: what is written at most; further calls are counted only.
        left_out: how many calls were not recorded.
        problems: why they were not, each reason once.
        ended: the exception that ended a script, by the name of its class; "" if none did.
    """

    folder: Path
    max_calls: int = 1000
    max_bytes: int = 20 << 30
    left_out: int = 0
    problems: tuple[str, ...] = ()
    ended: str = ""

    def __post_init__(self) -> None:
        self.folder = self.folder.absolute()  # the script may change the working directory
        self._inside = threading.local()
        self._lock = threading.Lock()
        self._calls = self._bytes = 0
        self._id = uuid.uuid4().hex  # that of forked processes too

    def written(self) -> int:
        """How many of the calls in the folder it has recorded, in forked processes too."""
        ours = 0
        for found in find_recordings(self.folder):
            with suppress(Unreadable):  # another process may be writing it
                ours += found.metadata().get("recorder") == self._id
        return ours

    @contextmanager
    def recording(self) -> Iterator[Recorder]:
        """While this lasts flashinfer's function and this package's drop-in are recorded, whoever holds them.

        flashinfer is imported if it is installed.
        """
        with ExitStack() as taken:
            for module, name in zip(_WHERE, FUNCTIONS, strict=True):
                try:
                    function = getattr(importlib.import_module(module), name)
                except (ImportError, AttributeError, RuntimeError, OSError):
                    continue  # not installed, or not for this machine
                taken.callback(take_over(function, partial(self._call, name, module)))
            yield self

    def _call(
        self, name: str, module: str, kernel: Kernel, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> Any:
        """Record a call; one that it makes of the other function is not recorded again."""
        if getattr(self._inside, "now", False):
            return kernel(*arguments, **named)
        self._inside.now = True
        try:
            path = self._begin(name, module, arguments, named)
            result = kernel(*arguments, **named)
            if path is not None:
                self._end(path, result)
            return result
        finally:
            self._inside.now = False

    def _begin(
        self, name: str, module: str, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> Path | None:
        """Write the inputs; the call's folder, or None where it is not recorded."""
        if capturing(arguments, named):
            self._leave_out("a CUDA graph captured it: run without graphs to record it")
            return None
        try:
            values = {f"arg_{i}": value for i, value in enumerate(arguments)}
            inputs = Stored.of(values | {f"kwarg_{key}": value for key, value in named.items()})
            size = sum(tensor.nbytes for tensor in inputs.tensors.values())
            with self._lock:
                if self._calls >= self.max_calls or self._bytes + size > self.max_bytes:
                    limits = f"{self.max_calls:,} calls or {self.max_bytes / 2**30:g} GiB"
                    self._leave_out(f"the limit of {limits} is reached")
                    return None
                self._calls += 1
                self._bytes += size
                number = self._calls
            return write_inputs(self.folder, name, module, number, inputs, self._id)
        except Exception as error:  # the script goes on, whatever the disk or an argument is like
            self._leave_out(f"{type(error).__name__}: {error}")
            return None

    def _end(self, path: Path, result: Any) -> None:
        """Write the output."""
        try:
            write_outputs(path, [result.output] if isinstance(result, MoeTrace) else result)
        except Exception as error:
            self._leave_out(f"{type(error).__name__}: {error}")

    def _leave_out(self, problem: str) -> None:
        self.left_out += 1
        if problem not in self.problems:
            self.problems += (problem,)


def run_script(
    script: str,
    arguments: Sequence[str],
    recorder: Recorder,
    *,
    module: bool = False,
    at_exit: Callable[[int], int] = int,
) -> int:
    """Run a Python script, or a module, as the main program and record its calls; its exit code.

    As Python does, it prints what the script raises, and waits for its threads, whose calls are recorded.

    Args:
        script, arguments, module: as of `python [-m] script arguments`.
        recorder: what records.
        at_exit: called before the script ends this process by `os._exit`, with its exit code; the one to take.

    Raises:
        KeyboardInterrupt: Ctrl-C in the script.
    """
    before, path, threads = sys.argv, list(sys.path), threading.enumerate()
    sys.argv = [script, *arguments]
    try:
        with recorder.recording(), _before_exit(at_exit):
            try:
                if module:
                    sys.path.insert(0, os.getcwd())
                    runpy.run_module(script, run_name="__main__", alter_sys=True)
                else:
                    sys.path.insert(0, str(Path(script).resolve().parent))
                    runpy.run_path(script, run_name="__main__")
            finally:
                _wait_for_threads(threads)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except Exception as error:
        # A BrokenPipeError too, which would be taken for one of this command's own output.
        recorder.ended = type(error).__name__
        traceback.print_exc()
        return 1
    finally:
        sys.argv, sys.path[:] = before, path
    return 0


@contextmanager
def _before_exit(tell: Callable[[int], int]) -> Iterator[None]:
    """While this lasts `os._exit`, which ends a process where it stands, calls `tell` first, in this process only."""
    end, here = os._exit, os.getpid()
    os._exit = lambda status: end(tell(status) if os.getpid() == here else status)
    try:
        yield
    finally:
        os._exit = end


def _wait_for_threads(others: Collection[threading.Thread]) -> None:
    """Wait for all threads that Python waits for at its end, but others, and those of pools, which end only then."""
    while running := [
        thread
        for thread in threading.enumerate()
        if not (thread.daemon or thread in others or thread in getattr(pools, "_threads_queues", ()))
    ]:
        running[0].join()
