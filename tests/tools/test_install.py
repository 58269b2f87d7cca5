"""What `make` tells while it installs."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from tests.helpers.tools import load_tool

ROOT = Path(__file__).resolve().parents[2]
install = load_tool("install.py")

PIP = """\
Obtaining file:///somewhere
  Installing build dependencies: started
Collecting torch>=2.11 (from mxfp4ref==0.2.0)
  Downloading torch-2.13.0-cp312-cp312-manylinux_2_28_x86_64.whl.metadata (30 kB)
Downloading https://files.example/torch-2.13.0-cp312-cp312-manylinux_2_28_x86_64.whl (906.4 MB)
Downloading rich-14.0.0-py3-none-any.whl (240 kB)
Requirement already satisfied: pip
Installing collected packages: rich, torch
Successfully installed rich-14.0.0 torch-2.13.0
"""


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("out", [io.StringIO(), _Terminal()])
def test_steps_are_told_with_seconds(out: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a pipe one line for what takes long; on a terminal, one line that has each in turn."""
    monkeypatch.setenv("COLUMNS", "60")
    steps = install.Steps(out, 1e6)
    for line in PIP.splitlines():
        install.follow(line, steps)
    steps.end("installed")
    told = re.split(r"\r\x1b\[K|\n", out.getvalue())
    assert all(re.match(r"\[ *\d+ s\] ", line) and len(line) < 60 for line in told if line and out.isatty())
    said = [line.partition("] ")[2] for line in told if line]
    long = [
        "downloading torch 2.13.0 (906.4 MB)",
        "unpacking 2 packages, torch among them, which is large",
        "installed",
    ]
    if not out.isatty():
        assert said == long
    else:
        short = ["installing build dependencies", "finding torch", "downloading rich 14.0.0 (240 kB)"]
        cut = [line[: 59 - len("[  0 s] ")] for line in (*short[:2], long[0], short[2], *long[1:])]
        assert said == cut


def test_a_step_that_lasts_is_told_again() -> None:
    out = io.StringIO()
    steps = install.Steps(out, 0.01)
    steps.now("compiling")
    while out.getvalue().count("compiling") < 3:
        pass
    steps.end("installed")
    assert re.fullmatch(r"(\[ *\d+ s\] compiling(, for \d+ s)?\n){3,}\[ *\d+ s\] installed\n", out.getvalue())


def test_the_makefile_has_no_other_way() -> None:
    """And the loops that it compiles are there."""
    assert "tools/install.py $(EXTRAS)" in (ROOT / "Makefile").read_text()
    for module in ",".join(install.LOOPS).replace("import ", "").split(","):
        assert (ROOT / f"{module.strip().replace('.', '/')}.py").is_file()
