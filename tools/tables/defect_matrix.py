"""Which golden case tells which defect: the matrix, what is wrong with it, and its table and picture.

    python tools/tables/defect_matrix.py            # write goldens/defect_matrix.md and .svg; exit code 1 on problems
    python tools/tables/defect_matrix.py --check    # write nothing; an outdated table is a problem too

An entry is the fraction of output elements in which a defect's output differs, in any bit, from the legitimate one
that is closest to it; 0 means that the case lets the defect pass. Problems are: a defect that fewer than two cases
catch; two defects with the same outputs on all cases; a case without which every defect would still be caught twice
and that gives no other reason to exist; a case that says it catches what it does not.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from html import escape
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxfp4ref._files import write_file
from mxfp4ref.conformance.comparison import differing
from mxfp4ref.defects import DEFECTS, DequantizeCall, RoutingCall
from mxfp4ref.goldens import Case, open_goldens, tensor_bytes
from mxfp4ref.goldens.runs import routing_options, runs
from mxfp4ref.model.humming import call_of
from mxfp4ref.sm90.tactics import Sm90Kernel

ENOUGH = 2  # cases that have to catch a defect
_MOST_TOKENS = 64
_TARGETS = {kind: kind for kind in ("moe", "routing", "dequantize", "w4a8")}


@dataclass(frozen=True)
class Entry:
    """A defect on a case: the fraction that differs, and what identifies its output."""

    fraction: float
    output: str


# By defect, then by case. A defect has no entry for cases that it cannot run on.
Matrix = Mapping[str, Mapping[str, Entry]]


def in_matrix(case: Case) -> bool:
    """Whether defects are run on the case: not on layers of 256 experts, on many tokens, nor on single stages."""
    if case.kind == "dequantize":
        return bool(case.parameters["dtype"] == "bfloat16")
    if case.kind == "moe" and (len(case.tensors["input"]) > _MOST_TOKENS or "tile_n" in case.parameters):
        return False
    return case.kind in _TARGETS and not case.is_whole_layer


def entries(case: Case, defects: Iterable[str]) -> dict[str, Entry]:
    """The case's column of the matrix."""
    call, legitimate = _call_and_outputs(case)
    column = {}
    for name in defects:
        defect = DEFECTS[name]
        if defect.target != _TARGETS[case.kind]:
            continue
        outputs = _tensors(defect.run(call)) if defect.applies(call) else legitimate[0]
        fraction = min(_fraction(outputs, expected) for expected in legitimate)
        digest = hashlib.sha256(b"".join(tensor_bytes(output) for output in outputs)).hexdigest()
        column[name] = Entry(fraction, digest)
    return column


def compute(root: Path | None, case_ids: Sequence[str], defects: Sequence[str], jobs: int) -> Matrix:
    """The matrix of some cases and defects, one process a case."""
    column = partial(_column, root, tuple(defects))
    if jobs == 1:
        columns = dict(zip(case_ids, map(column, case_ids), strict=True))
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            columns = dict(zip(case_ids, pool.map(column, case_ids), strict=True))
    return {
        defect: {case: column[defect] for case, column in columns.items() if defect in column}
        for defect in defects
    }


def catching(row: Mapping[str, Entry]) -> list[str]:
    """The cases that catch a defect, the one that shows it most first."""
    return sorted(
        (case for case in row if row[case].fraction > 0), key=lambda case: (-row[case].fraction, case)
    )


def needed_for(matrix: Matrix, case: str) -> list[str]:
    """The defects that would not be caught often enough without this case."""
    return [name for name, row in matrix.items() if case in (found := catching(row)) and len(found) <= ENOUGH]


