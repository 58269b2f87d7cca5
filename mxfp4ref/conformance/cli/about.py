"""The commands that say what there is: the golden cases, and this machine for a report of a fault."""

from __future__ import annotations

import fnmatch
import importlib.metadata
import os
import platform
import sys
import warnings
from pathlib import Path
from typing import Any

import click

from mxfp4ref._version import __version__
from mxfp4ref._words import did_you_mean
from mxfp4ref.conformance.cli import completing
from mxfp4ref.conformance.cli.command import command
from mxfp4ref.conformance.cli.shared import NOT_EQUAL, UsageError, goldens_option, usage_errors
from mxfp4ref.conformance.cli.terminal import echo, echo_json, echo_rows
from mxfp4ref.conformance.memory import needed
from mxfp4ref.goldens import Goldens, open_goldens

__all__ = ["doctor", "list_cases"]

_PACKAGES = (
    *(
        "torch",
        "numpy",
        "numba",
        "llvmlite",
        "triton",
        "safetensors",
        "click",
        "rich",
        "jinja2",
        "matplotlib",
    ),
    *("gguf", "flashinfer-python", "apache-tvm-ffi", "vllm", "sglang"),
)


@command("list")
@click.argument("patterns", nargs=-1, metavar="[GLOB]...", shell_complete=completing.globs)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
@goldens_option
def list_cases(patterns: tuple[str, ...], as_json: bool, root: Path | None) -> None:
    """List the golden cases, with what each is kept for and made to catch.

    GLOB is a suite or a pattern of names; without one, all are listed.

    \b
    mxfp4ref list
    mxfp4ref list gemm 'routing/gpt_oss*'

    The memory is what a kernel's process takes, about, that is handed all experts in the SM90 layout; where nothing
    is said, less than 1 GiB.

    The names are those that `conform --case` and `show` take.

    Exit codes: 0 listed; 2 nothing matches, or there are no goldens.
    """
    with usage_errors():
        goldens = open_goldens(root)
        rows = [_row(goldens, name) for name in _chosen(goldens, patterns)]
    if as_json:
        echo_json(rows)
        return
    echo_rows(
        ("case", "kind", "memory", "kept for", "made to catch"),
        [
            (
                *(
                    row["case"],
                    row["kind"],
                    f"{row['bytes'] / 2**30:.1f} GiB" if row["bytes"] >= 2**30 else "",
                ),
                *(row["unique_for"], ", ".join(row["catches"])),
            )
            for row in rows
        ],
    )
    echo(f"{len(rows)} of {len(goldens.names())} cases in {goldens.root}")


def _chosen(goldens: Goldens, patterns: tuple[str, ...]) -> list[str]:
    names = goldens.names()
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            hint = did_you_mean(pattern, [*goldens.suites, *names])
            raise UsageError(f"GLOB: {pattern!r} matches none of the {len(names)} cases{hint}")
    return [name for name in names if not patterns or any(_matches(name, pattern) for pattern in patterns)]


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatch(name, pattern) or name.split("/")[0] == pattern


def _row(goldens: Goldens, name: str) -> dict[str, Any]:
    case = goldens.load(name)
    about = {"case": case.id, "kind": case.kind, "why": case.why, "unique_for": case.unique_for or ""}
    return {**about, "catches": list(case.catches), "bytes": needed(case)}


@command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
@goldens_option
def doctor(as_json: bool, root: Path | None) -> None:
    """Say what a report of a fault needs: versions, machine, goldens, and whether this machine computes right.

    \b
    mxfp4ref doctor
    mxfp4ref doctor --json > doctor.json

    Exit codes: 0 all is well, 1 something is not: it is said on the lines that begin with "!".
    """
    import torch

    facts: dict[str, str] = {"mxfp4ref": f"{__version__} in {Path(__file__).parents[2]}"}
    facts |= {"python": platform.python_version(), "machine": platform.platform()}
    facts |= {name: version for name in _PACKAGES if (version := _version(name))}
    facts["torch"] = torch.__version__  # says which build it is, as "+cu130"
    facts["CPU"] = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    facts |= _gpus()
    facts |= {name: value for name, value in sorted(os.environ.items()) if name.startswith("MXFP4REF")}
    problems = {name: problem for name, check in _CHECKS.items() if (problem := check(root, facts))}
    if as_json:
        echo_json({"facts": facts, "problems": problems})
    else:
        for name, fact in facts.items():
            echo(f"{name:18} {fact}")
        for name, problem in problems.items():
            echo(f"! {name}: {problem}", fg="red")
        if not problems:
            echo("all is well", fg="green")
    sys.exit(NOT_EQUAL if problems else 0)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _gpus() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        return {"GPU": "none that torch sees"}
    return {f"GPU {n}": torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())}


def _check_goldens(root: Path | None, facts: dict[str, str]) -> str:
    try:
        goldens = open_goldens(root)
        facts["goldens"] = f"{len(goldens.names())} cases in {goldens.root}"
        found = goldens.verify()
    except Exception as error:  # whatever it is belongs into the report
        return f"{type(error).__name__}: {error}"
    return f"{len(found)} files are not those of the manifest, the first: {found[0]}" if found else ""


def _check_bits(root: Path | None, facts: dict[str, str]) -> str:
    """A few cases by the oracle; what it warns of, such as loops that cannot be compiled, is a problem too."""
    from mxfp4ref.conformance.options import Options
    from mxfp4ref.conformance.suite import run

    try:
        goldens = open_goldens(root)
        small = [name for name in goldens.names() if name.split("/")[0] in ("activation", "finalize", "gemm")]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            report = run("oracle", [goldens.load(name) for name in small[::4]], Options(repeat=False))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    facts["self-test"] = report.verdict
    return report.verdict if not report.ok else "; ".join(str(warning.message) for warning in said)


_CHECKS = {"goldens": _check_goldens, "bits": _check_bits}
