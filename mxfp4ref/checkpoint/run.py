"""A whole layer from disk: router, experts, output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mxfp4ref._validate import check_choice, check_tensor
from mxfp4ref.checkpoint.disk import read_layer, save
from mxfp4ref.checkpoint.layer import CheckpointLayer
from mxfp4ref.checkpoint.shards import CheckpointError, open_shards
from mxfp4ref.model.dense import dense_gemm
from mxfp4ref.model.layer import moe_layer
from mxfp4ref.model.parallel import Ranks
from mxfp4ref.routing.presets import Routing, deepseek_v4, gpt_oss, mixtral
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.tactics import Sm90Kernel

__all__ = ["ROUTERS", "router_logits", "run_layer"]

ROUTERS: dict[str, Callable[..., Routing]] = {
    "deepseek_v4": deepseek_v4,
    "gpt_oss": gpt_oss,
    "mixtral": mixtral,
}
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
    if layer.format == "deepseek_v4" or layer.router_bias is None:
        return logits
    return fp32.to_bf16(fp32.add(logits, layer.router_bias.to(torch.float32).expand_as(logits)))


def run_layer(
    checkpoint: str | Path,
    layer: int,
    input_path: str | Path,
    output_path: str | Path | None = None,
    *,
    router: str | None = None,
    top_k: int | None = None,
    routed_scaling_factor: float | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    limit: float | None = None,
    ranks: Ranks = _ONE_RANK,
    kernel: Sm90Kernel = _DEFAULT_KERNEL,
) -> dict[str, Tensor]:
    """Run a whole layer from disk: router, kernel on every rank, shared expert if its output is given.

    Args:
        checkpoint, layer, alpha, beta, limit: as for `read_layer`.
        input_path: a safetensors file with `hidden` `[M, H] bf16`, after the layer's norm, and optionally
            `logits` `[M, E]` (instead of `router_logits`), `token_ids` `[M] int64` (needed in DeepSeek-V4's
            hash layers), `shared_output` `[M, H] bf16` and `padded` `[M] bool`.
        output_path: a safetensors file to write the result to, too.
        router: a name of `ROUTERS`; by default the checkpoint's own.
        top_k, routed_scaling_factor: by default those of config.json.
        ranks, kernel: as for `moe_layer`.

    Returns:
        `output` `[M, H] bf16`, `logits`, and `token_selected_experts`, `token_final_scales` and `ambiguous` as
        in `Routing`. Where the layer has a shared expert and its output was not given, the result is
        no layer's and is called `routed_output` instead.

    Raises:
        TypeError, ValueError: as `read_layer`, the router and `moe_layer` do.
        CheckpointError: the input file is damaged or has other tensors, or the output cannot be written.
    """
    found = read_layer(checkpoint, layer, alpha=alpha, beta=beta, limit=limit)
    shards = open_shards(input_path)
    unknown = sorted(set(shards.files) - set(_INPUTS))
    if unknown or "hidden" not in shards.files:
        raise CheckpointError(
            f"{input_path}: expected the tensor hidden and optionally {', '.join(_INPUTS[1:])}, got "
            f"{', '.join(sorted(shards.files))}"
        )
    given = shards.read(shards.files)
    hidden, shared_output = given["hidden"], given.get("shared_output")
    logits = given["logits"] if "logits" in given else router_logits(found, hidden)
    routing = _route(found, logits, given, router, top_k, routed_scaling_factor)
    output = moe_layer(
        _widen(found, "hidden", hidden),
        routing,
        found.experts,
        shared_output=None if shared_output is None else _widen(found, "shared_output", shared_output),
        ranks=ranks,
        kernel=kernel,
    )
    complete = shared_output is not None or not found.shared_experts
    result = {
        "output" if complete else "routed_output": output[:, : found.hidden_size].contiguous(),
        "logits": logits,
        "token_selected_experts": routing.ids,
        "token_final_scales": routing.scales,
        "ambiguous": routing.ambiguous,
    }
    if output_path is not None:
        save(output_path, result)
    return result


def _route(
    layer: CheckpointLayer,
    logits: Tensor,
    given: Mapping[str, Tensor],
    router: str | None,
    top_k: int | None,
    routed_scaling_factor: float | None,
) -> Routing:
    name = layer.format.removesuffix("_original") if router is None else router
    check_choice("router", name, tuple(ROUTERS))
    top_k = layer.top_k if top_k is None else top_k
    if top_k is None:
        raise CheckpointError(
            "config.json: expected num_experts_per_tok or experts_per_token, or top_k given"
        )
    options: dict[str, Any] = {"top_k": top_k, "padded": given.get("padded")}
    if name == "deepseek_v4":
        if layer.format != name:
            raise ValueError(f"router: expected a router without a correction bias for {layer.format}")
        factor = layer.routed_scaling_factor if routed_scaling_factor is None else routed_scaling_factor
        options |= {"correction_bias": layer.router_bias, "routed_scaling_factor": factor}
        if layer.tid2eid is not None:
            if "token_ids" not in given:
                raise ValueError(f"token_ids: expected in the input file, {layer.prefix}* is a hash layer")
            options |= {"token_ids": given["token_ids"], "tid2eid": layer.tid2eid}
    elif routed_scaling_factor is not None:
        raise ValueError(f"routed_scaling_factor: expected None with the router {name}")
    return ROUTERS[name](logits, **options)


def _widen(layer: CheckpointLayer, name: str, tensor: Tensor) -> Tensor:
    check_tensor(name, tensor, dtype=torch.bfloat16, shape=("M", layer.hidden_size))
    return F.pad(tensor, (0, layer.experts.hidden_size - layer.hidden_size))
