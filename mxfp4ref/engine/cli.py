"""The commands on recorded calls."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mxfp4ref._files import files_below
from mxfp4ref.conformance.cli import completing
from mxfp4ref.conformance.cli.command import command
from mxfp4ref.conformance.cli.report_files import pop_report_files, print_report, report_files
from mxfp4ref.conformance.cli.shared import (
    NOT_EQUAL,
    USAGE,
    UsageError,
    check_no_swap,
    diagnosis_option,
    goldens_option,
    progress,
    usage_errors,
)
from mxfp4ref.conformance.cli.supervised import others_code_begins
from mxfp4ref.conformance.cli.terminal import echo, echo_rows
from mxfp4ref.engine.layer_cli import layer

if TYPE_CHECKING:
    from mxfp4ref.conformance.results import CaseResult
    from mxfp4ref.engine.replaying import ReplayReport

__all__ = ["COMMANDS"]

_FLASHINFERS = "flashinfer.fused_moe.cutlass_fused_moe"
_NOTE = 60  # characters of a finding in the table
_COLOURS = {"equal": "green", "skipped": "bright_black"}


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
@diagnosis_option
@report_files
def replay(folder: Path, **options: Any) -> None:
    """Compute the calls that a running server recorded again, and compare every bit.

    \b
    mxfp4ref replay flashinfer_dumps --html report.html
    mxfp4ref replay flashinfer_dumps --autotune-cache autotune.json --diagnosis none
    mxfp4ref replay flashinfer_dumps --max-calls 4 --diagnosis quick

    DIR holds what flashinfer's own recorder wrote, with no change of the engine:

    \b
    FLASHINFER_LOGLEVEL=10 FLASHINFER_DUMP_INCLUDE='*cutlass_fused_moe*'
    FLASHINFER_DUMP_SAFETENSORS=1 FLASHINFER_DUMP_DIR=DIR

    or what `mxfp4ref record` did; calls are found at any depth, of any number of processes and ranks. Every call is
    equal, for the pairs of K tiles (GEMM1 x GEMM2) that are listed, or different, with a diagnosis. A call that is
    not modelled, has no recorded output, or that a CUDA graph has overwritten since is skipped, and the reason told.

    Exit codes: 0 all that were compared are equal; 1 some differ or cannot be read, or ran other tactics than
    predicted; 2 wrong usage, nothing to compare, or a report could not be written.
    """
    from mxfp4ref.engine.replaying import ReplayOptions
    from mxfp4ref.engine.replaying import replay as replay_folder

    files = pop_report_files(options)
    with usage_errors():
        files.check(_files_of(folder, options["autotune_cache"]))
        with progress(lines=True) as step:
            report = replay_folder(
                folder,
                ReplayOptions(**options),
                begin=lambda expected: echo(str(expected), err=True),
                progress=lambda result, total: step(_line(result), total),
            )

    def show() -> None:
        _print_table(report)
        if problems := report.environment.get("not read of the autotune cache"):
            echo(f"not read of the autotune cache: {problems}", err=True)
        print_report(report, verbose=False)

    complete = files.write_after(show, report)
    if any(not result.ok for result in report.results):
        sys.exit(NOT_EQUAL)
    if report.ok:
        sys.exit(0 if complete else USAGE)
    raise UsageError(f"{folder}: none of the {len(report.results)} recorded calls could be compared")


@command(context_settings={"ignore_unknown_options": True})
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--output",
    "folder",
    required=True,
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the calls go, each into a folder of its own.",
)
@click.option("-m", "module", is_flag=True, help="SCRIPT is a module's name, as for python -m.")
@click.option(
    "--max-calls",
    type=click.IntRange(min=1),
    default=1000,
    metavar="N",
    show_default=True,
    help="Record no more calls.",
)
@click.option(
    "--max-gib",
    type=click.FloatRange(min=0, min_open=True),
    default=20,
    metavar="GIB",
    show_default=True,
    help="Record no more GiB of inputs, weights included.",
)
def record(
    script: str, arguments: tuple[str, ...], folder: Path, module: bool, max_calls: int, max_gib: float
) -> None:
    """Run a Python script and record its calls of flashinfer's cutlass_fused_moe.

    \b
    mxfp4ref record --output calls serve.py --port 8000
    mxfp4ref record --output calls -m mypackage.server
    mxfp4ref replay calls

    For releases of flashinfer without a recorder, or whose recorder leaves out lists (before 0.6.12). What it writes
    is what flashinfer writes, for `mxfp4ref replay`. Without flashinfer it records calls of
    mxfp4ref.torch_ref_cutlass_fused_moe. The weights are written again with each call.

    Calls are recorded in this process and those forked from it, not in processes that it starts anew, and not in CUDA
    graphs. Put -- before SCRIPT if it has options of these names.

    Exit codes: the script's; 2 if nothing was recorded.
    """
    from mxfp4ref._validate import check_float
    from mxfp4ref.engine.recorder import Recorder, run_script
    from mxfp4ref.engine.recordings import find_recordings

    check_no_swap()
    if not module and not Path(script).is_file():
        raise UsageError(f"SCRIPT: there is no file {script}")
    with usage_errors():
        max_bytes = int(check_float("--max-gib", max_gib) * 2**30)
        folder = folder.absolute()  # the script may change the working directory
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        there = len(find_recordings(folder))
    recorder = Recorder(folder, max_calls, max_bytes)

    def summary(code: int) -> int:
        """Say what was recorded; the exit code."""
        for problem in recorder.problems:
            echo(f"not recorded: {problem}", err=True)
        if recorder.left_out:
            echo(f"{recorder.left_out:,} calls were not recorded", err=True)
        ended = recorder.ended or (f"exit code {code}" if code else "")
        if not (written := recorder.written()):
            words = f"the script ended with {ended} before any call of" if ended else "expected calls of"
            missing = f"; {_FLASHINFERS} is not here: {recorder.missing}" if recorder.missing else ""
            words += f" {' or of '.join(recorder.hooked)} in this process{missing}"
            UsageError(
                f"{script}: {f'nothing recorded; {words}' if recorder.hooked else f'not run; {recorder.missing}'}"
            ).show()
            with suppress(OSError):  # only what this command made, and is empty
                for path in made:
                    path.rmdir()
            return USAGE
        beside = f", beside {there:,} that were there" if there else ""
        after = f"; then the script ended with {ended}" if ended else ""
        echo(f"{written:,} calls recorded in {folder}{beside}{after}")
        return code

    others_code_begins()
    sys.exit(summary(run_script(script, arguments, recorder, module=module, at_exit=summary)))


@command()
@click.argument("what", metavar="CALL|DIR|KERNEL", shell_complete=completing.kernels)
@click.option(
    "--ranks",
    type=click.IntRange(min=2),
    metavar="N",
    multiple=True,
    default=(2,),
    show_default=True,
    help="Ranks to share experts, and the intermediate size, where that divides it. Repeatable.",
)
@click.option(
    "--autotune-cache",
    type=click.Path(exists=True, path_type=Path),
    metavar="PATH",
    help="For recorded calls: each batch runs the tactics that flashinfer's autotuner chose for its size.",
)
@goldens_option
@click.option(
    "--case",
    "cases",
    multiple=True,
    metavar="NAME",
    shell_complete=completing.cases,
    help="For a kernel: the golden cases whose tokens are computed; a few by default. Repeatable.",
)
@click.option(
    "--device",
    metavar="DEVICE",
    help="For a kernel: where its tensors go, as torch names it; by default cpu, and cuda for flashinfer.",
)
def invariance(what: str, **options: Any) -> None:
    """Say which bits of a token depend on what it is computed with.

    The tokens of a call are computed alone, in reverse, behind as many others, and on several ranks. A recorded call,
    or each one below a folder, is computed by the oracle, with the tactics that its output or the autotune cache
    tells; a KERNEL, named as for `mxfp4ref conform`, runs on golden cases, in a process of its own.

    \b
    mxfp4ref invariance oracle
    mxfp4ref invariance mypackage.moe:fused_moe --device cuda
    mxfp4ref invariance flashinfer_dumps --autotune-cache autotune.json

    Exit codes: 0 no bit depends on the batch; 1 some do; 2 wrong usage, or nothing to compute. Sums over ranks are
    told, and do not count.
    """
    from mxfp4ref.engine.invariance_of import of_kernel, of_recordings

    if not Path(what).is_dir():
        check_no_swap()
    ok = True
    count = 0
    with usage_errors():
        if Path(what).is_dir():
            found = of_recordings(Path(what), options["ranks"], options["autotune_cache"])
        else:
            found = of_kernel(what, options["cases"], options["ranks"], options["root"], options["device"])
        for name, result in found:
            if isinstance(result, str):
                echo(f"{name}: {result}")
                continue
            count += any(variant.elements for variant in result.variants)
            ok &= result.ok
            echo(f"{name}: {result.verdict}", fg="green" if result.ok else "red")
            for variant in result.variants:
                words = f"{variant.differing:,} of {variant.elements:,} elements differ"
                echo(f"    {variant.name:30} {words if variant.differing else 'equal'}")
                if variant.first is not None:
                    echo(f"        first: {variant.first}")
                    echo(f"        why: {variant.why}")
    if not count:
        raise UsageError(f"{what}: nothing to compute")
    sys.exit(0 if ok else NOT_EQUAL)


def _files_of(*paths: Path | None) -> Iterator[Path]:
    """Files, and those below folders, which no report may replace."""
    for path in paths:
        if path is not None:
            yield path
            yield from files_below(path) if path.is_dir() else ()


def _line(result: CaseResult) -> str:
    """What came of a call, as it ends."""
    return f"{result.case}: {result.status}{f' ({note})' if (note := _note(result)) else ''}, {result.seconds:.1f} s"


def _print_table(report: ReplayReport) -> None:
    """A row for each call."""
    rows = []
    for result in report.results:
        layer, tokens = getattr(result, "layer", 0), getattr(result, "tokens", 0)
        read = (str(layer), f"{tokens:,}") if layer else ("", "")
        rows.append((result.case, *read, result.status, ", ".join(result.tiles), _note(result)))
    colours = {result.status: _COLOURS.get(result.status, "red") for result in report.results}
    echo_rows(("call", "layer", "tokens", "status", "K tiles", "note"), rows, colours)


def _note(result: CaseResult) -> str:
    """Why a call was not compared or is not equal: the first words of what is said below the table."""
    if result.message or result.ok:
        return result.message
    from mxfp4ref.conformance.report_text import wrong_elements

    found = result.diagnosis
    words = (found.finding.sentence or found.stage) if found else ""
    return textwrap.shorten(words or f"{wrong_elements(result)} differ", _NOTE, placeholder=" ...")


COMMANDS = (replay, record, invariance, layer)
