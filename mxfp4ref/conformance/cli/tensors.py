"""The commands on tensors in files: compare two, run a layer of a checkpoint."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from torch import Tensor

from mxfp4ref._files import check_no_input
from mxfp4ref.checkpoint.shards import open_shards
from mxfp4ref.conformance.cli.shared import NOT_EQUAL, describe, echo, first_values, usage_errors
from mxfp4ref.conformance.comparison import FAR, differing, first_difference, ulp_distance
from mxfp4ref.model.parallel import Ranks
from mxfp4ref.routing import PRESETS
from mxfp4ref.sm90.activation import ACTIVATIONS

__all__ = ["compare", "layer"]

_ACTIVATIONS = {activation.name: id for id, activation in ACTIVATIONS.items()}


@click.command()
@click.argument("a", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("b", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def compare(a: Path, b: Path) -> None:
    """Compare two saved outputs bit by bit: tensors of the same names in two safetensors files.

    Exit codes: 0 equal, 1 different, 2 a file cannot be read.
    """
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
        first = first_difference(got, want)
        if first is None:
            echo(f"{name}: equal, {describe(got)}")
            continue
        equal = False
        mask = differing(got, want)
        distance = ulp_distance(got, want)[mask]
        numbers = distance[distance < FAR]
        furthest = f", at most {int(numbers.max()):,} ulp" if len(numbers) else ""
        echo(f"{name}: {int(mask.sum()):,} of {mask.numel():,} elements differ{furthest}; first {first}")
    sys.exit(0 if equal else NOT_EQUAL)


@click.command()
@click.option(
    "--checkpoint",
    required=True,
    type=click.Path(exists=True, path_type=Path),
    help="A folder of safetensors files, with or without an index, or one file.",
)
@click.option("--layer", "index", required=True, type=click.IntRange(min=0), help="The layer's number.")
@click.option(
    "--input",
    "input_path",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="safetensors: hidden [M, H] bf16; optionally logits, token_ids, shared_output, padded.",
)
@click.option(
    "--output",
    "output_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the output and the routing to this safetensors file.",
)
@click.option("--router", type=click.Choice(list(PRESETS)), help="Default: the checkpoint's.")
@click.option("--top-k", type=click.IntRange(min=1), help="Default: that of config.json.")
@click.option("--routed-scaling-factor", type=float, help="Default: that of config.json.")
@click.option("--alpha", type=float, help="SwiGLU's alpha; default: the model's.")
@click.option("--beta", type=float, help="SwiGLU's beta; default: the model's.")
@click.option("--limit", type=float, help="SwiGLU's limit; default: the model's.")
@click.option("--activation", type=click.Choice(list(_ACTIVATIONS)), default="Swiglu", show_default=True)
@click.option("--ep-size", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--tp-size", type=click.IntRange(min=1), default=1, show_default=True)
def layer(
    checkpoint: Path,
    index: int,
    input_path: Path,
    output_path: Path | None,
    router: str | None,
    **options: Any,
) -> None:
    """Run a whole mixture-of-experts layer of a DeepSeek-V4 or gpt-oss checkpoint: router, experts, output."""
    from mxfp4ref.checkpoint import read_layer, run_layer

    def given(*names: str) -> dict[str, Any]:
        return {name: options[name] for name in names if options[name] is not None}

    with usage_errors():
        if output_path is not None:
            inputs = (
                [*checkpoint.iterdir()]
                if checkpoint.is_dir()
                else [checkpoint, checkpoint.parent / "config.json"]
            )
            check_no_input(output_path, inputs)
        found = read_layer(checkpoint, index, **given("alpha", "beta", "limit"))
        found = replace(found, **given("top_k", "routed_scaling_factor"))
        ranks = Ranks(options["ep_size"], options["tp_size"])
        result = run_layer(
            found,
            input_path,
            output_path,
            router=router,
            ranks=ranks,
            activation_type=_ACTIVATIONS[options["activation"]],
        )
    for name, tensor in result.items():
        echo(f"{name:22}  {describe(tensor):22}  {first_values(tensor)}")
    if output_path is not None:
        echo(f"written: {output_path}")


def _load(path: Path) -> dict[str, Tensor]:
    shards = open_shards(path)
    return shards.read(shards.files)
