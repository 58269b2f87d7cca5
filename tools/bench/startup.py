"""How long the command takes to say something: CPU time, and its ratio to that of an empty Python process.

    python tools/bench/startup.py

The target is 0.3 s: nothing here imports torch, which alone takes 2 s.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys

TURNS = 7
TARGET = 0.3  # seconds
COMMAND = (sys.executable, "-m", "mxfp4ref")
RUNS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "python -c pass": ((sys.executable, "-c", "pass"), {}),
    "mxfp4ref --version": ((*COMMAND, "--version"), {}),
    "mxfp4ref --help": ((*COMMAND, "--help"), {}),
    "mxfp4ref conform --help": ((*COMMAND, "conform", "--help"), {}),
    "completion of a case": (
        COMMAND,
        {"_MXFP4REF_COMPLETE": "bash_complete", "COMP_LINE": "mxfp4ref show gemm/"},
    ),
    "completion of a defect": (
        COMMAND,
        {"_MXFP4REF_COMPLETE": "bash_complete", "COMP_LINE": "mxfp4ref conform defect:"},
    ),
}


def cpu_seconds(command: tuple[str, ...], environment: dict[str, str]) -> float:
    """Of a process and those that it started, in user and system mode."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env=os.environ | environment, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    turns = [{name: cpu_seconds(*run) for name, run in RUNS.items()} for _ in range(TURNS + 1)][1:]
    medians = {name: statistics.median(turn[name] for turn in turns) for name in RUNS}
    empty = next(iter(medians.values()))
    print("| what | s | ratio | target | |\n|---|--:|--:|---|---|")
    for name, seconds in medians.items():
        verdict = f"s <= {TARGET} | {'met' if seconds <= TARGET else 'MISSED'}" if seconds != empty else "|"
        print(f"| {name} | {seconds:.3f} | {seconds / empty:.1f} | {verdict} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