def problems(matrix: Matrix, cases: Sequence[Case]) -> list[str]:
    """Everything that is wrong, one line each."""
    found = []
    for name, row in matrix.items():
        if len(catching(row)) < ENOUGH:
            found.append(
                f"defect {name}: caught by {', '.join(catching(row)) or 'no case'}, wanted {ENOUGH} cases"
            )
    for first, second in combinations(matrix, 2):
        if DEFECTS[first].target != DEFECTS[second].target:
            continue
        if all(matrix[first][case].output == entry.output for case, entry in matrix[second].items()):
            found.append(f"defects {first} and {second}: the same outputs on all cases")
    for case in cases:
        for name in case.catches:
            if name not in DEFECTS:
                found.append(f"case {case.id}: says it catches {name}, which is no defect")
            elif name in matrix and not (case.id in matrix[name] and matrix[name][case.id].fraction > 0):
                found.append(f"case {case.id}: says it catches {name}, and does not")
        if not case.unique_for and not needed_for(matrix, case.id):
            found.append(f"case {case.id}: nothing depends on it, and it gives no other reason to exist")
    return found


def markdown(matrix: Matrix, cases: Sequence[Case]) -> str:
    """The matrix as tables: by defect, by case, and in full for each suite."""
    counts = {name: len(catching(row)) for name, row in matrix.items()}
    tested = [case for case in cases if any(case.id in row for row in matrix.values())]
    lines = [
        "# Which case catches which defect",
        "",
        "Written by `tools/tables/defect_matrix.py`. Percentages are output elements that differ in any bit from the",
        "closest legitimate output. Cases of single stages and of whole models take no part.",
        "",
        f"{len(matrix)} defects on {len(tested)} cases. Every defect is caught by at least {min(counts.values())} "
        f"cases, half of them by {sorted(counts.values())[len(counts) // 2]} or more.",
        "",
        "## By defect",
        "",
        "| defect | kind | caught by | most clearly by |",
        "|---|---|---:|---|",
    ]
    for name, row in matrix.items():
        best = ", ".join(f"{case} {_percent(row[case].fraction)}" for case in catching(row)[:3])
        lines.append(f"| {name} | {DEFECTS[name].kind} | {counts[name]} | {best} |")
    lines += ["", "## By case", "", "| case | catches | needed for | kept for |", "|---|---:|---|---|"]
    for case in tested:
        caught = sum(case.id in row and row[case.id].fraction > 0 for row in matrix.values())
        lines.append(
            f"| {case.id} | {caught} | {', '.join(needed_for(matrix, case.id))} | {case.unique_for} |"
        )
    for suite in dict.fromkeys(case.suite for case in tested):
        columns = [case.id for case in tested if case.suite == suite]
        lines += ["", f"## {suite}", ""]
        lines += [f"{number}. {case}" for number, case in enumerate(columns, start=1)]
        lines += ["", f"| defect | {' | '.join(str(n + 1) for n in range(len(columns)))} |"]
        lines.append("|---|" + "---:|" * len(columns))
        for name, row in matrix.items():
            if any(case in row for case in columns):
                shown = [_percent(row[case].fraction) if case in row else "" for case in columns]
                lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


_DARK = {
    "#fff": "#14161b",
    "#08306b": "#cfe3ff",
    "#2171b5": "#7fb0ea",
    "#6baed6": "#3f77b8",
    "#c6dbef": "#26486e",
}
_STYLE = (
    "<style>@media (prefers-color-scheme: dark) { svg { fill: #e7e8ee } "
    + " ".join(f'[fill="{light}"] {{ fill: {dark} }}' for light, dark in _DARK.items())
    + " }</style>"
)


