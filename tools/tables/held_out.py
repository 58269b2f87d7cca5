"""The wrong kernels of tests/held_out_kernels, and what the diagnosis says of each: four numbers.

    python tools/tables/held_out.py                           # all of them, over the goldens and as single calls
    python tools/tables/held_out.py --only 'weight*' --where single
    python tools/tables/held_out.py --where single --store    # and keep the numbers, which docs/confusion.md tells

Each is run (a) over the goldens as users do it, of which the suite's verdict is taken, and (b) on one captured
call: the first of `tests/held_out_kernels/calls.py` on which it shows in 16 elements, else the golden case on which
it shows most. Whole-size layers are left out unless `--whole` is given.

What was said is a `Finding`: the stages in which the change may lie (none: unknown), a sentence for who wrote the
kernel ("": unknown), and whether every wrong bit is predicted. It is judged by these rules:

- detected: some bit differs, or lies outside its bounds where the kernel is compared in mode "bounded".
- stage right: one of the kernel's stages is among those said, and these are at most two. Of a kernel whose stage is
  "none", which is noise, no stage is said.
- described: the sentence contains a match of each of the kernel's `says`. Of noise also: no sentence at all.
- misleading: something false is said. Stages are given and none of the kernel's is among them; or the sentence calls
  right what is wrong; or it matches none of `says` and names stages of which none is the kernel's; or noise is called
  exact.

A kernel that is not detected is neither described nor is its stage right. Exit code 1 if the four numbers are not
those that are asked for: 100 % detected, 95 % stage right, 80 % described, none misleading.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mxfp4ref import forward, quantize
from mxfp4ref._files import write_file
from mxfp4ref.conformance import Diagnosis, Options, Report, diagnose, differing, run
from mxfp4ref.conformance.kernels.adapters import Kernel, keyword_arguments, whole_arguments
from mxfp4ref.goldens import open_goldens
from mxfp4ref.goldens.case import Case
from mxfp4ref.goldens.runs import runs
from mxfp4ref.goldens.store import KINDS
from tests.held_out_kernels.calls import CALLS, QUANTISED, captured, quantised_values
from tests.held_out_kernels.definition import STAGES, Wrong, load_all, run_on

STORED = Path(__file__).with_suffix(".json")  # by place: how many kernels, the four numbers, which mislead
SHOWS = 16  # elements from which a captured call is one on which somebody would have noticed
ASKED = {"detected": 1.0, "stage right": 0.95, "described": 0.8}
# How a sentence names a stage.
NAMES = {
    "input": r"\binput rows?\b|\bhidden states\b|\bthe input\b",
    "slots": r"\bexpert ids?\b|(last|first|padded|foreign) slots?|other ranks?",
    "fc1": r"GEMM ?1|\bfc1\b|first GEMM",
    "activation": r"\bactivation\b|swiglu|\bclamp|\blimit\b|\balpha\b|\bsigmoid\b",
    "fc2": r"GEMM ?2|\bfc2\b|second GEMM",
    "finalize": r"\bfinalize\b|weighted sum|routing weights?\b",
    "routing": r"\brouter\b|renormali|\bsoftmax\b",
    "quantize": r"\bquanti[sz](e|ed|er|ing)\b",
    "dequantize": r"\bdequanti[sz]",
}
CALLED_RIGHT = re.compile(r"[^.;:]*?\b(?:(?:is|are) right|agrees?)\b", re.IGNORECASE)
# "before finalize" does not say that finalize is wrong.
ELSEWHERE = re.compile(
    r"\b(?:before or after|before|after|up to|not|than) (?:the )?\w+(?: ?[12])?", re.IGNORECASE
)


@dataclass(frozen=True)
class Said:
    """What the package says: as its `Finding`."""

    stages: tuple[str, ...] = ()
    sentence: str = ""
    exact: bool = False


@dataclass(frozen=True)
class Judged:
    """A kernel, what was said of it in one place, and what that is worth."""

    kernel: str
    theme: str
    truth: tuple[str, ...]
    story: str
    where: str
    detected: bool
    said: Said
    stage_right: bool
    described: bool
    misleading: bool
    seconds: float


def said_of(result: Diagnosis | Report) -> Said:
    """The result's finding; where it has none, what its words come to. The only place that knows of either."""
    finding = getattr(result, "finding", None)
    if finding is not None:
        return Said(tuple(finding.stages), finding.sentence, bool(finding.exact))
    if isinstance(result, Diagnosis):
        sentence = f"Every wrong bit is that of {result.exact[0]}. " if result.exact else ""
        return Said(_stages(result.stage), sentence + result.stage, bool(result.exact))
    words = [case.diagnosis.stage for case in result.results if case.diagnosis is not None]
    agreed = (
        set.intersection(*map(set, found)) if (found := [s for w in words if (s := _stages(w))]) else set()
    )
    return Said(tuple(s for s in STAGES if s in agreed), result.culprit.strip(), bool(result.defects))


