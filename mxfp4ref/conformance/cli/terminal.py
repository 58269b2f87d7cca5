"""All that the commands print: wrapped at words on a terminal, whole lines in a pipe."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from mxfp4ref._files import printable

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["animated", "columns", "console", "echo", "echo_json", "echo_rows", "use_colour", "wrapped"]

_LEAST = 24  # narrower columns of a table are unreadable
# What stays on one line, to be pasted: `code`, a command with its arguments, and every word.
_UNIT = re.compile(
    r"`[^`]+`\S*|\(mxfp4ref [^)]*\)\S*"
    r"|(?:^|(?<=: )|(?<=  ))(?:mxfp4ref [a-z]|export [A-Z]|python |pip )(?:(?!  ).)*|\S+"
)


def use_colour() -> bool | None:
    """What the environment says of colours and bold type; None if it is for the stream to say."""
    if os.environ.get("NO_COLOR"):
        return False
    if any(os.environ.get(name, "0") not in ("", "0") for name in ("FORCE_COLOR", "CLICOLOR_FORCE")):
        return True
    return False if os.environ.get("TERM") == "dumb" or os.environ.get("CLICOLOR") == "0" else None


def animated() -> bool:
    """Whether a progress bar can be drawn on stderr."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def columns(*, err: bool = False) -> int | None:
    """How wide the terminal is; None where there is none, and lines are left whole for what reads them."""
    return shutil.get_terminal_size().columns if (sys.stderr if err else sys.stdout).isatty() else None


def console() -> Console:
    """rich's way to stderr, for progress bars."""
    from rich.console import Console

    return Console(stderr=True, no_color=use_colour() is False, highlight=False, markup=False)


def echo(text: str, *, err: bool = False, **style: Any) -> None:
    """Print text that may come from a file: nothing in it commands the terminal."""
    width = columns(err=err)
    shown = "\n".join(wrapped(line, width) for line in printable(text).split("\n"))
    # By name, as print does: click's own stream writes past a progress bar, into its line.
    file = sys.stderr if err else sys.stdout
    click.echo(_styled(shown, **style), file=file)


def _styled(text: str, **style: Any) -> str:
    return click.style(text, **style) if any(style.values()) else text


def echo_json(value: object) -> None:
    """Print JSON, which no terminal's width may break."""
    click.echo(json.dumps(value, indent=1))


def wrapped(line: str, width: int | None, hang: int | None = None) -> str:
    """A line broken at spaces; what follows hangs below its last column, or is indented.

    No command, no code in backticks and no word is broken, even if it is wider.

    Args:
        line: the text, without line breaks.
        width: of the terminal; None for no limit.
        hang: how far to indent all lines but the first; by default as the line looks.
    """
    if width is None or len(line) <= width:
        return line
    if hang is None:
        indent = len(line) - len(line.lstrip())
        gaps = [gap.end() for gap in re.finditer(r"(?<=\S) {2,}", line) if gap.end() <= width // 2]
        item = line.startswith("- ", indent)
        hang = gaps[-1] if gaps else min(indent + (2 if item else 4), width // 2)
    lines, end = [""], 0
    for unit in _UNIT.finditer(line):
        gap = line[end : unit.start()]
        end = unit.end()
        if lines[-1].strip() and len(lines[-1]) + len(gap) + len(unit[0]) > width:
            lines.append(" " * hang + unit[0])
        else:
            lines[-1] += gap + unit[0]
    return "\n".join(lines)


def echo_rows(
    heads: Sequence[str], rows: Iterable[Sequence[str]], colours: Mapping[str, str] | None = None
) -> None:
    """Print a table; where the terminal is too narrow for one, each row as a list, with its first cell as the title.

    Args:
        heads: the names of the columns.
        rows: the cells.
        colours: what a cell of exactly that text is written in.
    """
    cells = [[printable(cell, lines=False) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    width = columns()
    if width is not None and sum(widths) + 2 * (len(widths) - 1) > width:
        # Words can be wrapped in the columns that have more than one; the others keep their width.
        prose = [
            i for i, column in enumerate(zip(*cells, strict=True)) if i and any(" " in c for c in column)
        ]
        free = width - 2 * (len(widths) - 1) - sum(w for i, w in enumerate(widths) if i not in prose)
        for taken, i in enumerate(sorted(prose, key=lambda i: widths[i])):
            widths[i] = min(widths[i], free // (len(prose) - taken))
            free -= widths[i]
        longest = [
            max(len(word) for cell in column for word in cell.split(" "))
            for column in zip(*cells, strict=True)
        ]
        if not prose or any(widths[i] < max(_LEAST, longest[i]) for i in prose):
            _echo_lists(heads, cells, colours or {})
            return
    _echo_row(heads, widths, {}, bold=True)
    for row in cells:
        _echo_row(row, widths, colours or {})


def _echo_row(row: Sequence[str], widths: Sequence[int], colours: Mapping[str, str], **style: Any) -> None:
    columns = [wrapped(cell, width, hang=0).split("\n") for cell, width in zip(row, widths, strict=True)]
    for n in range(max(map(len, columns))):
        texts = [column[n] if n < len(column) else "" for column in columns]
        last = max(i for i, text in enumerate(texts) if text or not i)
        padded = [
            _styled(text, fg=colours.get(cell)) + " " * (0 if i == last else width - len(text) + 2)
            for i, (text, width, cell) in enumerate(zip(texts, widths, row, strict=True))
        ]
        click.echo(_styled("".join(padded[: last + 1]), **style))


def _echo_lists(heads: Sequence[str], rows: Sequence[Sequence[str]], colours: Mapping[str, str]) -> None:
    for row in rows:
        echo(row[0], bold=True)
        for head, cell in zip(heads[1:], row[1:], strict=True):
            if cell:
                echo(f"    {head}: {cell}", fg=colours.get(cell))
