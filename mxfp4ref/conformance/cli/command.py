"""How the commands read their arguments and lay out their help."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import click

from mxfp4ref.conformance.cli.terminal import use_colour, wrapped

__all__ = ["WIDTH", "Command", "Group", "command"]

WIDTH = 100  # of help, at most
_NARROW = 70
_FEW = 6  # options that are all listed beside the one that was meant


class _Formatter(click.HelpFormatter):
    """Help that is broken at spaces only; in a narrow terminal, options stand above what they do."""

    def write_text(self, text: str) -> None:
        indent = " " * self.current_indent
        for n, paragraph in enumerate(re.split(r"\n{2,}", text.strip("\n"))):
            self.write("\n" * bool(n))
            if paragraph.startswith("\b"):
                for line in paragraph.split("\n")[1:]:
                    self.write(wrapped(indent + line, self.width) + "\n")
            else:
                self.write(wrapped(indent + " ".join(paragraph.split()), self.width, len(indent)) + "\n")

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        rows = list(rows)
        indent = self.current_indent
        first = min(max(len(term) for term, _ in rows), col_max) + col_spacing + indent
        for term, text in rows:
            if self.width >= _NARROW and indent + len(term) + col_spacing <= first:
                self.write(wrapped(f"{' ' * indent}{term}".ljust(first) + text, self.width, first) + "\n")
            else:
                hang = first if self.width >= _NARROW else indent + 4
                lines = (" " * indent + term, " " * hang + text)
                self.write("".join(f"{wrapped(line, self.width, hang)}\n" for line in lines))


class _Context(click.Context):
    formatter_class = _Formatter

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.color = use_colour()
        self.terminal_width = min(shutil.get_terminal_size().columns, WIDTH)


class Command(click.Command):
    """A command that refuses what it would silently lose: an option given twice, of which only the last counts."""

    context_class = _Context

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:
            try:
                _, _, given = self.make_parser(ctx).parse_args(args=list(args))
            except click.NoSuchOption as error:
                known = sorted(name for one in self.get_params(ctx) for name in one.opts if name[:2] == "--")
                if error.possibilities and len(known) > _FEW:
                    raise
                words = f"{error.message} There {'are' if known[1:] else 'is'} {', '.join(known)}."
                raise click.NoSuchOption(error.option_name, words, error.possibilities, ctx) from None
            _refuse_repeated(given, ctx)
        return super().parse_args(ctx, args)


class Group(click.Group):
    """A group whose list of commands says all of each command's first sentence."""

    context_class = _Context
    command_class = Command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, self.commands[name].get_short_help_str(1000)) for name in self.list_commands(ctx)]
            )


command = partial(click.command, cls=Command)


def _refuse_repeated(given: Sequence[click.Parameter], ctx: click.Context) -> None:
    first: dict[str | None, click.Parameter] = {}
    for parameter in given:
        if not isinstance(parameter, click.Option) or parameter.multiple or parameter.count:
            continue
        other = first.setdefault(parameter.name, parameter)
        if other is not parameter:
            names = f"{other.opts[-1]} and {parameter.opts[-1]}"
            raise click.UsageError(f"{names}: expected one of them, got both", ctx)
    for name, parameter in first.items():
        harmless = parameter.is_flag and not parameter.secondary_opts  # type: ignore[attr-defined]
        if not harmless and sum(other.name == name for other in given) > 1:
            raise click.UsageError(f"{parameter.opts[-1]}: expected once, got it more often", ctx)
