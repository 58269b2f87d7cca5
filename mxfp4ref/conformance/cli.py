"""The `mxfp4ref` command."""

from __future__ import annotations

import fnmatch
import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from mxfp4ref.conformance import report
from mxfp4ref.conformance import suite as conformance
from mxfp4ref.conformance.bounds import STORAGE
from mxfp4ref.conformance.comparison import FAR, differing, first_difference, ulp_distance
from mxfp4ref.conformance.kernels import KernelError
from mxfp4ref.conformance.suite import CaseResult
from mxfp4ref.defects import DEFECTS, get_defect
from mxfp4ref.goldens import hardware_record
from mxfp4ref.goldens.store import GoldenError, Goldens, open_goldens
from mxfp4ref.model.parallel import Ranks
from mxfp4ref.routing import PRESETS

__all__ = ["commands", "main"]

NOT_EQUAL, USAGE = 1, 2  # exit codes, besides 0

_WIDTH = 100


class _Usage(click.ClickException):
    """Wrong usage, or something missing in the environment."""

    exit_code = USAGE


def main() -> None:
    """Entry point of the console script."""
    commands(prog_name="mxfp4ref")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": _WIDTH})
@click.version_option(package_name="mxfp4ref")
def commands() -> None:
    """Bit-exact reference of the SM90 W4A16 MXFP4 mixture-of-experts kernel.

    \b
    mxfp4ref conform oracle                      see what success looks like, no GPU needed
    mxfp4ref conform defect:limit_ignored        see what a diagnosis looks like
    mxfp4ref conform flashinfer                  the installed flashinfer, on this machine's GPU
    mxfp4ref conform mypackage.moe:fused_moe     your kernel, with flashinfer's signature
    mxfp4ref show gemm/ordinary                  what is in a golden case, and why
    mxfp4ref explain limit_ignored               what a named defect does, and where it was seen

    Exit codes: 0 conforms, equal or done; 1 does not; 2 wrong usage, or something is missing.
    """


_goldens = click.option(
    "--goldens",
    "root",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the goldens; by default $MXFP4REF_GOLDENS, ./goldens here or above, or the built-in few.",
)