def _stages(words: str) -> tuple[str, ...]:
    """The stages that the older diagnosis means by what it says of where to look."""
    if words.startswith("finalize"):
        return ("finalize",)
    if "GEMM1 or the activation is wrong" in words:
        return ("fc1", "activation")
    if words.startswith("before finalize"):
        return ("input", "slots", "fc1", "activation", "fc2")
    return ()


def judge(kernel: Wrong, where: str, detected: bool, said: Said, seconds: float = 0.0) -> Judged:
    """By the rules above."""
    noise = kernel.stages == ("none",)
    sentence = said.sentence.replace("_", " ")  # names of defects are words too
    matched = [bool(re.search(pattern, sentence, re.IGNORECASE)) for pattern in kernel.says]
    right = bool(set(kernel.stages) & set(said.stages)) and len(said.stages) <= 2
    praised = _named(" ".join(CALLED_RIGHT.findall(sentence)))
    named = _named(ELSEWHERE.sub("", CALLED_RIGHT.sub("", sentence)))
    misleading = (
        bool(said.stages and not set(kernel.stages) & set(said.stages))
        or (set(kernel.stages) <= praised)
        or (not any(matched) and bool(named) and not set(kernel.stages) & named)
        or (noise and said.exact)
    )
    return Judged(
        kernel.name,
        kernel.theme,
        kernel.stages,
        kernel.story,
        where,
        detected,
        said,
        detected and (not said.stages if noise else right),
        detected and (all(matched) or (noise and not said.sentence)),
        detected and misleading,
        seconds,
    )


def _named(sentence: str) -> set[str]:
    return {stage for stage, pattern in NAMES.items() if re.search(pattern, sentence, re.IGNORECASE)}


def under_test(kernel: Wrong) -> Kernel:
    """A wrong kernel as one for `conformance.run`."""
    if kernel.kind == "moe":
        return Kernel(kernel.name, ("moe",), whole_arguments, lambda kind, call: kernel.function(call))
    return Kernel(kernel.name, (kernel.kind,), keyword_arguments, kernel.function)


def over_goldens(kernel: Wrong, goldens: str, *, whole: bool) -> tuple[bool, Said]:
    """Whether the suite rejects it, and its verdict."""
    if kernel.kind not in KINDS:
        return False, Said(sentence=f"the goldens have no cases of kind {kernel.kind}")
    cases = [case for case in _cases() if fnmatch(case.id, goldens) and (whole or not case.is_whole_layer)]
    report = run(under_test(kernel), cases, Options(mode=kernel.mode, repeat=False))
    return any(not result.ok for result in report.results), said_of(report)


def on_one_call(kernel: Wrong) -> tuple[bool, Said, str]:
    """Whether it shows, what is said of one call, and which."""
    name, inputs, expected, got = one_call(kernel)
    if not _count(got, expected):
        return False, Said(), name
    return True, said_of(diagnose(kernel.kind, inputs, got, expected)), name


def one_call(kernel: Wrong) -> tuple[str, Any, dict[str, Tensor], dict[str, Tensor]]:
    """The name, the inputs and the right outputs of a call on which a kernel shows, and the kernel's outputs."""
    if kernel.kind == "moe":
        for name in CALLS:
            expected = {"output": _right(name)}
            if _count(got := run_on(kernel, captured(name)), expected) >= SHOWS:
                return name, captured(name), expected, got
    if kernel.kind == "quantize":
        for name, rule in QUANTISED.items():
            values = quantised_values(name)
            inputs = {"values": values, "rule": rule}
            right = dict(zip(("packed", "scales"), quantize(values, rule=rule), strict=True))
            if _count(got := run_on(kernel, inputs), right) >= SHOWS:
                return name, inputs, right, got
    best: tuple[int, str, Any, dict[str, Tensor], dict[str, Tensor]] | None = None
    for case in _cases():
        if case.kind == kernel.kind and not case.is_whole_layer:
            one = runs(case)[0]
            count = _count(got := run_on(kernel, one.inputs), one.expected)
            if best is None or count > best[0]:
                best = count, case.id, one.inputs, dict(one.expected), got
    assert best is not None
    return best[1:]


def work(job: tuple[str, str], *, goldens: str, whole: bool) -> Judged:
    torch.set_num_threads(1)
    name, where = job
    kernel = load_all()[name]
    start = time.perf_counter()
    if where == "suite":
        detected, said = over_goldens(kernel, goldens, whole=whole)
    else:
        detected, said, call = on_one_call(kernel)
        where = f"single: {call}"
    return judge(kernel, where, detected, said, time.perf_counter() - start)


