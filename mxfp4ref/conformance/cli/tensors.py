"""The command that compares two files: outputs, or reports."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mxfp4ref._files import printable
from mxfp4ref._words import listed
from mxfp4ref.conformance.cli.command import command
from mxfp4ref.conformance.cli.report_files import ReportFiles
from mxfp4ref.conformance.cli.shared import NOT_EQUAL, USAGE, describe, usage_errors
from mxfp4ref.conformance.cli.terminal import echo
from mxfp4ref.conformance.findings.finding import counted

if TYPE_CHECKING:
    from torch import Tensor

    from mxfp4ref.conformance.reports.report_comparison import Changes

__all__ = ["compare"]


@command()
@click.argument("a", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("b", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path, allow_dash=True),
    metavar="FILE",
    help="Write what is printed as JSON too; to stdout, with the text on stderr, if FILE is -.",
)
def compare(a: Path, b: Path, json_file: Path | None) -> None:
    """Compare two saved outputs bit by bit, or two reports.

    \b
    mxfp4ref compare mine.safetensors reference.safetensors
    mxfp4ref compare yesterday.json today.json --json changes.json

    Of two safetensors files the tensors of the same names are compared: in how many elements they differ, how far at
    most in ulp (steps from one representable number to the next; for bytes their difference), and the first of
    them. A is what was computed, B what was expected. Tensors that only one file has are told, and not compared; the
    last line is the verdict.

    Of two reports, as conform --json writes them, A is the older: which cases fail now and passed, which pass, which
    fail in another way. What else is different, such as goldens and versions, is told first.

    Exit codes: 0 all tensors that both files have are equal, or no case got worse; 1 different, or some case passed,
    and fails or is skipped now; 2 a file cannot be read, or is none, both are the same file, have no tensor or case
    in common, or the JSON could not be written. Cases that only one report has, as after conform --last-failed, are
    told and do not count.
    """
    from mxfp4ref.conformance.reports.report_comparison import compare_reports
    from mxfp4ref.conformance.reports.report_reading import is_report, read_report

    files = ReportFiles({} if json_file is None else {"json": json_file})
    with usage_errors():
        files.check([a, b])
        if a.samefile(b):
            raise ValueError(f"{b}: expected another file than {a}, which it is itself: that proves nothing")
        if is_report(a) and is_report(b):
            changes = compare_reports(read_report(a), read_report(b))
            ok, show = not changes.worse, partial(_print, changes)
            found = {"kind": "reports", **asdict(changes), "worse": changes.worse}
        else:
            compared = _compared(a, b)
            ok = all(row["equal"] for row in compared if row["compared"])
            show = partial(_print_tensors, compared)
            found = {"kind": "tensors", "tensors": compared}
    value = {"format": _FORMAT, "a": printable(str(a)), "b": printable(str(b)), "ok": ok, **found}
    complete = files.write_after(show, value, {"json": lambda value: json.dumps(value, indent=1) + "\n"})
    sys.exit(NOT_EQUAL if not ok else 0 if complete else USAGE)


def _compared(a: Path, b: Path) -> list[dict[str, Any]]:
    """What is to be said of each tensor of two files."""
    from mxfp4ref.conformance.comparison import differing, in_words
    from mxfp4ref.conformance.reports.report_reading import is_report, read_report

    for path, beside in ((a, b), (b, a)):
        if is_report(path) and (came := _OTHER_KINDS.get(beside.suffix)):
            raise ValueError(
                f"{beside}: expected a report as conform --json writes it, as {path} is, got {came}"
            )
        if is_report(path) or path.suffix == ".json":
            for either in (path, beside):
                read_report(either)  # says what is wrong with it
    one, other = _load(a), _load(b)
    if not one and not other:
        raise ValueError(f"{a} and {b}: expected tensors to compare, got none in either")
    if not one.keys() & other.keys():
        raise ValueError(
            f"expected a tensor that both files have, got {_named(one)} in {a} and {_named(other)} in {b}"
            f"{_likely_pair(one, other)}"
        )
    rows = []
    for name in sorted(one.keys() | other.keys()):
        both = name in one and name in other
        row: dict[str, Any] = {"name": printable(name), "equal": False, "compared": both}
        row |= {key: describe(found[name]) for key, found in (("a", one), ("b", other)) if name in found}
        if not both:
            row["message"] = f"only in {a if name in one else b}, not compared"
        elif row["a"] != row["b"]:
            row["message"] = f"{row['a']} in {a}, {row['b']} in {b}"
        else:
            row["message"] = words = in_words(one[name], other[name])
            row |= {"equal": words == "equal", "elements": one[name].numel()}
            row["differing"] = 0 if row["equal"] else int(differing(one[name], other[name]).sum())
        row["message"] = printable(row["message"])
        rows.append(row)
    compared = [row for row in rows if row["compared"]]
    if not any(row.get("elements", not row["equal"]) for row in compared):
        raise ValueError(f"expected a tensor with elements, got none that both {a} and {b} have")
    return rows


def _named(tensors: Mapping[str, Tensor]) -> str:
    return listed(sorted(tensors))


def _likely_pair(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str:
    """A hint where a tensor of one file is like just one of the other's."""
    in_one, in_other = (Counter(map(describe, tensors.values())) for tensors in (one, other))
    alike = [kind for kind in in_one if kind in in_other]
    if len(alike) != 1 or in_one[alike[0]] * in_other[alike[0]] != 1:
        return ""
    x, y = (next(name for name in found if describe(found[name]) == alike[0]) for found in (one, other))
    return f": {x} and {y} are both {alike[0]}; save them under one name"


