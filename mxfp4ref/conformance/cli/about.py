"""The commands that say what there is: the golden cases, and this machine for a report of a fault."""

from __future__ import annotations

import fnmatch
import importlib.metadata
import os
import platform
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import click

from mxfp4ref._version import __version__
from mxfp4ref._words import did_you_mean
from mxfp4ref.conformance.cli import completing
from mxfp4ref.conformance.cli.command import command
from mxfp4ref.conformance.cli.shared import NOT_EQUAL, UsageError, goldens_option, usage_errors
from mxfp4ref.conformance.cli.terminal import columns, echo, echo_json, echo_rows
from mxfp4ref.conformance.memory import needed_for
from mxfp4ref.conformance.source import defect_names
from mxfp4ref.goldens import Goldens, open_goldens
from mxfp4ref.goldens.matrix import caught_in

__all__ = ["doctor", "list_cases"]

_TRIED = ("activation", "finalize", "gemm")  # suites of the self-test, every fourth case
_NAMED, _WIDTH = 2, 50  # of a case, in the list: defects, and characters of its reason
_ENVIRONMENT = ("MXFP4REF", "FLASHINFER")  # how the names begin of variables that change what is computed
_ENGINES = ("flashinfer-python", "vllm", "sglang")  # of which a report says that they are absent, too
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
    *("gguf", "apache-tvm-ffi", *_ENGINES),
)


@command("list")
@click.argument("patterns", nargs=-1, metavar="[GLOB]...", shell_complete=completing.globs)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
@goldens_option
def list_cases(patterns: tuple[str, ...], as_json: bool, root: Path | None) -> None:
    """List the golden cases, with what each is made to catch.

    GLOB is a suite, a pattern of names, a kind such as quantize, or a named defect, for the cases that catch it, be
    they made for it or not; without one, all are listed.

    \b
    mxfp4ref list
    mxfp4ref list gemm 'routing/gpt_oss*'
    mxfp4ref list limit_ignored

    The memory is what a kernel's process takes, about, that is handed all experts in the SM90 layout; "-" for
    less than 1 GiB. --json has all that a case is made to catch, what it is kept for, and why.

    The names are those that `conform --case` and `show` take.

    Exit codes: 0 listed; 2 nothing matches, or there are no goldens.
    """
    with usage_errors():
        goldens = open_goldens(root)
        rows = [_row(goldens, name) for name in _chosen(goldens, patterns)]
    if as_json:
        echo_json(rows)
        return
    heads = ("case", "kind", "memory", "made to catch, or kept for")
    echo_rows(heads, [(row["case"], row["kind"], _memory(row["bytes"]), _about(row)) for row in rows])
    echo(f"{len(rows)} of {goldens.of} cases, in {goldens.root}")
    for defect in sorted({*patterns} & {*defect_names()}):
        made = sum(defect in row["catches"] for row in rows)
        others = (
            "goldens/defect_matrix.md of a checkout has those that catch it besides"
            if caught_in(goldens.root, defect) is None
            else "the others catch it too"
        )
        echo(f"{defect}: {made} of these are made for it; {others}")


def _memory(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else "-"


def _about(row: dict[str, Any]) -> str:
    """The first defects that a case is made to catch; of one that is for none, what it is kept for."""
    first, more = row["catches"][:_NAMED], len(row["catches"]) - _NAMED
    return (
        ", ".join([*first, *([f"{more} more"] if more > 0 else [])])
        or row["unique_for"]
        or (row["why"] if columns() is None else textwrap.shorten(row["why"], _WIDTH))
    )


def _chosen(goldens: Goldens, patterns: tuple[str, ...]) -> list[str]:
    names = goldens.names()
    chosen: set[str] = set()
    for pattern in patterns:
        found = [name for name in names if _matches(name, pattern)]
        if not found and pattern in defect_names():
            seen = caught_in(goldens.root, pattern) or {}
            found = [name for name in names if name in seen or pattern in goldens.about(name)["catches"]]
        found = found or [name for name in names if pattern == goldens.about(name)["kind"]]
        if not found:
            if pattern in defect_names():
                raise UsageError(f"GLOB: no case is made for {pattern}: mxfp4ref explain {pattern}")
            hint = did_you_mean(pattern, [*goldens.suites, *names, *defect_names()])
            raise UsageError(f"GLOB: {pattern!r} matches none of the {len(names)} cases{hint}")
        chosen.update(found)
    return [name for name in names if not patterns or name in chosen]


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatch(name, pattern) or name.split("/")[0] == pattern


def _row(goldens: Goldens, name: str) -> dict[str, Any]:
    case = goldens.about(name)
    about = {key: case[key] for key in ("kind", "why", "unique_for", "catches")}
    return {"case": name, **about, "bytes": needed_for(case["bytes"])}


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
    versions = {name: _version(name) or "not installed" * (name in _ENGINES) for name in _PACKAGES}
    facts |= {name: version for name, version in versions.items() if version}
    facts["torch"] = torch.__version__  # says which build it is, as "+cu130"
    facts["CPU"] = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    facts |= _gpus()
    given = {
        name: value for name, value in sorted(os.environ.items()) if value and name.startswith(_ENVIRONMENT)
    }
    facts |= given or {"environment": " and ".join(f"no {name}*" for name in _ENVIRONMENT)}
    told: set[str] = set()

    def tell() -> None:
        """What is known by now and was not told."""
        for name in [] if as_json else [name for name in facts if name not in told]:
            echo(f"{name:18} {facts[name]}")
            told.add(name)

    problems = {}
    for name, check in _CHECKS.items():
        tell()
        echo(f"checking {name} ...", err=True)
        if problem := check(root, facts):
            problems[name] = problem
    tell()
    if as_json:
        echo_json({"facts": facts, "problems": problems})
    else:
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
        facts["goldens"] = f"{goldens.count} in {goldens.root}"
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
        small = [name for name in goldens.names() if name.split("/")[0] in _TRIED]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            report = run("oracle", [goldens.load(name) for name in small[::4]], Options(repeat=False))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    which = f"{len(small[::4])} of {len(goldens.entries)} cases, every fourth of {', '.join(_TRIED)}"
    facts["self-test"] = f"oracle {report.judged}: {which}; `mxfp4ref conform oracle` runs all"
    return report.verdict if not report.ok else "; ".join(str(warning.message) for warning in said)


_CHECKS = {"goldens": _check_goldens, "bits": _check_bits}
