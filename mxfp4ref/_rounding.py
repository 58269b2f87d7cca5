"""The CPU's rounding mode: all results here are those of rounding to nearest, which a caller may have turned off.

The mode is a thread's own, and a new thread has that of the one which starts it. So it is looked at in the thread
that calls, once a call, and in torch's threads when a caller first uses them; threads of this package's own are
started during a call. It is not set and put back: that would need a way to do so on every platform, in every thread.
"""

from __future__ import annotations

import threading

import torch

__all__ = ["check_rounding"]

# float64, as Python's own numbers, and variables, so that nothing is added up beforehand. To nearest the first sum is
# the number after 1, and the second is 1; upwards both are the number after 1, downwards and towards zero both are 1.
_ONE, _NEXT = 1.0, 1.0 + 2.0**-52
_MORE_THAN_HALF, _LESS_THAN_HALF = 2.0**-53 + 2.0**-54, 2.0**-54

_SHARE = 1 << 15  # elements of an operation for which torch takes one thread more
_seen = (
    threading.local()
)  # how many of torch's threads have been looked at; each caller has threads of its own


def check_rounding() -> None:
    """Raise RuntimeError unless the CPU rounds to nearest, in this thread and in those that torch has for it."""
    if _ONE + _MORE_THAN_HALF != _NEXT or _ONE + _LESS_THAN_HALF != _ONE:
        raise RuntimeError(
            "rounding mode: expected the CPU to round to nearest, as it does by default, got another mode (set by "
            "fesetround or in MXCSR), in which results have other bits; set FE_TONEAREST before the call"
        )
    threads = torch.get_num_threads()
    if threads > 1 and getattr(_seen, "threads", 1) != threads:
        _check_pool(threads)
        _seen.threads = threads


def _check_pool(threads: int) -> None:
    ones = torch.ones(threads * _SHARE, dtype=torch.float32, device="cpu")
    half = 2.0**-24
    if not bool((ones + 1.5 * half != 1).all() & (ones + 0.5 * half == 1).all()):
        raise RuntimeError(
            "rounding mode: expected torch's threads to round to nearest, got another mode in one of them: they were "
            "started while fesetround or MXCSR had set it; set FE_TONEAREST before torch first uses its threads"
        )
