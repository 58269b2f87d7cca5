"""A pytest session that a kernel runs in: how its process ends is the kernel's doing, and no verdict of it."""

from __future__ import annotations

import signal
import sys
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING

import pytest

import __main__

if TYPE_CHECKING:
    from mxfp4ref.conformance.cli.shared import Presses

__all__ = ["watch"]

_START = """\
import sys
sys.path[:] = eval(sys.argv.pop(1))
mxfp4ref_verdict, sys.argv[0] = sys.argv.pop(1), "pytest"
import pytest
code = pytest.main()
from mxfp4ref.conformance.cli.supervised import end
end(int(code))
sys.exit(code)
"""  # which imports nothing of this package before pytest has made its assertions speak


def watch(config: pytest.Config) -> int | None:
    """Run the session in a process of its own, and return its exit code; None where it has to run in this one.

    That is where it runs in one already, xdist's workers among them, whose end xdist reports; where a debugger is
    at work, whose user sees how it ends; and where `pytest.main` was given plugins that exist in this process only.
    """
    from mxfp4ref.conformance.cli import supervised
    from mxfp4ref.conformance.cli.shared import Presses

    if verdict := getattr(__main__, "mxfp4ref_verdict", ""):
        supervised.begin(verdict)
        signal.signal(signal.SIGINT, partial(_interrupt, Presses()))
        return None
    debugged = sys.gettrace() is not None or "pydevd" in sys.modules
    if hasattr(config, "workerinput") or debugged or config.invocation_params.plugins:
        return None
    arguments = [str(one) for one in config.invocation_params.args]
    try:
        return supervised.supervise(_START, arguments, "--mxfp4-no-isolate")
    except OSError as error:  # no room for a file, or for a process
        raise pytest.UsageError(f"--mxfp4-no-isolate: {error}") from error


def _interrupt(presses: Presses, number: int, frame: FrameType | None) -> None:
    """As Ctrl-C does it, once: a terminal sends it to this process and to the one that passes it on."""
    if presses.take():
        raise KeyboardInterrupt
