"""Independent pieces of work on the threads that torch may use.

Threads inside of one operation have little to share here: most operations are small. A thread for a whole piece,
with no others inside, keeps all of them busy, unless operations are so short that the interpreter's lock becomes
the bottleneck. Nothing that is computed depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["in_parallel", "spans"]

_ENOUGH = 5 << 20  # weights; smaller pieces are no slower one after the other
_T = TypeVar("_T")
_R = TypeVar("_R")


def in_parallel(
    function: Callable[[_T], _R], pieces: Sequence[_T], device: torch.device, weights: int
) -> list[_R]:
    """`[function(piece) for piece in pieces]`, on a CPU by as many threads as torch has been given.

    `weights` says how large a piece is: how many weights it has to work on. The function may read tensors of the
    caller, but has to return what it makes: modes of the caller, such as inference mode, do not hold in the threads.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or min(threads, len(pieces)) < 2 or weights < _ENOUGH:
        return [function(piece) for piece in pieces]
    with ThreadPoolExecutor(min(threads, len(pieces)), initializer=_work_alone) as pool:
        try:
            return list(pool.map(function, pieces))
        finally:
            torch.set_num_threads(threads)  # for threads that start later; a thread's own number is its own


def _work_alone() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)


def spans(length: int, step: int) -> Iterator[slice]:
    """Slices of `step` that cover `length`."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
