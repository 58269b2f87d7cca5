"""pytest plugin: `pytest --mxfp4-kernel=package.module:function` makes a test of every golden case.

Everything heavy is imported when it is first needed: without the option and the fixtures, no torch.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from mxfp4ref.conformance import Options
    from mxfp4ref.conformance.adapters import Kernel
    from mxfp4ref.conformance.results import CaseResult
    from mxfp4ref.conformance.worker import Worker
    from mxfp4ref.goldens import Case, Goldens

_SUITE = "mxfp4"  # what the tests' names begin with


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
        choices=("exact", "bounded"),
        default="exact",
        help="equal bits (default), or within the bounds of every correct evaluation",
    )
    group.addoption("--mxfp4-device", metavar="DEVICE", help="where the kernel's tensors go")
    group.addoption("--mxfp4-timeout", metavar="SECONDS", type=float, help="limit for each run of the kernel")
    group.addoption(
        "--mxfp4-no-isolate",
        action="store_true",
        help="run the kernel in pytest's process, for debuggers: if it ends that, pytest ends without a word",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("mxfp4_kernel") and not hasattr(
        config, "workerinput"
    ):  # xdist's workers report to this one
        config.pluginmanager.register(_Verdict(config.getoption("mxfp4_kernel")))


class _Verdict:
    """A kernel that ran no case has not passed: `mxfp4ref conform` ends so too."""

    def __init__(self, spec: str) -> None:
        self._spec = spec
        self._cases: set[str] = set()
        self._skipped: set[str] = set()

    @property
    def _none_ran(self) -> bool:
        return bool(self._cases) and self._cases == self._skipped

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.nodeid.startswith(f"{_SUITE}::"):
            self._cases.add(report.nodeid)
            if report.skipped:
                self._skipped.add(report.nodeid)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._none_ran and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.USAGE_ERROR

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._none_ran:
            count = len(self._cases)
            terminalreporter.write_line(
                f"ERROR: --mxfp4-kernel: none of the {count} cases is of a kind that {self._spec} runs"
            )


@pytest.hookimpl(tryfirst=True)  # before -k and -m choose among the tests
def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    if config.getoption("mxfp4_kernel"):
        _under_test(config)  # what cannot be loaded is wrong usage, said once
        suite = _ConformanceSuite.from_parent(session, name=_SUITE, nodeid=_SUITE)
        items.extend(suite.collect())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "mxfp4_case" in metafunc.fixturenames:
        metafunc.parametrize("mxfp4_case", _names(metafunc.config), indirect=True)


@pytest.fixture
def mxfp4_case(request: pytest.FixtureRequest) -> Case:
    """A golden case; a test that asks for it runs once for each."""
    return _goldens(request.config).load(request.param)


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
        return [_ConformanceItem.from_parent(self, name=name) for name in _names(self.config)]


class _ConformanceItem(pytest.Item):
    """One golden case, run through the kernel."""

    def runtest(self) -> None:
        from mxfp4ref.conformance import run_case

        kernel, worker, options = _under_test(self.config)
        result = run_case(kernel, _goldens(self.config).load(self.name), options, worker=worker)
        if result.status == "skipped":
            pytest.skip(result.message)
        if not result.ok:
            raise _Nonconformance(result)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, _Nonconformance):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, f"mxfp4 {self.name}"


class _Nonconformance(AssertionError):
    """A case that the kernel does not pass; the message is the diagnosis."""

    def __init__(self, result: CaseResult) -> None:
        from mxfp4ref.conformance.report import case_lines, headline

        super().__init__("\n  ".join([headline(result), *case_lines(result)]))


def _names(config: pytest.Config) -> list[str]:
    names = _goldens(config).names()
    patterns = config.getoption("mxfp4_case")
    if not patterns:
        return names
    chosen = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    if not chosen:
        raise pytest.UsageError(f"--mxfp4-case: {' '.join(patterns)} matches none of the {len(names)} cases")
    return chosen


def _goldens(config: pytest.Config) -> Goldens:
    return _open(config.getoption("mxfp4_goldens"))


@cache
def _open(root: str | None) -> Goldens:
    from mxfp4ref.goldens import GoldenError, open_goldens

    try:
        return open_goldens(root)
    except GoldenError as error:
        raise pytest.UsageError(str(error)) from error


_LOADED = pytest.StashKey["tuple[Kernel, Worker | None, Options]"]()


def _under_test(config: pytest.Config) -> tuple[Kernel, Worker | None, Options]:
    """The kernel, the process it is in, which ends with the session, and the options; loaded when first asked for."""
    from mxfp4ref.conformance import Options
    from mxfp4ref.conformance.adapters import KernelError
    from mxfp4ref.conformance.kernels import is_stand_in, load_kernel
    from mxfp4ref.conformance.worker import Worker

    if _LOADED not in config.stash:
        spec, device = config.getoption("mxfp4_kernel"), config.getoption("mxfp4_device")
        try:
            options = Options(config.getoption("mxfp4_mode"), timeout=config.getoption("mxfp4_timeout"))
            if config.getoption("mxfp4_no_isolate") or is_stand_in(spec):
                config.stash[_LOADED] = load_kernel(spec, device), None, options
            else:
                worker = Worker(spec, device, options.timeout)
                config.add_cleanup(worker.stop)
                config.stash[_LOADED] = worker.kernel, worker, options
        except (KernelError, ValueError) as error:
            raise pytest.UsageError(str(error)) from error
    return config.stash[_LOADED]