def picture(matrix: Matrix, cases: Sequence[Case]) -> str:
    """The matrix as an SVG, for light and dark pages: the further from the paper, the more elements differ."""
    shades = ((0.5, "#08306b"), (0.1, "#2171b5"), (0.01, "#6baed6"), (0.0, "#c6dbef"))
    tested = [case for case in cases if any(case.id in row for row in matrix.values())]
    cell, left, top = 11, 190, 290
    width, height = left + cell * len(tested) + 10, top + cell * len(matrix) + 40
    paths: dict[str, list[str]] = {colour: [] for _, colour in shades}
    for y, row in enumerate(matrix.values()):
        for x, case in enumerate(tested):
            fraction = row[case.id].fraction if case.id in row else 0.0
            if fraction > 0:
                colour = next(colour for least, colour in shades if fraction > least)
                paths[colour].append(
                    f"M{left + cell * x} {top + cell * y}h{cell - 1}v{cell - 1}h-{cell - 1}z"
                )
    labels = [
        f'<text x="{left - 5}" y="{top + cell * y + 9}" text-anchor="end">{escape(name)}</text>'
        for y, name in enumerate(matrix)
    ]
    labels += [
        f'<text transform="translate({left + cell * x + 9} {top - 5}) rotate(-90)">{escape(case.id)}</text>'
        for x, case in enumerate(tested)
    ]
    words = ("above 50 %", "above 10 %", "above 1 %", "above 0")
    for index, ((_, colour), word) in enumerate(zip(shades, words, strict=True)):
        x, y = left + 110 * index, height - 25
        labels.append(f'<rect x="{x}" y="{y}" width="10" height="10" fill="{colour}"/>')
        labels.append(f'<text x="{x + 15}" y="{y + 9}">{word}</text>')
    body = [f'<path fill="{colour}" d="{"".join(parts)}"/>' for colour, parts in paths.items() if parts]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="9">',
            "<title>Fraction of output elements that a defect changes, by case</title>",
            _STYLE,
            f'<rect width="{width}" height="{height}" fill="#fff"/>',
            *body,
            *labels,
            "</svg>\n",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)"
    )
    parser.add_argument("--root", type=Path, help="the goldens; by default those that are found")
    options = parser.parse_args(arguments)
    goldens = open_goldens(options.root)
    cases = [goldens.load(name) for name in goldens.names()]
    matrix = compute(
        goldens.root, [case.id for case in cases if in_matrix(case)], tuple(DEFECTS), options.jobs
    )
    found = problems(matrix, cases)
    for name, text in (("md", markdown(matrix, cases)), ("svg", picture(matrix, cases))):
        path = goldens.root / f"defect_matrix.{name}"
        if not options.check:
            write_file(path, text)
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            found.append(f"{path}: out of date")
    print("\n".join(found) or "no problems")
    counts = [len(catching(row)) for row in matrix.values()]
    print(
        f"{len(matrix)} defects, {len(next(iter(matrix.values())))} or fewer cases each; least {min(counts)}"
    )
    return 1 if found else 0


def _column(root: Path | None, defects: tuple[str, ...], case_id: str) -> dict[str, Entry]:
    return entries(open_goldens(root).load(case_id), defects)


def _call_and_outputs(case: Case) -> tuple[Any, list[tuple[Tensor, ...]]]:
    """What a defect takes, and every legitimate output, that of the call first."""
    if case.kind == "moe":
        legitimate = list(dict.fromkeys(case.output_tensors.values()))
        pair = next(iter(case.output_tensors))
        return case.call(Sm90Kernel.of_tiles(pair)), [(case.tensors[name],) for name in legitimate]
    if case.kind == "routing":
        inputs = runs(case)[0].inputs
        call = RoutingCall(case.parameters["preset"], case.tensors["logits"], routing_options(inputs))
        return call, [(case.tensors["ids"], case.tensors["scales"])]
    tensors = case.tensors
    if case.kind == "w4a8":
        return call_of(runs(case)[0].inputs), [(tensors["output"],)]
    call = DequantizeCall(tensors["packed"], tensors["scales"], case.parameters["convention"])
    return call, [(tensors["values"],)]


def _tensors(output: Any) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else (output.ids, output.scales)


def _fraction(outputs: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    differ = sum(int(differing(got, want).sum()) for got, want in zip(outputs, expected, strict=True))
    return differ / sum(want.numel() for want in expected)


def _percent(fraction: float) -> str:
    if fraction == 0:
        return ""
    return "<0.1 %" if fraction < 0.001 else f"{100 * fraction:.1f} %"


if __name__ == "__main__":
    sys.exit(main())
