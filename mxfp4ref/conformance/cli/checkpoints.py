"""The command that says what is in a checkpoint, and the options of those that read one."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from mxfp4ref._choices import SCALE_RULES, ScaleRule
from mxfp4ref.conformance.cli.command import command
from mxfp4ref.conformance.cli.progress import progress
from mxfp4ref.conformance.cli.shared import usage_errors
from mxfp4ref.conformance.cli.terminal import echo_json

__all__ = ["Experts", "Layer", "checkpoint", "layers_option", "read_options", "reading"]


class Layer(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """The number of a layer, or the name of one of a draft head."""

    name = "layer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if isinstance(value, str) and re.fullmatch(r"mtp\.[0-9]{1,6}", value):
            return value
        if not re.fullmatch("[0-9]{1,6}", str(value)):
            self.fail(f"expected a number, or mtp.0 of a draft head, got {value!r}", param, ctx)
        return int(value)


class Experts(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """Experts as "64-95", "0,8,16", or both."""

    name = "experts"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        ids: list[int] = []
        for part in str(value).split(","):
            match = re.fullmatch("([0-9]{1,6})(?:-([0-9]{1,6}))?", part)
            if match is None or int(match[2] or match[1]) < int(match[1]):
                self.fail(f"expected experts as 64-95 or 0,8,16, got {part!r}", param, ctx)
            ids += range(int(match[1]), int(match[2] or match[1]) + 1)
        return ids


class Setting(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """A key of config.json and its value."""

    name = "KEY=VALUE"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, object]:
        key, equals, text = str(value).partition("=")
        if not key or not equals:
            self.fail(f"expected KEY=VALUE, got {value!r}", param, ctx)
        try:
            return key, json.loads(text)
        except (ValueError, RecursionError):  # a bare word
            return key, text


layers_option = click.option(
    "--layer",
    "layers",
    type=Layer(),
    multiple=True,
    help="Only this layer: a number, or mtp.0 of a draft head; by default all. Repeatable.",
)


def reading(function: Callable[..., None]) -> Callable[..., None]:
    """The options of how a checkpoint is read."""
    options = (
        click.option(
            "--set",
            "changes",
            type=Setting(),
            multiple=True,
            help="A key that goes before config.json's, as norm_topk_prob=true; null takes it away. Repeatable.",
        ),
        click.option(
            "--quantize", type=click.Choice(SCALE_RULES), help="Quantise experts in bf16 by this rule."
        ),
        click.option(
            "--name-map",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="TOML with the checkpoint's own names of tensors.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def read_options(
    changes: Sequence[tuple[str, object]],
    quantize: ScaleRule | None,
    name_map: Path | None,
    experts: Sequence[int] | None = None,
) -> Any:
    from mxfp4ref.checkpoint import ReadOptions, read_name_map

    for key, count in Counter(key for key, _ in changes).items():
        if count > 1:
            raise ValueError(f"--set: expected {key} once, got it {count} times")
    return ReadOptions(
        config=dict(changes),
        experts=experts,
        quantize=quantize,
        format=None if name_map is None else read_name_map(name_map),
    )


@command()
@click.argument("root", metavar="CHECKPOINT", type=click.Path(exists=True, path_type=Path))
@layers_option
@click.option("--names-only", is_flag=True, help="Do not read the weights: no counts of unusual ones.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead, with all numbers.")
@reading
def checkpoint(
    root: Path, layers: tuple[int | str, ...], names_only: bool, as_json: bool, **options: Any
) -> None:
    """Say what is in a checkpoint: layers, formats, router, parameters, unusual weights, and what `layer` would
    refuse.

    \b
    mxfp4ref checkpoint DeepSeek-V4-Flash
    mxfp4ref checkpoint gpt-oss-20b --layer 0 --layer 1 --names-only

    Exit codes: 0 everything can be run, 1 a layer would be refused, 2 there is no checkpoint.
    """
    from mxfp4ref.checkpoint.inspection import inspect
    from mxfp4ref.conformance.cli.checkpoint_table import as_object, show

    with usage_errors(), progress(before=True) as step:
        how = read_options(options["changes"], options["quantize"], options["name_map"])
        found = inspect(root, how, layers=layers, weights=not names_only, step=step)
    if as_json:
        echo_json(as_object(found))
    else:
        show(found)
    if any(entry.refused for entry in found.layers):
        raise SystemExit(1)
