"""The command that compares two files: outputs, or reports."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mxfp4ref._files import printable
from mxfp4ref.conformance.cli.command import command
from mxfp4ref.conformance.cli.shared import NOT_EQUAL, describe, usage_errors
from mxfp4ref.conformance.cli.terminal import echo

if TYPE_CHECKING:
    from torch import Tensor

    from mxfp4ref.conformance.report_comparison import Changes

__all__ = ["compare"]


@command()
@click.argument("a", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("b", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def compare(a: Path, b: Path) -> None:
    """Compare two saved outputs bit by bit, or two reports.

    \b
    mxfp4ref compare mine.safetensors reference.safetensors
    mxfp4ref compare yesterday.json today.json

    Of two safetensors files the tensors of the same names are compared: in how many elements they differ, how far at
    most in ulp (steps from one representable number to the next; for integers their difference), and the first of
    them. A is what was computed, B what was expected.

    Of two reports, as conform --json writes them, A is the older: which cases fail now and passed, which pass, which
    fail in another way. What else is different, such as goldens and versions, is told first.

    Exit codes: 0 equal, or no case got worse; 1 different, or some case passed, and fails or is skipped now; 2 a file
    cannot be read, or is neither. Cases that only one report has, as after conform --last-failed, are told and do not
    count.
    """
    from mxfp4ref.conformance.comparison import in_words
    from mxfp4ref.conformance.report_comparison import compare_reports
    from mxfp4ref.conformance.report_reading import is_report, read_report

    with usage_errors():
        if is_report(a) and is_report(b):
            changes = compare_reports(read_report(a), read_report(b))
            _print(changes)
            sys.exit(NOT_EQUAL if changes.worse else 0)
        for path, beside in ((a, b), (b, a)):
            if is_report(path):
                if beside.suffix in (".html", ".htm"):
                    raise ValueError(
                        f"{beside}: expected a report as conform --json writes it, got an HTML page"
                    )
                read_report(beside)  # says what is wrong with it
        one, other = _load(a), _load(b)
        if not one and not other:
            raise ValueError(f"{a} and {b}: expected tensors to compare, got none in either")
    equal = True
    for name in sorted(one.keys() | other.keys()):
        if name not in one or name not in other:
            echo(f"{name}: only in {a if name in one else b}")
            equal = False
            continue
        got, want = one[name], other[name]
        if (got.dtype, got.shape) != (want.dtype, want.shape):
            echo(f"{name}: {describe(got)} in {a}, {describe(want)} in {b}")
            equal = False
            continue
        words = in_words(got, want)
        equal &= words == "equal"
        echo(f"{name}: {words}{f', {describe(got)}' if words == 'equal' else ''}")
    sys.exit(0 if equal else NOT_EQUAL)


_HEADINGS = {
    "failing": "newly failing",
    "lost": "passed, and skipped now",
    "first_failing": "failing, and not run before",
    "passing": "newly passing",
    "changed": "changed",
    "not_run": "in the old report only, not run now",
    "only_new": "in the new report only",
}


def _print(changes: Changes) -> None:
    for line in changes.conditions:
        echo(printable(line, lines=False))
    for name, heading in _HEADINGS.items():
        if lines := getattr(changes, name):
            echo(f"{heading} ({len(lines)}):", bold=True)
            for line in lines:
                echo(f"  {printable(line, lines=False)}")
    words = f"{changes.worse} cases got worse" if changes.worse else "no case got worse"
    not_run = f", {len(changes.not_run)} were not run" if changes.not_run else ""
    echo(
        f"{words}, {changes.alike} are as they were{not_run}",
        fg="red" if changes.worse else "green",
        bold=True,
    )


def _load(path: Path) -> dict[str, Tensor]:
    from mxfp4ref.checkpoint.shards import open_shards

    shards = open_shards(path)
    return shards.read(shards.files)
