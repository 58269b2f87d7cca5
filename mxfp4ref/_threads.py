"""Independent pieces of work on the threads that torch may use.

Threads inside of one operation have little to share here: most operations are small. A thread for a whole piece,
with no others inside, keeps all of them busy, unless operations are so short that the interpreter's lock becomes
the bottleneck. Nothing that is computed depends on it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from threading import Thread
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
    threads = min(torch.get_num_threads(), len(pieces))
    if device.type != "cpu" or threads < 2 or weights < _ENOUGH:
        return [function(piece) for piece in pieces]
    found: dict[int, _R] = {}
    errors: list[BaseException] = []
    left = iter(range(len(pieces)))

    def work() -> None:
        try:
            with torch.no_grad():
                for number in left:
                    found[number] = function(pieces[number])
        except BaseException as error:
            errors.append(error)
            deque(left, maxlen=0)  # which nobody has to do any more

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # for this thread and those that start now
    try:
        others = [Thread(target=work) for _ in range(threads - 1)]
        for thread in others:
            thread.start()
        work()
        for thread in others:
            thread.join()
    finally:
        torch.set_num_threads(before)
    if errors:
        raise errors[0]
    return [found[number] for number in range(len(pieces))]


def spans_in_parallel(function: Callable[[slice], object], length: int, step: int, weights: int) -> None:
    """Call a loop with slices that cover `length`: of `step` for threads, one of all where there is little to do.

    `weights` says how large all of it is.
    """
    pieces = list(spans(length, step if weights >= _ENOUGH else max(length, 1)))
    in_parallel(function, pieces, torch.device("cpu"), weights)
