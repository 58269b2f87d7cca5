"""A whole layer from a checkpoint, run: router, experts, output."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mxfp4ref._files import check_no_input
from mxfp4ref._validate import check_choice, check_tensor
from mxfp4ref.checkpoint.disk import FORMATS, save
from mxfp4ref.checkpoint.layer import CheckpointLayer
from mxfp4ref.checkpoint.shards import CheckpointError, open_shards
from mxfp4ref.model.dense import dense_gemm
from mxfp4ref.model.layer import moe_layer
from mxfp4ref.model.parallel import Ranks
from mxfp4ref.routing.presets import ROUTERS, Routing
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.activation import SWIGLU
from mxfp4ref.sm90.tactics import Sm90Kernel

__all__ = ["router_logits", "run_layer"]

_INPUTS = ("hidden", "logits", "token_ids", "shared_output", "padded")
_ONE_RANK = Ranks()
_DEFAULT_KERNEL = Sm90Kernel()


def router_logits(layer: CheckpointLayer, hidden: Tensor) -> Tensor:
    """The router's logits of `[M, H] bf16` hidden states: `[M, E]`, float32 or, for gpt-oss, bf16.

    Exact products summed in float64 by ascending K, rounded to float32 (a GPU's own order of summation may
    give a neighbour); gpt-oss's bias is added in float32 and the sum rounded to bf16.
    """
    check_tensor("hidden", hidden, dtype=torch.bfloat16, shape=("M", layer.hidden_size))
    logits = dense_gemm(hidden[None], layer.router_weight[None])[0]
    if layer.router_bias is None or "correction_bias" in _options(FORMATS[layer.format].router):
        return logits
    return fp32.to_bf16(fp32.add(logits, layer.router_bias.to(torch.float32).expand_as(logits)))


def run_layer(
    layer: CheckpointLayer,
    input_path: str | Path,
    output_path: str | Path | None = None,
    *,
    router: str | None = None,
    ranks: Ranks = _ONE_RANK,
    kernel: Sm90Kernel = _DEFAULT_KERNEL,
    activation_type: int = SWIGLU,
) -> dict[str, Tensor]:
    """Run a whole layer: router, kernel on every rank, shared expert if its output is given.

        run_layer(read_layer("DeepSeek-V4-Flash", 3), "hidden.safetensors")

    Args:
        layer: as `read_layer` gives it; `replace(layer, top_k=2)` runs it with other settings.
        input_path: a safetensors file with `hidden` `[M, H] bf16`, after the layer's norm, and optionally
            `logits` `[M, E]` (instead of `router_logits`), `token_ids` `[M] int64` (needed in DeepSeek-V4's
            hash layers), `shared_output` `[M, H] bf16` and `padded` `[M] bool`.
        output_path: a safetensors file to write the result to, too.
        router: a key of `ROUTERS`; by default the router of the layer's format.
        ranks, kernel, activation_type: as for `moe_layer`.

    Returns:
        `output` `[M, H] bf16`, `logits`, and `token_selected_experts`, `token_final_scales` and `ambiguous` as
        in `Routing`. Where the layer has a shared expert and its output was not given, the result is
        no layer's and is called `routed_output` instead.

    Raises:
        TypeError, ValueError: as the router and `moe_layer` do; or the layer has no bias for the router, or a
            factor that its router does not apply; or the output would replace the input.
        CheckpointError: the input file is damaged or has other tensors, top_k is not known, or the output
            cannot be written.
    """
    shards = open_shards(input_path)
    if output_path is not None:
        check_no_input(Path(output_path), {shards.root, *shards.files.values()})
    unknown = sorted(set(shards.files) - set(_INPUTS))
    if unknown or "hidden" not in shards.files:
        raise CheckpointError(
            f"{input_path}: expected the tensor hidden and optionally {', '.join(_INPUTS[1:])}, got "
            f"{', '.join(sorted(shards.files))}"
        )
    given = shards.read(shards.files)
    hidden, shared_output = given["hidden"], given.get("shared_output")
    padded_hidden = _widen(layer, "hidden", hidden)
    logits = given["logits"] if "logits" in given else router_logits(layer, hidden)
    shape = (len(hidden), layer.experts.num_experts)
    check_tensor("logits", logits, dtype=(torch.float32, torch.bfloat16), shape=shape)
    routing = _route(layer, logits, given, router)
    if ranks.intermediate_size is None:
        ranks = replace(ranks, intermediate_size=layer.intermediate_size)
    output = moe_layer(
        padded_hidden,
        routing,
        layer.experts,
        shared_output=None if shared_output is None else _widen(layer, "shared_output", shared_output),
        ranks=ranks,
        kernel=kernel,
        activation_type=activation_type,
    )
    complete = shared_output is not None or not layer.shared_experts
    result = {
        "output" if complete else "routed_output": output[:, : layer.hidden_size].contiguous(),
        "logits": logits,
        "token_selected_experts": routing.ids,
        "token_final_scales": routing.scales,
        "ambiguous": routing.ambiguous,
    }
    if output_path is not None:
        save(output_path, result)
    return result


def _route(
    layer: CheckpointLayer, logits: Tensor, given: Mapping[str, Tensor], router: str | None
) -> Routing:
    format = FORMATS[layer.format]
    name = format.router if router is None else router
    check_choice("router", name, tuple(ROUTERS))
    if layer.top_k is None:
        keys = " or ".join(format.config_keys["top_k"])
        raise CheckpointError(f"config.json: expected {keys}, or top_k in the layer")
    takes, own = _options(name), _options(format.router)
    if layer.routed_scaling_factor is not None and "routed_scaling_factor" not in own:
        raise ValueError(f"routed_scaling_factor: expected None with the router {format.router}")
    options: dict[str, Any] = {"routed_scaling_factor": layer.routed_scaling_factor}
    if layer.tid2eid is not None and "tid2eid" in takes:
        if "token_ids" not in given:
            raise ValueError(f"token_ids: expected in the input file, {layer.prefix}* is a hash layer")
        options |= {"tid2eid": layer.tid2eid, "token_ids": given["token_ids"]}
    elif "correction_bias" in takes:
        if layer.router_bias is None or "correction_bias" not in own:
            raise ValueError(f"router: expected a router without a correction bias for {layer.prefix}*")
        options["correction_bias"] = layer.router_bias
    options = {option: value for option, value in options.items() if option in takes and value is not None}
    return ROUTERS[name](logits, top_k=layer.top_k, padded=given.get("padded"), **options)


def _options(router: str) -> Collection[str]:
    """The names of a router's arguments."""
    return signature(ROUTERS[router]).parameters


def _widen(layer: CheckpointLayer, name: str, tensor: Tensor) -> Tensor:
    check_tensor(name, tensor, dtype=torch.bfloat16, shape=("M", layer.hidden_size))
    return F.pad(tensor, (0, layer.experts.hidden_size - layer.hidden_size))
