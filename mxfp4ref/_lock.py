"""A lock on a folder, between processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl


@contextmanager
def locked(folder: Path, *, exclusive: bool = False) -> Iterator[None]:
    """Wait for who holds the folder exclusively, or, `exclusive`, for who holds it at all; then hold it.

    The lock is advisory and ends with its process. Where there is none (Windows, some network file systems, no
    such folder) nothing is waited for.
    """
    if sys.platform == "win32":
        yield
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield
        return
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)
