"""What Python's faulthandler prints of a process that a signal ends: of it only the kernel's own line is told."""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path

import torch

from mxfp4ref.conformance.isolation.plain import PACKAGE, printable

__all__ = ["before_dump", "last_words"]

_SIGNALS = "Segmentation fault|Aborted|Bus error|Illegal instruction|Floating[- ]point exception"
_BEGIN = re.compile(rf"(?:^|(?<=\n))Fatal Python error: (?:(?:{_SIGNALS})\n|\Z)")
_BEGIN_OF_BYTES = re.compile(_BEGIN.pattern.encode())
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)
_PYTHONS = re.compile(rf"{re.escape(sysconfig.get_path('stdlib'))}/(?!(site|dist)-packages/)")
_OTHERS = (str(Path(torch.__file__).parent / "_")[:-1], PACKAGE)


def before_dump(tail: bytes, new: bytes) -> bytes:
    """What was printed last, the end of `tail`, as far as it comes before a dump."""
    found = _BEGIN_OF_BYTES.search(tail)
    return new if found is None else new[: max(found.start() - len(tail) + len(new), 0)]


def last_words(tail: bytes) -> str:
    """After how a process ended: the innermost frame of a dump that is the kernel's, and what it printed before."""
    printed, where = tail.decode("utf-8", "backslashreplace"), ""
    if (found := _BEGIN.search(printed)) is not None:
        frames = [
            f" ({printable(f'{file}:{line} in {name}', 400)})"
            for file, line, name in _FRAME.findall(printed, found.end())
            if not file.startswith(_OTHERS) and not _PYTHONS.match(file)
        ]
        printed, where = printed[: found.start()], "".join(frames[:1])
    return where + (f"; the last it printed: {printable(printed.strip())}" if printed.strip() else "")
