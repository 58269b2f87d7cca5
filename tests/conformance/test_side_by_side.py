"""Runs of many cases: side by side, interrupted, diagnosed more or less."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mxfp4ref.conformance import CaseResult, Interrupted, Options, Report, diagnosing, families, run
from mxfp4ref.conformance.diagnosing import Failing
from mxfp4ref.conformance.findings import suspects
from mxfp4ref.conformance.isolation import execution
from mxfp4ref.conformance.kernels.adapters import KernelError
from mxfp4ref.conformance.side_by_side import side_by_side
from mxfp4ref.goldens import Goldens, open_goldens
from tests.helpers import forked, kernels_under_test
from tests.helpers.usual import first

GOLDENS = open_goldens()
NAMES = ["finalize/slot_order", "formats/every_code_by_row", "gemm/ordinary", "layout/swap_halves"]
COMPARE = Options(diagnosis="none")
KERNEL = "tests.helpers.kernels_under_test:dies_once"  # on the first


def cases() -> list[Any]:
    return [GOLDENS.load(name) for name in NAMES]


def told(report: Report) -> list[tuple[Any, ...]]:
    """All that has to be the same however many run at once."""
    return [(r.case, r.status, r.tiles, r.differing, r.message.split(";")[0]) for r in report.results]


@pytest.mark.usefixtures("copied_processes")
@pytest.mark.parametrize("spec", first(1, [KERNEL, "defect:last_slot_dropped"]))
def test_results_and_their_order_are_those_of_one_at_a_time(spec: str) -> None:
    seen: list[str] = []
    one = run(spec, cases(), COMPARE)
    two = run(spec, cases(), replace(COMPARE, jobs=3), progress=lambda result: seen.append(result.case))
    assert told(two) == told(one)
    assert not one.ok
    assert seen == NAMES
    assert (one.verdict, one.left) == (two.verdict, two.left)


def _processes() -> list[str]:
    """The ids of kernels' processes, and of what is copied to make them."""
    found = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True
    )
    lines = [line for line in found.stdout.splitlines() if "<defunct>" not in line]
    return sorted(line.split()[0] for line in lines if "kernel_process" in line or "forked" in line)


@pytest.fixture
def processes(copied_processes: None) -> list[str]:
    """Those before a run."""
    forked.original(True)
    assert _processes()
    return _processes()


def test_enough_failures_are_the_same_side_by_side(processes: list[str]) -> None:
    options = replace(COMPARE, max_failures=1)
    one, two = (run(KERNEL, cases(), replace(options, jobs=jobs)) for jobs in (1, 2))
    assert told(one) == told(two)
    assert (len(two.results), two.left) == (1, 3)
    assert _processes() == processes  # none is left


def test_only_isolated_kernels_run_side_by_side() -> None:
    for kernel, isolate in ((kernels_under_test.good, None), ("oracle", False)):
        with pytest.raises(ValueError, match="jobs: expected 1, or a kernel given by its name and isolated"):
            run(kernel, cases(), Options(jobs=2), isolate=isolate)
    with pytest.raises(ValueError, match="jobs: expected"):
        Options(jobs=0)


def test_an_interrupted_run_gives_what_was_run(processes: list[str]) -> None:
    def interrupt(result: CaseResult) -> None:
        if result.case == NAMES[1]:
            raise KeyboardInterrupt

    for jobs in (1, 2):
        with pytest.raises(KeyboardInterrupt) as raised:
            run("oracle", cases(), replace(COMPARE, jobs=jobs), progress=interrupt)
        assert isinstance(raised.value, Interrupted)
        report = raised.value.report
        assert [r.case for r in report.results] == NAMES[:2]
        assert (report.ok, report.interrupted, report.left) == (False, True, 2)
        assert report.outcome == "oracle: interrupted, no verdict; 0 of 2 cases failed, of 4."
        assert report.unfinished.startswith("2 cases were not run; to run all: mxfp4ref conform oracle")
    assert _processes() == processes  # none is left


INTERRUPTED = """
import os, signal, threading
from mxfp4ref.conformance import Interrupted, Options, run
from mxfp4ref.goldens import open_goldens

def interrupted(**arguments):
    started.append(threading.current_thread())
    os.kill(os.getpid(), signal.SIGINT)
    over.wait(30)

started, over = [], threading.Event()
try:
    run(interrupted, [open_goldens().load("finalize/slot_order")], Options(diagnosis="none"))
except Interrupted as stopped:
    print(stopped.report.results)
over.set()
started[0].join(30)
print(len(started), started[0].is_alive())
"""


