"""A report on the terminal and in files: `--json`, `--junit` and `--html` of the commands that make one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from mxfp4ref._files import check_no_input, write_file
from mxfp4ref.conformance.cli.shared import UsageError, echo
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

    def check(self, inputs: Iterable[Path]) -> None:
        """Before the run, which may take long, refuse what cannot be written.

        Raises:
            UsageError, ValueError: a folder is missing, or a file would replace another one or an input.
            ModuleNotFoundError: what an HTML report needs is not installed.
        """
        from mxfp4ref.conformance.html_report import check_html

        if len({path.resolve() for path in self.paths.values()}) < len(self.paths):
            raise UsageError("--json, --junit, --html: expected a file of its own for each")
        if "html" in self.paths:
            check_html()
        inputs = list(inputs) if self.paths else []
        for path in self.paths.values():
            if not path.absolute().parent.is_dir():
                raise UsageError(f"cannot write {path}: there is no folder {path.absolute().parent}")
            check_no_input(path, inputs)

    def write_after(self, show: Callable[[], None], result: Report) -> bool:
        """Show the text, then write each file by itself; whether all of that went well.

        What fails costs that file and a line, not the results.

        Raises:
            BrokenPipeError: nobody reads the text; the files are written.
        """
        from mxfp4ref.conformance import html_report, report

        render = {"json": report.to_json, "junit": report.to_junit, "html": html_report.to_html}

        def write(kind: str, path: Path) -> None:
            write_file(path, render[kind](result))

        unread: list[BrokenPipeError] = []

        def text() -> None:
            try:
                show()
            except BrokenPipeError as error:
                unread.append(error)

        done = [_attempt("the text", text)]
        done += [_attempt(str(path), partial(write, kind, path)) for kind, path in self.paths.items()]
        if unread:
            raise unread[0]
        return all(done)


def _attempt(what: str, write: Callable[[], None]) -> bool:
    """Write something; whether that went well. If not, it has been told."""
    try:
        write()
    except Exception as error:  # a full disk, a library that draws
        with suppress(OSError):
            echo(f"Error: {what} could not be written: {type(error).__name__}: {error}", err=True)
        return False
    return True


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
        echo(line, bold=heading or None)
    echo(verdict, fg="green" if result.ok else "red", bold=True)
