"""Ctrl-C, a reader that goes away, a full disk: what ends a command from outside is no verdict."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from mxfp4ref.__main__ import commands
from mxfp4ref.conformance.cli import shared, supervised
from mxfp4ref.conformance.reports import report_text
from mxfp4ref.goldens import Goldens
from mxfp4ref.goldens.archive import write_archive
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.commands import exit_code
from tests.helpers.hostile_files import CHECKOUT, COMMANDS, make_folder

MXFP4REF = (sys.executable, "-m", "mxfp4ref")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}


INTERRUPTED_WITH_A_REPORT = KeyboardInterrupt()
INTERRUPTED_WITH_A_REPORT.__context__ = shared.Terminated(signal.SIGHUP)


@pytest.mark.parametrize("name", commands.commands)
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130),
        (shared.Terminated(signal.SIGTERM), 143),
        (INTERRUPTED_WITH_A_REPORT, 129),
        (BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)), 141),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 2),
    ],
)
def test_every_command(name: str, error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(context: click.Context) -> Any:
        raise error

    monkeypatch.setattr(commands.commands[name], "params", [])
    monkeypatch.setattr(commands.commands[name], "no_args_is_help", False)
    monkeypatch.setattr(commands.commands[name], "invoke", raising)
    result = CliRunner().invoke(commands, [name])
    assert (result.exit_code, type(result.exception)) == (code, SystemExit)
    assert ("Error: OSError: [Errno 28] No space left on device" in result.output) == (code == 2)


@pytest.mark.parametrize("command", ["conform", "replay"])
def test_reports_are_written_though_nobody_reads_the_text(
    tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unread(*arguments: Any, **options: Any) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    make_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report_text, "to_text", unread)
    assert CliRunner().invoke(commands, [*COMMANDS[command], "--json", "r.json"]).exit_code == 141
    assert Path("r.json").read_bytes()


@pytest.mark.usefixtures("copied_processes")
@pytest.mark.parametrize("arguments", [("defects", "--json"), ("--help",)])
def test_a_closed_pipe(arguments: tuple[str, ...]) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "wb") as pipe:
        command = subprocess.run(
            [*MXFP4REF, *arguments], stdout=pipe, stderr=subprocess.PIPE, env=ENVIRONMENT, check=False
        )
    assert (command.returncode, command.stderr) == (141, b"")


WITHOUT_STREAMS = """
import os, sys
sys.stdin = sys.stdout = sys.stderr = sys.__stdin__ = sys.__stdout__ = sys.__stderr__ = None
os.closerange(0, 3)
from mxfp4ref.__main__ import main
main()
"""


@pytest.mark.usefixtures("copied_processes")
def test_closed_streams(tmp_path: Path) -> None:
    """The report's number is none of theirs, and what could not be printed is no success."""
    arguments = ("conform", "oracle", "--goldens", CHECKOUT, "--case", "finalize/slot_order")
    command = subprocess.run(
        [sys.executable, "-c", WITHOUT_STREAMS, *arguments, "--json", "r.json"],
        env=ENVIRONMENT,
        cwd=tmp_path,
        check=False,
    )
    assert command.returncode == 2
    assert json.loads((tmp_path / "r.json").read_bytes())["ok"] is True


@pytest.mark.parametrize(
    "arguments", [("--version",), pytest.param(("goldens", "pack", "-"), marks=pytest.mark.slow)]
)
def test_a_closed_stdout(arguments: tuple[str, ...]) -> None:
    command = subprocess.run(
        ["sh", "-c", '"$@" >&-', "sh", *MXFP4REF, *arguments],
        stderr=subprocess.PIPE,
        env=ENVIRONMENT | {"MXFP4REF_GOLDENS": str(CHECKOUT)},
        check=False,
    )
    assert (command.returncode, command.stderr) == (2, b"Error: stdout is closed\n")


@pytest.mark.parametrize("megabytes", [60, 100, 520])  # with less Python itself may not start
def test_too_little_memory_is_no_verdict(megabytes: int) -> None:
    """C libraries that get none end the process, OpenBLAS and libgomp with the exit code of a wrong kernel."""
    command = subprocess.run(
        [*MXFP4REF, "conform", "oracle", "--goldens", CHECKOUT, "--case", "gemm/ordinary"],
        capture_output=True,
        env=ENVIRONMENT,
        preexec_fn=partial(_limit_memory, megabytes * 10**6),
        check=False,
    )
    assert (command.returncode, command.stdout) == (2, b"")
    last = command.stderr.decode().splitlines()[-1]
    assert last.startswith("Error: ")
    assert megabytes == 20 or f"the limit is {megabytes * 10**6 >> 20} MiB (ulimit -v)" in last