def _print_tensors(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        echo(f"{row['name']}: {row['message']}{', ' + row['a'] if row['equal'] else ''}")
    compared = [row for row in rows if row["compared"]]
    different = sum(not row["equal"] for row in compared)
    words = (
        f"different: {different} of {counted(len(compared), 'tensor')}"
        if different
        else f"equal: {counted(len(compared), 'tensor')}"
    )
    left = f"; {alone} in one file only, not compared" if (alone := len(rows) - len(compared)) else ""
    echo(f"{words}{left}", fg="red" if different else "green", bold=True)


_FORMAT = "mxfp4ref-comparison-1"
_HEADINGS = {
    "failing": "newly failing",
    "lost": "passed, and skipped now",
    "first_failing": "failing, and not run before",
    "passing": "newly passing",
    "changed": "another result, neither better nor worse",
    "not_run": "in the old report only, not run now",
    "only_new": "in the new report only",
}
_WHERE = {"old": "the old report", "new": "the new", "both": "both"}


def _print(changes: Changes) -> None:
    for line in changes.conditions:
        echo(printable(line, lines=False))
    for name, heading in _HEADINGS.items():
        if lines := getattr(changes, name):
            echo(f"{heading} ({len(lines)}):", bold=True)
            for line in lines:
                echo(f"  {printable(line, lines=False)}")
    if changes.alike < changes.cases["either"]:
        counts = {heading: len(getattr(changes, name)) for name, heading in _HEADINGS.items()}
        counts["as they were"] = changes.alike
        told = " + ".join(f"{count} {heading}" for heading, count in counts.items() if count)
        of = ", ".join(f"{changes.cases[name]} in {words}" for name, words in _WHERE.items())
        echo(f"cases: {changes.cases['either']} = {told}; {of}")
    words = f"{counted(changes.worse, 'case')} got worse" if changes.worse else "no case got worse"
    count = len(changes.not_run)
    not_run = f", {count} {'was' if count == 1 else 'were'} not run" if count else ""
    echo(
        f"{words}, {changes.alike} {'is as it was' if changes.alike == 1 else 'are as they were'}{not_run}",
        fg="red" if changes.worse else "green",
        bold=True,
    )


_OTHER_KINDS = {".html": "an HTML page", ".htm": "an HTML page", ".safetensors": "tensors"} | dict.fromkeys(
    (".pt", ".pth", ".npy", ".npz"), "what torch or numpy saved"
)


def _load(path: Path) -> dict[str, Tensor]:
    from mxfp4ref.checkpoint.shards import CheckpointError, open_shards

    try:
        shards = open_shards(path)
    except CheckpointError as error:
        if (came := _OTHER_KINDS.get(path.suffix, "tensors")) == "tensors":
            raise
        hint = "; safetensors.torch.save_file({'output': output}, 'output.safetensors') writes a tensor" * (
            "saved" in came
        )
        raise ValueError(
            f"{path}: expected a safetensors file, or two reports as conform --json writes them, got {came}{hint}"
        ) from error
    return shards.read(shards.files)
