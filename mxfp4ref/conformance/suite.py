"""Running a kernel over golden cases: equal, or what is wrong with it.

    report = run("mypackage.kernels:fused_moe", open_goldens())
    print(report.verdict)

In mode "exact" an output has to equal, in every bit, the expected output for one of the legitimate pairs of K
tiles. In mode "bounded", for kernels that sum in another order, it has to lie in the interval that `bounds`
computes for it, and a router's ids and weights in those of `router_bounds`; all other kinds stay exact.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from mxfp4ref._compiled import compile_loops
from mxfp4ref._files import check_outside
from mxfp4ref._validate import check_function, check_instance, shown
from mxfp4ref.conformance.case_result import enough
from mxfp4ref.conformance.diagnosing import Failed, Failing, diagnosed
from mxfp4ref.conformance.goldens_used import goldens_used, load_unchanged
from mxfp4ref.conformance.isolation.worker import Worker
from mxfp4ref.conformance.kernels.adapters import Kernel, KernelError
from mxfp4ref.conformance.kernels.loading import check_device, environment, is_stand_in, load_kernel_here
from mxfp4ref.conformance.options import Options
from mxfp4ref.conformance.reports.again import conform_arguments
from mxfp4ref.conformance.results import CaseResult, Report, now
from mxfp4ref.conformance.running import compare_case, told_alone
from mxfp4ref.conformance.side_by_side import side_by_side
from mxfp4ref.goldens import GoldenError, Goldens
from mxfp4ref.goldens.case import Case

__all__ = ["InternalError", "Interrupted", "run", "run_case"]

_DEFAULTS = Options()
_COUNTED = 1000  # cases of an iterator that were not run, at most


class InternalError(Exception):
    """An error of this package itself, its cause: there is no verdict; `report` as of a `GoldenError`."""

    report: Report | None = None


class Interrupted(KeyboardInterrupt):
    """A run was interrupted; `report` is of the cases that had been run, and no verdict."""

    def __init__(self, report: Report) -> None:
        super().__init__(report.verdict)
        self.report = report


def run(
    kernel: str | Callable[..., Any] | Kernel,
    cases: Goldens | Iterable[Case],
    options: Options = _DEFAULTS,
    *,
    device: str | None = None,
    isolate: bool | None = None,
    progress: Callable[[CaseResult], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Report:
    """Run a kernel over cases and compare.

    Args:
        kernel: a name as in `kernels`, or a callable with flashinfer's signature.
        cases: goldens, or any cases; loaded one at a time, or as many as run side by side.
        options: how to compare.
        device: where the kernel's tensors go.
        isolate: run the kernel in a process of its own, which never sees the expected outputs. By default that is
            done with every kernel that is given by its name and is not one of this package's own, and with all where
            cases run side by side. A kernel that is not isolated may end this process, and a verdict on one that
            means harm is worth nothing.
        progress: called with each result, in the order of the cases.
        note: called in words before the diagnosis of a large case, which may take long.

    Raises:
        KernelError: the kernel cannot be loaded, or its device is not here.
        GoldenError: a case is damaged; with a report of the cases that had been run.
        TypeError: an argument is something else, or something else than a case is among the cases.
        ValueError: reproducers among the goldens, a callable to be isolated, cases side by side of a kernel that is
            not, or all tactics of a kernel whose tactics cannot be chosen.
        InternalError: a mistake of this package, its cause; with a report of the cases that had been run.
        Interrupted: as KeyboardInterrupt, with a report of the cases that had been run.
    """
    check_instance("options", options, Options)
    for name, given, wanted in (("device", device, str), ("isolate", isolate, bool)):
        if given is not None:
            check_instance(name, given, wanted)
    check_function("progress", progress)
    check_function("note", note)
    if isinstance(cases, str | Tensor) or not isinstance(cases, Goldens | Iterable):
        raise TypeError(f"cases: expected Goldens or Case objects, got {type(cases).__name__} {shown(cases)}")
    if isolate and not isinstance(kernel, str):
        raise ValueError(f"isolate: expected a kernel given by its name, got {type(kernel).__name__}")
    if options.jobs > 1 and (isolate is False or not isinstance(kernel, str)):
        what = "one that is not isolated" if isinstance(kernel, str) else type(kernel).__name__
        raise ValueError(f"jobs: expected 1, or a kernel given by its name and isolated, got {what}")
    goldens = cases if isinstance(cases, Goldens) else None
    if goldens is not None and options.dump is not None:
        check_outside("dump", options.dump, goldens.root)
    arguments = (
        conform_arguments(kernel, options, device, isolate, goldens) if isinstance(kernel, str) else ()
    )
    state = _State(options, goldens, now(), arguments, note)
    report: Report | None = None
    try:
        with ExitStack() as stack:
            report = _run(stack, kernel, cases, (device, isolate), progress, state)
    except KeyboardInterrupt:
        if report is None:
            raise
        raise Interrupted(replace(report, interrupted=True)) from None  # while the kernel's process was ended
    return report


def _run(
    stack: ExitStack,
    kernel: str | Callable[..., Any] | Kernel,
    cases: Goldens | Iterable[Case],
    where: tuple[str | None, bool | None],
    progress: Callable[[CaseResult], None] | None,
    state: _State,
) -> Report:
    """As `run`; what the stack gets ends with it."""
    (device, isolate), options = where, state.options
    compile_loops()  # before a process of the kernel's, which may use this package, does so each time anew
    worker: Worker | None = None
    if isinstance(kernel, str) and (
        options.jobs > 1 or (not is_stand_in(kernel) if isolate is None else isolate)
    ):
        threads = max(torch.get_num_threads() // options.jobs, 1) if options.jobs > 1 else None
        worker = state.worker = stack.enter_context(Worker(kernel, device, options.timeout, threads=threads))
        loaded = worker.kernel
        # What it says of this package is not asked of a process that a kernel is in.
        state.environment = {**worker.environment, **environment("cpu")}
    else:
        loaded = kernel if isinstance(kernel, Kernel) else load_kernel_here(kernel, device)
        check_device(loaded.device)
        state.environment = environment(loaded.device)
    if options.all_tactics and not loaded.forces_tactics:
        raise ValueError(
            f"all_tactics: expected a kernel whose tactics can be chosen (flashinfer), got {loaded.name}"
        )
    try:
        todo = _Todo(cases)
        compare = partial(_compare, loaded, options)
        each: Generator[tuple[CaseResult, Failed | None], None, None] = (
            side_by_side(worker, options.jobs, todo, compare)
            if worker is not None and options.jobs > 1
            else (compare(worker, load) for load in todo)
        )
        with closing(each):
            for result, failure in each:
                state.results.append(result)  # an interruption costs its diagnosis only
                with _own_errors():
                    state.diagnose_last(failure)
                if progress is not None:
                    progress(state.results[-1])
                if enough([r for r in state.results if r.fails_outright], options.max_failures):
                    break
        state.leave(todo, loaded)
        with _own_errors():
            return state.report(loaded.name)
    except (GoldenError, InternalError) as error:  # after hours, maybe
        state.leave(todo, loaded, count=False)
        with suppress(Exception):  # where the error is in what makes a report
            error.report = state.report(loaded.name, interrupted=True) if state.results else None
        raise
    except KeyboardInterrupt:
        state.leave(todo, loaded, count=False)
        raise Interrupted(state.report(loaded.name, interrupted=True)) from None


def run_case(
    kernel: Kernel, case: Case, options: Options = _DEFAULTS, *, worker: Worker | None = None
) -> CaseResult:
    """Run a kernel on one case; arguments as in `run`."""
    check_instance("kernel", kernel, Kernel)
    check_instance("options", options, Options)
    result, failure = compare_case(kernel, case, options, worker)
    result = result if failure is None else diagnosed(result, failure, options.diagnosis)
    return told_alone(result, worker)


def _compare(
    kernel: Kernel, options: Options, worker: Worker | None, load: Callable[[], Case]
) -> tuple[CaseResult, Failed | None]:
    case = load()
    with _own_errors():
        return compare_case(kernel, case, options, worker)


@contextmanager
def _own_errors() -> Iterator[None]:
    """What is raised inside is this package's error, and not that of who called it."""
    try:
        yield
    except (GoldenError, KernelError):
        raise
    except (TypeError, ValueError) as error:
        raise InternalError(f"{type(error).__name__}: {error}") from error


