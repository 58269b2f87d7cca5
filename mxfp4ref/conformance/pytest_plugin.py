"""pytest plugin: `pytest --mxfp4-kernel=package.module:function` makes a test of every golden case.

The tests are named `mxfp4::CASE`, and `pytest 'mxfp4::CASE'` runs that one. Everything heavy is imported when it is
first needed: without the option and the fixtures, no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pytest

from mxfp4ref._choices import DIAGNOSES, MODES
from mxfp4ref.conformance.pytest_choosing import chosen, goldens_of, names_of, take_ids
from mxfp4ref.conformance.pytest_verdict import SUITE, Outcome, Summary, Told, Verdict, uncaptured_stderr

if TYPE_CHECKING:
    from mxfp4ref.conformance import Options
    from mxfp4ref.conformance.diagnosing import Failed
    from mxfp4ref.conformance.isolation.worker import Worker
    from mxfp4ref.conformance.kernels.adapters import Kernel
    from mxfp4ref.conformance.results import CaseResult
    from mxfp4ref.goldens import Case

_FULLY = 3  # failures of a session that are diagnosed fully, and the others quickly


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mxfp4ref", "MXFP4 mixture-of-experts conformance")
    group.addoption(
        "--mxfp4-kernel",
        metavar="SPEC",
        help="test this kernel on every golden case: package.module:function, flashinfer, oracle, ... "
        "(see mxfp4ref conform --help)",
    )
    group.addoption("--mxfp4-goldens", metavar="DIR", help="folder of the golden cases")
    group.addoption(
        "--mxfp4-case",
        metavar="GLOB",
        action="append",
        help="only these cases, as in 'gemm/*' (repeatable); also for the fixture mxfp4_case",
    )
    group.addoption(
        "--mxfp4-mode",
        choices=MODES,
        default="exact",
        help="equal bits (default), or within the bounds of every correct evaluation",
    )
    group.addoption("--mxfp4-device", metavar="DEVICE", help="where the kernel's tensors go")
    group.addoption("--mxfp4-timeout", metavar="SECONDS", type=float, help="limit for each run of the kernel")
    group.addoption(
        "--mxfp4-isolate",
        action="store_true",
        default=None,
        help="run the kernel in a process of its own, which survives hangs and crashes: the default for every "
        "kernel but the stand-ins",
    )
    group.addoption(
        "--mxfp4-no-isolate",
        action="store_false",
        dest="mxfp4_isolate",
        default=None,
        help="run the kernel in pytest's process, which another one watches unless a debugger does",
    )
    group.addoption(
        "--mxfp4-diagnosis",
        choices=DIAGNOSES,
        default="full",
        help=f"say what is wrong where bits differ: full (default), up to a minute for each of the first {_FULLY} "
        "failures and about a second for the others; quick, about a second for each; none",
    )
    group.addoption("--mxfp4-html", metavar="FILE", help="write a report on the kernel as one HTML file")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Watch a session that a kernel may end at any place, with any exit code."""
    from mxfp4ref.conformance.pytest_watching import watch

    return watch(config) if config.getoption("mxfp4_isolate") is False else None


def pytest_configure(config: pytest.Config) -> None:
    ids = take_ids(config)
    if config.getoption("mxfp4_kernel") == "":
        raise pytest.UsageError(
            "--mxfp4-kernel: expected a kernel, got nothing, as of a variable that is not set"
        )
    if config.getoption("mxfp4_kernel") is None:
        if ids is not None or config.getoption("mxfp4_html") is not None:
            what = f"{SUITE}::..." if ids is not None else "--mxfp4-html"
            raise pytest.UsageError(f"{what}: expected --mxfp4-kernel=..., which says what is tested")
        return
    given = getattr(config, "workerinput", {}).get(_KEY)
    config.stash[_LARGE], config.stash[_CHOSEN] = given or chosen(config, ids)
    config.stash[_SHA256] = goldens_of(config).sha256
    if not hasattr(config, "workerinput"):  # xdist's workers report to this one
        config.pluginmanager.register(Verdict(config, goldens_of(config), config.stash[_LARGE]))
        config.stash[_STDERR] = uncaptured_stderr(config)