def _limit_memory(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


@pytest.mark.usefixtures("copied_processes")
def test_a_script_may_end_as_it_likes_where_memory_is_limited(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 40, before[1]))
    try:
        assert supervised.needed(["record"])  # else this process would end
        assert exit_code("record", "--output", tmp_path / "calls", script) == 128 + signal.SIGTERM
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("wanted", ["bash_complete", "zsh_complete", "nonsense"])
def test_completion_that_no_shell_asked_for(wanted: str) -> None:
    command = subprocess.run(
        MXFP4REF, capture_output=True, env=ENVIRONMENT | {"_MXFP4REF_COMPLETE": wanted}, check=False
    )
    assert (command.returncode, command.stdout) == (2, b"")
    assert command.stderr.startswith(b"Error: _MXFP4REF_COMPLETE: expected what the scripts of")
    assert command.stderr.count(b"\n") == 1


@pytest.mark.usefixtures("copied_processes")
def test_a_wrong_variable_is_no_verdict_on_a_kernel() -> None:
    command = subprocess.run(
        [*MXFP4REF, "conform", "oracle", "--goldens", CHECKOUT, "--case", "finalize/slot_order"],
        capture_output=True,
        env=ENVIRONMENT | {"MXFP4REF_GPU_GEMM": "emulate"},
        check=False,
    )
    words = b"Error: MXFP4REF_GPU_GEMM: expected 'emulated' in the environment, or nothing, got 'emulate'\n"
    assert (command.returncode, command.stdout, command.stderr) == (2, b"", words)


@pytest.mark.usefixtures("copied_processes")
def test_a_full_disk() -> None:
    with Path("/dev/full").open("wb") as full:
        command = subprocess.run(
            [*MXFP4REF, "defects"], stdout=full, stderr=subprocess.PIPE, env=ENVIRONMENT, check=False
        )
    assert (command.returncode, command.stderr) == (
        2,
        b"Error: OSError: [Errno 28] No space left on device\n",
    )


