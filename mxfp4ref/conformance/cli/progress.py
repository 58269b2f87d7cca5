"""How far a command has come: a bar on a terminal, and lines where none can be drawn."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

from mxfp4ref.conformance.cli.terminal import animated, console, echo
from mxfp4ref.conformance.heartbeat import ALL_TOGETHER, heartbeat

if TYPE_CHECKING:
    from mxfp4ref.conformance.results import CaseResult

__all__ = ["case_progress", "progress"]


@contextmanager
def progress(
    *, lines: bool = False, first: str = "", total: int | None = None, before: bool = False
) -> Iterator[Callable[..., None]]:
    """A function to call after each step, or `before` it, with its name and the number of steps; 0 if unknown.

    A third argument is whether the steps to come may take as long as those done.

    It moves a progress bar on stderr, which shows `first` and `total` until then. Where none can be drawn it prints a
    line, if `lines`; and how far it has come, after each so many seconds that pass in silence.
    """
    done = itertools.count(0 if before else 1)
    if animated():
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=console(), transient=True) as bar:
            task = bar.add_task(first, total=total)
            yield lambda name, total, rate=True: bar.update(
                task, completed=next(done), total=total or None, description=name
            )
        return

    def say(words: str) -> None:
        with suppress(OSError, ValueError):  # stderr is closed
            echo(words, err=True)

    moments = [time.monotonic()]
    with heartbeat(say) as now:
        now(partial(_so_far, 0, total, 0.0, first))

        def line(name: str, total: int, rate: bool = True) -> None:
            count = next(done)
            if lines:
                echo(f"[{count:3}/{total}] {name}", err=True)
            words = f"now {name}" if before and total else name
            if lines:  # which has told the name
                words = "now the end of the run" if count == total else ""
            moments.append(time.monotonic())
            end = moments[-1] + _left(moments, total) * rate
            now(partial(_so_far, count, total, end, words))

        yield line


def _left(moments: Sequence[float], total: int) -> float:
    """How long the rest takes, by the last quarter of all steps; 0 before so many are done beside the first.

    The first one waits for what is imported and compiled, and the diagnoses of the first cases that fail are longer.

    Args:
        moments: the beginning, and the end of each step.
        total: how many steps there are.
    """
    ground, done = -(-total // 4), len(moments) - 1
    if not ground or done <= ground:
        return 0.0
    return (moments[-1] - moments[-1 - ground]) / ground * (total - done)


def _so_far(count: int, total: int | None, end: float, now: str) -> str:
    """ "12 of 69 done, about 40 s more; 3 failed; now gemm/ordinary", where that ends at a moment to come."""
    left = end - time.monotonic()
    rate = f", about {left:.0f} s more" if left >= 1 else ""
    return "; ".join(filter(None, (f"{count} of {total} done{rate}" if total else "", now)))


@contextmanager
def case_progress(
    names: Sequence[str], max_failures: int | None = None
) -> Iterator[Callable[[CaseResult], None]]:
    """`progress` of these cases of a run, those that it can run: how many have failed, and which one is running.

    After the last case, or so many failures, that is the diagnosis of those that failed.

    On a terminal a case that fails is also told at once, in a line, and in a second one what is known of it.
    """
    from mxfp4ref.conformance.case_result import enough
    from mxfp4ref.conformance.findings.finding import listed
    from mxfp4ref.conformance.reports.report_text import headline

    told_of = {*names}
    done = failed = 0
    outright: list[CaseResult] = []
    skipped = False  # which takes no time, and says nothing of how long the others take
    with progress(first=f"now {names[0]}" if names else "", total=len(names)) as step:

        def advance(result: CaseResult) -> None:
            nonlocal done, failed, skipped
            if result.case not in told_of:
                return
            skipped |= result.status == "skipped"
            done, failed = done + 1, failed + (not result.ok)
            outright.extend([result] * result.fails_outright)
            if not result.ok and sys.stderr.isatty():
                echo(headline(result).split("\n")[0], err=True)
                found = result.diagnosis
                if found is not None and (found.finding.exact or not result.within_bounds):
                    said = (
                        listed(str(found.finding))[0] or found.stage or f"first: {found.output} {found.first}"
                    )
                    echo(f"    {said}", err=True)
            ended = done == len(names) or enough(outright, max_failures)
            last = ALL_TOGETHER if failed else "the end of the run"
            over = failed - len(outright) if max_failures else 0
            told = f"{failed} failed{f', {over} of them passed over, within bounds' if over else ''}"
            words = f"{told}; now {last if ended else names[done]}"
            if ended and done < len(names):  # there is no rate: the other cases are not run
                step(f"{done} of {len(names)} done; {words}", 0)
            else:
                step(words, len(names), not skipped)

        yield advance
