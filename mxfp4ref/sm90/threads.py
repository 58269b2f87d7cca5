"""Independent pieces of work on the threads that torch may use.

Threads inside of one operation have little to share here: most operations are small. A thread for a whole piece,
with no others inside, keeps all of them busy, unless operations are so short that the interpreter's lock becomes
the bottleneck. Nothing that is computed depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from mxfp4ref._spans import spans

__all__ = ["in_parallel", "spans_in_parallel"]

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


def spans_in_parallel(
    function: Callable[[slice], object], length: int, step: int, device: torch.device, weights: int
) -> None:
    """Call a function with slices that cover `length`: of `step` for threads, one of all where there is little to do.

    `weights` says how large all of it is.
    """
    pieces = list(spans(length, step if weights >= _ENOUGH else max(length, 1)))
    in_parallel(function, pieces, device, weights)


def _work_alone() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
