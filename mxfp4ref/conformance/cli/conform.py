"""The command `conform`: a kernel over the golden cases."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mxfp4ref._choices import STORAGE
from mxfp4ref._files import files_below
from mxfp4ref.conformance import memory
from mxfp4ref.conformance.cli import completing
from mxfp4ref.conformance.cli.command import command
from mxfp4ref.conformance.cli.progress import case_progress
from mxfp4ref.conformance.cli.report_files import pop_report_files, print_report, report_files
from mxfp4ref.conformance.cli.selecting import failed_in, in_advance, pace_of, select, sources, too_large
from mxfp4ref.conformance.cli.shared import (
    INTERRUPTED,
    NOT_EQUAL,
    USAGE,
    Interruption,
    UsageError,
    check_no_swap,
    diagnosis_option,
    goldens_option,
    interrupted_once,
    limited_jobs,
    mode_option,
    usage_errors,
)
from mxfp4ref.conformance.cli.supervised import end, others_code_begins
from mxfp4ref.conformance.cli.terminal import echo
from mxfp4ref.conformance.kernel_names import wrong_name
from mxfp4ref.goldens import GoldenError, Goldens, open_goldens

if TYPE_CHECKING:
    from collections.abc import Callable

    from mxfp4ref.conformance.results import CaseResult
    from mxfp4ref.goldens import Case

__all__ = ["conform"]


@command()
@click.argument("kernel", required=False, shell_complete=completing.kernels)
@click.option(
    "--kernel",
    "kernel_option",
    metavar="KERNEL",
    shell_complete=completing.kernels,
    help="The same as the argument.",
)
@goldens_option
@click.option(
    "--case",
    "patterns",
    multiple=True,
    metavar="GLOB",
    shell_complete=completing.globs,
    help="Only these cases: a suite, a case, or as in 'gemm/*'; by default all that fit into memory. Repeatable.",
)
@click.option(
    "--exclude",
    "excluded",
    multiple=True,
    metavar="GLOB",
    shell_complete=completing.globs,
    help="None of these cases, a suite or as in --case. Repeatable.",
)
@mode_option
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
@click.option(
    "--device",
    metavar="DEVICE",
    help="Where the kernel's tensors go, as torch names it; by default cpu, and cuda for flashinfer.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=600,
    show_default=True,
    metavar="SECONDS",
    help="Limit for each run of the kernel; importing it may take as long, and at least 60 seconds.",
)
@click.option(
    "--isolate/--no-isolate",
    default=None,
    help="Run the kernel in a process of its own, which survives hangs and crashes; the default for every kernel "
    "but the stand-ins.",
)
@click.option(
    "--all-tactics",
    is_flag=True,
    help="flashinfer: every tile and cluster of either GEMM, instead of one of each K tile.",
)
@click.option("--no-repeat", is_flag=True, help="Run each case once only; a kernel that races may go unseen.")
@diagnosis_option
@click.option(
    "-j",
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="How many cases run side by side, each in a process of its own, with a share of torch's threads.",
)
@click.option(
    "--maxfail",
    "max_failures",
    type=click.IntRange(min=1),
    metavar="N",
    help="Stop when so many cases have failed, those within the bounds of a correct evaluation aside; two cases "
    "later while none says what is wrong.",
)
@click.option("-x", "max_failures", flag_value=1, type=int, help="The same as --maxfail 1.")
@click.option(
    "--last-failed",
    "earlier",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="REPORT",
    help="Only the cases that failed in an earlier report, as --json writes it.",
)
@click.option(
    "--dump",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write a minimal reproducer of each failing case here.",
)
@report_files
@click.option(
    "-v", "--verbose", is_flag=True, help="All of each failing case, and a line for each passing one."
)
def conform(kernel: str | None, kernel_option: str | None, root: Path | None, **options: Any) -> None:
    """Run KERNEL over the golden cases, compare every bit, and say what is wrong.

    \b
    mxfp4ref conform oracle
    mxfp4ref conform mypackage.moe:fused_moe --device cuda --html report.html
    mxfp4ref conform plain:adapter.py:fused_moe --case 'gemm/*' -x --dump folder
    mxfp4ref conform flashinfer --mode bounded --json report.json

    KERNEL is one of

    \b
    oracle                       this package's own forward
    defect:NAME                  a named wrong pipeline (mxfp4ref defects)
    torch-bf16                   dequantise to bf16 and matmul, as most references do
    flashinfer                   the installed flashinfer; its layout helpers are checked too
    flashinfer-w4a8              the same with FP8 activations (use_wfp4afp8_humming)
    package.module:function      called with flashinfer's arguments by name, weights in SM90 layout;
                                 file.py:function too
    logical:package.module:f     the same with weights and scales in logical layout
    plain:package.module:f       f(x, ids, scales, w1, s1, w2, s2, **parameters), logical layout
    stage:KIND:package.module:f  one stage: quantize, dequantize, layout, tensor_core, gemm,
                                 activation, finalize, routing, w4a8, preparation, fp8_rows or
                                 fp8_tensor_core; called with a case's inputs by name, tensors and
                                 numbers (mxfp4ref init router: a router's)

    A kernel that lacks something a case needs raises mxfp4ref.conformance.Skip("no alpha"): that case is skipped.

    In mode exact an output must have the bits of one of the legitimate pairs of K tiles, and the report tells which.
    In mode bounded, for kernels that sum in another order, it must lie in the interval of all correct evaluations.

    A kernel that raises, hangs, crashes, returns something else, writes nothing or into its inputs, or gives other
    bits the second time is reported as that, and the remaining cases still run. All kernels but the stand-ins run in
    a process of their own. With --no-isolate, for debuggers, a run that takes longer than --timeout is abandoned in
    its thread, and a kernel that ends its process ends the command, with exit code 1.

    Where stderr is no terminal, a line there every ten seconds says how far it has come.

    With Ctrl-C or SIGTERM, what was run is told and the reports are written, marked as interrupted. A second one
    changes nothing, a third ends at once.

    Exit codes: 0 conforms, 1 does not, 2 wrong usage or environment, or a report could not be written, 130 and 143
    interrupted, by Ctrl-C or SIGTERM.
    """
    if (kernel is None) == (kernel_option is None):
        raise click.UsageError("expected one KERNEL, as the argument or as --kernel")
    spec = kernel if kernel_option is None else kernel_option
    assert spec is not None
    check_no_swap()
    if wrong := wrong_name(spec):  # before torch is imported, which takes seconds
        raise UsageError(wrong)
    with interrupted_once() as interruption:
        try:
            code = _conform(spec, root, options, interruption)
        except KeyboardInterrupt:
            if not interruption.ran:
                echo(f"{spec}: interrupted before any case was run: no verdict", err=True)
            raise
        end(code)
        sys.exit(code)


def _conform(spec: str, root: Path | None, options: dict[str, Any], interruption: Interruption) -> int:
    """Run the kernel and tell what came of it; the exit code."""
    files = pop_report_files(options)
    patterns, excluded, earlier, isolate, device, verbose = (
        options.pop(name) for name in ("patterns", "excluded", "earlier", "isolate", "device", "verbose")
    )
    options["repeat"] = not options.pop("no_repeat")
    with usage_errors():  # before torch is imported, too
        goldens = open_goldens(root)
        out, chosen = select(goldens, excluded, "--exclude"), select(goldens, patterns, "--case")
        names = [n for n in goldens.in_order_to_run() if (not chosen or n in chosen) and n not in out]
        if not names:
            raise UsageError("--exclude: none of the chosen cases is left")

    from mxfp4ref._compiled import compile_loops
    from mxfp4ref.conformance.kernels.loading import is_stand_in, runnable
    from mxfp4ref.conformance.options import Options
    from mxfp4ref.conformance.reports.again import selection_arguments
    from mxfp4ref.conformance.running import NOT_DUMPED
    from mxfp4ref.conformance.suite import InternalError, Interrupted, run

    broken: GoldenError | InternalError | None = None
    with files.stdout_kept(), usage_errors():
        if earlier is not None:
            names = failed_in(earlier, goldens, names, (spec, options["mode"]))
        large = {} if patterns else too_large(goldens, names, spec, device)
        left_out = [f"{name} is left out: {why}; --case {name} runs it" for name, why in large.items()]
        names = [name for name in names if name not in large]
        if not names:
            raise UsageError("; ".join(left_out))
        options["jobs"] = limited_jobs(options["jobs"], len(names))
        inputs = chain(files_below(goldens.root), sources(spec), [earlier] if earlier else ())
        files.check(inputs, goldens.root, options["dump"])
        if isolate is False and not is_stand_in(spec):
            others_code_begins()
        compile_loops()  # here, since it is no part of the first case
        to_run = runnable(spec, goldens, names)
        pace = pace_of(goldens, to_run, spec)
        left_out += in_advance(pace, "--exclude 'models/*'", options["max_failures"])
        with case_progress(to_run, options["max_failures"], pace) as advance:
            try:
                result = run(
                    spec,
                    _Selection(goldens, names, in_full=_takes_all_experts(spec)),
                    Options(**options),
                    device=device,
                    isolate=isolate,
                    progress=partial(_advance, advance, left_out, interruption),
                    note=partial(echo, err=True),
                )
            except Interrupted as interrupted:
                result = interrupted.report
            except (GoldenError, InternalError) as error:
                if error.report is None:
                    raise
                result, broken = error.report, error
            interruption.done = True  # what is left to do is short, and worth the wait
    # An interruption that did not end the run may have cut anything in it short.
    result = replace(
        result, interrupted=result.interrupted or bool(interruption.signal), seconds=interruption.seconds
    )
    limits = options["max_failures"], options["jobs"]
    selection = selection_arguments(patterns, earlier, *limits, excluded)
    result = replace(result, selection=selection, too_large=len(large))
    complete = files.write_after(partial(print_report, result, verbose=verbose), result)
    if options["dump"] is not None and any(not r.ok and NOT_DUMPED not in r.message for r in result.results):
        with files.stdout_kept():
            echo(f"Reproducers: {options['dump']}")
    if broken is not None:
        with usage_errors():
            raise broken
    if interruption.signal and not result.interrupted:
        echo(
            "interrupted while the reports were written: all cases had been run, and the verdict holds",
            err=True,
        )
    if result.interrupted or interruption.signal:
        return interruption.exit_code if interruption.signal else INTERRUPTED
    if not any(r.status != "skipped" for r in result.results):
        raise UsageError(f"{spec}: none of the {len(names)} cases ran: {result.skipped}")
    if not result.compared:
        raise UsageError(f"{spec}: none of the cases that ran has an element to compare")
    return NOT_EQUAL if not result.ok else 0 if complete else USAGE


def _advance(
    advance: Callable[[CaseResult], None],
    left_out: list[str],
    interruption: Interruption,
    result: CaseResult,
) -> None:
    """After the first case tell what to expect: of a kernel that cannot be loaded that is all there is to tell."""
    interruption.ran = True
    while left_out:
        echo(left_out.pop(0), err=True)
    advance(result)


def _takes_all_experts(spec: str) -> bool:
    """Whether a kernel is handed weights in a layout that is made of them: all experts are in memory then."""
    return spec.partition(":")[0] not in ("oracle", "torch-bf16", "defect", "logical", "plain", "stage")


class _Selection(Goldens):
    """Some of the cases, loaded one at a time."""

    def __init__(self, goldens: Goldens, names: list[str], *, in_full: bool) -> None:
        super().__init__(goldens.root)
        self._names, self._in_full = names, in_full

    def load(self, name: str) -> Case:
        """Told before the kernel's process runs out of memory, which says nothing."""
        case = super().load(name)
        available = memory.free() if self._in_full and case.is_whole_layer else None
        if available is not None and memory.needed(case) > available:
            echo(memory.too_large(case, available), err=True)
        return case

    def names(self, suite: str | None = None) -> list[str]:
        return self._names
