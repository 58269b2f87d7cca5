"""What the tests of the pytest plugin say together: the verdict at the end of a session, and its HTML report."""

from __future__ import annotations

import base64
import os
import pickle
import signal
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from shutil import get_terminal_size
from typing import IO, TYPE_CHECKING, Any

import pytest

from mxfp4ref._files import quoted

if TYPE_CHECKING:
    from mxfp4ref.conformance.pytest_together import Kept
    from mxfp4ref.conformance.results import CaseResult, Report
    from mxfp4ref.goldens import Goldens

__all__ = ["SUITE", "Outcome", "Summary", "Told", "Verdict", "uncaptured_stderr"]

SUITE = "mxfp4"  # what the tests' names begin with


@dataclass(frozen=True)
class Outcome:
    """A case's result, the kernel's name, where it ran, arguments for `conform`, what it gave and is told."""

    result: CaseResult
    kernel: str
    environment: Mapping[str, str]
    arguments: tuple[str, ...]
    kept: Kept | None = None
    told: Told | None = None

    def to_text(self) -> str:
        """As text, as which xdist carries it."""
        return base64.b64encode(pickle.dumps(self)).decode()

    @classmethod
    def of_text(cls, text: str) -> Outcome:
        """What `to_text` gave, in a process of this session."""
        found: Outcome = pickle.loads(base64.b64decode(text))
        return found


@dataclass(frozen=True)
class Summary:
    """What pytest's short summary, and JUnit XML, say of a failure."""

    message: str


@dataclass(frozen=True)
class Told:
    """A failure as pytest shows one: the case and its status, and what there is to say of it."""

    head: str
    lines: list[str]
    reprcrash: Summary

    def __str__(self) -> str:
        return "\n".join([self.head, *self.lines])

    def toterminal(self, writer: Any) -> None:
        writer.line(self.head, bold=True, red=True)
        for line in self.lines:
            writer.line(line)


