"""The router of a layer from a checkpoint: logits, and which experts each token is given with which weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref._choices import RouterName
from mxfp4ref._ieee import to_fp64
from mxfp4ref._validate import check_choice, check_tensor
from mxfp4ref.checkpoint.config import HONOURED, OPTIONS
from mxfp4ref.checkpoint.error import CheckpointError
from mxfp4ref.checkpoint.formats import FORMATS
from mxfp4ref.checkpoint.layer import CheckpointLayer
from mxfp4ref.model.dense import dense_gemm
from mxfp4ref.routing.models import PRESETS, Preset
from mxfp4ref.routing.route import PADDING_ID, Gate, Routing, Tokens, route
from mxfp4ref.sm90 import fp32

__all__ = ["checked_router", "gate_of", "route_layer", "router_logits", "router_to_run", "with_shared"]


def router_logits(layer: CheckpointLayer, hidden: Tensor) -> Tensor:
    """The router's logits of `[M, H] bf16` hidden states: `[M, E]`, float32 or, for gpt-oss, bf16.

    Exact products summed in float64 by ascending K, rounded to float32 (a GPU's own order of summation may
    give a neighbour); gpt-oss's bias is added in float32 and the sum rounded to bf16.
    """
    check_tensor("hidden", hidden, dtype=torch.bfloat16, shape=("M", layer.router_weight.shape[1]))
    if layer.router_weight.dtype == torch.bfloat16:
        logits = dense_gemm(hidden[None], layer.router_weight[None])[0]
    else:
        logits = _linear(to_fp64(hidden.to(torch.float32)), to_fp64(layer.router_weight))
    if layer.router_bias is None or not _of_logits(layer):
        return logits
    return fp32.to_bf16(fp32.add(logits, layer.router_bias.to(torch.float32).expand_as(logits)))


def _preset(layer: CheckpointLayer) -> Preset:
    """The layer's router, without its top_k and factor."""
    if layer.router is not None:
        return layer.router
    format = FORMATS.get(layer.format)
    if format is not None and format.router is not None:
        return PRESETS[format.router]
    if format is not None and "score" in format.defaults:
        return PRESETS["deepseek_v4"]
    keys = " and ".join(" or ".join(HONOURED[role]) for role in ("score", "normalize"))
    raise CheckpointError(
        f"config.json: expected {keys}, or an argument router (--router, or --set KEY=VALUE, on the command line)"
    )


def checked_router(layer: CheckpointLayer) -> Preset:
    """The router that `run_layer` uses, with top_k and factor, after a token of zeros has passed it.

    Raises:
        TypeError, ValueError, CheckpointError: as `run_layer` does whatever its input.
    """
    nothing = torch.zeros(1, layer.router_weight.shape[1], dtype=torch.bfloat16, device="cpu")
    tokens = {"token_ids": torch.zeros(1, dtype=torch.int64, device="cpu")}
    route_layer(layer, router_logits(layer, nothing), tokens, None)
    return router_to_run(layer, None)


def router_to_run(layer: CheckpointLayer, router: RouterName | None) -> Preset:
    """The router that `run_layer` uses, with top_k and factor.

    Raises:
        ValueError: the layer has a factor that its router does not apply.
        CheckpointError: config.json does not say what the router needs.
    """
    own = _preset(layer) if router is None or layer.router is not None else PRESETS[router]
    factor = layer.routed_scaling_factor
    if own.name == "gpt_oss" and factor is not None:
        raise ValueError(f"routed_scaling_factor: expected None with the router {own.name}")
    if layer.top_k is None:
        raise _missing("top_k")
    preset = own if router is None else PRESETS[router]
    if router in ("gpt_oss", "mixtral"):  # which have no factor
        factor = 1.0
    if factor is None:
        if preset.name in ("deepseek_v3", "deepseek_v4"):
            raise _missing("routed_scaling_factor")
        factor = 1.0
    if layer.top_k == 1 and preset.name.startswith("deepseek") and preset.normalize == "sum":
        raise CheckpointError(
            f"config.json: expected {' or '.join(HONOURED['normalize'])} to be false with one expert a token: "
            f"engines "
            f"differ in whether they divide its score by itself (--set norm_topk_prob=false leaves it as it is)"
        )
    return replace(preset, top_k=layer.top_k, factor=factor)


def route_layer(
    layer: CheckpointLayer, logits: Tensor, given: Mapping[str, Tensor], router: RouterName | None
) -> Routing:
    if router is not None:
        check_choice("router", router, tuple(PRESETS))
    gate = gate_of(layer, router)
    if gate.correction_bias is None and gate.tid2eid is None and router in ("deepseek_v3", "deepseek_v4"):
        raise ValueError(f"router: expected a router without a correction bias for {layer.prefix}*")
    preset = router_to_run(layer, router)
    tokens = Tokens(given.get("padded"), given.get("token_ids"), given.get("image_mask"))
    if gate.tid2eid is not None and tokens.token_ids is None:
        raise ValueError(f"token_ids: expected in the input file, {layer.prefix}* is a hash layer")
    routing = route(preset, logits, gate, tokens)
    return routing if not layer.fused else with_shared(routing, layer)


def gate_of(layer: CheckpointLayer, router: RouterName | None) -> Gate:
    """What beside the logits decides in the layer's router, or in the one that was asked for."""
    # gpt-oss's bias is part of the logits; another router that was asked for needs the layer to have its own.
    bias = None if router in ("gpt_oss", "mixtral") or _of_logits(layer) else layer.router_bias
    table = layer.tid2eid if router in (None, "deepseek_v4") else None
    return Gate(None if bias is None else bias.to(torch.float32), layer.image_bias, table)


def _of_logits(layer: CheckpointLayer) -> bool:
    """Whether the layer's bias is part of its logits."""
    if layer.router is not None:
        return layer.router.name == "gpt_oss"
    format = FORMATS.get(layer.format)
    return format is not None and format.router == "gpt_oss"


def with_shared(routing: Routing, layer: CheckpointLayer) -> Routing:
    """The same with the shared expert in slots of its own, of weight 1."""
    ids = torch.arange(layer.num_experts, layer.num_experts + layer.fused, dtype=torch.int32, device="cpu")
    no_token = (routing.ids == PADDING_ID).all(1, keepdim=True)
    shared = ids.expand(len(routing.ids), -1).masked_fill(no_token, PADDING_ID)
    weights = torch.ones(shared.shape, dtype=torch.float32, device="cpu").masked_fill(no_token, 0.0)
    return replace(
        routing, ids=torch.cat([routing.ids, shared], 1), scales=torch.cat([routing.scales, weights], 1)
    )


def _missing(role: str) -> CheckpointError:
    return CheckpointError(
        f"config.json: expected {' or '.join(HONOURED[role])}, or {role} in the layer ({OPTIONS[role]} on the "
        f"command line)"
    )


def _linear(x: Tensor, weights: Tensor) -> Tensor:
    """`x @ weights^T` in float64, by ascending K, rounded to float32: `dense_gemm` of weights in float32."""
    total = torch.zeros(len(x), len(weights), dtype=torch.float64, device=x.device)
    for column, other in zip(x.T.contiguous(), weights.T.contiguous(), strict=True):
        total += column[:, None] * other
    return fp32.round_fp64(total)