class _Todo(Iterator[Callable[[], Case]]):
    """The cases, each as a function that loads it."""

    def __init__(self, cases: Goldens | Iterable[Case]) -> None:
        self._goldens = cases if isinstance(cases, Goldens) else None
        self._all: Iterable[str | Case]
        self._each: Iterator[Callable[[], Case]]
        if isinstance(cases, Goldens):
            names = self._all = cases.in_order_to_run()
            self._each = iter([partial(load_unchanged, cases, name, cases.sha256) for name in names])
        else:
            self._all, self._each = cases, (partial(_checked, case) for case in cases)
        self._taken = 0

    def __next__(self) -> Callable[[], Case]:
        one = next(self._each)
        self._taken += 1
        return one

    def left(self, done: int, *, count: bool = True) -> int:
        """How many are left when so many are done; of an iterator, which may have no end, not more than a few."""
        if isinstance(self._all, Sized):
            return len(self._all) - done
        return self._taken - done + (sum(1 for _ in islice(self._each, _COUNTED)) if count else 0)

    def unable(self, done: int, kernel: Kernel) -> int:
        """How many of those the kernel does not run, as far as that can be told without an iterator's cases."""
        count = 0
        with suppress(GoldenError, TypeError):  # of damaged goldens, and of what is no case
            left: Sequence[Any] = self._all[done:] if isinstance(self._all, Sequence) else ()
            for one in left:
                about = self._goldens.about(one) if self._goldens is not None else vars(_checked(one))
                count += bool(kernel.unable(about["kind"], about["parameters"]))
        return count


