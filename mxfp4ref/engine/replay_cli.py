"""The command that computes recorded calls again."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mxfp4ref._files import files_below
from mxfp4ref.conformance.cli import completing
from mxfp4ref.conformance.cli.command import command
from mxfp4ref.conformance.cli.progress import progress
from mxfp4ref.conformance.cli.report_files import pop_report_files, print_report, report_files
from mxfp4ref.conformance.cli.selecting import sources
from mxfp4ref.conformance.cli.shared import (
    NOT_EQUAL,
    USAGE,
    Interruption,
    UsageError,
    check_no_swap,
    diagnosis_option,
    interrupted_once,
    mode_option,
    usage_errors,
)
from mxfp4ref.conformance.cli.terminal import echo, echo_rows

if TYPE_CHECKING:
    from mxfp4ref.conformance.results import CaseResult, Report

__all__ = ["replay"]

_COLOURS = {"equal": "green", "within bounds": "green", "skipped": "bright_black"}


@command()
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--autotune-cache",
    type=click.Path(exists=True, path_type=Path),
    metavar="PATH",
    help="flashinfer's autotune cache, JSON file or v2 folder: a call that ran other tactics is a finding.",
)
@click.option(
    "--any-tile", is_flag=True, help="Stop at the first pair of K tiles that fits, instead of naming all."
)
@click.option(
    "--max-calls", type=click.IntRange(min=1), metavar="N", help="Replay no more calls than the first N."
)
@mode_option
@click.option(
    "--kernel",
    metavar="KERNEL",
    shell_complete=completing.kernels,
    help="Run this kernel on the recorded inputs, and compare what it gives, not what was recorded; named as for "
    "`mxfp4ref conform`.",
)
@click.option(
    "--device",
    metavar="DEVICE",
    help="With --kernel: where its tensors go, as torch names it; by default cpu, and cuda for flashinfer.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=600,
    show_default=True,
    metavar="SECONDS",
    help="With --kernel: limit for each of its calls.",
)
@click.option("-v", "--verbose", is_flag=True, help="All of each failing call.")
@diagnosis_option
@report_files
def replay(folder: Path, **options: Any) -> None:
    """Compute the calls that a running server recorded again, and compare every bit.

    \b
    mxfp4ref replay flashinfer_dumps --html report.html
    mxfp4ref replay dumps --autotune-cache autotune.json --diagnosis none
    mxfp4ref replay flashinfer_dumps --max-calls 4 --diagnosis quick
    mxfp4ref replay dumps --kernel plain:kernel.py:fused_moe --mode bounded

    DIR holds what flashinfer's own recorder wrote, with no change of the engine:

    \b
    FLASHINFER_LOGLEVEL=10 FLASHINFER_DUMP_INCLUDE='*cutlass_fused_moe*'
    FLASHINFER_DUMP_SAFETENSORS=1 FLASHINFER_DUMP_DIR=DIR

    or what `mxfp4ref record` did; calls are found at any depth, of any number of processes and ranks, and DIR may be
    the folder of one. Every call is equal, for the pairs of K tiles (GEMM1 x GEMM2) that are listed, or different,
    with a diagnosis. A call that is not modelled, has no recorded output, or that a CUDA graph has overwritten since
    is skipped, and the reason told.

    With --kernel only the inputs are read: a kernel that was mended, or that no server runs yet, meets the calls of
    one that does. With Ctrl-C or SIGTERM, what was replayed is told and the reports are written.

    Exit codes: 0 all that were compared are equal; 1 some differ or cannot be read, or ran other tactics than
    predicted; 2 wrong usage, nothing to compare, or a report could not be written; 130 and 143 interrupted.
    """
    with interrupted_once() as interruption:
        sys.exit(_replay(folder, options, interruption))


def _replay(folder: Path, options: dict[str, Any], interruption: Interruption) -> int:
    """Replay and tell what came of it; the exit code."""
    from mxfp4ref.conformance.suite import Interrupted
    from mxfp4ref.engine.replay_report import ReplayOptions
    from mxfp4ref.engine.replaying import replay as replay_folder

    files, verbose = pop_report_files(options), options.pop("verbose")
    if options["kernel"] is not None:
        check_no_swap()
    with usage_errors():
        kernel = [] if options["kernel"] is None else sources(options["kernel"])
        beside = (
            ""
            if options["kernel"] is None
            else "; what the kernel takes, to start and twice a call, is not in it"
        )
        files.check(chain(_files_of(folder, options["autotune_cache"]), kernel))
        with files.stdout_kept(), progress(lines=True, first="now the first call") as step:
            report: Report
            try:
                report = replay_folder(
                    folder,
                    ReplayOptions(**options),
                    begin=lambda expected: echo(f"{expected}{beside}", err=True),
                    progress=lambda result, total: step(_line(result), total),
                )
            except Interrupted as interrupted:
                report = interrupted.report
            interruption.done = True
    report = replace(
        report, interrupted=report.interrupted or bool(interruption.signal), seconds=interruption.seconds
    )

    def show() -> None:
        _print_table(report)
        if problems := report.environment.get("not read of the autotune cache"):
            echo(f"not read of the autotune cache: {problems}", err=True)
        print_report(report, verbose=verbose)

    complete = files.write_after(show, report)
    if interruption.signal:
        return interruption.exit_code
    if any(not result.ok for result in report.results):
        return NOT_EQUAL
    if report.ok:
        return 0 if complete else USAGE
    count = len(report.results)
    which = "the one recorded call could not" if count == 1 else f"none of the {count:,} recorded calls could"
    raise UsageError(f"{folder}: {which} be compared")


def _files_of(*paths: Path | None) -> Iterator[Path]:
    """Files, and those below folders, which no report may replace."""
    for path in paths:
        if path is not None:
            yield path
            yield from files_below(path) if path.is_dir() else ()


def _line(result: CaseResult) -> str:
    """What came of a call, as it ends."""
    return f"{result.case}: {result.status}{f' ({note})' if (note := _note(result)) else ''}, {result.seconds:.1f} s"


def _print_table(report: Report) -> None:
    """A row for each call."""
    rows = []
    for result in report.results:
        layer, tokens = getattr(result, "layer", 0), getattr(result, "tokens", 0)
        read = (str(layer), f"{tokens:,}") if layer else ("", "")
        rows.append((result.case, *read, result.status, ", ".join(result.tiles), _note(result)))
    colours = {result.status: _COLOURS.get(result.status, "red") for result in report.results}
    echo_rows(("call", "layer", "tokens", "status", "K tiles", "note"), rows, colours)


def _note(result: CaseResult) -> str:
    """Why a call was not compared or is not equal, without what else would give the same bits."""
    if result.ok:
        return result.message
    from mxfp4ref.conformance.findings.finding import listed
    from mxfp4ref.conformance.reports.report_text import wrong_elements

    found = result.diagnosis
    words = result.message or ((found.finding.sentence or found.stage) if found else "")
    return listed(words)[0] or f"{wrong_elements(result)} differ"
