"""Failing cases once more, each alone in a new process: a kernel that keeps state between calls is right there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

from mxfp4ref.conformance.kernels.adapters import KernelError

__all__ = ["Alone"]

_AT_MOST = 3  # cases of a run


class Alone:
    """What is run alone, in the order in which it came; one that is wrong alone, too, is the last.

    Each takes a process some seconds to start. None begins by itself: while the kernel's own process is at work, a
    second one would take memory and time from it.
    """

    def __init__(self) -> None:
        self._found: dict[str, Future[str]] = {}
        self._waiting: list[tuple[Future[str], Callable[[], str]]] = []
        self._wrong, self._lock = False, threading.Lock()  # cases may run side by side

    def add(self, case: str, work: Callable[[], str]) -> None:
        """To be run later; `work` gives what there is to say where all is right, else "" or an error."""
        with self._lock:
            if not self._wrong and len(self._found) < _AT_MOST:
                self._found[case] = Future()
                self._waiting.append((self._found[case], work))

    def begin(self) -> None:
        """Run what was added in a thread, beside what this one does."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            threading.Thread(target=self._run, args=(waiting,), daemon=True).start()

    def words(self, case: str) -> str:
        """What there is to say of a case, once it has been run; "" if it was not."""
        self.begin()
        return self._found[case].result() if case in self._found else ""

    def _run(self, waiting: list[tuple[Future[str], Callable[[], str]]]) -> None:
        for future, work in waiting:
            try:
                words = "" if self._wrong else work()
            except (KernelError, OSError, RuntimeError):  # no room for a second process
                words = ""
            except BaseException as error:
                self._wrong = True
                future.set_exception(error)
                continue
            self._wrong = self._wrong or not words
            future.set_result(words)