_STDERR = pytest.StashKey[IO[str] | None]()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """All of xdist's workers collect what this process chose: what memory is free changes."""
    if _CHOSEN in node.config.stash:
        node.workerinput[_KEY] = node.config.stash[_LARGE], node.config.stash[_CHOSEN]


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Add the suite to what a session has collected: it is then counted and chosen from like everything else."""
    report = yield
    config = collector.config
    if isinstance(collector, pytest.Session) and config.getoption("mxfp4_kernel") and report.passed:
        if not hasattr(config, "workerinput") and not config.getoption("collectonly"):
            _under_test(config)  # what cannot be loaded is wrong usage, said once
        report.result.append(_ConformanceSuite.from_parent(collector, name=SUITE, nodeid=SUITE))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Hand the result over with the report, or that there is none through no fault of the kernel's."""
    report = yield
    if isinstance(item, _ConformanceItem) and call.excinfo is not None:
        from mxfp4ref.goldens import GoldenError

        report.mxfp4_unusable = call.excinfo.errisinstance((pytest.UsageError, GoldenError))  # type: ignore[attr-defined]
    if isinstance(item, _ConformanceItem) and report.when == "call" and item.result is not None:
        from mxfp4ref.conformance.pytest_together import Kept

        tested = _under_test(item.config)
        kernel, where = tested.kernel, (tested.environment, tested.arguments)
        kept = Kept.of(item.failed, kernel.generation)
        told = report.longrepr if isinstance(report.longrepr, Told) else None
        outcome = Outcome(item.result, kernel.name, *where, kept, told)
        report.mxfp4_outcome = outcome.to_text()  # type: ignore[attr-defined]
    return report


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "mxfp4_case" in metafunc.fixturenames:
        metafunc.parametrize("mxfp4_case", names_of(metafunc.config), indirect=True)


@pytest.fixture
def mxfp4_case(request: pytest.FixtureRequest) -> Case:
    """A golden case; a test that asks for it runs once for each."""
    return goldens_of(request.config).load(request.param)


@pytest.fixture(scope="session")
def mxfp4_oracle() -> Callable[..., Any]:
    """`torch_ref_cutlass_fused_moe`: flashinfer's signature, the SM90 kernel's bits."""
    from mxfp4ref.model.flashinfer import torch_ref_cutlass_fused_moe

    return torch_ref_cutlass_fused_moe


@pytest.fixture(scope="session")
def assert_bits_equal() -> Callable[..., None]:
    """`assert_bits_equal(got, expected)`: dtype, shape and every bit, or the first difference."""
    from mxfp4ref.conformance import comparison

    return comparison.assert_bits_equal


class _ConformanceSuite(pytest.Collector):
    """The parent of the tests that `--mxfp4-kernel` adds."""

    def collect(self) -> list[pytest.Item]:
        return [_ConformanceItem.from_parent(self, name=name) for name in self.config.stash[_CHOSEN]]


class _ConformanceItem(pytest.Item):
    """One golden case, run through the kernel."""

    result: CaseResult | None = None
    failed: Failed | None = None

    def runtest(self) -> None:
        from mxfp4ref.conformance.heartbeat import heartbeat

        stderr = self.config.stash.get(_STDERR, None)
        with heartbeat(lambda words: print(words, file=stderr, flush=True)) as now:
            now(f"{SUITE}::{self.name}" if stderr is not None else "")
            self.result, self.failed = _run(self.config, self.name)
        if self.result.status == "skipped":
            pytest.skip(self.result.message)
        if not self.result.ok:
            raise _Nonconformance(self.result)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        from mxfp4ref.conformance.kernels.adapters import KernelError
        from mxfp4ref.conformance.reports.again import case_command
        from mxfp4ref.conformance.reports.report_text import case_lines, headline
        from mxfp4ref.goldens import GoldenError

        if isinstance(excinfo.value, _Nonconformance):
            assert self.result is not None
            head, *more = headline(self.result).split("\n")
            found = self.result.diagnosis
            why = f": {found.finding.sentence} ({found.proof})" if found and found.finding.sentence else ""
            summary = head.removeprefix(f"{self.name}: ") + why
            tested = _under_test(self.config)
            again = case_command(tested.kernel.name, tested.arguments, self.result)
            lines = case_lines(self.result, again)
            return Told(head, [*more, *(f"  {line}" for line in lines)], Summary(summary))
        if isinstance(excinfo.value, GoldenError | KernelError | pytest.UsageError):
            words = f"{self.name}: {excinfo.value}"
            return Told(words, [], Summary(words))
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, f"mxfp4 {self.name}"  # without a line, pytest fails where a mark skips it


