"""What became of the calls: counted, and said in the log of the engine."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, fields

__all__ = ["LOGGER", "Counting", "Counts", "rank"]

LOGGER = logging.getLogger("mxfp4ref.engine")


@dataclass(frozen=True)
class Counts:
    """How many calls ended in which way; each call counts once. What CUDA graphs replay is never seen.

    Attributes:
        answered: swap: the oracle's output was returned.
        equal: shadow: the kernel's output has the bits of a pair of tiles.
        different: shadow: it has those of none, or the `output` that the engine gave has other bits than what the
            kernel returned.
        empty: shadow: no token has an output, so that there was nothing to compare.
        not_modelled: the real kernel answered, and nothing was compared.
        not_due: shadow: left out by `every`.
        in_graphs: shadow: not compared, since a CUDA graph was being captured.
        failed: shadow: the oracle raised an exception.
    """

    answered: int = 0
    equal: int = 0
    different: int = 0
    empty: int = 0
    not_modelled: int = 0
    not_due: int = 0
    in_graphs: int = 0
    failed: int = 0

    @property
    def calls(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        parts = [f"{count:,} {name.replace('_', ' ')}" for name, count in found.items() if count]
        return f"{self.calls:,} call{'s' * (self.calls != 1)}" + ": " * bool(parts) + ", ".join(parts)


class Counting:
    """Counts of one mode, by any number of threads."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.forget()

    def forget(self) -> None:
        """Count from zero, and say again what is said once."""
        self._lock = threading.Lock()
        self._found: Counter[str] = Counter()
        self._said: set[Hashable] = set()
        self._local: set[int] = set()

    def add(self, outcome: str) -> None:
        """Count a call; the log has the counts at the first, tenth, hundredth ... call: a server may be killed."""
        with self._lock:
            self._found[outcome] += 1
            counts = Counts(**self._found)
        if str(counts.calls) == f"{1:0<{len(str(counts.calls))}}":
            self.log(logging.INFO, str(counts))

    def counts(self) -> Counts:
        with self._lock:
            return Counts(**self._found)

    def add_local_ids(self, layer: int) -> None:
        """Keep in mind that the ids of this layer look local."""
        with self._lock:
            self._local.add(layer)

    def doubts(self) -> str:
        """What the counts do not say of calls that are equal, in words; "" if nothing."""
        with self._lock:
            count = len(self._local)
        layers = f"{count:,} layer{'s' * (count != 1)}"
        return f"; in {layers} the ids look local already, and the kernel takes global ones" if count else ""

    def log(self, level: int, message: str, *, once: Hashable = None, traceback: bool = False) -> None:
        """A line of the log with mode and rank; if `once` is given, only the first of those that share it."""
        if once is not None:
            with self._lock:
                if once in self._said:
                    return
                self._said.add(once)
        who = rank()
        LOGGER.log(
            level,
            "%s%s: %s",
            self.mode,
            "" if who is None else f", rank {who}",
            message,
            exc_info=traceback,
        )


def rank() -> int | None:
    """This process's rank: torch.distributed's, else that of the environment, if there is one."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank())
    text = os.environ.get("RANK", "")
    return int(text) if text.isdecimal() else None


def show_log() -> None:
    """See to it that the lines appear somewhere, unless the program has said where."""
    if LOGGER.level == logging.NOTSET:
        LOGGER.setLevel(logging.INFO)
    if not LOGGER.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s"))
        LOGGER.addHandler(handler)
