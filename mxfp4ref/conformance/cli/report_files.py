"""A report on the terminal and in files: `--json`, `--junit` and `--html` of the commands that make one.

One of them may be "-": it is written to stdout, and everything else to stderr.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mxfp4ref._files import check_no_input, check_outside, check_replaceable, write_file
from mxfp4ref.conformance.cli.shared import UsageError
from mxfp4ref.conformance.cli.terminal import echo

if TYPE_CHECKING:
    from mxfp4ref.conformance.results import Report

__all__ = ["ReportFiles", "pop_report_files", "print_report", "report_files"]

_Command = TypeVar("_Command", bound=Callable[..., Any])
_STDOUT = Path("-")
_HELP = {
    "json": "Write the report as JSON; to stdout, with the text on stderr, if FILE is -.",
    "junit": "Write it as JUnit XML; - as for --json.",
    "html": "Write it as one HTML file; - as for --json.",
}


@contextmanager
def _descriptor_kept() -> Iterator[None]:
    """Inside, what C code and child processes write to stdout goes to stderr too."""
    try:
        kept = os.dup(1)
        os.dup2(2, 1)
    except OSError:  # one of them is closed
        yield
        return
    try:
        yield
    finally:
        with suppress(OSError, AttributeError):
            sys.__stdout__.flush()  # type: ignore[union-attr]
        if os.name == "posix":
            ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


@dataclass(frozen=True)
class ReportFiles:
    """Where the report is to be written, by its format."""

    paths: Mapping[str, Path]

    @contextmanager
    def stdout_kept(self) -> Iterator[None]:
        """Inside, what is printed goes to stderr if stdout is for a report."""
        with ExitStack() as stack:
            if _STDOUT in self.paths.values():
                stack.enter_context(_descriptor_kept())
                stack.enter_context(redirect_stdout(sys.stderr))
            yield

    def check(
        self, inputs: Iterable[Path], goldens: Path | None = None, reproducers: Path | None = None
    ) -> None:
        """Before the run, which may take long, refuse what cannot be written.

        Args:
            inputs: files that none of them may replace.
            goldens: a folder that they may not be in.
            reproducers: another one that is written to, of files that none of them may replace.

        Raises:
            UsageError, ValueError: a folder is missing, or a file would replace another one or an input.
            OSError: it, or its folder, may not be written to, or is a link.
            ModuleNotFoundError: what an HTML report needs is not installed.
        """
        from mxfp4ref.conformance.reports.html_report import check_html

        if len({os.path.realpath(path) for path in self.paths.values()}) < len(self.paths):
            raise UsageError(
                "--json, --junit, --html: expected a file of its own for each, and - for one at most"
            )
        if "html" in self.paths:
            check_html()
        inputs = list(inputs) if self.paths else []
        for path in self.paths.values():
            if path == _STDOUT:
                continue
            if not path.absolute().parent.is_dir():
                raise UsageError(f"cannot write {path}: there is no folder {path.absolute().parent}")
            if path.is_dir():  # "", too
                raise UsageError(f"cannot write {path}: it is a folder")
            check_no_input(path, inputs)
            check_replaceable(path)
            if reproducers is not None and _is_reproducer(path, reproducers):
                raise UsageError(
                    f"{path}: expected another file than the reproducers of --dump {reproducers}"
                )
        for name, path in (*self.paths.items(), *([("dump", reproducers)] if reproducers else [])):
            if goldens is not None and path != _STDOUT:
                check_outside(f"--{name}", path, goldens)

    def write_after(
        self,
        show: Callable[[], None],
        result: Any,
        render: Mapping[str, Callable[[Any], str]] | None = None,
    ) -> bool:
        """Show the text, then write each file by itself; whether all of that went well.

        What fails costs that file and a line, not the results.

        Args:
            show: prints the text.
            result: what is written, a `Report` unless `render` makes files of something else.
            render: what makes a file of it, by format.

        Raises:
            BrokenPipeError: nobody reads the text; the files are written.
        """
        from mxfp4ref.conformance.reports import html_report, report

        render = render or {
            "json": report.to_json,
            "junit": report.to_junit,
            "html": html_report.to_html,
        }

        def write(kind: str, path: Path) -> None:
            if path == _STDOUT:
                click.echo(render[kind](result), nl=False)
            else:
                write_file(path, render[kind](result))

        unread: list[BrokenPipeError] = []

        def text() -> None:
            with self.stdout_kept():
                show()

        def told(work: Callable[[], None]) -> None:
            try:
                work()
            except BrokenPipeError as error:
                unread.append(error)

        done = [_attempt("the text", partial(told, text))]
        done += [
            _attempt(str(path), partial(told, partial(write, kind, path)))
            for kind, path in self.paths.items()
        ]
        if unread:
            raise unread[0]
        return all(done)


def _is_reproducer(path: Path, folder: Path) -> bool:
    """Whether a file could be one of those, or lies where their folder will be."""
    found, place = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    return found == place or (found.parent == place and found.suffix in (".py", ".safetensors"))


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
        path = click.Path(dir_okay=False, path_type=Path, allow_dash=True)
        command = click.option(f"--{kind}", f"{kind}_file", type=path, metavar="FILE", help=words)(command)
    return command


def pop_report_files(options: dict[str, Any]) -> ReportFiles:
    """Take what the three options were given out of a command's options."""
    return ReportFiles({kind: path for kind in _HELP if (path := options.pop(f"{kind}_file"))})


def print_report(result: Report, *, verbose: bool) -> None:
    """The report; wrapped on a terminal, and click drops the colours where the output is none."""
    from mxfp4ref.conformance.reports.report_text import to_text, verdict_lines

    lines, last = to_text(result, verbose=verbose).split("\n"), len(verdict_lines(result))
    cases = {f"{one.case}:" for one in result.results}
    for line in lines[:-last]:
        echo(line, bold=line.partition(" ")[0] in cases or None)
    colour = "yellow" if result.proves_nothing else "green" if result.ok else "red"
    for n, line in enumerate(lines[-last:]):
        echo(line, fg=None if n else colour, bold=not n)
