"""A whole layer from a checkpoint, run: router, experts, output."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mxfp4ref._choices import RouterName
from mxfp4ref._files import check_no_input, check_replaceable
from mxfp4ref._validate import check_ids, check_tensor, did_you_mean
from mxfp4ref.checkpoint.error import CheckpointError
from mxfp4ref.checkpoint.layer import CheckpointLayer, ExpertsInFiles, has_shared_expert
from mxfp4ref.checkpoint.router import route_layer, router_logits, with_shared
from mxfp4ref.checkpoint.shards import open_shards
from mxfp4ref.checkpoint.streaming import forward_in_parts
from mxfp4ref.checkpoint.writing import save, writing
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.layer import finish_output, moe_layer
from mxfp4ref.model.parallel import Ranks, split_intermediate
from mxfp4ref.routing.route import PADDING_ID, Routing
from mxfp4ref.sm90.tactics import Sm90Kernel

__all__ = [
    "OUTPUTS",
    "ROUTER_INPUTS",
    "ROUTING",
    "check_result_path",
    "check_whose_output",
    "layer_call",
    "read_input",
    "route_input",
    "run_layer",
    "write_result",
]

ROUTING = ("token_selected_experts", "token_final_scales")
OUTPUTS = ("routed_output", "output", "rank_output")
ROUTER_INPUTS = ("logits", "token_ids", "padded", "image_mask")  # what the router alone reads
_INPUTS = ("hidden", "logits", "token_ids", "shared_output", "padded", "image_mask", *ROUTING)
_BY_THIS_PACKAGE = "run_layer"  # what its output says that it was written by
_ONE_RANK = Ranks()
_DEFAULT_KERNEL = Sm90Kernel()


def run_layer(
    layer: CheckpointLayer,
    input_path: str | Path | Mapping[str, Tensor],
    output_path: str | Path | None = None,
    *,
    router: RouterName | None = None,
    ranks: Ranks = _ONE_RANK,
    kernel: Sm90Kernel = _DEFAULT_KERNEL,
    step: Callable[[str, int], None] | None = None,
) -> dict[str, Tensor]:
    """Run a whole layer: router, kernel on every rank, shared expert if its output is given.

        run_layer(open_layer("DeepSeek-V4-Flash", 3), "hidden.safetensors")

    Args:
        layer: as `read_layer` gives it, or `open_layer`, whose experts are read some at a time and only if a token
            chose them; `replace(layer, top_k=2)` runs it with other settings.
        input_path: a safetensors file with `hidden` `[M, H] bf16`, after the layer's norm, and optionally
            `logits` `[M, E]` (instead of `router_logits`), `token_ids` `[M] int64` (needed in DeepSeek-V4's
            hash layers), `shared_output` `[M, H] bf16`, `padded` `[M] bool` and, in models that see, `image_mask`
            `[M] bool`, without which all tokens are text. `token_selected_experts` `[M, k] int32` and
            `token_final_scales` `[M, k] float32` take the router's place. Or these tensors by name.
        output_path: a safetensors file to write the result to, too.
        router: a key of `PRESETS`; by default the router that config.json describes.
        ranks, kernel: as for `moe_layer`.
        step: called before each part of the experts with a description and the number of parts.

    Returns:
        `output` `[M, H] bf16`, `token_selected_experts`, `token_final_scales` and, of a router, `logits` and
        `ambiguous`, as in `Routing`. Where the layer has a shared expert and its output was not given, the result is
        no layer's and is called `routed_output` instead; of a part of the experts, or with `Ranks.tp_rank`, it is
        what that rank adds to the others', and is called `rank_output`.

    Raises:
        TypeError, ValueError: as the router and `moe_layer` do; or the layer has no bias for the router, or a
            factor that its router does not apply; or the output would replace the input.
        CheckpointError: the input file is damaged or has other tensors, config.json does not say what the router
            needs, or the output cannot be written.
    """
    if output_path is not None:
        check_result_path(output_path, input_path)
    given = read_input(input_path)
    shared_output = given.get("shared_output")
    latent = _latent(layer)
    alone = of_one_rank(layer, ranks)
    if shared_output is not None and (alone or layer.fused or latent):
        raise ValueError("shared_output: expected none, it is not added to this result")
    padded_hidden = _widen(layer, "hidden", given["hidden"])
    logits, routing = route_input(layer, given, router)
    if ranks.intermediate_size is None:
        ranks = replace(ranks, intermediate_size=layer.intermediate_size)
    if shared_output is not None:
        shared_output = _widen(layer, "shared_output", shared_output)
    if isinstance(layer.experts, ExpertsInFiles) or layer.expert_ids is not None:
        ids = _local(layer, routing.ids, ranks)
        output = finish_output(
            forward_in_parts(
                padded_hidden,
                replace(routing, ids=ids),
                layer.experts,
                ranks,
                kernel,
                step,
                activation_type=layer.activation_type,
            ),
            shared_output=shared_output,
            routed_scaling=routing.routed_scaling,
            routed_scaling_factor=routing.routed_scaling_factor,
        )
    else:
        output = moe_layer(
            padded_hidden,
            routing,
            layer.experts,
            shared_output=shared_output,
            ranks=ranks,
            kernel=kernel,
            activation_type=layer.activation_type,
        )
    result = {
        "rank_output" if alone else _name(layer, latent, shared_output): output[
            :, : layer.hidden_size
        ].contiguous(),
        **({} if logits is None else {"logits": logits}),
        **dict(zip(ROUTING, (routing.ids, routing.scales), strict=True)),
        **({} if logits is None else {"ambiguous": routing.ambiguous}),
    }
    if output_path is not None:
        write_result(output_path, result)
    return result


def check_result_path(path: str | Path, input_path: str | Path | Mapping[str, Tensor]) -> None:
    """Raise ValueError or CheckpointError if a layer's result cannot be written there, or would replace its input."""
    if not isinstance(input_path, Mapping):
        shards = open_shards(input_path)
        check_no_input(Path(path), {shards.root, *shards.files.values()})
    with writing(path):
        check_replaceable(Path(path))


