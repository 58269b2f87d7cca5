"""The commands on checkpoints: run a layer, say what is in one."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from mxfp4ref._choices import ACTIVATION_NAMES, ROUTER_NAMES, SCALE_RULES, STRATEGIES, RouterName, ScaleRule
from mxfp4ref._files import check_no_input
from mxfp4ref.conformance.cli.command import command
from mxfp4ref.conformance.cli.shared import describe, first_values, progress, usage_errors
from mxfp4ref.conformance.cli.terminal import echo, echo_json

__all__ = ["checkpoint", "layer"]


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
            if match is None:
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
@click.option(
    "--checkpoint",
    "root",
    required=True,
    type=click.Path(exists=True, path_type=Path),
    help="A folder of safetensors files, with or without an index, or of GGUF files; or one file.",
)
@click.option(
    "--layer", "index", required=True, type=Layer(), help="The layer's number, or mtp.0 of a draft head."
)
@click.option(
    "--input",
    "input_path",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="safetensors: hidden [M, H] bf16; optionally logits, token_ids, shared_output, padded, image_mask; "
    "token_selected_experts and token_final_scales take the router's place.",
)
@click.option(
    "--output",
    "output_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the output and the routing to this safetensors file.",
)
@click.option(
    "--router", type=click.Choice(ROUTER_NAMES), help="Default: the one that config.json describes."
)
@click.option("--top-k", type=click.IntRange(min=1), help="Default: that of config.json.")
@click.option("--routed-scaling-factor", type=float, help="Default: that of config.json.")
@click.option("--alpha", type=float, help="SwiGLU's alpha; default: the model's.")
@click.option("--beta", type=float, help="SwiGLU's beta; default: the model's.")
@click.option("--limit", type=float, help="SwiGLU's limit; default: the model's.")
@click.option(
    "--activation",
    type=click.Choice(ACTIVATION_NAMES),
    help="Default: the model's.",
)
@click.option(
    "--ep-size",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Ranks that share the experts; it need not divide their number.",
)
@click.option(
    "--expert-placement",
    type=click.Choice(STRATEGIES),
    default=STRATEGIES[0],
    show_default=True,
    help="Which experts a rank has: consecutive ones, or every ep-size-th.",
)
@click.option(
    "--tp-size",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Ranks that share each expert's intermediate size, of which it has to be a divisor (that of the checkpoint, "
    "before it is padded: 2880 for gpt-oss, which 3 ranks can share, too).",
)
@click.option(
    "--tp-rank",
    type=click.IntRange(min=0),
    help="Run this one of the --tp-size ranks alone, from 0: what it adds to the output.",
)
@click.option(
    "--experts", type=Experts(), help="Only these, as 64-95 or 0,8,16: what one rank adds to the output."
)
@click.option(
    "--fuse-shared",
    type=click.Choice(["stored", *SCALE_RULES]),
    help="Run the shared expert as one more expert of weight 1: as stored in MXFP4, or requantised by this rule.",
)
@reading
def layer(
    root: Path,
    index: int | str,
    input_path: Path,
    output_path: Path | None,
    router: RouterName | None,
    **options: Any,
) -> None:
    """Run a whole mixture-of-experts layer of a checkpoint: router, experts, output.

    \b
    mxfp4ref layer --checkpoint DeepSeek-V4-Flash --layer 3 --input hidden.safetensors --output out.safetensors
    mxfp4ref layer --checkpoint gpt-oss-20b --layer 3 --input hidden.safetensors --tp-size 4 --tp-rank 1

    With --experts or --tp-rank it is one rank's output, `rank_output`: its own sum, rounded to bf16, as the kernel
    hands it to the all-reduce; fc2's bias is on --tp-rank 0 only, and a routed factor that the model applies to the
    output is applied. Without them all ranks are run, and their outputs added in float32.

    Experts are read some at a time, and only those that a token chose. `mxfp4ref checkpoint` says what is in a
    folder.

    Exit codes: 0 done; 2 wrong usage, or a file that cannot be read or written.
    """
    from mxfp4ref.checkpoint import fuse_shared, open_layer, open_shards, run_layer
    from mxfp4ref.model.parallel import Ranks
    from mxfp4ref.model.placement import place_experts
    from mxfp4ref.sm90.activation import ACTIVATIONS

    def given(*names: str) -> dict[str, Any]:
        return {name: options[name] for name in names if options[name] is not None}

    with usage_errors():
        if output_path is not None:
            inputs = [*root.iterdir()] if root.is_dir() else [root, root.parent / "config.json"]
            check_no_input(output_path, [*inputs, *([options["name_map"]] if options["name_map"] else [])])
        how = read_options(options["changes"], options["quantize"], options["name_map"], options["experts"])
        found = open_layer(root, index, **given("alpha", "beta", "limit"), options=how)
        found = replace(found, **given("top_k", "routed_scaling_factor"))
        if options["activation"] is not None:
            (chosen,) = (n for n, known in ACTIVATIONS.items() if known.name == options["activation"])
            found = replace(found, activation_type=chosen)
        _refuse_unused(found, router, options)
        if options["fuse_shared"] is not None:
            found = fuse_shared(found, None if options["fuse_shared"] == "stored" else options["fuse_shared"])
        ep_size = options["ep_size"]
        expert_map = place_experts(found.experts.num_experts, ep_size, options["expert_placement"])
        tp_size, tp_rank = options["tp_size"], options["tp_rank"]
        if tp_rank is not None and tp_rank >= tp_size:
            raise ValueError(
                f"--tp-rank: expected one of 0 to {tp_size - 1} with --tp-size {tp_size}, got {tp_rank}"
            )
        if tp_rank is not None and ep_size > 1:
            raise ValueError(
                "--tp-rank: expected --experts, those of the rank, with it, instead of --ep-size"
            )
        ranks = Ranks(ep_size, tp_size, expert_map=expert_map, tp_rank=tp_rank)
        with progress() as step:
            result = run_layer(found, input_path, output_path, router=router, ranks=ranks, step=step)
        if found.image_bias is not None and "image_mask" not in open_shards(input_path).files:
            echo("no image_mask in the input: all tokens were routed as text", err=True)
    for name, tensor in result.items():
        echo(f"{name:22}  {describe(tensor):22}  {first_values(tensor)}")
    if output_path is not None:
        echo(f"written: {output_path}")


def _refuse_unused(layer: Any, router: str | None, options: Mapping[str, Any]) -> None:
    """Raise ValueError if an option was given that the router or the activation does not read."""
    from mxfp4ref.sm90.activation import activation_of

    if router in ("gpt_oss", "mixtral") and options["routed_scaling_factor"] is not None:
        raise ValueError(
            f"--routed-scaling-factor: expected none with --router {router}, which has no factor"
        )
    given = {name for name in ("alpha", "beta", "limit") if options[name] is not None}
    activation = activation_of(layer.activation_type, {f"swiglu_{name}" for name in given})
    if unread := sorted(name for name in given if f"swiglu_{name}" not in activation.defaults):
        raise ValueError(
            f"--{unread[0]}: expected none with the activation {activation.name}, which has none"
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

    with usage_errors(), progress() as step:
        how = read_options(options["changes"], options["quantize"], options["name_map"])
        found = inspect(root, how, layers=layers, weights=not names_only, step=step)
    if as_json:
        echo_json(as_object(found))
    else:
        show(found)
    if any(entry.refused for entry in found.layers):
        raise SystemExit(1)
