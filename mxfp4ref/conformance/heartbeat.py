"""A sign of life: what is being done, told whenever nothing was for a while, and what a long diagnosis is at."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["ALL_TOGETHER", "SILENCE", "at_work", "heartbeat", "told_to", "trying"]

SILENCE = 10.0  # seconds
ALL_TOGETHER = "the diagnosis of all together, a minute or two at most"

_TOLD: ContextVar[Callable[[str, float], None] | None] = ContextVar("who is told", default=None)
_AT: ContextVar[Callable[[str], None] | None] = ContextVar("what is done", default=None)


@contextmanager
def told_to(say: Callable[[str, float], None]) -> Iterator[None]:
    """Inside, `say` is called with what a long diagnosis is at, and how many seconds more it takes at most."""
    before = _TOLD.set(say)
    try:
        yield
    finally:
        _TOLD.reset(before)


@contextmanager
def at_work(words: str, left: Callable[[], float]) -> Iterator[None]:
    """Inside, this is done, with so many seconds left when it is asked; of what is `trying`, that is told too."""
    say = _TOLD.get()

    def tell(what: str) -> None:
        if say is not None:
            say(f"{words}{f', trying: {what}' if what else ''}", left())

    tell("")
    before = _AT.set(tell)
    try:
        yield
    finally:
        _AT.reset(before)


def trying(what: str) -> None:
    """Tell what is tried, a kind of mistake, where that is `at_work`."""
    if (tell := _AT.get()) is not None:
        tell(what)


@contextmanager
def heartbeat(
    say: Callable[[str], None], seconds: float | None = None
) -> Iterator[Callable[[str | Callable[[], str]], None]]:
    """A function to call with what is done from now on, in words, or "" for nothing that is worth a line.

    Or with a function that says it, each time anew.

    Args:
        say: called, in a thread, with "[ 25 s] ", the words and how long they have been true, after each so many
            seconds since it was last called, or since words came that were told by themselves.
        seconds: of silence; by default `SILENCE`.
    """
    silence = SILENCE if seconds is None else seconds
    start = since = time.monotonic()
    words: str | Callable[[], str] = ""
    ended = threading.Event()

    def now(what: str | Callable[[], str]) -> None:
        nonlocal words, since
        words, since = what, time.monotonic()

    def beat() -> None:
        while not ended.wait(silence):
            told = words() if callable(words) else words
            if told and not ended.is_set():
                moment = time.monotonic()
                lasting = f", for {moment - since:.0f} s" if moment - since >= 1 else ""
                say(f"[{moment - start:3.0f} s] {told}{lasting}")

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield now
    finally:
        ended.set()
        thread.join()
