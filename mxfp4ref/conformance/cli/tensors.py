"""The command on tensors in files: compare two."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mxfp4ref.conformance.cli.command import command
from mxfp4ref.conformance.cli.shared import NOT_EQUAL, describe, usage_errors
from mxfp4ref.conformance.cli.terminal import echo

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["compare"]


@command()
@click.argument("a", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("b", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def compare(a: Path, b: Path) -> None:
    """Compare two saved outputs bit by bit: tensors of the same names in two safetensors files.

    Of each tensor that differs: in how many elements, how far at most in ulp (steps from one representable number to
    the next), and the first of them. A is what was computed, B what was expected.

    \b
    mxfp4ref compare mine.safetensors reference.safetensors

    Exit codes: 0 equal, 1 different, 2 a file cannot be read.
    """
    from mxfp4ref.conformance.comparison import in_words

    with usage_errors():
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


def _load(path: Path) -> dict[str, Tensor]:
    from mxfp4ref.checkpoint.shards import open_shards

    shards = open_shards(path)
    return shards.read(shards.files)