def write_result(path: str | Path, result: dict[str, Tensor]) -> None:
    """Write what `run_layer` gave. Raises CheckpointError if that is not possible."""
    save(path, result, about=_BY_THIS_PACKAGE)


def of_one_rank(layer: CheckpointLayer, ranks: Ranks) -> bool:
    """Whether the result is one rank's of several, `rank_output`."""
    return layer.expert_ids is not None or ranks.tp_rank is not None


def check_whose_output(names: Container[str], layer: CheckpointLayer, ranks: Ranks) -> None:
    """Raise ValueError if a `rank_output` alone is among the names of what was served, and no rank was chosen."""
    if [name for name in OUTPUTS if name in names] == ["rank_output"] and not of_one_rank(layer, ranks):
        raise ValueError(
            "rank_output: expected the rank that gave it, by --ep-size and --ep-rank, --experts, or --tp-size and "
            "--tp-rank, got none; the whole layer's is routed_output or output"
        )


def layer_call(
    layer: CheckpointLayer,
    input_path: str | Path | Mapping[str, Tensor],
    *,
    router: RouterName | None = None,
    ranks: Ranks = _ONE_RANK,
) -> MoeCall:
    """The kernel's call for a layer's input, with all experts of the rank in memory: what `diagnose` takes.

    Args:
        layer, input_path, router: as for `run_layer`.
        ranks: one rank: of several tensor-parallel ones that of `tp_rank`; of expert-parallel ones, that of the
            layer's `expert_ids`.

    Raises:
        ValueError: `ranks` are several.
        TypeError, ValueError, CheckpointError: as `run_layer` does.
    """
    if ranks.ep_size > 1 or (ranks.tp_size > 1 and ranks.tp_rank is None):
        raise ValueError(f"ranks: expected one rank, with tp_rank or the layer's expert_ids, got {ranks}")
    given = read_input(input_path)
    routing = route_input(layer, given, router)[1]
    tp_rank = ranks.tp_rank or 0
    experts = layer.experts.read() if isinstance(layer.experts, ExpertsInFiles) else layer.experts
    inner = ranks.intermediate_size or layer.intermediate_size
    shard = split_intermediate(experts, ranks.tp_size, intermediate_size=inner)[tp_rank]
    ids, place = routing.ids, _equal_share(layer)
    if place is None:
        ids, place = _local(layer, ids, ranks), {}
    return MoeCall(
        _widen(layer, "hidden", given["hidden"]),
        ids,
        routing.scales,
        shard,
        tp_size=ranks.tp_size,
        tp_rank=tp_rank,
        strict=False,
        activation_type=layer.activation_type,
        **place,
    )