def numbers(judged: Iterable[Judged]) -> dict[str, float]:
    """The four, the first three as parts of 1."""
    rows = list(judged)
    parts = {
        "detected": sum(row.detected for row in rows),
        "stage right": sum(row.stage_right for row in rows),
        "described": sum(row.described for row in rows),
    }
    return {
        **{name: count / len(rows) for name, count in parts.items()},
        "misleading": sum(r.misleading for r in rows),
    }


def store(rows: list[Judged], path: Path = STORED, *, first_sight: bool = False) -> None:
    """Keep the numbers of each place that was judged, those of kernels seen for the first time apart; others stay."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for place in ("suite", "single"):
        if of_place := [row for row in rows if row.where.startswith(place)]:
            names = [row.kernel for row in of_place if row.misleading]
            kept[f"{place}{', at first sight' * first_sight}"] = {
                "kernels": len(of_place),
                **numbers(of_place),
                "which": names,
            }
    write_file(path, json.dumps(kept, indent=1) + "\n")


def reached(found: dict[str, float]) -> bool:
    return found["misleading"] == 0 and all(found[name] >= least for name, least in ASKED.items())


def show(rows: list[Judged], console: Console) -> bool:
    """Print a table for each place, and whether the four numbers of each are those asked for."""
    fine = True
    for place in ("suite", "single"):
        of_place = [row for row in rows if row.where.startswith(place)]
        if not of_place:
            continue
        table = Table(title="Over the goldens" if place == "suite" else "One call")
        for column in (
            "kernel",
            "detected",
            "stage said",
            "right",
            "sentence",
            "described",
            "misleading",
            "s",
        ):
            table.add_column(column, overflow="fold")
        for row in of_place:
            marks = (row.detected, row.stage_right, row.described, row.misleading)
            detected, right, described, misleading = ("yes" if mark else "no" for mark in marks)
            stages = ", ".join(row.said.stages) or "-"
            table.add_row(
                f"{row.kernel} ({', '.join(row.truth)})",
                *(detected, stages, right, row.said.sentence, described),
                f"[red]{misleading}[/red]" if row.misleading else misleading,
                f"{row.seconds:.1f}",
            )
        found = numbers(of_place)
        fine &= reached(found)
        console.print(table)
        words = ", ".join(f"{name} {found[name]:.0%}" for name in ASKED)
        console.print(f"{len(of_place)} kernels, {place}: {words}, misleading {found['misleading']:.0f}\n")
    return fine


@cache
def _cases() -> list[Case]:
    goldens = open_goldens()
    return [goldens.load(name) for name in goldens.names()]


@cache
def _right(name: str) -> Tensor:
    return forward(captured(name))


def _count(got: dict[str, Tensor], expected: Any) -> int:
    return sum(int(differing(got[name], want).sum()) for name, want in expected.items())


@click.command(help=__doc__)
@click.option(
    "--only", "patterns", multiple=True, default=("*",), metavar="GLOB", help="Kernels or themes; repeatable."
)
@click.option("--where", type=click.Choice(("both", "suite", "single")), default="both", show_default=True)
@click.option(
    "--goldens", default="*", metavar="GLOB", help="The golden cases to run over, such as 'gemm/*'."
)
@click.option("--whole", is_flag=True, help="Whole-size layers too, each of which takes minutes.")
@click.option(
    "--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write everything to a file."
)
@click.option("--store", "kept", is_flag=True, help="Keep the numbers for docs/confusion.md.")
@click.option(
    "--first-sight", is_flag=True, help="Keep them apart: nothing had been mended by these kernels."
)
@click.option("--jobs", type=click.IntRange(1), default=2, show_default=True, help="Processes.")
def main(
    patterns: tuple[str, ...],
    where: str,
    goldens: str,
    whole: bool,
    path: Path | None,
    kept: bool,
    first_sight: bool,
    jobs: int,
) -> None:
    kernels = load_all().values()
    chosen = [k.name for k in kernels if any(fnmatch(k.name, p) or fnmatch(k.theme, p) for p in patterns)]
    if not chosen:
        raise click.BadParameter(f"no kernel or theme is called {' or '.join(patterns)}", param_hint="--only")
    places = ("suite", "single") if where == "both" else (where,)
    todo = [(name, place) for place in places for name in chosen]
    do: Callable[[tuple[str, str]], Judged] = partial(work, goldens=goldens, whole=whole)
    console = Console()
    rows: list[Judged] = []
    console.print(f"{len(todo)} runs, {jobs} side by side; over the goldens each takes a minute or more")
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for row in pool.map(do, todo):
            rows.append(row)
            if not console.is_terminal:
                console.print(f"{len(rows)}/{len(todo)} {row.kernel} ({row.seconds:.0f} s)", highlight=False)
            if path is not None:
                write_file(path, json.dumps([asdict(row) for row in rows], indent=1))
    if kept:
        store(rows, first_sight=first_sight)
    sys.exit(0 if show(rows, console) else 1)


if __name__ == "__main__":
    main()
