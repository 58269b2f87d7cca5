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
from types import ModuleType
from typing import Any

from mxfp4ref.engine.arguments import capturing
from mxfp4ref.engine.dump import Stored, write_inputs, write_outputs
from mxfp4ref.engine.install import MODULE, Kernel, Waiting, take_over, unwrapped
from mxfp4ref.engine.recordings import FUNCTIONS, Unreadable, find_recordings
from mxfp4ref.model.forward import MoeTrace

__all__ = ["Recorder", "run_script"]

_THEIR_NAME, _OUR_NAME = FUNCTIONS
_PROBLEMS = 20  # different ones that are kept
_THEIRS = (
    MODULE,
    f"{MODULE}.core",
    "flashinfer",
)  # modules that may have flashinfer's function, or one of their own
_OURS = "mxfp4ref.model.flashinfer"


@dataclass
class Recorder:
    """Writes calls into a folder; use it as a context manager around the calls.

    Attributes:
        folder: where each call becomes a folder of its own; made if it is missing, and added to if it is not.
        max_calls, max_bytes: what is written at most; further calls are counted only.
        left_out: how many calls were not recorded.
        problems: why they were not, each reason once.
        hooked: the names of the functions whose calls are recorded.
        missing: why flashinfer's function is not one of them; "" if it is.
        ended: the exception that ended a script, by the name of its class; "" if none did.
    """

    folder: Path
    max_calls: int = 1000
    max_bytes: int = 20 << 30
    left_out: int = 0
    problems: tuple[str, ...] = ()
    hooked: tuple[str, ...] = ()
    missing: str = ""
    ended: str = ""

    def __post_init__(self) -> None:
        self.folder = self.folder.absolute()  # the script may change the working directory
        self._inside = threading.local()
        self._functions: list[Any] = []
        self._taken = ExitStack()
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

        flashinfer is imported if it is installed; one that can be imported only later is recorded from then on.
        A call that one of these functions makes of another is part of it.

        Raises:
            TypeError: flashinfer's function is not one of Python.
        """
        self.hooked, self.missing = (), ""
        with ExitStack() as self._taken:
            for module in _THEIRS:
                try:
                    function = getattr(importlib.import_module(module), _THEIR_NAME)
                except (ImportError, AttributeError, RuntimeError, OSError) as error:
                    self.missing = self.missing or str(error)  # not installed, or not for this machine
                    continue
                self._hook(module, unwrapped(function))
            self.missing = "" if self.hooked else self.missing
            self._take_over(_OURS, getattr(importlib.import_module(_OURS), _OUR_NAME))
            self.hooked += (f"mxfp4ref.{_OUR_NAME}",)
            waiting = Waiting(_THEIRS, self._came)
            sys.meta_path.insert(0, waiting)
            self._taken.callback(sys.meta_path.remove, waiting)
            try:
                yield self
            finally:
                self._functions.clear()

    def _came(self, module: ModuleType) -> None:
        """Record the function of a module of flashinfer's that is imported after the recording has begun."""
        if (function := getattr(module, _THEIR_NAME, None)) is not None:
            self._hook(module.__name__, unwrapped(function))

    def _hook(self, module: str, function: Any) -> None:
        """Record the calls of a function that flashinfer has in this module, once under however many names."""
        if any(function is other for other in self._functions):
            return
        self._take_over(module, function)
        self.hooked += (f"{module}.{_THEIR_NAME}",)

    def _take_over(self, module: str, function: Any) -> None:
        name = _OUR_NAME if module == _OURS else _THEIR_NAME
        own = str(getattr(function, "__module__", ""))  # where flashinfer's own recorder says that it is
        record = partial(self._call, name, own if own.startswith("flashinfer") else module)
        self._taken.callback(take_over(function, record))
        self._functions.append(function)

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
        if problem not in self.problems and len(self.problems) < _PROBLEMS:
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

    Where flashinfer's function cannot be recorded, nothing runs, and `recorder.missing` says why.

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
    # As Python does, and before flashinfer is looked for: it may lie beside the script.
    sys.path.insert(0, os.getcwd() if module else str(Path(script).resolve().parent))
    try:
        with ExitStack() as recording:
            try:
                recording.enter_context(recorder.recording())
            except TypeError as error:
                recorder.hooked, recorder.missing = (), str(error)
                return 2
            recording.enter_context(_before_exit(at_exit))
            try:
                if module:
                    runpy.run_module(script, run_name="__main__", alter_sys=True)
                else:
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
