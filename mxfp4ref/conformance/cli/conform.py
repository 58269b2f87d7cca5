"""The command `conform`: a kernel over the golden cases."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import click

from mxfp4ref._files import check_no_input, write_file
from mxfp4ref.conformance import report
from mxfp4ref.conformance.bounds import STORAGE
from mxfp4ref.conformance.cli.shared import (
    NOT_EQUAL,
    USAGE,
    UsageError,
    case_progress,
    echo,
    goldens_option,
    usage_errors,
)
from mxfp4ref.conformance.results import MODES
from mxfp4ref.conformance.suite import Options, run
from mxfp4ref.goldens import Goldens, open_goldens

__all__ = ["conform"]

_RENDERERS = {"json": report.to_json, "junit": report.to_junit, "html": report.to_html}


@click.command()
@click.argument("kernel", required=False)
@click.option("--kernel", "kernel_option", metavar="KERNEL", help="The same as the argument.")
@goldens_option
@click.option(
    "--case", "patterns", multiple=True, metavar="GLOB", help="Only these cases, as in 'gemm/*'. Repeatable."
)
@click.option("--mode", type=click.Choice(MODES), default="exact", show_default=True)
@click.option(
    "--intermediates",
    "storage",
    type=click.Choice(STORAGE),
    default="wider",
    show_default=True,
    help="In mode bounded: a correct kernel may keep wider intermediates, or has to round them to bf16.",
)
@click.option(
    "--confidence",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="P",
    help="In mode bounded: probabilistic bounds with this confidence, such as 0.999999, instead of rigorous ones.",
)
@click.option("--device", help="Where the kernel's tensors go; cpu, or cuda for flashinfer.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=600,
    show_default=True,
    metavar="SECONDS",
    help="Limit for each run of the kernel.",
)
@click.option(
    "--isolate", is_flag=True, help="Run the kernel in a process of its own: survives hangs and crashes."
)
@click.option(
    "--all-tactics",
    is_flag=True,
    help="flashinfer: every tile and cluster of either GEMM, instead of one of each K tile.",
)
@click.option("--no-repeat", is_flag=True, help="Run each case once only; a kernel that races may go unseen.")
@click.option("--no-diagnosis", is_flag=True, help="Only compare.")
@click.option(
    "--dump",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write a minimal reproducer of each failing case here.",
)
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the report as JSON."
)
@click.option(
    "--junit", "junit_file", type=click.Path(dir_okay=False, path_type=Path), help="Write it as JUnit XML."
)
@click.option(
    "--html", "html_file", type=click.Path(dir_okay=False, path_type=Path), help="Write it as one HTML file."
)
@click.option("-v", "--verbose", is_flag=True, help="A line for each passing case too.")
def conform(kernel: str | None, kernel_option: str | None, root: Path | None, **options: Any) -> None:
    """Run KERNEL over the golden cases, compare every bit, and say what is wrong.

    KERNEL is one of

    \b
    oracle                       this package's own forward
    defect:NAME                  a named wrong pipeline (mxfp4ref defects)
    torch-bf16                   dequantise to bf16 and matmul, as most references do
    flashinfer                   the installed flashinfer; its layout helpers are checked too
    package.module:function      flashinfer's signature, weights in SM90 layout
    logical:package.module:f     the same with weights and scales in logical layout
    plain:package.module:f       f(x, ids, scales, w1, s1, w2, s2, **parameters), logical layout
    stage:KIND:package.module:f  one stage: dequantize, layout, tensor_core, gemm, activation,
                                 finalize or routing; called with a case's tensors by name

    In mode exact an output must have the bits of one of the legitimate pairs of K tiles, and the report tells which.
    In mode bounded, for kernels that sum in another order, it must lie in the interval of all correct evaluations.

    A kernel that raises, hangs, crashes, returns something else, writes nothing or into its inputs, or gives other
    bits the second time is reported as that, and the remaining cases still run. Without --isolate a run that takes
    longer than --timeout is abandoned in its thread.

    Exit codes: 0 conforms, 1 does not, 2 wrong usage or environment, or a report could not be written.
    """
    if (kernel is None) == (kernel_option is None):
        raise click.UsageError("expected one KERNEL, as the argument or as --kernel")
    spec = kernel or kernel_option
    assert spec is not None
    given = [(path, render) for kind, render in _RENDERERS.items() if (path := options.pop(f"{kind}_file"))]
    files = dict(given)
    if len({path.absolute() for path in files}) < len(given):
        raise click.UsageError("--json, --junit, --html: expected a file of its own for each")
    if report.to_html in files.values():
        with usage_errors():
            report.check_html()
    patterns, isolate, device, verbose = (
        options.pop(name) for name in ("patterns", "isolate", "device", "verbose")
    )
    options["repeat"], options["diagnosed"] = not options.pop("no_repeat"), not options.pop("no_diagnosis")
    with usage_errors():
        goldens = open_goldens(root)
        names = _select(goldens, patterns)
        _check_files(list(files), goldens)
        with case_progress(len(names)) as advance:
            result = run(
                spec,
                _Selection(goldens, names),
                Options(**options),
                device=device,
                isolate=isolate,
                progress=advance,
            )

    # The text first, and each file by itself: what fails costs that file and a line, not the results.
    def show() -> None:
        _print(report.to_text(result, verbose=verbose), ok=result.ok)

    def write(path: Path) -> None:
        write_file(path, files[path](result))

    failed = [_attempt("the text", show), *(_attempt(str(path), partial(write, path)) for path in files)]
    if options["dump"] is not None and not result.ok:
        echo(f"Reproducers: {options['dump']}")
    if not any(r.status != "skipped" for r in result.results):
        raise UsageError(f"{spec}: none of the {len(names)} cases is of a kind that it runs")
    sys.exit(NOT_EQUAL if not result.ok else USAGE if any(failed) else 0)


def _attempt(what: str, write: Callable[[], None]) -> bool:
    """Write something; whether that failed, which has been told then."""
    try:
        write()
    except Exception as error:  # a full disk, a closed pipe, a library that draws
        with suppress(OSError):
            echo(f"Error: {what} could not be written: {type(error).__name__}: {error}", err=True)
        return True
    return False


class _Selection(Goldens):
    """Some of the cases, loaded one at a time."""

    def __init__(self, goldens: Goldens, names: list[str]) -> None:
        super().__init__(goldens.root)
        self._names = names

    def names(self, suite: str | None = None) -> list[str]:
        return self._names


def _select(goldens: Goldens, patterns: Iterable[str]) -> list[str]:
    names = goldens.names()
    chosen: set[str] = set()
    for pattern in patterns:
        found = [name for name in names if fnmatch.fnmatch(name, pattern) or name.split("/")[0] == pattern]
        if not found:
            raise UsageError(f"--case: {pattern!r} matches none of the {len(names)} cases in {goldens.root}")
        chosen.update(found)
    return [name for name in names if name in chosen] if chosen else names


def _check_files(paths: Sequence[Path], goldens: Goldens) -> None:
    """Refuse, before anything runs, files that cannot be written, or would replace each other or a golden."""
    inputs = [goldens.root / "manifest.json"]
    inputs += [
        goldens.root / f"{name}.{kind}" for name in goldens.names() for kind in ("json", "safetensors")
    ]
    for path in paths:
        if not path.absolute().parent.is_dir():
            raise UsageError(f"cannot write {path}: there is no folder {path.absolute().parent}")
        check_no_input(path, inputs)


def _print(text: str, *, ok: bool) -> None:
    """The report; click drops the colours where the output is no terminal."""
    *lines, verdict = text.split("\n")
    for line in lines:
        heading = bool(line) and not line.startswith(" ") and ":" in line
        echo(line, bold=heading or None)
    echo(verdict, fg="green" if ok else "red", bold=True)
