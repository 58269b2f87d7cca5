"""Hypothesis: the same examples in every run, a bounded number of them, no deadline on a shared machine.

torch has one thread: tensors are small, and threads that wait for each other take ten times the time where workers
share the cores. `tests/helpers/modes.py` is where several threads have to give the same bits.
"""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers import forked

# Tests send these, and a suite in a shell's background or under nohup ignores them.
for sent, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(sent) is signal.SIG_IGN:
        signal.signal(sent, usual)

try:
    from hypothesis import settings
except ModuleNotFoundError:  # `make demo` brings pytest alone, which is enough for --mxfp4-kernel
    collect_ignore_glob = ["*"]
else:
    settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=25, database=None)
    # To look for more: pytest --hypothesis-profile=search
    settings.register_profile("search", deadline=None, max_examples=2000, print_blob=True)
    settings.load_profile("repeatable")


def pytest_configure() -> None:
    if (missing := next((name for name in ("torch", "numba") if find_spec(name) is None), None)) is not None:
        words = f"tests/: {sys.executable} has no {missing}: `make test` sets up what they need"
        raise pytest.UsageError(words)  # it is a Python that is not that of .venv


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if sys.modules.get("hypothesis") is None:  # not in the header, which -q leaves out
        words = "tests/: left out, hypothesis is not installed: `make test` sets up what they need"
        terminalreporter.write_line(words)


@pytest.fixture(scope="session")
def builtin_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The goldens of an installed package, written as the wheel's build does."""
    from mxfp4ref.goldens.manifest import write_builtin

    root = tmp_path_factory.mktemp("wheel") / "builtin"
    write_builtin(Path(__file__).resolve().parents[1] / "goldens", root)
    return root


def pytest_collection_finish() -> None:
    """What is imported and collected stays: the collector need not look at it each time.

    What takes seconds to import is imported here, which xdist's first process does not come to.
    """
    import torch

    from mxfp4ref.conformance import heartbeat

    torch.set_num_threads(1)
    heartbeat.SILENCE = 1e6  # tests do not depend on how fast a machine is; those of the sign of life set it
    gc.freeze()


def pytest_sessionfinish() -> None:
    """pytest collects garbage five times over at its end, to hear of exceptions in it: once is enough."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """See `tests/helpers/patience.py`."""
    from tests.helpers.patience import be_patient

    be_patient(monkeypatch)


@pytest.fixture
def copied_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python processes need no time to import torch: see `tests/helpers/forked.py`."""
    monkeypatch.setattr(subprocess, "Popen", forked.ForkingPopen)


@pytest.fixture(scope="module")
def copied_processes_of_module() -> Iterator[None]:
    """The same, for fixtures of a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", forked.ForkingPopen)
        yield