@pytest.mark.usefixtures("copied_processes")
def test_an_interruption_while_the_kernel_runs() -> None:
    """Its thread, which is given up, does not run the kernel a second time."""
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["()", "1 False", ""]


def test_searches_are_limited_in_processor_time() -> None:
    """What is found does not depend on what else the machine does."""
    for path in (*Path(families.__file__).parent.glob("*.py"), Path(suspects.__file__)):
        assert "monotonic" not in path.read_text(encoding="utf-8"), path.name


@pytest.mark.usefixtures("patient")
def test_diagnoses(monkeypatch: pytest.MonkeyPatch) -> None:
    some = cases()[:1]
    (none,) = run("defect:last_slot_dropped", some, COMPARE).results
    assert none.diagnosis is None
    monkeypatch.setattr(diagnosing, "judge", None)  # is not reached
    quick = run("defect:last_slot_dropped", some, Options(diagnosis="quick", repeat=False))
    assert quick.defects == ("last_slot_dropped",)
    assert quick.results[0].diagnosis is not None
    assert quick.results[0].diagnosis_seconds > 0
    with pytest.raises(ValueError, match="diagnosis: expected one of 'quick', 'full', 'none', got 'deep'"):
        Options(diagnosis="deep")


@pytest.mark.slow
@pytest.mark.usefixtures("patient")
def test_progress_sees_a_quick_diagnosis() -> None:
    seen: list[CaseResult] = []
    report = run(
        "defect:last_slot_dropped",
        cases()[:1],
        Options(repeat=False, diagnosis="quick"),
        progress=seen.append,
    )
    assert seen[0].diagnosis is not None
    assert report.defects == ("last_slot_dropped",)


def test_what_was_tested_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Some(Goldens):
        def names(self, suite: str | None = None) -> list[str]:
            return NAMES[:1]

    report = run("oracle", Some(GOLDENS.root), COMPARE)
    assert report.goldens is not None
    assert (report.goldens.cases, report.goldens.sha256) == (len(GOLDENS.entries), GOLDENS.sha256)
    assert report.verdict.endswith(f"in the one case that ran, of the goldens' {len(GOLDENS.entries)}.")
    assert report.date.endswith("Z")
    assert report.environment["mxfp4ref"]
    assert report.arguments == ("oracle", "--diagnosis", "none")
    result = report.results[0]
    assert 0 < result.kernel_seconds <= result.seconds <= report.seconds


def test_an_interruption_between_two_events_gives_the_thread_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only while one is waited for."""

    class Interrupted(str):
        def __eq__(self, other: object) -> bool:
            raise KeyboardInterrupt

        __hash__ = str.__hash__

    told: list[Any] = []
    over, known = threading.Event(), threading.Event()

    def work(report: Any, abandoned: Any) -> Any:
        report(Interrupted(execution.RUN))
        over.wait(30)
        told.append(abandoned())
        known.set()

    with pytest.raises(KeyboardInterrupt):
        execution.in_thread(work)
    over.set()
    assert known.wait(30)
    assert told == [True]


def test_a_process_that_cannot_be_started_costs_no_result(capsys: pytest.CaptureFixture[str]) -> None:
    """A GPU may have room for one."""

    class Alone:
        def another(self) -> Any:
            raise KernelError("no room")

        def stop(self, seconds: float = 0) -> None: ...

    first: Any = Alone()
    found = list(side_by_side(first, 3, range(9), lambda worker, item: (worker is first, item)))
    assert found == [(True, item) for item in range(9)]
    assert capsys.readouterr().err == "one process fewer for the kernel: no room\n" * 2


def test_an_interrupted_diagnosis_costs_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Failing, "take", interrupted)
    with pytest.raises(Interrupted) as raised:
        run("defect:last_slot_dropped", cases()[:1], Options(repeat=False))
    report = raised.value.report
    assert [r.status for r in report.results] == ["differs"]
    assert report.verdict.endswith("interrupted, no verdict; 1 of 1 case failed.")
    assert report.left == 0