class Verdict:
    """What all cases say together, and the report. A kernel that ran no case has not passed, as in `conform`."""

    def __init__(self, config: pytest.Config, goldens: Goldens, too_large: list[str]) -> None:
        self._config = config
        self._too_large = too_large
        self._goldens = goldens
        self._by_case: dict[str, Outcome] = {}  # the first that failed, of one that another plugin repeats
        self._chosen: set[str] = (
            set()
        )  # that are to be run, and of which there was a report that tells something
        self._told: set[str] = set()
        self._lost: set[str] = set()
        self._undone: set[str] = set()  # since the session was stopped
        self._unusable = 0  # of those: a kernel that cannot be loaded by xdist's workers, a damaged golden
        self._passed_over: set[str] = set()
        self._html = _html_file(config, goldens)
        from mxfp4ref.conformance.results import now

        self._date = now()
        self._interrupted = self._terminated = False
        self._none_chosen = self._passing_over = (
            False  # though asked for; by a command line about other tests
        )
        self._failed = 0  # whatever another plugin has made of it, but for an expected failure
        self._said = ""  # of the report's file
        self._end_as_ctrl_c_does()

    def _end_as_ctrl_c_does(self) -> None:
        """SIGTERM, as `timeout` and CI send it, leaves a verdict and reports too, unless somebody else answers it."""

        def handle(number: int, frame: object) -> None:
            self._terminated = True
            raise KeyboardInterrupt

        ours = threading.current_thread() is threading.main_thread()
        if ours and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, handle)
            self._config.add_cleanup(_end_at_sigterm)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._choose([item.nodeid for item in session.items])

    def pytest_report_collectionfinish(self, config: pytest.Config, items: list[pytest.Item]) -> list[str]:
        from mxfp4ref.conformance.cli.selecting import in_advance, pace_of
        from mxfp4ref.conformance.kernels.loading import runnable

        kernel = config.getoption("mxfp4_kernel")
        names = [item.name for item in items if item.nodeid.startswith(f"{SUITE}::")]
        pace = pace_of(self._goldens, runnable(kernel, self._goldens, names), kernel)
        return in_advance(pace, "-k 'not models'", config.getoption("maxfail"))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        self._choose(ids)

    def _choose(self, ids: Sequence[str]) -> None:
        self._chosen.update(one for one in ids if one.startswith(f"{SUITE}::"))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.nodeid.startswith(f"{SUITE}::"):
            return
        self._unusable += getattr(report, "mxfp4_unusable", False)
        if hasattr(report, "mxfp4_outcome") or report.failed or report.skipped:
            self._told.add(report.nodeid)
        if hasattr(report, "mxfp4_outcome"):
            outcome = Outcome.of_text(report.mxfp4_outcome)
            if (earlier := self._by_case.get(report.nodeid)) is None or earlier.result.ok:
                self._by_case[report.nodeid] = outcome
            self._failed += not (outcome.result.ok or hasattr(report, "wasxfail"))
            if outcome.told is not None:  # of which xdist makes a text without a summary
                report.longrepr = outcome.told  # type: ignore[assignment]
        elif report.failed:  # before there was a result, or the worker is gone
            self._lost.add(report.nodeid)
        elif report.skipped:  # by a mark, or another plugin
            self._passed_over.add(report.nodeid)

    @property
    def _outcomes(self) -> list[Outcome]:
        return list(self._by_case.values())

    @property
    def _nothing_compared(self) -> bool:
        compared = any(outcome.result.compared for outcome in self._outcomes)
        return bool(self._outcomes or self._passed_over) and not self._lost and not compared

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, None, None]:
        """After all other plugins but what prints, some of which make every exit code 0."""
        try:
            return (yield)
        finally:
            self._finish(session)

    def _finish(self, session: pytest.Session) -> None:
        self._interrupted = session.exitstatus == pytest.ExitCode.INTERRUPTED
        stopped = self._interrupted or session.shouldstop or session.shouldfail
        untold = self._chosen - self._told  # such as where another plugin runs the tests, in its own way
        dry = self._config.getoption("collectonly") or self._config.getoption("setuponly", False)
        if not dry:
            self._undone, self._lost = (untold, self._lost) if stopped else (set(), self._lost | untold)
        line = [str(arg) for arg in self._config.invocation_params.args]
        # With the kernel in a file of settings, a line that chooses tests may be about others.
        about_others = not any(arg.startswith("--mxfp4-kernel") for arg in line) and any(
            arg.startswith(("-k", "-m", "--deselect")) or "::" in arg for arg in line
        )
        again = any(self._config.getoption(name, False) for name in ("lf", "stepwise"))
        # What cannot be loaded is said by itself.
        collected = session.exitstatus != pytest.ExitCode.USAGE_ERROR
        self._none_chosen = collected and not (self._chosen or stopped or dry or again or about_others)
        self._passing_over = collected and about_others and not (self._chosen or dry)
        wrong = self._nothing_compared or bool(self._lost) or self._none_chosen
        if self._html is not None and self._outcomes:
            from mxfp4ref._files import write_file
            from mxfp4ref.conformance.reports.html_report import to_html

            try:
                write_file(self._html, to_html(self._report))
                self._said = f"report: {self._html}"
            except Exception as error:  # a full disk; the verdict is told all the same
                wrong = True
                self._said = f"ERROR: {self._html} could not be written: {type(error).__name__}: {error}"
        if self._terminated:
            session.exitstatus = 128 + signal.SIGTERM
        only_unusable = bool(self._unusable) and self._unusable == session.testsfailed
        if wrong and (session.exitstatus == pytest.ExitCode.OK or only_unusable):
            session.exitstatus = pytest.ExitCode.USAGE_ERROR
        if self._failed and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        lost = f"{len(self._lost):,} without a result" if self._lost else ""
        if not self._outcomes:
            if lost:
                terminalreporter.write_line(f"ERROR: --mxfp4-kernel: {lost}, none with one")
            elif self._none_chosen:
                terminalreporter.write_line("ERROR: --mxfp4-kernel: none ran, all were deselected")
            elif self._passing_over:
                terminalreporter.write_line("--mxfp4-kernel: none ran, all were deselected: no verdict on it")
            elif count := len(self._passed_over):
                terminalreporter.write_line(f"ERROR: --mxfp4-kernel: none ran, {count:,} were skipped before")
            return
        from mxfp4ref.conformance.cli.terminal import wrapped
        from mxfp4ref.conformance.reports.report_text import verdict_lines

        report = self._report
        terminalreporter.section(f"{SUITE}ref")
        good = report.ok and not self._lost
        width = get_terminal_size().columns if terminalreporter.isatty else None
        for n, line in enumerate(verdict_lines(report)):
            colour = {"bold": True, "green": good, "red": not good} if not n else {}
            terminalreporter.write_line(wrapped(line, width), **colour)
        skipped = "" if self._nothing_compared else report.skipped  # the verdict has it
        before = f"{count:,} skipped before they ran" if (count := len(self._passed_over)) else ""
        if told := "; ".join(filter(None, (skipped, before, lost))):
            terminalreporter.write_line(f"{told}.")
        for line in self._too_large:
            terminalreporter.write_line(wrapped(line, width))
        if self._said:
            terminalreporter.write_line(self._said)
        if self._nothing_compared:
            spec = self._config.getoption("mxfp4_kernel")
            terminalreporter.write_line(
                f"ERROR: --mxfp4-kernel: none of the {len(report.results)} cases of {spec} ran on any element"
            )

    @cached_property
    def _report(self) -> Report:
        from mxfp4ref.conformance.goldens_used import goldens_used
        from mxfp4ref.conformance.kernels.loading import runnable
        from mxfp4ref.conformance.pytest_together import verdict
        from mxfp4ref.conformance.results import Report

        outcomes, last = sorted(self._outcomes, key=lambda one: one.result.case), self._outcomes[-1]
        given = [(outcome.result, outcome.kept) for outcome in outcomes]
        start, diagnosis = time.perf_counter(), self._config.getoption("mxfp4_diagnosis")
        found = verdict(given, self._goldens, diagnosis, search=not self._interrupted)
        together = time.perf_counter() - start
        left = self._undone | self._lost
        undone = [one.removeprefix(f"{SUITE}::") for one in self._undone - self._lost]
        return Report(
            last.kernel,
            self._config.getoption("mxfp4_mode"),
            found.results,
            found.defects,
            sum(outcome.result.seconds for outcome in outcomes) + together,
            last.environment,
            found.finding,
            left=len(left),
            unable=len(undone) - len(runnable(self._config.getoption("mxfp4_kernel"), self._goldens, undone)),
            too_large=len(self._too_large),
            interrupted=self._interrupted
            or (bool(self._lost) and all(result.ok for result in found.results)),
            goldens=goldens_used(self._goldens),
            date=self._date,
            arguments=last.arguments,
            verdict_seconds=together,
            line=" ".join(map(quoted, ("pytest", *map(str, self._config.invocation_params.args)))),
        )


