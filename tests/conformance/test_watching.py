"""Processes of Python that are watched, and that end with the one that watches them."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mxfp4ref.conformance.cli import supervised
from mxfp4ref.conformance.isolation import processes

_START = """\
import sys
path, verdict, *arguments = sys.argv[1:]
assert all(type(entry) is str for entry in eval(path)), path
with open(verdict, "r+b") as file:
    file.write(arguments[0].encode())
"""


def test_a_path_among_texts_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A conftest.py puts them into `sys.path`: no process could be started then."""
    monkeypatch.setattr(sys, "path", [*sys.path, Path("/somewhere"), b"bytes"])
    assert supervised.supervise(_START, ["3   "], None) == 3


def test_in_a_thread_that_may_handle_no_signals() -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(supervised.supervise(_START, ["3   "], None)))
    thread.start()
    thread.join()
    assert codes == [3]


def test_a_signal_that_did_not_come_from_outside_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """A kernel that sent SIGHUP to its own process ended the command without a word."""
    start = """\
import os, signal, sys
with open(sys.argv[2], "r+b") as file:
    file.write(b"code")
os.kill(os.getpid(), signal.SIGHUP)
"""
    assert supervised.supervise(start, [], "--no-isolate") == 1
    assert "it ended its process (signal SIGHUP) before there was a verdict" in capsys.readouterr().err


def test_options_of_the_interpreter_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "warnoptions", ["error::FutureWarning"])
    assert "-Werror::FutureWarning" in processes.python("pass")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
@pytest.mark.usefixtures("copied_processes")
def test_what_is_watched_ends_with_who_watches() -> None:
    """Else it went on, and held the pipes open for whoever had killed the other."""
    start = """\
import os, time
from mxfp4ref.conformance.isolation.processes import end_with_parent
if not os.fork():
    end_with_parent()
    print("ready", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.communicate(timeout=30)  # until all who have it have closed the pipe
