"""A report on the terminal and in files: `--json`, `--junit` and `--html` of the commands that make one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from mxfp4ref.conformance.cli.shared import UsageError
from mxfp4ref.conformance.results import Report

__all__ = ["ReportFiles", "pop_report_files", "print_report", "report_files"]

_Command = TypeVar("_Command", bound=Callable[..., Any])
_HELP = {
    "json": "Write the report as JSON.",
    "junit": "Write it as JUnit XML.",
    "html": "Write it as one HTML file.",
}


@dataclass(frozen=True)
class ReportFiles:
    """Where the report is to be written, by its format."""

    paths: Mapping[str, Path]

    def refuse_missing_folders(self) -> None:
        """Before the run, which may take long."""
        for path in self.paths.values():
            if not path.absolute().parent.is_dir():
                raise UsageError(f"cannot write {path}: there is no folder {path.absolute().parent}")

    def write(self, result: Report) -> None:
        from mxfp4ref.conformance import report

        render = {"json": report.to_json, "junit": report.to_junit, "html": report.to_html}
        for kind, path in self.paths.items():
            path.write_text(render[kind](result), encoding="utf-8")


def report_files(command: _Command) -> _Command:
    """The three options, as a decorator of a command."""
    for kind, words in reversed(_HELP.items()):
        path = click.Path(dir_okay=False, path_type=Path)
        command = click.option(f"--{kind}", f"{kind}_file", type=path, help=words)(command)
    return command


def pop_report_files(options: dict[str, Any]) -> ReportFiles:
    """Take what the three options were given out of a command's options."""
    return ReportFiles({kind: path for kind in _HELP if (path := options.pop(f"{kind}_file"))})


def print_report(result: Report, *, verbose: bool) -> None:
    """The report; click drops the colours where the output is no terminal."""
    from mxfp4ref.conformance import report

    *lines, verdict = report.to_text(result, verbose=verbose).split("\n")
    for line in lines:
        heading = bool(line) and not line.startswith(" ") and ":" in line
        click.secho(line, bold=heading or None)
    click.secho(verdict, fg="green" if result.ok else "red", bold=True)