class _Nonconformance(AssertionError):
    """A case that the kernel does not pass."""


_CHOSEN = pytest.StashKey[list[str]]()
_LARGE = pytest.StashKey[list[str]]()  # what is left out, a line each
_KEY = "mxfp4_chosen"
_SHA256 = pytest.StashKey[str]()


def _run(config: pytest.Config, name: str) -> tuple[CaseResult, Failed | None]:
    """A case's result, with as much of a diagnosis as is wanted, and what that is of."""
    from mxfp4ref.conformance.diagnosing import diagnosed
    from mxfp4ref.conformance.goldens_used import load_unchanged
    from mxfp4ref.conformance.running import compare_case, told_alone

    how = config.getoption("mxfp4_diagnosis")
    failures = config.stash.get(_FAILURES, 0)
    tested = _under_test(config)
    options = replace(tested.options, diagnosis="quick" if failures >= _FULLY and how == "full" else how)
    case = load_unchanged(goldens_of(config), name, config.stash[_SHA256])
    result, failed = compare_case(tested.kernel, case, options, tested.worker)
    if failed is not None:
        result = diagnosed(result, failed, options.diagnosis)
    result = told_alone(result, tested.worker)
    config.stash[_FAILURES] = failures + (not result.ok)
    return result, failed


_FAILURES = pytest.StashKey[int]()


@dataclass(frozen=True)
class _UnderTest:
    """The kernel, the process that it is in, which ends with the session, and how and where it runs."""

    kernel: Kernel
    worker: Worker | None
    options: Options
    environment: Mapping[str, str]
    arguments: tuple[str, ...]


_LOADED = pytest.StashKey["_UnderTest | pytest.UsageError"]()


def _under_test(config: pytest.Config) -> _UnderTest:
    """What is tested; loaded, or found that it cannot be, when first asked for."""
    from mxfp4ref.conformance import Options
    from mxfp4ref.conformance.cli.supervised import others_code_begins
    from mxfp4ref.conformance.isolation.worker import Worker
    from mxfp4ref.conformance.kernels.adapters import KernelError
    from mxfp4ref.conformance.kernels.loading import environment, is_stand_in, load_kernel_here
    from mxfp4ref.conformance.reports.again import conform_arguments

    if _LOADED not in config.stash:
        spec, device = config.getoption("mxfp4_kernel"), config.getoption("mxfp4_device")
        isolate = config.getoption("mxfp4_isolate")
        try:
            options = Options(
                config.getoption("mxfp4_mode"),
                timeout=config.getoption("mxfp4_timeout"),
                diagnosis=config.getoption("mxfp4_diagnosis"),
            )
            arguments = conform_arguments(spec, options, device, isolate, goldens_of(config))
            if not is_stand_in(spec) if isolate is None else isolate:
                worker = Worker(spec, device, options.timeout)
                config.add_cleanup(worker.stop)
                found = _UnderTest(worker.kernel, worker, options, worker.environment, arguments)
            else:
                if not is_stand_in(spec):
                    others_code_begins()
                kernel = load_kernel_here(spec, device)
                found = _UnderTest(kernel, None, options, environment(kernel.device), arguments)
            config.stash[_LOADED] = found
        except (KernelError, ValueError) as error:
            config.stash[_LOADED] = pytest.UsageError(str(error))
    loaded = config.stash[_LOADED]
    if isinstance(loaded, pytest.UsageError):
        raise loaded
    return loaded
