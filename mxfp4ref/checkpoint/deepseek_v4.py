"""DeepSeek-V4's tensors, as V4-Flash and V4-Pro are published.

Below `layers.3.ffn.`, also with `model.` before it:

    experts.E.w1.weight, .w3.weight   [I, H/2] int8       gate and up, two codes a byte
    experts.E.w2.weight               [H, I/2] int8       down
    experts.E.w1.scale, ...           [I, H/32], [H, I/32] float8_e8m0fnu
    gate.weight                       [E, H] bf16         the router
    gate.bias                         [E] float32         correction bias; or, in the hash layers,
    gate.tid2eid                      [V, k] int64        the experts of each token id
    shared_experts.*                  not MXFP4 (float8_e4m3fn in 128 x 128 blocks), handed on as stored

The low nibble of a byte is the even index along K, as everywhere in this package. Weights may also be uint8,
scales uint8, or float32 as long as each is a power of two.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.checkpoint.format import CONFIG_KEYS, NUMBER, CheckpointFormat, check_sizes
from mxfp4ref.checkpoint.layer import CheckpointLayer
from mxfp4ref.checkpoint.shards import CheckpointError, Shards
from mxfp4ref.formats.experts import Experts
from mxfp4ref.formats.mxfp4 import GROUP_SIZE, PACKED_DTYPES

__all__ = ["DEEPSEEK_V4", "read", "write"]

_MATRICES = ("gate", "up", "down")


def read(format: CheckpointFormat, shards: Shards, prefix: str, num_experts: int | None) -> CheckpointLayer:
    """Read a layer whose experts have three weight and three scale tensors each; see `CheckpointFormat`."""
    names = {role: prefix + name for role, name in format.names.items()}
    present = {
        int(match[3]) for name in shards.files if (match := format.pattern.match(name)) and match[1] == prefix
    }
    count = max(present) + 1
    if num_experts not in (None, count):
        raise CheckpointError(
            f"{prefix}experts.*: expected experts 0 to {num_experts - 1}, as config.json says, found "
            f"{len(present)}, the last of them {count - 1}"
        )
    if count != len(present):
        missing = next(expert for expert in range(count) if expert not in present)
        raise CheckpointError(f"{prefix}experts.{missing}.*: expected experts 0 to {count - 1}, not there")
    roles = [f"{matrix}_{kind}" for matrix in _MATRICES for kind in ("weights", "scales")]
    of_experts = [names[role].format(expert) for role in roles for expert in range(count)]
    format.refuse_others(shards, prefix, of_experts)
    tensors = shards.read(of_experts)
    router = [role for role in ("router_bias", "tid2eid") if names[role] in shards.files]
    if len(router) != 1:
        found = "both" if router else "neither"
        raise CheckpointError(f"{prefix}gate.*: expected either a bias or a table tid2eid, found {found}")
    shared = [name for name in shards.files if name.startswith(names["shared_experts"])]
    router = ["router_weight", *router]
    others = shards.read([*(names[role] for role in router), *shared])

    first = names["gate_weights"].format(0)
    inner, packed = shards.check(first, tensors[first], PACKED_DTYPES, ("I", "H/2")).shape
    hidden = 2 * packed
    check_sizes(shards.label(first), count, hidden, inner)

    shapes = (
        (2 * inner, hidden // 2),
        (2 * inner, hidden // GROUP_SIZE),
        (hidden, inner // 2),
        (hidden, inner // GROUP_SIZE),
    )
    experts = Experts(*(torch.empty(count, *shape, dtype=torch.uint8, device="cpu") for shape in shapes))
    # One dtype for all experts: a mixture means that somebody converted half of them.
    weight_dtype, scale_dtype = tensors[first].dtype, tensors[names["gate_scales"].format(0)].dtype
    for expert, matrix, weights, scales in _matrices(experts):
        name = names[f"{matrix}_weights"].format(expert)
        weights.copy_(shards.check(name, tensors[name], weight_dtype, weights.shape).view(torch.uint8))
        name = names[f"{matrix}_scales"].format(expert)
        scales.copy_(shards.scale_bytes(name, tensors[name], scale_dtype, scales.shape))

    kinds: dict[str, Any] = {
        "router_weight": (torch.bfloat16, (count, hidden)),
        "router_bias": (torch.float32, (count,)),
        "tid2eid": ((torch.int64, torch.int32), ("V", "k")),
    }
    checked: dict[str, Any] = {
        role: shards.check(names[role], others[names[role]], *kinds[role]) for role in router
    }
    shared_experts = {name.removeprefix(names["shared_experts"]): others[name] for name in shared}
    return CheckpointLayer(
        format.name,
        prefix,
        experts,
        hidden,
        inner,
        shared_experts=MappingProxyType(shared_experts),
        **checked,
    )


def write(format: CheckpointFormat, layer: CheckpointLayer) -> dict[str, Tensor]:
    """The tensors of a layer, the inverse of `read`."""
    if layer.experts.fc1_biases is not None or layer.experts.fc2_biases is not None:
        raise ValueError(f"layer.experts: expected no biases in {format.name}, got some")
    if (layer.router_bias is None) == (layer.tid2eid is None):
        raise ValueError(f"layer: expected exactly one of router_bias and tid2eid in {format.name}")
    tensors = {}
    for expert, matrix, weights, scales in _matrices(layer.experts):
        tensors[format.names[f"{matrix}_weights"].format(expert)] = weights.view(torch.int8)
        tensors[format.names[f"{matrix}_scales"].format(expert)] = scales.view(torch.float8_e8m0fnu)
    for role in ("router_weight", "router_bias", "tid2eid"):
        if getattr(layer, role) is not None:
            tensors[format.names[role]] = getattr(layer, role)
    shared = format.names["shared_experts"]
    return tensors | {shared + name: tensor for name, tensor in layer.shared_experts.items()}


def _matrices(experts: Experts) -> Iterator[tuple[int, str, Tensor, Tensor]]:
    """Each expert's number and, as views, the weights and scales of its three matrices."""
    assert experts.fc1_scales is not None
    assert experts.fc2_scales is not None
    up, gate = slice(0, experts.intermediate_size), slice(experts.intermediate_size, None)
    for index in range(experts.num_experts):
        yield index, "up", experts.fc1_weights[index, up], experts.fc1_scales[index, up]
        yield index, "gate", experts.fc1_weights[index, gate], experts.fc1_scales[index, gate]
        yield index, "down", experts.fc2_weights[index], experts.fc2_scales[index]


DEEPSEEK_V4 = CheckpointFormat(
    name="deepseek_v4",
    pattern=re.compile(rf"((?:model\.)?layers\.{NUMBER}\.ffn\.)experts\.{NUMBER}\.w[123]\."),
    names={
        "gate_weights": "experts.{}.w1.weight",
        "gate_scales": "experts.{}.w1.scale",
        "up_weights": "experts.{}.w3.weight",
        "up_scales": "experts.{}.w3.scale",
        "down_weights": "experts.{}.w2.weight",
        "down_scales": "experts.{}.w2.scale",
        "router_weight": "gate.weight",
        "router_bias": "gate.bias",
        "tid2eid": "gate.tid2eid",
        "shared_experts": "shared_experts.",
    },
    closed=("experts.",),
    router="deepseek_v4",
    read=read,
    write=write,
    config_keys=CONFIG_KEYS
    | {"num_experts": ("n_routed_experts",), "intermediate_size": ("moe_intermediate_size",)},
    no_limit=0.0,
)
