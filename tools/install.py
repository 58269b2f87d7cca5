"""What `make` sets up .venv with, told step by step: pip, then the loops, which are compiled for this CPU.

    .venv/bin/python tools/install.py report,test [--ignore-installed]

Nothing has to be installed for it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[1]
SILENCE = 10.0  # seconds, where nothing can be drawn anew
# Compiled at first use, which each of the tests' workers would do for itself. What they import is compiled with them;
# all of torch, as pip does it, takes a minute.
LOOPS = (
    "import mxfp4ref.sm90.gemm.cpu_loops, mxfp4ref.sm90.gemm.fp8_loops, mxfp4ref.formats.mxfp4_loops",
    "import mxfp4ref.sm90.elementwise_loops, mxfp4ref.formats.layout_loops, mxfp4ref.defects.variants.gemm_loops",
)


class Steps:
    """What is being done, with the seconds since the beginning: one line that changes, or lines in a pipe."""

    def __init__(self, out: TextIO, silence: float = SILENCE) -> None:
        self._out, self._start, self._drawn = out, time.monotonic(), out.isatty()
        self._silence = 0.5 if self._drawn else silence
        self._words, self._since, self._over = "", 0.0, threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)
        self._thread.start()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def now(self, words: str, *, line: bool = True) -> None:
        """From here on this is done; in a pipe it is told at once, unless it is no `line` of its own."""
        self._words, self._since = words, self.seconds
        if self._drawn or line:
            self._show(words)

    def end(self, words: str) -> None:
        self._over.set()
        self._thread.join()
        self._show(words, "\n")

    def _tick(self) -> None:
        while not self._over.wait(self._silence):
            lasting = self.seconds - self._since
            if words := self._words:
                self._show(words if self._drawn or lasting < 1 else f"{words}, for {lasting:.0f} s")

    def _show(self, words: str, end: str = "") -> None:
        line = f"[{self.seconds:3.0f} s] {words}"
        if self._drawn:
            self._out.write(f"\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}{end}")
        else:
            self._out.write(f"{line}\n")
        self._out.flush()


def follow(line: str, steps: Steps) -> None:
    """Tell what a line of pip's says that it does now."""
    line = line.strip()
    if found := re.match(r"Collecting ([\w.\[\],-]+)", line):
        steps.now(f"finding {found[1]}", line=False)
    elif found := re.match(
        r"Downloading (?:\S*/)?([^\s/]+?)-(\d[^\s-]*)\S*\.(?:whl|tar\.gz) \((.*)\)$", line
    ):
        steps.now(f"downloading {found[1]} {found[2]} ({found[3]})", line="kB" not in found[3])
    elif found := re.match(r"(Installing build dependencies|Preparing|Building)\b.*", line):
        steps.now(f"{line[0].lower()}{line[1:].partition(':')[0]}", line=False)
    elif found := re.match(r"Installing collected packages: (.*)", line):
        names = found[1].split(", ")
        steps.now(
            f"unpacking {len(names)} packages{', torch among them, which is large' * ('torch' in names)}"
        )


def main(arguments: Sequence[str]) -> int:
    extras, *options = arguments
    steps = Steps(sys.stdout)
    steps.now(
        f"installing mxfp4ref[{extras}] into {Path(sys.prefix).name}; torch is large, this takes a minute or more"
    )
    pip = [sys.executable, "-m", "pip", "install", *options, "--disable-pip-version-check", "--no-compile"]
    pip += ["--progress-bar", "off", "--constraint", "constraints.txt", "--editable", f".[{extras}]"]
    with subprocess.Popen(pip, stdout=subprocess.PIPE, text=True, errors="replace", cwd=ROOT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            follow(line, steps)
    if process.returncode:
        steps.end("pip failed, as it says itself")
        return process.returncode
    steps.now("compiling the loops for this CPU")
    cached = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    for compiling in [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=cached) for code in LOOPS]:
        compiling.wait()  # what cannot be compiled is told when it is used
    steps.end("installed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