def _checked(case: Case) -> Case:
    if isinstance(case, str):
        raise TypeError(f"cases: expected Case, got str; did you mean open_goldens().load({shown(case)})?")
    check_instance("cases", case, Case)
    return case


@dataclass
class _State:
    """How far a run has come."""

    options: Options
    goldens: Goldens | None
    date: str
    arguments: tuple[str, ...]
    note: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        self.start = time.perf_counter()
        self.failing = Failing(self.options.diagnosis, self.note)
        self.results: list[CaseResult] = []
        self.environment: dict[str, str] = {}
        self.worker: Worker | None = None
        self.left = self.unable = 0
        self.done = 0.0  # when the last case was

    def leave(self, todo: _Todo, kernel: Kernel, *, count: bool = True) -> None:
        """What is left to do is left out."""
        done = len(self.results)
        self.left, self.unable = todo.left(done, count=count), todo.unable(done, kernel)

    def diagnose_last(self, failure: Failed | None) -> None:
        """A quick diagnosis of the last result, which counts for it if it is interrupted, too."""
        before, result = time.perf_counter(), self.results[-1]
        try:
            self.results[-1] = self.failing.take(result, failure)
        except KeyboardInterrupt:
            self.results[-1] = result.lasting(diagnosis=time.perf_counter() - before)
            raise

    def report(self, kernel: str, *, interrupted: bool = False) -> Report:
        """With a diagnosis of all cases together, unless the run was interrupted, maybe in one."""
        before = self.done = self.done or time.perf_counter()
        if (
            self.worker is not None and not interrupted
        ):  # the kernel has run: another process does not disturb it
            self.worker.alone.begin()
        found = self.failing.verdict(self.results, self.goldens, search=not interrupted)
        now = time.perf_counter()
        of_cases = sum(r.diagnosis_seconds for r in found.results)
        of_cases -= sum(r.diagnosis_seconds for r in self.results)  # which counts for them already
        results = found.results if interrupted else tuple(told_alone(r, self.worker) for r in found.results)
        return Report(
            kernel=kernel,
            mode=self.options.mode,
            results=results,
            defects=found.defects,
            seconds=time.perf_counter() - self.start,
            environment=self.environment,
            finding=found.finding,
            left=self.left,
            unable=self.unable,
            interrupted=interrupted,
            goldens=None if self.goldens is None else goldens_used(self.goldens),
            date=self.date,
            arguments=self.arguments,
            verdict_seconds=now - before - of_cases,
        )