def uncaptured_stderr(config: pytest.Config) -> IO[str] | None:
    """What stderr is before pytest captures it; None of a terminal, where pytest itself shows what is running."""
    try:
        if os.isatty(2):
            return None
        found = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace")
    except OSError:  # closed
        return None
    config.add_cleanup(found.close)
    return found


def _end_at_sigterm() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _html_file(config: pytest.Config, goldens: Goldens) -> Path | None:
    """Where the report goes, if one is wanted, once it is clear that it can be written."""
    if (name := config.getoption("mxfp4_html")) is None:
        return None
    from click import ClickException

    from mxfp4ref._files import files_below
    from mxfp4ref.conformance.cli.report_files import ReportFiles
    from mxfp4ref.conformance.cli.selecting import sources

    here, kernel = config.invocation_params.dir, config.getoption("mxfp4_kernel")
    inputs = [*sources(kernel), *(here / argument.partition("::")[0] for argument in config.args)]
    path: Path = here / name
    try:
        if path.is_dir():
            raise ValueError(f"{path}: expected a file to write to, it is a folder")
        ReportFiles({"html": path}).check([*files_below(goldens.root), *inputs])
    except (ClickException, ModuleNotFoundError, ValueError, OSError) as error:
        raise pytest.UsageError(f"--mxfp4-html: {error}") from error
    return path
