"""The command on what the preparation for FP8 activations makes of a checkpoint's weights."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mxfp4ref.conformance.cli.checkpoints import layers_option
from mxfp4ref.conformance.cli.command import command
from mxfp4ref.conformance.cli.progress import progress
from mxfp4ref.conformance.cli.shared import UsageError, usage_errors
from mxfp4ref.conformance.cli.terminal import echo, echo_json, echo_rows

if TYPE_CHECKING:
    from mxfp4ref.formats.humming import PreparationLoss

__all__ = ["checkpoint_report"]

_HEADS = ("tensor", "groups", "rewritten", "weights changed", "to zero", "worst error", "mean error")


@command("checkpoint-report")
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@layers_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
def checkpoint_report(checkpoint: Path, layers: tuple[int | str, ...], as_json: bool) -> None:
    """Report what W4A8 loses of the MXFP4 weights of a CHECKPOINT.

    \b
    mxfp4ref checkpoint-report DeepSeek-V4-Flash --layer 3

    flashinfer prepares weights for FP8 activations (use_wfp4afp8_humming, sglang's --flashinfer-mxfp4-moe-precision
    fp8) by raising each expert's scales to no less than its highest over 2^11, and rounding the weights of the groups
    that it raises. A group has 32 weights; errors are absolute; zeros are weights that were none. One layer is in
    memory at a time, and unsharded: ranks of tensor parallelism prepare their shards, and lose no more.

    Exit codes: 0 reported, whatever is lost; 2 a layer cannot be read.
    """
    from mxfp4ref.checkpoint import find_layers, open_shards, read_layer
    from mxfp4ref.checkpoint.disk import left_out
    from mxfp4ref.formats.humming import PreparationLoss, preparation_loss

    losses: dict[str, PreparationLoss] = {}
    with usage_errors(), progress() as step:
        found = find_layers(shards := open_shards(checkpoint))
        if not layers and (unknown := left_out(shards, found)):
            layer, reason = next(iter(unknown.items()))
            raise UsageError(f"layer {layer}: {reason}; --layer reports of others")
        numbers: tuple[int | str, ...] = layers or tuple(found)
        for number in numbers:
            experts = read_layer(checkpoint, number, limit=math.inf, multiple=32).experts
            for gemm in ("fc1", "fc2"):
                weights, scales = getattr(experts, f"{gemm}_weights"), getattr(experts, f"{gemm}_scales")
                losses[f"{number} {gemm}"] = preparation_loss(weights, scales)
            step(f"layer {number}", len(numbers))
    total = sum(losses.values(), PreparationLoss(0, 0, 0, 0, 0.0, 0.0, 0.0))
    if as_json:
        echo_json({name: asdict(loss) for name, loss in (*losses.items(), ("all", total))})
        return
    echo_rows(_HEADS, [_row(name, loss) for name, loss in (*losses.items(), ("all", total))])
    if not total.groups_rewritten:
        echo("nothing is lost: no expert has scales over a range of more than 12")


def _row(name: str, loss: PreparationLoss) -> tuple[str, ...]:
    weights = 32 * loss.groups
    return (
        name,
        f"{loss.groups:,}",
        f"{loss.groups_rewritten:,} ({_percent(loss.groups_rewritten, loss.groups)})",
        f"{loss.weights_changed:,} ({_percent(loss.weights_changed, weights)})",
        f"{loss.weights_zeroed:,}",
        f"{loss.worst_error:.3g}",
        f"{loss.mean_error:.3g}",
    )


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.3g} %"
