"""Standard streams, and the files with their numbers, which a kernel may close or put others in the place of."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["FOR_GOOD", "STREAMS", "stream_of", "streams_files"]

STREAMS = ("stdin", "stdout", "stderr")
FOR_GOOD = " for good"  # of what cannot be put back


def stream_of(name: str, number: int) -> tuple[str, Callable[[], Any], Callable[[Any], None]]:
    """A setting of `surroundings`: a standard stream, which may be closed, while its file is open all the same."""

    def found() -> Any:
        stream = getattr(sys, name)
        return None if getattr(stream, "closed", False) else stream

    def put_back(stream: Any) -> None:
        if getattr(stream, "closed", False):
            if stream is not getattr(sys, f"__{name}__"):
                raise ValueError("somebody's own, which cannot be opened again")
            how = {"encoding": stream.encoding, "errors": stream.errors, "closefd": False}
            stream = open(number, "r" if name == "stdin" else "w", buffering=1, **how)  # noqa: SIM115
            setattr(sys, f"__{name}__", stream)
        setattr(sys, name, stream)

    return f"sys.{name}", found, put_back


def _identity(number: int) -> tuple[int, int] | None:
    """What an open file is, which another one is not; None if it is closed."""
    try:
        found = os.fstat(number)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def streams_files() -> Callable[[], list[str]]:
    """Keep the files that have the standard streams' numbers; what is returned puts them back, and names them."""
    kept = [(n, name, os.dup(n), _identity(n)) for n, name in enumerate(STREAMS) if _identity(n) is not None]

    def restore() -> list[str]:
        changed = [(number, name, copy) for number, name, copy, before in kept if _identity(number) != before]
        whole = {copy for _, _, copy, before in kept if _identity(copy) == before}
        for number, _, copy in changed:
            if copy in whole:  # and not closed by somebody who closes all
                os.dup2(copy, number)
        for copy in whole:
            os.close(copy)
        kept.clear()
        return [f"the file of {name}{FOR_GOOD * (copy not in whole)}" for _, name, copy in changed]

    return restore
