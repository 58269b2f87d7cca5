"""Several cases at once, each in a process of the kernel's of its own; what comes of them comes in their order."""

from __future__ import annotations

import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import TypeVar

from mxfp4ref.conformance.isolation.worker import Worker
from mxfp4ref.conformance.kernels.adapters import KernelError

__all__ = ["side_by_side"]

_AHEAD = 8  # cases of each process that may be done before an earlier one is

T = TypeVar("T")
Item = TypeVar("Item")


def side_by_side(
    first: Worker, jobs: int, items: Iterable[Item], work: Callable[[Worker, Item], T]
) -> Generator[T, None, None]:
    """What `work` gives for each of the items, in their order, by the first process and others like it.

    When it is closed before the end, or interrupted, the processes are killed, and what they were at is dropped.
    """
    workers, over = [first], threading.Event()
    idle: queue.SimpleQueue[Worker | None] = queue.SimpleQueue()
    for worker in (first, *[None] * (jobs - 1)):
        idle.put(worker)

    def on_any(item: Item) -> T:
        worker = idle.get()
        try:
            while worker is None:  # started in a thread that lasts: with it, on Linux, the process would end
                try:
                    worker = first.another()
                    workers.append(worker)
                except (
                    KernelError,
                    OSError,
                    RuntimeError,
                ) as error:  # such as no room for two on a GPU: the others do the work
                    print(f"one process fewer for the kernel: {error}", file=sys.stderr)
                    worker = idle.get()
            if over.is_set():
                raise CancelledError
            return work(worker, item)
        finally:
            idle.put(worker)

    pending: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(jobs)
    try:
        for item in items:
            pending.append(pool.submit(on_any, item))
            while len(pending) > _AHEAD * jobs or (pending and pending[0].done()):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BaseException:
        over.set()
        for future in pending:
            future.cancel()
        for worker in workers:
            worker.stop(0)
        raise
    finally:
        pool.shutdown()
        for worker in workers:
            worker.stop()
