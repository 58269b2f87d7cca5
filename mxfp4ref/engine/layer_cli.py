"""The command that runs a layer of a checkpoint, and holds what a server gave against it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from mxfp4ref._choices import ACTIVATION_NAMES, ROUTER_NAMES, SCALE_RULES, STRATEGIES, RouterName
from mxfp4ref._files import check_no_input, printable
from mxfp4ref.conformance.cli.checkpoints import Experts, Layer, read_options, reading
from mxfp4ref.conformance.cli.command import command
from mxfp4ref.conformance.cli.progress import progress
from mxfp4ref.conformance.cli.shared import (
    NOT_EQUAL,
    USAGE,
    describe,
    diagnosis_option,
    first_values,
    usage_errors,
)
from mxfp4ref.conformance.cli.terminal import echo

__all__ = ["layer"]


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
    "--served",
    "served_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Compare with what a server gave for this input, and diagnose what differs. safetensors: routed_output, "
    "output or rank_output [M, H] bf16; better with token_selected_experts and token_final_scales [M, k].",
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
    "--ep-rank",
    type=click.IntRange(min=0),
    help="Run this one of the --ep-size ranks alone, from 0: what its experts add to the output.",
)
@click.option(
    "--experts", type=Experts(), help="Only these, as 64-95 or 0,8,16: what one rank adds to the output."
)
@click.option(
    "--fuse-shared",
    type=click.Choice(["stored", *SCALE_RULES]),
    help="Run the shared expert as one more expert of weight 1: as stored in MXFP4, or requantised by this rule.",
)
@diagnosis_option
@reading
def layer(
    root: Path,
    index: int | str,
    input_path: Path,
    output_path: Path | None,
    served_path: Path | None,
    router: RouterName | None,
    **options: Any,
) -> None:
    """Run a whole mixture-of-experts layer of a checkpoint: router, experts, output.

    \b
    mxfp4ref layer --checkpoint DeepSeek-V4-Flash --layer 3 \\
        --input hidden.safetensors --output out.safetensors
    mxfp4ref layer --checkpoint gpt-oss-20b --layer 3 \\
        --input hidden.safetensors --tp-size 4 --tp-rank 1
    mxfp4ref layer --checkpoint DeepSeek-V4-Flash --layer 3 \\
        --input hidden.safetensors --served served.safetensors

    With --experts, --ep-rank or --tp-rank it is one rank's output, `rank_output`: its own sum, rounded to bf16, as
    the kernel hands it to the all-reduce; fc2's bias is on --tp-rank 0 only, and a routed factor that the model
    applies to the output is applied. Without them all ranks are run, and their outputs added in float32.

    Beside the output, `ambiguous` is true of tokens whose ids hang on a few ulp of their scores, so that another
    correct router may choose others; `token_selected_experts` and `token_final_scales` are the router's.

    Experts are read some at a time, and only those that a token chose. `mxfp4ref checkpoint` says what is in a
    folder.

    With --served, ids and weights are compared first, as far as the file has them, and the output is expected for
    these: a mistake of the router is told from one of the experts, and either is named as `conform` and `replay` name
    it. All K tiles are tried. A rank's own output needs --ep-rank, --experts or --tp-rank.

    Exit codes: 0 done, or equal; 1 what was served is wrong; 2 wrong usage, or a file that cannot be read or
    written.
    """
    from mxfp4ref.checkpoint import fuse_shared, open_layer, open_shards, run_layer
    from mxfp4ref.checkpoint.run import check_result_path, check_whose_output
    from mxfp4ref.model.parallel import Ranks
    from mxfp4ref.model.placement import place_experts
    from mxfp4ref.sm90.activation import ACTIVATIONS

    def given(*names: str) -> dict[str, Any]:
        return {name: options[name] for name in names if options[name] is not None}

    with usage_errors():
        diagnosis_from = click.get_current_context().get_parameter_source("diagnosis")
        if served_path is None and diagnosis_from is not ParameterSource.DEFAULT:
            raise ValueError("--diagnosis: expected --served with it: nothing is compared")
        if output_path is not None:
            inputs = [*root.iterdir()] if root.is_dir() else [root, root.parent / "config.json"]
            check_no_input(output_path, [*inputs, *filter(None, (options["name_map"], served_path))])
            check_result_path(output_path, input_path)
        how = read_options(options["changes"], options["quantize"], options["name_map"], options["experts"])
        found = open_layer(root, index, **given("alpha", "beta", "limit"), options=how)
        if options["ep_rank"] is not None:
            how = replace(how, experts=_experts_of_rank(found.num_experts, options))
            found = open_layer(root, index, **given("alpha", "beta", "limit"), options=how)
        found = replace(found, **given("top_k", "routed_scaling_factor"))
        if options["activation"] is not None:
            (chosen,) = (n for n, known in ACTIVATIONS.items() if known.name == options["activation"])
            found = replace(found, activation_type=chosen)
        _refuse_unused(found, router, options)
        if options["fuse_shared"] is not None:
            found = fuse_shared(found, None if options["fuse_shared"] == "stored" else options["fuse_shared"])
        ep_size = options["ep_size"] if options["ep_rank"] is None else 1
        expert_map = place_experts(found.experts.num_experts, ep_size, options["expert_placement"])
        tp_size, tp_rank = options["tp_size"], options["tp_rank"]
        if tp_rank and tp_size == 1:
            raise ValueError(
                f"--tp-rank: expected --tp-size with it, the number of ranks, got {tp_rank} alone"
            )
        if tp_rank is not None and tp_rank >= tp_size:
            raise ValueError(
                f"--tp-rank: expected one of 0 to {tp_size - 1} with --tp-size {tp_size}, got {tp_rank}"
            )
        if tp_rank is not None and ep_size > 1:
            raise ValueError(
                "--tp-rank: expected --ep-rank, too, or the rank's --experts instead of --ep-size"
            )
        ranks = Ranks(ep_size, tp_size, expert_map=expert_map, tp_rank=tp_rank)
        if served_path is not None:
            check_whose_output(open_shards(served_path).files, found, ranks)
        with progress(before=True) as step:
            result = run_layer(found, input_path, router=router, ranks=ranks, step=step)
        routed = "logits" in result  # by a router, and not by ids in the input
        if routed and found.image_bias is not None and "image_mask" not in open_shards(input_path).files:
            echo("no image_mask in the input: all tokens were routed as text", err=True)
    for name, tensor in result.items():
        echo(f"{name:22}  {describe(tensor):22}  {first_values(tensor)}")
    complete = output_path is None or _written(output_path, result)
    if served_path is None:
        from mxfp4ref.checkpoint.run import read_input
        from mxfp4ref.engine.unshown import shown_by_layer, unshown

        with usage_errors():
            for words in unshown([shown_by_layer(found, read_input(input_path), router)]):
                echo(words, err=True)
    else:
        from mxfp4ref.engine.served import ServedOptions, check_served

        with usage_errors(), progress(before=True) as step:
            how = ServedOptions(router, ranks, options["diagnosis"], step, tell=echo)
            served = check_served(found, input_path, served_path, how, result=result)
        echo(printable(f"{served_path}: {served.verdict}"), fg="green" if served.ok else "red", bold=True)
        if not served.ok:
            sys.exit(NOT_EQUAL)
    if not complete:
        sys.exit(USAGE)


def _written(path: Path, result: dict[str, Any]) -> bool:
    """Write the result, which has been printed; whether that went well. If not, it has been told."""
    from mxfp4ref.checkpoint import CheckpointError
    from mxfp4ref.checkpoint.run import write_result

    try:
        write_result(path, result)
    except CheckpointError as error:
        echo(f"Error: {error}", err=True)
        return False
    echo(f"written: {path}")
    return True


def _experts_of_rank(num_experts: int, options: Mapping[str, Any]) -> tuple[int, ...]:
    """Those that --ep-rank has."""
    from mxfp4ref.model.placement import place_experts

    ep_size, ep_rank = options["ep_size"], options["ep_rank"]
    if options["experts"] is not None:
        raise ValueError("--ep-rank: expected none with --experts, which are those of a rank")
    if ep_rank and ep_size == 1:
        raise ValueError(f"--ep-rank: expected --ep-size with it, the number of ranks, got {ep_rank} alone")
    if ep_rank >= ep_size:
        raise ValueError(
            f"--ep-rank: expected one of 0 to {ep_size - 1} with --ep-size {ep_size}, got {ep_rank}"
        )
    return place_experts(num_experts, ep_size, options["expert_placement"])[ep_rank]


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
