"""A whole layer from a checkpoint, run: router, experts, output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mxfp4ref._choices import RouterName
from mxfp4ref._files import check_no_input
from mxfp4ref._ieee import to_fp64
from mxfp4ref._validate import check_choice, check_tensor, did_you_mean
from mxfp4ref.checkpoint.config import HONOURED, OPTIONS
from mxfp4ref.checkpoint.formats import FORMATS
from mxfp4ref.checkpoint.layer import CheckpointLayer, ExpertsInFiles, has_shared_expert
from mxfp4ref.checkpoint.shards import CheckpointError, open_shards
from mxfp4ref.checkpoint.streaming import forward_in_parts
from mxfp4ref.checkpoint.writing import save
from mxfp4ref.model.dense import dense_gemm
from mxfp4ref.model.layer import finish_output, moe_layer
from mxfp4ref.model.parallel import Ranks
from mxfp4ref.routing.models import PRESETS, Preset
from mxfp4ref.routing.route import PADDING_ID, Gate, Routing, Tokens, route
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.tactics import Sm90Kernel

__all__ = ["checked_router", "router_logits", "router_to_run", "run_layer"]

_INPUTS = ("hidden", "logits", "token_ids", "shared_output", "padded", "image_mask")
_ONE_RANK = Ranks()
_DEFAULT_KERNEL = Sm90Kernel()


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


def run_layer(
    layer: CheckpointLayer,
    input_path: str | Path,
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
            `[M] bool`, without which all tokens are text.
        output_path: a safetensors file to write the result to, too.
        router: a key of `PRESETS`; by default the router that config.json describes.
        ranks, kernel: as for `moe_layer`.
        step: called before each part of the experts with a description and the number of parts.

    Returns:
        `output` `[M, H] bf16`, `logits`, and `token_selected_experts`, `token_final_scales` and `ambiguous` as
        in `Routing`. Where the layer has a shared expert and its output was not given, the result is
        no layer's and is called `routed_output` instead; of a part of the experts, or with `Ranks.tp_rank`, it is
        what that rank adds to the others', and is called `rank_output`.

    Raises:
        TypeError, ValueError: as the router and `moe_layer` do; or the layer has no bias for the router, or a
            factor that its router does not apply; or the output would replace the input.
        CheckpointError: the input file is damaged or has other tensors, config.json does not say what the router
            needs, or the output cannot be written.
    """
    shards = open_shards(input_path)
    if output_path is not None:
        check_no_input(Path(output_path), {shards.root, *shards.files.values()})
    unknown = sorted(set(shards.files) - set(_INPUTS))
    if unknown or "hidden" not in shards.files:
        raise CheckpointError(
            f"{input_path}: expected the tensor hidden and optionally {', '.join(_INPUTS[1:])}, got "
            f"{', '.join(sorted(shards.files))}{did_you_mean(unknown[0], _INPUTS) if unknown else ''}"
        )
    given = shards.read(shards.files)
    hidden, shared_output = given["hidden"], given.get("shared_output")
    padded_hidden = _widen(layer, "hidden", hidden)
    latent = layer.router_weight.shape[1] != layer.hidden_size
    if latent and "logits" not in given:
        raise ValueError(
            f"logits: expected in the input file, the experts of {layer.prefix}* have a space of their own, of "
            f"{layer.hidden_size}, and hidden is in it"
        )
    alone = layer.expert_ids is not None or ranks.tp_rank is not None  # one rank of several
    if shared_output is not None and (alone or layer.fused or latent):
        raise ValueError("shared_output: expected none, it is not added to this result")
    logits = given["logits"] if "logits" in given else router_logits(layer, hidden)
    check_tensor(
        "logits", logits, dtype=(torch.float32, torch.bfloat16), shape=(len(hidden), layer.num_experts)
    )
    routing = _route(layer, logits, given, router)
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
        "logits": logits,
        "token_selected_experts": routing.ids,
        "token_final_scales": routing.scales,
        "ambiguous": routing.ambiguous,
    }
    if output_path is not None:
        save(output_path, result)
    return result


def _name(layer: CheckpointLayer, latent: bool, shared_output: Tensor | None) -> str:
    """What the output of all ranks is."""
    shared = has_shared_expert(layer.shared_experts, layer.others)
    return "routed_output" if latent or (shared and shared_output is None and not layer.fused) else "output"


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
    _route(layer, router_logits(layer, nothing), tokens, None)
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


def _route(
    layer: CheckpointLayer, logits: Tensor, given: Mapping[str, Tensor], router: RouterName | None
) -> Routing:
    if router is not None:
        check_choice("router", router, tuple(PRESETS))
    table = layer.tid2eid if router in (None, "deepseek_v4") else None
    # gpt-oss's bias is part of the logits; another router that was asked for needs the layer to have its own.
    bias = None if router in ("gpt_oss", "mixtral") or _of_logits(layer) else layer.router_bias
    if bias is None and table is None and router in ("deepseek_v3", "deepseek_v4"):
        raise ValueError(f"router: expected a router without a correction bias for {layer.prefix}*")
    preset = router_to_run(layer, router)
    tokens = Tokens(given.get("padded"), given.get("token_ids"), given.get("image_mask"))
    if table is not None and tokens.token_ids is None:
        raise ValueError(f"token_ids: expected in the input file, {layer.prefix}* is a hash layer")
    gate = Gate(None if bias is None else bias.to(torch.float32), layer.image_bias, table)
    routing = route(preset, logits, gate, tokens)
    return routing if not layer.fused else _with_shared(routing, layer)


def _of_logits(layer: CheckpointLayer) -> bool:
    """Whether the layer's bias is part of its logits."""
    if layer.router is not None:
        return layer.router.name == "gpt_oss"
    format = FORMATS.get(layer.format)
    return format is not None and format.router == "gpt_oss"


def _with_shared(routing: Routing, layer: CheckpointLayer) -> Routing:
    """The same with the shared expert in slots of its own, of weight 1."""
    ids = torch.arange(layer.num_experts, layer.num_experts + layer.fused, dtype=torch.int32, device="cpu")
    no_token = (routing.ids == PADDING_ID).all(1, keepdim=True)
    shared = ids.expand(len(routing.ids), -1).masked_fill(no_token, PADDING_ID)
    weights = torch.ones(shared.shape, dtype=torch.float32, device="cpu").masked_fill(no_token, 0.0)
    return replace(
        routing, ids=torch.cat([routing.ids, shared], 1), scales=torch.cat([routing.scales, weights], 1)
    )


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


def _widen(layer: CheckpointLayer, name: str, tensor: Tensor) -> Tensor:
    check_tensor(name, tensor, dtype=torch.bfloat16, shape=("M", layer.hidden_size))
    return F.pad(tensor, (0, layer.experts.hidden_size - layer.hidden_size))
