"""How far a command has come: a bar on a terminal, and lines where none can be drawn."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from mxfp4ref._words import duration
from mxfp4ref.conformance.cli.terminal import animated, console, echo
from mxfp4ref.conformance.heartbeat import ALL_TOGETHER, heartbeat, told_to
from mxfp4ref.conformance.pace import Pace

if TYPE_CHECKING:
    from mxfp4ref.conformance.results import CaseResult

__all__ = ["case_progress", "progress"]


@contextmanager
def progress(
    *, lines: bool = False, first: str = "", total: int | None = None, before: bool = False, left: float = 0.0
) -> Iterator[Callable[..., None]]:
    """A function to call after each step, or `before` it, with its name and the number of steps; 0 if unknown.

    A third argument is how many seconds the steps to come may take, by default what those done tell; `left` is that
    of all steps, and 0 where nothing is known of it. With False as the fourth the step is not done yet.

    It moves a progress bar on stderr, which shows `first` and `total` until then. Where none can be drawn it prints a
    line, if `lines`; and how far it has come, after each so many seconds that pass in silence.
    """
    count = -1 if before else 0
    moments = [time.monotonic()]

    def end(total: int, seconds: float | None) -> float:
        moments.append(time.monotonic())
        return moments[-1] + (_left(moments, total) if seconds is None else seconds)

    if animated():
        with _bar() as bar:
            task = bar.add_task(first, total=total, end=moments[0] + left)

            def move(name: str, total: int, seconds: float | None = None, done: bool = True) -> None:
                nonlocal count
                count += done
                bar.update(
                    task, description=name, completed=count, total=total or None, end=end(total, seconds)
                )

            yield move
        return

    def say(words: str) -> None:
        with suppress(OSError, ValueError):  # stderr is closed
            echo(words, err=True)

    with heartbeat(say) as now:
        now(partial(_so_far, 0, total, moments[0] + left, first))

        def line(name: str, total: int, seconds: float | None = None, done: bool = True) -> None:
            nonlocal count
            count += done
            if lines:
                echo(f"[{count:3}/{total}] {name}", err=True)
            words = f"now {name}" if before and total else name
            if lines:  # which has told the name
                words = "now the end of the run" if count == total else ""
            now(partial(_so_far, count, total, end(total, seconds), words))

        yield line


def _bar() -> Any:
    """rich's, narrow enough for a name of a case beside it, with "0:12 of 1:30" as far as that is known."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn
    from rich.table import Column
    from rich.text import Text

    class Time(ProgressColumn):
        def render(self, task: Any) -> Text:
            elapsed, left = int(task.elapsed or 0), int(task.fields["end"] - time.monotonic())
            of = f" of {_clock(elapsed + left)}" if left >= 1 else ""
            return Text(f"{_clock(elapsed)}{of}", style="progress.elapsed")

    def fixed() -> Column:
        return Column(no_wrap=True)

    words = TextColumn("{task.description}", table_column=Column(no_wrap=True, ratio=1))
    columns = (BarColumn(10), MofNCompleteColumn(table_column=fixed()), Time(fixed()), words)
    return Progress(*columns, console=console(), transient=True, expand=True)


def _clock(seconds: int) -> str:
    """ "1:05", "1:00:00"."""
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def _left(moments: Sequence[float], total: int) -> float:
    """How long the rest takes, by the last quarter of all steps; 0 before so many are done beside the first.

    Args:
        moments: the beginning, and the end of each step.
        total: how many steps there are.
    """
    ground, done = -(-total // 4), len(moments) - 1
    if not ground or done <= ground:
        return 0.0
    return (moments[-1] - moments[-1 - ground]) / ground * (total - done)


def _rest(end: float) -> str:
    """ "about 40 s more", until a moment to come."""
    left = end - time.monotonic()
    return f"about {duration(left)} more" if left >= 1 else ""


def _so_far(count: int, total: int | None, end: float, now: str) -> str:
    """ "12 of 69 done, about 40 s more; 3 failed; now gemm/ordinary"."""
    so_far = [f"{count} of {total} done" if total else "", _rest(end)]
    return "; ".join(filter(None, (", ".join(filter(None, so_far)), now)))


@contextmanager
def case_progress(
    names: Sequence[str], max_failures: int | None = None, pace: Pace | None = None
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
    told = ""
    outright: list[CaseResult] = []
    pace = pace or Pace(names, {})
    before = time.monotonic()
    with progress(first=f"now {names[0]}" if names else "", total=len(names), left=pace.left) as step:

        def advance(result: CaseResult) -> None:
            nonlocal done, failed, told, before
            if result.case not in told_of:
                return
            done, failed = done + 1, failed + (not result.ok)
            outright.extend([result] * result.fails_outright)
            now = time.monotonic()
            pace.done(result.case, now - before, ran=result.status != "skipped")
            before = now
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
                step(words, len(names), pace.left)

        def at(what: str, seconds: float) -> None:
            step(f"{told}; now all together: {what}", len(names) * (done == len(names)), seconds, False)

        with told_to(at):
            yield advance
