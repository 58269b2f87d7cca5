"""The commands on goldens: check them, write them, export them, show one."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import click

from mxfp4ref.conformance.cli import completing
from mxfp4ref.conformance.cli.command import command
from mxfp4ref.conformance.cli.progress import case_progress, progress
from mxfp4ref.conformance.cli.shared import (
    NOT_EQUAL,
    UsageError,
    first_values,
    goldens_option,
    limited_jobs,
    usage_errors,
)
from mxfp4ref.conformance.cli.terminal import echo
from mxfp4ref.goldens import GoldenError, open_goldens

__all__ = ["export", "regenerate", "show", "verify"]


@command()
@goldens_option
@click.option("--files-only", is_flag=True, help="Check sizes and hashes, compute nothing.")
def verify(root: Path | None, files_only: bool) -> None:
    """Check the goldens, and this machine against them and against the hardware record.

    First the files: size, dtype, shape, SHA-256. Then this machine: the oracle has to give the stored bits of every
    case. Then the record of what real GPUs gave, if there is one: its hashes have to be those of the goldens. Runs
    that gave something else, by a known race of that release, are counted and told; they are no reason to fail.

    \b
    mxfp4ref verify --files-only             # seconds
    mxfp4ref verify                          # minutes

    Exit codes: 0 all is as it has to be; 1 something is not, and is listed; 2 there are no goldens.
    """
    from mxfp4ref.conformance.options import Options
    from mxfp4ref.conformance.reports.report_text import headline
    from mxfp4ref.conformance.suite import run
    from mxfp4ref.goldens import hardware_record

    with usage_errors():
        goldens = open_goldens(root)
        problems = goldens.verify()
        echo(f"{goldens.root}: {goldens.count}, {len(problems)} problems with files")
        if not problems:
            records, contradictions = hardware_record.compare(goldens)
            problems += contradictions
            echo(f"hardware record: {hardware_record.in_words(records, len(contradictions))}")
        if not problems and not files_only:
            try:
                with case_progress(goldens.names()) as advance:
                    result = run("oracle", goldens, Options(repeat=False), progress=advance)
            except GoldenError as error:  # files that are whole, but make no case
                problems.append(str(error))
            else:
                echo(result.verdict)
                problems += [headline(r) for r in result.results if not r.ok]
                if not problems and not result.ok:  # of cases without an element
                    problems.append("no bit of this machine was checked")
    for problem in problems:
        echo(problem, err=True)
    sys.exit(NOT_EQUAL if problems else 0)


@command()
@click.option("--check", is_flag=True, help="Write nothing; list the differences and exit with 1.")
@click.option(
    "--only",
    multiple=True,
    metavar="GLOB",
    shell_complete=completing.globs,
    help="Only cases that match, as in 'gemm/*'; by default all. Repeatable.",
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=lambda: os.cpu_count() or 1,
    metavar="N",
    show_default="one a core",
    help="How many processes.",
)
@click.option(
    "--root",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the goldens; by default that of the checkout.",
)
def regenerate(check: bool, only: tuple[str, ...], jobs: int, root: Path | None) -> None:
    """Write the goldens from nothing, or --check that they are what would be written.

    \b
    mxfp4ref regenerate --check
    mxfp4ref regenerate --only 'gemm/*' --only formats/scale_bytes_0_and_255

    Exit codes: 0 written, or equal byte for byte; 1 not equal, or larger than goldens may be; 2 wrong usage.
    """
    from mxfp4ref.goldens import writing  # imports the definitions of all cases

    start, jobs = time.monotonic(), limited_jobs(jobs)
    with usage_errors(), progress(lines=True, first="now the first cases") as step:
        result = writing.regenerate(root, only, check=check, jobs=jobs, progress=step)
    for difference in result.differences:
        echo(difference)
    if not result.differences:
        what = "equal byte for byte" if check else "written"
        echo(f"{result.root}: {result.cases} cases, {what}")
    echo(f"{result.root}: {result.size / 2**20:.2f} MiB in all")
    echo(f"generated {result.cases} cases in {time.monotonic() - start:.1f} s with {jobs} processes")
    too_large = result.size > writing.SIZE_LIMIT
    if too_large:
        echo(f"{result.root}: more than {writing.SIZE_LIMIT >> 20} MiB", err=True)
    sys.exit(NOT_EQUAL if result.differences or too_large else 0)


@command()
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@goldens_option
def export(folder: Path, root: Path | None) -> None:
    """Write the goldens to DIR as a data set of flashinfer-bench: definitions, workloads, a reference.

    DIR is created if it is not there; a file in it that has other bytes than would be written is refused. Every
    kernel call with stored weights and a finite output becomes a workload; the others are listed with the reason.
    flashinfer-bench is not needed for that.

    \b
    mxfp4ref export DIR
    flashinfer-bench run --local DIR         # with your kernels in DIR/solutions

    It compares with a tolerance. To compare bits, use mxfp4ref conform.

    Exit codes: 0 written, 2 wrong usage, or goldens that are missing or damaged.
    """
    from mxfp4ref.goldens.flashinfer_bench import export_flashinfer_bench

    with usage_errors():
        goldens = open_goldens(root)
        exported, left_out = export_flashinfer_bench(goldens, folder)
    for name, reason in left_out.items():
        echo(f"left out: {name}: {reason}")
    if not exported:
        raise UsageError(f"{goldens.root}: no case can be exported")
    echo(f"{folder}: {len(exported)} workloads written, {len(left_out)} cases left out")


@command()
@click.argument("case", shell_complete=completing.cases)
@goldens_option
@click.option("--values", is_flag=True, help="The first 8 values of each tensor too.")
def show(case: str, root: Path | None, values: bool) -> None:
    """Show a golden CASE: why it exists, what it catches, its tensors and outputs.

    \b
    mxfp4ref show gemm/ordinary
    mxfp4ref show routing/gpt_oss_bf16_ties --values

    Exit codes: 0 shown; 2 there is no such case, or it is damaged. `mxfp4ref list` has the names.
    """
    with usage_errors():
        goldens = open_goldens(root)
        about = goldens.about(case, tensors=True)  # without torch, which takes seconds to import
        tensors = goldens.load(case).tensors if values else {}
    echo(case, bold=True)
    echo(f"kind: {about['kind']}")
    echo(f"why: {about['why']}")
    if about["catches"]:
        echo(f"catches: {', '.join(about['catches'])}")
    if about["unique_for"]:
        echo(f"kept for: {about['unique_for']}")
    for name, value in about["parameters"].items():
        echo(f"{name} = {value!r}")
    echo("tensors:")
    for name, tensor in sorted(about["tensors"].items()):
        echo(f"  {name:24} {tensor['dtype']} {tensor['shape']}")
        if values:
            echo(f"  {'':24} {first_values(tensors[name])}")
    for name, recipe in about["derived"].items():
        echo(f"  {name:24} generated: {recipe['rule']} {recipe['shape']}, seed {recipe['seed']}")
    for output in about["outputs"]:
        for gemm1, gemm2 in output["tile_k"]:
            echo(
                f"output for K tiles {gemm1}x{gemm2}: SHA-256 {about['tensors'][output['tensor']]['sha256']}"
            )