def read_input(source: str | Path | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an input of `run_layer`, none of another name.

    Raises:
        CheckpointError: they have other names, or the file is damaged.
    """
    if isinstance(source, Mapping):
        names, given = [*source], dict(source)
    else:
        shards = open_shards(source)
        names = [*shards.files]
    unknown = sorted(set(names) - set(_INPUTS))
    if unknown or "hidden" not in names:
        raise CheckpointError(
            f"{'input' if isinstance(source, Mapping) else source}: expected the tensor hidden and optionally "
            f"{', '.join(_INPUTS[1:])}, got {', '.join(sorted(names))}"
            f"{did_you_mean(unknown[0], _INPUTS if 'hidden' in names else ('hidden',)) if unknown else ''}"
        )
    return given if isinstance(source, Mapping) else shards.read(shards.files)


def route_input(
    layer: CheckpointLayer, given: Mapping[str, Tensor], router: RouterName | None = None
) -> tuple[Tensor | None, Routing]:
    """The logits and what the router decides; of an input with ids and weights None, and these.

    Raises:
        TypeError, ValueError: as the router does; or the input has not both ids and weights, or others than fit.
    """
    hidden = given["hidden"]
    if not any(name in given for name in ROUTING):
        if _latent(layer) and "logits" not in given:
            raise ValueError(
                f"logits: expected in the input file, the experts of {layer.prefix}* have a space of their own, of "
                f"{layer.hidden_size}, and hidden is in it"
            )
        logits = given["logits"] if "logits" in given else _finite(router_logits(layer, hidden), hidden)
        check_tensor(
            "logits", logits, dtype=(torch.float32, torch.bfloat16), shape=(len(hidden), layer.num_experts)
        )
        return logits, route_layer(layer, logits, given, router)
    if missing := [name for name in ROUTING if name not in given]:
        raise ValueError(f"{missing[0]}: expected in the input, too: {' and '.join(ROUTING)} go together")
    unused = [name for name in ROUTER_INPUTS if name in given] + ["router"] * (router is not None)
    if unused:
        raise ValueError(
            f"{unused[0]}: expected none beside {' and '.join(ROUTING)}, which take the router's place"
            + "; ids of padded tokens are -1" * (unused[0] == "padded")
        )
    ids, weights = (given[name] for name in ROUTING)
    check_tensor(ROUTING[0], ids, dtype=(torch.int32, torch.int64), shape=(len(hidden), "k"))
    check_tensor(ROUTING[1], weights, dtype=torch.float32, shape=tuple(ids.shape))
    check_ids(ROUTING[0], ids, minimum=PADDING_ID, maximum=layer.num_experts - 1)
    routing = Routing(ids.to(torch.int32), weights, torch.zeros(len(ids), dtype=torch.bool, device="cpu"))
    return None, with_shared(routing, layer) if layer.fused else routing


def _finite(logits: Tensor, hidden: Tensor) -> Tensor:
    """The logits, or ValueError with what of `hidden` makes one that no router takes."""
    bad = torch.isnan(logits) | (logits == torch.inf)
    if bool(bad.any()):
        token, expert = bad.nonzero()[0].tolist()
        of_token = hidden[token]
        cause = "".join(
            f", as hidden[{token}, {i}] is {of_token[i].item()}"
            for i in (~of_token.isfinite()).nonzero()[:1, 0]
        )
        raise ValueError(
            f"hidden: expected numbers whose logits are below +inf, got {logits[token, expert].item()} at "
            f"token {token}, expert {expert}{cause}"
        )
    return logits


def _latent(layer: CheckpointLayer) -> bool:
    """Whether the experts work in a space of their own."""
    return layer.router_weight.shape[1] != layer.hidden_size


def _equal_share(layer: CheckpointLayer) -> dict[str, Any] | None:
    """`ep_size` and `ep_rank` of the rank that has the layer's experts, which are one of equal ranges; else None."""
    if layer.expert_ids is None:
        return {}
    first, count = layer.expert_ids[0], len(layer.expert_ids)
    in_order = layer.expert_ids == tuple(range(first, first + count))
    if layer.fused or not in_order or layer.num_experts % count or first % count:
        return None
    return {"ep_size": layer.num_experts // count, "ep_rank": first // count}


def _name(layer: CheckpointLayer, latent: bool, shared_output: Tensor | None) -> str:
    """What the output of all ranks is."""
    shared = has_shared_expert(layer.shared_experts, layer.others)
    return "routed_output" if latent or (shared and shared_output is None and not layer.fused) else "output"


def _local(layer: CheckpointLayer, ids: Tensor, ranks: Ranks) -> Tensor:
    """Ids as indices into the layer's experts, -1 where it does not have them; of equal experts the first."""
    if layer.expert_ids is None:
        return ids
    if ranks.ep_size != 1:
        raise ValueError(f"ep_size: expected 1 with the experts of one rank, got {ranks.ep_size}")
    index = torch.full(
        (layer.num_experts + 1,), -1, dtype=torch.int32, device="cpu"
    )  # the last is that of id -1
    for local, expert in reversed([*enumerate(layer.expert_ids)]):
        index[expert] = local
    return index[ids.long()]


def _widen(layer: CheckpointLayer, name: str, tensor: Tensor) -> Tensor:
    check_tensor(name, tensor, dtype=torch.bfloat16, shape=("M", layer.hidden_size))
    return F.pad(tensor, (0, layer.experts.hidden_size - layer.hidden_size))
