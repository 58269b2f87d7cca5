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
from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref.checkpoint.format import CONFIG_KEYS, NUMBER, CheckpointFormat, RowOrder, check_sizes
from mxfp4ref.checkpoint.layer import CheckpointLayer
from mxfp4ref.checkpoint.shards import CheckpointError, Shards
from mxfp4ref.formats.experts import Experts
from mxfp4ref.formats.layout import halves_to_interleaved, interleaved_to_halves
from mxfp4ref.formats.mxfp4 import GROUP_SIZE

__all__ = ["GPT_OSS", "GPT_OSS_ORIGINAL", "read", "write"]


def read(format: CheckpointFormat, shards: Shards, prefix: str, num_experts: int | None) -> CheckpointLayer:
    """Read a layer that has one tensor for all experts, gate and up together; see `CheckpointFormat`."""
    assert format.rows is not None
    names = {role: prefix + name for role, name in format.names.items()}
    format.refuse_others(shards, prefix, names.values())
    tensors = shards.read(names.values())

    def get(role: str, dtype: torch.dtype, *shape: int | str) -> Tensor:
        return shards.check(names[role], tensors[names[role]], dtype, shape)

    def scales(role: str, *shape: int) -> Tensor:
        dtype = tensors[names["fc1_scales"]].dtype
        return shards.scale_bytes(names[role], tensors[names[role]], dtype, shape)

    size: int | str = "E" if num_experts is None else num_experts
    fc1 = get("fc1_weights", torch.uint8, size, "2I", "H/32", 16)
    count, rows, groups = fc1.shape[:3]
    label = shards.label(names["fc1_weights"])
    if rows % 2:
        raise CheckpointError(f"{label}: expected rows in pairs, gate and up, got {rows}")
    hidden, inner = GROUP_SIZE * groups, rows // 2
    check_sizes(label, count, hidden, inner)
    fc2 = get("fc2_weights", torch.uint8, count, hidden, inner // GROUP_SIZE, 16)
    experts = Experts(
        format.rows.to_halves(fc1.flatten(2)),
        format.rows.to_halves(scales("fc1_scales", count, rows, groups)),
        fc2.flatten(2),
        scales("fc2_scales", count, hidden, inner // GROUP_SIZE),
        format.rows.to_halves(get("fc1_biases", torch.bfloat16, count, rows)),
        get("fc2_biases", torch.bfloat16, count, hidden),
    )
    router_weight = get("router_weight", torch.bfloat16, count, hidden)
    router_bias = get("router_bias", torch.bfloat16, count)
    return CheckpointLayer(format.name, prefix, experts, hidden, inner, router_weight, router_bias)


def write(format: CheckpointFormat, layer: CheckpointLayer) -> dict[str, Tensor]:
    """The tensors of a layer, the inverse of `read`."""
    assert format.rows is not None
    if layer.tid2eid is not None or layer.shared_experts:
        raise ValueError(f"layer: expected neither tid2eid nor shared_experts in {format.name}")
    tensors = {
        role: getattr(layer if role.startswith("router") else layer.experts, role) for role in format.names
    }
    missing = [role for role, tensor in tensors.items() if tensor is None]
    if missing:
        raise ValueError(f"layer: expected all tensors of {format.name}, got None for {', '.join(missing)}")
    for role in tensors:
        if role.startswith("fc1"):
            tensors[role] = format.rows.from_halves(tensors[role])
        if role.endswith("weights"):
            tensors[role] = tensors[role].unflatten(2, (-1, GROUP_SIZE // 2))
    return {format.names[role]: tensor for role, tensor in tensors.items()}


GPT_OSS = CheckpointFormat(
    name="gpt_oss",
    pattern=re.compile(rf"(model\.layers\.{NUMBER}\.mlp\.)experts\.(?:gate_up|down)_proj_"),
    names={
        "fc1_weights": "experts.gate_up_proj_blocks",
        "fc1_scales": "experts.gate_up_proj_scales",
        "fc1_biases": "experts.gate_up_proj_bias",
        "fc2_weights": "experts.down_proj_blocks",
        "fc2_scales": "experts.down_proj_scales",
        "fc2_biases": "experts.down_proj_bias",
        "router_weight": "router.weight",
        "router_bias": "router.bias",
    },
    closed=("experts.",),
    config_keys=CONFIG_KEYS,
    router="gpt_oss",
    read=read,
    write=write,
    rows=RowOrder(interleaved_to_halves, halves_to_interleaved),
    alpha=1.702,
    beta=1.0,
)
GPT_OSS_ORIGINAL = replace(
    GPT_OSS,
    name="gpt_oss_original",
    pattern=re.compile(rf"(block\.{NUMBER}\.mlp\.)mlp[12]_"),
    names={
        "fc1_weights": "mlp1_weight.blocks",
        "fc1_scales": "mlp1_weight.scales",
        "fc1_biases": "mlp1_bias",
        "fc2_weights": "mlp2_weight.blocks",
        "fc2_scales": "mlp2_weight.scales",
        "fc2_biases": "mlp2_bias",
        "router_weight": "gate.weight",
        "router_bias": "gate.bias",
    },
    closed=("mlp1", "mlp2"),
)
