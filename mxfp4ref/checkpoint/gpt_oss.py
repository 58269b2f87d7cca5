"""gpt-oss's tensors: gpt_oss, as Hugging Face has them, and gpt_oss_original, as OpenAI.

Below `model.layers.3.mlp.`           below `block.3.mlp.`

    experts.gate_up_proj_blocks       mlp1_weight.blocks  [E, 2I, H/32, 16] uint8, rows gate0, up0, gate1, ...
    experts.gate_up_proj_scales       mlp1_weight.scales  [E, 2I, H/32] uint8
    experts.gate_up_proj_bias         mlp1_bias           [E, 2I] bf16
    experts.down_proj_blocks, ...     mlp2_weight.blocks  [E, H, I/32, 16] uint8; scales, bias [E, H]
    router.weight, router.bias        gate.weight, .bias  [E, H], [E] bf16

The low nibble of a byte is the even index along K, as everywhere in this package. Scales may also be
float8_e8m0fnu, or float32 as long as each is a power of two.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from mxfp4ref.checkpoint.layer import NUMBER, CheckpointLayer, check_sizes, refuse_others, scale_bytes
from mxfp4ref.checkpoint.shards import CheckpointError, Shards
from mxfp4ref.formats.experts import Experts
from mxfp4ref.formats.layout import halves_to_interleaved, interleaved_to_halves
from mxfp4ref.formats.mxfp4 import GROUP_SIZE

__all__ = ["ALPHA", "BETA", "PREFIXES", "read", "write"]

# What gpt-oss's own code fixes and its config.json does not say.
ALPHA, BETA = 1.702, 1.0

# What the name of an expert tensor begins with, in either format; in it the prefix and the layer's number.
PREFIXES = {
    "gpt_oss": re.compile(rf"(model\.layers\.{NUMBER}\.mlp\.)experts\.(?:gate_up|down)_proj_"),
    "gpt_oss_original": re.compile(rf"(block\.{NUMBER}\.mlp\.)mlp[12]_"),
}
_NAMES = {
    "gpt_oss": {
        "fc1_blocks": "experts.gate_up_proj_blocks",
        "fc1_scales": "experts.gate_up_proj_scales",
        "fc1_biases": "experts.gate_up_proj_bias",
        "fc2_blocks": "experts.down_proj_blocks",
        "fc2_scales": "experts.down_proj_scales",
        "fc2_biases": "experts.down_proj_bias",
        "router_weight": "router.weight",
        "router_bias": "router.bias",
    },
    "gpt_oss_original": {
        "fc1_blocks": "mlp1_weight.blocks",
        "fc1_scales": "mlp1_weight.scales",
        "fc1_biases": "mlp1_bias",
        "fc2_blocks": "mlp2_weight.blocks",
        "fc2_scales": "mlp2_weight.scales",
        "fc2_biases": "mlp2_bias",
        "router_weight": "gate.weight",
        "router_bias": "gate.bias",
    },
}


def read(shards: Shards, format_name: str, prefix: str, num_experts: int | None) -> CheckpointLayer:
    """Read a layer, not padded and without SwiGLU parameters; see `deepseek_v4.read`."""
    names = {key: f"{prefix}{name}" for key, name in _NAMES[format_name].items()}
    refuse_others(shards, (f"{prefix}experts.", f"{prefix}mlp1", f"{prefix}mlp2"), names.values())
    tensors = shards.read(names.values())

    def get(key: str, dtype: torch.dtype | tuple[torch.dtype, ...], *shape: int | str) -> Tensor:
        return shards.check(names[key], tensors[names[key]], dtype, shape)

    size: int | str = "E" if num_experts is None else num_experts
    blocks = get("fc1_blocks", torch.uint8, size, "2I", "H/32", 16)
    count, rows, groups = blocks.shape[:3]
    if rows % 2:
        label = shards.label(names["fc1_blocks"])
        raise CheckpointError(f"{label}: expected rows in pairs, gate and up, got {rows}")
    hidden, inner = GROUP_SIZE * groups, rows // 2
    check_sizes(shards.label(names["fc1_blocks"]), count, hidden, inner)
    down = get("fc2_blocks", torch.uint8, count, hidden, inner // GROUP_SIZE, 16)
    scale_dtype = tensors[names["fc1_scales"]].dtype
    fc1_scales, fc2_scales = (
        scale_bytes(shards, names[key], tensors[names[key]], shape, scale_dtype)
        for key, shape in (
            ("fc1_scales", (count, rows, groups)),
            ("fc2_scales", (count, hidden, inner // GROUP_SIZE)),
        )
    )
    experts = Experts(
        interleaved_to_halves(blocks.flatten(2)),
        interleaved_to_halves(fc1_scales),
        down.flatten(2),
        fc2_scales,
        fc1_biases=interleaved_to_halves(get("fc1_biases", torch.bfloat16, count, rows)),
        fc2_biases=get("fc2_biases", torch.bfloat16, count, hidden),
    )
    return CheckpointLayer(
        format_name,
        prefix,
        experts,
        hidden,
        inner,
        get("router_weight", torch.bfloat16, count, hidden),
        get("router_bias", torch.bfloat16, count),
    )


def write(layer: CheckpointLayer) -> dict[str, Tensor]:
    """The tensors of an unpadded layer by the ends of their names, the inverse of `read`.

    Raises:
        ValueError: the layer lacks a bias, or has a table or shared experts.
    """
    experts, names = layer.experts, _NAMES[layer.format]
    if layer.tid2eid is not None or layer.shared_experts:
        raise ValueError(f"layer: expected neither tid2eid nor shared_experts in {layer.format}")

    def rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else halves_to_interleaved(tensor)

    def blocks(tensor: Tensor) -> Tensor:
        return tensor.reshape(*tensor.shape[:2], -1, GROUP_SIZE // 2)

    tensors = {
        "fc1_blocks": blocks(halves_to_interleaved(experts.fc1_weights)),
        "fc1_scales": rows(experts.fc1_scales),
        "fc1_biases": rows(experts.fc1_biases),
        "fc2_blocks": blocks(experts.fc2_weights),
        "fc2_scales": experts.fc2_scales,
        "fc2_biases": experts.fc2_biases,
        "router_weight": layer.router_weight,
        "router_bias": layer.router_bias,
    }
    missing = [key for key, tensor in tensors.items() if tensor is None]
    if missing:
        raise ValueError(f"layer: expected all tensors of {layer.format}, got None for {', '.join(missing)}")
    return {names[key]: tensor for key, tensor in tensors.items() if tensor is not None}