@pytest.mark.usefixtures("copied_processes")
def test_ctrl_c(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import time\nprint('waiting', flush=True)\ntime.sleep(60)\n")
    with subprocess.Popen(
        [*MXFP4REF, "record", script, "--output", tmp_path / "calls"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    ) as command:
        assert command.stdout is not None
        assert command.stderr is not None
        assert command.stdout.readline() == b"waiting\n"
        command.send_signal(signal.SIGINT)
        assert (command.wait(30), command.stderr.read()) == (130, b"")


def test_the_second_ctrl_c_is_told_and_the_third_ends(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The reports are written on the first; what comes with it, of a terminal and of a parent, is the same one."""
    now = 100.0
    monkeypatch.setattr(shared.time, "monotonic", lambda: now)
    before = signal.getsignal(signal.SIGINT)
    with shared.interrupted_once():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        now = 101.9
        signal.raise_signal(signal.SIGINT)
        assert capfd.readouterr().err == ""
        now = 102.1
        signal.raise_signal(signal.SIGINT)
        assert "interrupted before: the reports are being written; a third Ctrl-C" in capfd.readouterr().err
        now = 104.2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_handlers_of_signals_are_put_back_in_whatever_order() -> None:
    """As of `replay`, which asks for the usual ones for a process of its own while it answers them itself."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test in which `main` ended has it ignored
    before = [signal.getsignal(number) for number in numbers]
    with shared.terminable():
        with shared.interrupted_once():
            shared.not_terminable()
        assert signal.getsignal(signal.SIGINT) is not before[0]
    assert [signal.getsignal(number) for number in numbers] == before


INTERRUPTED_TWICE = """
import os, signal, sys, threading, time
from mxfp4ref.conformance.cli.shared import interrupted_once
from mxfp4ref import __main__

@__main__.commands.command("waiting")
@interrupted_once()
def waiting():
    try:
        print("waiting", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(0.3)
        open("report", "w").write("whole")
        sys.exit(130)

class Late:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)

late = Late()
sys.argv = ["mxfp4ref", "waiting"]
__main__.main()
"""


def test_a_hasty_second_ctrl_c_costs_neither_report_nor_exit_code(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED_TWICE],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": ENVIRONMENT, "cwd": tmp_path},
    ) as command:
        assert command.stdout is not None
        assert command.stdout.readline() == b"waiting\n"
        for _ in range(3):
            command.send_signal(signal.SIGINT)
            time.sleep(0.01)
        assert command.wait(30) == 130
    assert (tmp_path / "report").read_text() == "whole"


GIVEN_UP = """
import sys
import torch
from mxfp4ref.__main__ import commands, main
from mxfp4ref.conformance.isolation.execution import in_thread

def run(report, abandoned):
    report("run")
    while True:
        torch.ones(4096).sum()

@commands.command("waiting")
def waiting():
    assert in_thread(run, 0.1)[0] is None
    print("does not conform")
    sys.exit(1)

sys.argv = ["mxfp4ref", "waiting"]
main()
"""


def test_a_run_that_was_given_up_changes_no_exit_code() -> None:
    """It may still compute, in C++ code, in which Python cannot end a thread without an abort of the process."""
    process = subprocess.run(
        [sys.executable, "-c", GIVEN_UP], capture_output=True, env=ENVIRONMENT, check=False
    )
    assert (process.returncode, process.stdout, process.stderr) == (1, b"does not conform\n", b"")


WRITING = """
import os, sys, time
from mxfp4ref.__main__ import main

def wait(*arguments):
    print("writing", flush=True)
    time.sleep(60)

os.fsync = os.replace = wait
main()
"""


@pytest.mark.usefixtures("copied_processes")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("command", ["pack", "fetch", "export"])
def test_no_half_of_a_file_is_left(command: str, number: int, tmp_path: Path) -> None:
    make_folder(tmp_path)
    digest = write_archive(Goldens(tmp_path / "goldens"), tmp_path / "goldens.tar")
    (tmp_path / "new").mkdir()
    arguments = {
        "pack": ("goldens", "pack", "new/goldens.tar", "--goldens", "goldens"),
        "fetch": ("goldens", "fetch", "goldens.tar", "--sha256", digest, "--into", "new/goldens"),
        "export": ("export", "new/exported", "--goldens", "goldens"),
    }
    with subprocess.Popen(
        [sys.executable, "-c", WRITING, *arguments[command]],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": ENVIRONMENT, "cwd": tmp_path},
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(number)
        assert (process.wait(30), process.stderr.read()) == (128 + number, b"")
    assert [path for path in (tmp_path / "new").rglob("*") if path.is_file() or path.name[0] == "."] == []


@pytest.mark.skipif(not hasattr(signal, "SIGBUS"), reason="which tells of it")
@pytest.mark.usefixtures("copied_processes")
def test_a_file_that_becomes_shorter_is_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is mapped into memory: who reads behind its end is ended by the system."""
    make_checkpoint(tmp_path / "checkpoint", "gpt_oss")
    monkeypatch.setattr(supervised, "_START", SHORTENS + supervised._START)
    assert exit_code("checkpoint", tmp_path / "checkpoint") == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert "signal SIGBUS, as of a file that became shorter while it was read" in err
    assert "there is no verdict" in err


SHORTENS = """
import inspect
import os
from mxfp4ref.checkpoint import shards
read = shards._read_file

def shortened(file, wanted):
    tensors = read(file, wanted)
    if any(frame.function == "_load" for frame in inspect.stack()):
        os.truncate(file, 4096)
    return tensors

shards._read_file = shortened
"""


@pytest.mark.parametrize("hard", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_limit_of_time_is_told_as_that(hard: bool) -> None:
    command = subprocess.run(
        [*MXFP4REF, "conform", "oracle", "--goldens", CHECKOUT, "--diagnosis", "none"],
        capture_output=True,
        env=ENVIRONMENT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (2, 2 if hard else 60)),
        check=False,
    )
    assert (command.returncode, command.stdout) == (2, b"")
    assert b"the limit is 2 s of a processor's time (ulimit -t)" in command.stderr
    assert b"memory" not in command.stderr


@pytest.mark.parametrize("number", [5, 8])
def test_too_few_open_files_are_no_verdict(number: int) -> None:
    command = subprocess.run(
        [*MXFP4REF, "conform", "oracle", "--goldens", CHECKOUT, "--case", "gemm/ordinary"],
        capture_output=True,
        env=ENVIRONMENT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (number, number)),
        check=False,
    )
    assert (command.returncode, command.stdout) == (2, b"")
    words = f"Error: expected at least 24 open files, the limit is {number} (ulimit -n)\n"
    assert command.stderr.decode() == words