@commands.command()
@click.argument("kernel", required=False)
@click.option("--kernel", "kernel_option", metavar="KERNEL", help="The same as the argument.")
@_goldens
@click.option(
    "--case", "patterns", multiple=True, metavar="GLOB", help="Only these cases, as in 'gemm/*'. Repeatable."
)
@click.option("--mode", type=click.Choice(conformance.MODES), default="exact", show_default=True)
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
def conform(
    kernel: str | None,
    kernel_option: str | None,
    root: Path | None,
    patterns: tuple[str, ...],
    mode: str,
    storage: str,
    confidence: float | None,
    device: str | None,
    timeout: float,
    isolate: bool,
    all_tactics: bool,
    no_repeat: bool,
    no_diagnosis: bool,
    dump: Path | None,
    json_file: Path | None,
    junit_file: Path | None,
    html_file: Path | None,
    verbose: bool,
) -> None:
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

    Exit codes: 0 conforms, 1 does not, 2 wrong usage or environment.
    """
    if (kernel is None) == (kernel_option is None):
        raise click.UsageError("expected one KERNEL, as the argument or as --kernel")
    kernel = kernel or kernel_option
    assert kernel is not None
    with _usage_errors():
        goldens = open_goldens(root)
        names = _select(goldens, patterns)
        _writable(json_file, junit_file, html_file)
        with _progress(len(names)) as advance:
            result = conformance.run(
                kernel,
                _Selection(goldens, names),
                mode=mode,
                storage=storage,
                confidence=confidence,
                device=device,
                timeout=timeout,
                isolate=isolate,
                repeat=not no_repeat,
                all_tactics=all_tactics,
                diagnosed=not no_diagnosis,
                dump=dump,
                progress=advance,
            )
        for path, render in (
            (json_file, report.to_json),
            (junit_file, report.to_junit),
            (html_file, report.to_html),
        ):
            if path is not None:
                path.write_text(render(result), encoding="utf-8")
    _print(report.to_text(result, verbose=verbose), ok=result.ok)
    if dump is not None and not result.ok:
        click.echo(f"Reproducers: {dump}")
    if not any(r.status != "skipped" for r in result.results):
        raise _Usage(f"{kernel}: none of the {len(names)} cases is of a kind that it runs")
    sys.exit(0 if result.ok else NOT_EQUAL)


@commands.command()
@_goldens
@click.option("--files-only", is_flag=True, help="Check sizes and hashes, compute nothing.")
def verify(root: Path | None, files_only: bool) -> None:
    """Check the goldens, and this machine against them and against the hardware record.

    First the files: size, dtype, shape, SHA-256. Then this machine: the oracle has to give the stored bits of every
    case. Then the record of what real GPUs gave, if there is one: its hashes have to be those of the goldens.
    """
    with _usage_errors():
        goldens = open_goldens(root)
        problems = goldens.verify()
        click.echo(f"{goldens.root}: {len(goldens.names())} cases, {len(problems)} problems with files")
        if not problems:
            records, differences = hardware_record.compare(goldens)
            problems += differences
            if records:
                gpus = ", ".join(sorted({str(r["gpu"]) for r in records}))
                click.echo(f"hardware record: {len(records)} runs on {gpus}, {len(differences)} differ")
            else:
                click.echo("hardware record: none")
        if not problems and not files_only:
            with _progress(len(goldens.names())) as advance:
                result = conformance.run("oracle", goldens, repeat=False, progress=advance)
            click.echo(result.verdict)
            problems += [report.headline(r) for r in result.results if not r.ok]
    for problem in problems:
        click.echo(problem, err=True)
    sys.exit(NOT_EQUAL if problems else 0)


@commands.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": []}, add_help_option=False
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def regenerate(arguments: tuple[str, ...]) -> None:
    """Write the goldens from nothing, or --check that they are what would be written."""
    from mxfp4ref.goldens import writing as module

    sys.exit(module.main(list(arguments)))


@commands.command()
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@_goldens
def export(folder: Path, root: Path | None) -> None:
    """Write the goldens to DIR as a data set of flashinfer-bench: definitions, workloads, a reference.

    DIR is created if it is not there, and files of an earlier export are replaced. Every kernel call with stored
    weights and a finite output becomes a workload; the others are listed with the reason. flashinfer-bench is not
    needed for that. Put your kernels into DIR/solutions and run

    \b
    flashinfer-bench run --local DIR

    It compares with a tolerance. To compare bits, use mxfp4ref conform.

    Exit codes: 0 written, 2 wrong usage, or goldens that are missing or damaged.
    """
    from mxfp4ref.goldens.flashinfer_bench import export_flashinfer_bench

    with _usage_errors():
        goldens = open_goldens(root)
        exported, left_out = export_flashinfer_bench(goldens, folder)
    for name, reason in left_out.items():
        click.echo(f"left out: {name}: {reason}")
    if not exported:
        raise _Usage(f"{goldens.root}: no case can be exported")
    click.echo(f"{folder}: {len(exported)} workloads written, {len(left_out)} cases left out")


@commands.command()
@click.argument("case")
@_goldens
@click.option("--values", is_flag=True, help="The first values of each tensor too.")
def show(case: str, root: Path | None, values: bool) -> None:
    """Show a golden CASE (suite/name): why it exists, what it catches, its tensors and outputs."""
    with _usage_errors():
        loaded = open_goldens(root).load(case)
    click.secho(loaded.id, bold=True)
    click.echo(f"kind: {loaded.kind}")
    click.echo(textwrap.fill(f"why: {loaded.why}", _WIDTH, subsequent_indent="     "))
    if loaded.catches:
        click.echo(
            textwrap.fill(f"catches: {', '.join(loaded.catches)}", _WIDTH, subsequent_indent="         ")
        )
    if loaded.unique_for:
        click.echo(f"kept for: {loaded.unique_for}")
    for name, value in loaded.parameters.items():
        click.echo(f"{name} = {value!r}")
    click.echo("tensors:")
    for name, tensor in sorted(loaded.tensors.items()):
        click.echo(f"  {name:24} {_describe(tensor)}")
        if values:
            click.echo(f"  {'':24} {_first_values(tensor)}")
    for name, recipe in loaded.derived.items():
        click.echo(f"  {name:24} generated: {recipe['rule']} {recipe['shape']}, seed {recipe['seed']}")
    for pair, digest in loaded.output_hashes.items() if loaded.kind == "moe" else ():
        click.echo(f"output for K tiles {pair[0]}x{pair[1]}: SHA-256 {digest}")


@commands.command()
@click.argument("a", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("b", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def compare(a: Path, b: Path) -> None:
    """Compare two saved outputs bit by bit: tensors of the same names in two safetensors files.

    Exit codes: 0 equal, 1 different, 2 a file cannot be read.
    """
    with _usage_errors():
        one, other = _load(a), _load(b)
    equal = True
    for name in sorted(one.keys() | other.keys()):
        if name not in one or name not in other:
            click.echo(f"{name}: only in {a if name in one else b}")
            equal = False
            continue
        got, want = one[name], other[name]
        if (got.dtype, got.shape) != (want.dtype, want.shape):
            click.echo(f"{name}: {_describe(got)} in {a}, {_describe(want)} in {b}")
            equal = False
            continue
        first = first_difference(got, want)
        if first is None:
            click.echo(f"{name}: equal, {_describe(got)}")
            continue
        equal = False
        mask = differing(got, want)
        distance = ulp_distance(got, want)[mask]
        numbers = distance[distance < FAR]
        furthest = f", at most {int(numbers.max()):,} ulp" if len(numbers) else ""
        click.echo(
            f"{name}: {int(mask.sum()):,} of {mask.numel():,} elements differ{furthest}; first {first}"
        )
    sys.exit(0 if equal else NOT_EQUAL)


@commands.command()
@click.option(
    "--checkpoint",
    required=True,
    type=click.Path(exists=True, path_type=Path),
    help="A folder of safetensors files, with or without an index, or one file.",
)
@click.option("--layer", "index", required=True, type=click.IntRange(min=0), help="The layer's number.")
@click.option(
    "--input",
    "input_path",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="safetensors: hidden [M, H] bf16; optionally logits, token_ids, shared_output, padded.",
)
@click.option(
    "--output",
    "output_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the output and the routing to this safetensors file.",
)
@click.option("--router", type=click.Choice(list(PRESETS)), help="Default: the checkpoint's.")
@click.option("--top-k", type=click.IntRange(min=1), help="Default: that of config.json.")
@click.option("--routed-scaling-factor", type=float, help="Default: that of config.json.")
@click.option("--alpha", type=float, help="SwiGLU's alpha; default: the model's.")
@click.option("--beta", type=float, help="SwiGLU's beta; default: the model's.")
@click.option("--limit", type=float, help="SwiGLU's limit; default: the model's.")
@click.option("--ep-size", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--tp-size", type=click.IntRange(min=1), default=1, show_default=True)
def layer(
    checkpoint: Path,
    index: int,
    input_path: Path,
    output_path: Path | None,
    router: str | None,
    **options: Any,
) -> None:
    """Run a whole mixture-of-experts layer of a DeepSeek-V4 or gpt-oss checkpoint: router, experts, output."""
    from mxfp4ref.checkpoint import read_layer, run_layer

    def given(*names: str) -> dict[str, Any]:
        return {name: options[name] for name in names if options[name] is not None}

    with _usage_errors():
        found = read_layer(checkpoint, index, **given("alpha", "beta", "limit"))
        found = replace(found, **given("top_k", "routed_scaling_factor"))
        ranks = Ranks(**given("ep_size", "tp_size"))
        result = run_layer(found, input_path, output_path, router=router, ranks=ranks)
    for name, tensor in result.items():
        click.echo(f"{name:22}  {_describe(tensor):22}  {_first_values(tensor)}")
    if output_path is not None:
        click.echo(f"written: {output_path}")


@commands.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def defects(as_json: bool) -> None:
    """List the named defects: mistakes of real code, and other arithmetics that mean the same."""
    if as_json:
        rows = [
            {n: getattr(d, n) for n in ("name", "kind", "target", "summary", "seen_in")}
            for d in DEFECTS.values()
        ]
        click.echo(json.dumps(rows, indent=1))
        return
    width = max(len(name) for name in DEFECTS)
    for kind, title in (("defect", "Mistakes"), ("arithmetic", "Other arithmetics")):
        click.secho(title, bold=True)
        for defect in DEFECTS.values():
            if defect.kind == kind:
                where = "" if defect.target == "moe" else f" [{defect.target}]"
                click.echo(f"  {defect.name:{width}}  {defect.summary}{where}")


@commands.command()
@click.argument("defect")
@_goldens
def explain(defect: str, root: Path | None) -> None:
    """Explain a named DEFECT: what it does, where it was seen, and which golden cases are there for it."""
    with _usage_errors():
        found = get_defect(defect)
        goldens = open_goldens(root)
        catching = [name for name in goldens.names() if found.name in goldens.load(name).catches]
    click.secho(found.name, bold=True)
    click.echo(textwrap.fill(found.summary, _WIDTH))
    nature = "a mistake" if found.kind == "defect" else "another arithmetic that means the same"
    click.echo(f"{nature}; changes: {found.target}")
    click.echo(f"seen in: {', '.join(found.seen_in)}")
    if catching:
        click.echo(
            textwrap.fill(f"cases made for it: {', '.join(catching)}", _WIDTH, subsequent_indent="    ")
        )
    click.echo(f"try it: mxfp4ref conform defect:{found.name}")


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
            raise _Usage(f"--case: {pattern!r} matches none of the {len(names)} cases in {goldens.root}")
        chosen.update(found)
    return [name for name in names if name in chosen] if chosen else names


def _writable(*paths: Path | None) -> None:
    for path in paths:
        if path is not None and not path.absolute().parent.is_dir():
            raise _Usage(f"cannot write {path}: there is no folder {path.absolute().parent}")


@contextmanager
def _usage_errors() -> Iterator[None]:
    """What goes wrong before or beside the comparison is wrong usage or environment: exit code 2."""
    try:
        yield
    except (KernelError, GoldenError, ModuleNotFoundError, TypeError, ValueError, OSError) as error:
        raise _Usage(str(error)) from error


@contextmanager
def _progress(total: int) -> Iterator[Callable[[CaseResult], None] | None]:
    """A progress bar on stderr if that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        failed = 0

        def advance(result: CaseResult) -> None:
            nonlocal failed
            failed += not result.ok
            bar.update(task, advance=1, description=f"{failed} failed  {result.case}")

        yield advance


def _print(text: str, *, ok: bool) -> None:
    """The report; click drops the colours where the output is no terminal."""
    *lines, verdict = text.split("\n")
    for line in lines:
        heading = bool(line) and not line.startswith(" ") and ":" in line
        click.secho(line, bold=heading or None)
    click.secho(verdict, fg="green" if ok else "red", bold=True)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file: {error}") from error


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _first_values(tensor: Tensor) -> str:
    shown = ", ".join(f"{value:.6g}" for value in tensor.flatten()[:8].to(torch.float64).tolist())
    return f"{shown}{', ...' if tensor.numel() > 8 else ''}"
