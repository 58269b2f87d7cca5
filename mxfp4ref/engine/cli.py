"""The commands on recorded calls."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from mxfp4ref.conformance.cli import completing
from mxfp4ref.conformance.cli.command import command
from mxfp4ref.conformance.cli.shared import (
    NOT_EQUAL,
    USAGE,
    UsageError,
    check_no_swap,
    goldens_option,
    usage_errors,
)
from mxfp4ref.conformance.cli.supervised import others_code_begins
from mxfp4ref.conformance.cli.terminal import echo
from mxfp4ref.engine.layer_cli import layer
from mxfp4ref.engine.replay_cli import replay

__all__ = ["COMMANDS"]

_FLASHINFERS = "flashinfer.fused_moe.cutlass_fused_moe"


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
    from mxfp4ref.conformance.findings.finding import counted
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
            left = recorder.left_out
            echo(f"{counted(left, 'call')} {'was' if left == 1 else 'were'} not recorded", err=True)
        ended = recorder.ended or (f"exit code {code}" if code else "")
        if not (written := recorder.written()):
            words = f"the script ended with {ended} before any call of" if ended else "expected calls of"
            missing = f"; {_FLASHINFERS} is not here: {recorder.missing}" if recorder.missing else ""
            words += f" {' or of '.join(recorder.hooked)} in this process{missing}"
            if recorder.left_out:  # there were some
                words = "what was wrong stands above"
            UsageError(
                f"{script}: {f'nothing recorded; {words}' if recorder.hooked else f'not run; {recorder.missing}'}"
            ).show()
            with suppress(OSError):  # only what this command made, and is empty
                for path in made:
                    path.rmdir()
            return USAGE
        beside = f", beside {there:,} that were there" if there else ""
        after = f"; then the script ended with {ended}" if ended else ""
        echo(f"{counted(written, 'call')} recorded in {folder}{beside}{after}")
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


COMMANDS = (replay, record, invariance, layer)
