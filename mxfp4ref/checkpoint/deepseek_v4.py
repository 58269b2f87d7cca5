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
from types import MappingProxyType

import torch
from torch import Tensor

from mxfp4ref.checkpoint.layer import NUMBER, CheckpointLayer, check_sizes, refuse_others, scale_bytes
from mxfp4ref.checkpoint.shards import CheckpointError, Shards
from mxfp4ref.formats.experts import Experts
from mxfp4ref.formats.mxfp4 import GROUP_SIZE, PACKED_DTYPES

__all__ = ["PREFIX", "read", "write"]

# What the name of an expert's tensor begins with; in it the prefix and the layer's number.
PREFIX = re.compile(rf"((?:model\.)?layers\.{NUMBER}\.ffn\.)experts\.{NUMBER}\.w[123]\.")
_PARTS, _KINDS = ("w1", "w2", "w3"), ("weight", "scale")


def read(shards: Shards, format_name: str, prefix: str, num_experts: int | None) -> CheckpointLayer:
    """Read a layer, not padded and without SwiGLU parameters.

    Args:
        shards: the checkpoint.
        format_name, prefix: as `find_layers` gives them.
        num_experts: how many there must be, None to go by the tensors.

    Raises:
        CheckpointError: a tensor is missing, unknown, unreadable, or of another dtype or shape than the
            others call for; or a scale is no power of two.
    """
    found = [match for name in shards.files if (match := PREFIX.match(name)) and match[1] == prefix]
    present = {int(match[3]) for match in found}
    count = max(present) + 1
    if num_experts not in (None, count):
        raise CheckpointError(
            f"{prefix}experts.*: expected experts 0 to {num_experts - 1}, as config.json says, found "
            f"{len(present)}, the last of them {count - 1}"
        )
    experts = [f"{prefix}experts.{expert}." for expert in range(count)]
    names = [f"{expert}{part}.{kind}" for expert in experts for part in _PARTS for kind in _KINDS]
    refuse_others(shards, f"{prefix}experts.", names)
    tensors = shards.read(names)
    router = [name for name in (f"{prefix}gate.bias", f"{prefix}gate.tid2eid") if name in shards.files]
    if len(router) != 1:
        raise CheckpointError(
            f"{prefix}gate.*: expected either a bias or a table tid2eid, found {'both' if router else 'neither'}"
        )
    shared_prefix = f"{prefix}shared_experts."
    shared = [name for name in shards.files if name.startswith(shared_prefix)]
    others = shards.read([f"{prefix}gate.weight", *router, *shared])

    name = f"{experts[0]}w1.weight"
    inner, packed = shards.check(name, tensors[name], PACKED_DTYPES, ("I", "H/2")).shape
    hidden = 2 * packed
    check_sizes(shards.label(name), count, hidden, inner)
    fc1_weights = torch.empty(count, 2 * inner, hidden // 2, dtype=torch.uint8, device="cpu")
    fc1_scales = torch.empty(count, 2 * inner, hidden // GROUP_SIZE, dtype=torch.uint8, device="cpu")
    fc2_weights = torch.empty(count, hidden, inner // 2, dtype=torch.uint8, device="cpu")
    fc2_scales = torch.empty(count, hidden, inner // GROUP_SIZE, dtype=torch.uint8, device="cpu")
    weight_dtype, scale_dtype = (tensors[f"{experts[0]}w1.{kind}"].dtype for kind in _KINDS)
    for index, expert in enumerate(experts):
        up, gate = slice(0, inner), slice(inner, None)
        for part, weights, scales in (
            ("w3", fc1_weights[index, up], fc1_scales[index, up]),
            ("w1", fc1_weights[index, gate], fc1_scales[index, gate]),
            ("w2", fc2_weights[index], fc2_scales[index]),
        ):
            name = f"{expert}{part}.weight"
            # One dtype for all experts: a mixture means that somebody converted half of them.
            stored = shards.check(name, tensors[name], weight_dtype, weights.shape)
            weights.copy_(stored.view(torch.uint8))
            name = f"{expert}{part}.scale"
            scales.copy_(scale_bytes(shards, name, tensors[name], scales.shape, scale_dtype))

    name = f"{prefix}gate.weight"
    router_weight = shards.check(name, others[name], torch.bfloat16, (count, hidden))
    router_bias = tid2eid = None
    if router[0].endswith("bias"):
        router_bias = shards.check(router[0], others[router[0]], torch.float32, (count,))
    else:
        tid2eid = shards.check(router[0], others[router[0]], (torch.int64, torch.int32), ("V", "k"))
    return CheckpointLayer(
        format_name,
        prefix,
        Experts(fc1_weights, fc1_scales, fc2_weights, fc2_scales),
        hidden,
        inner,
        router_weight,
        router_bias,
        tid2eid,
        MappingProxyType({name.removeprefix(shared_prefix): others[name] for name in shared}),
    )


def write(layer: CheckpointLayer) -> dict[str, Tensor]:
    """The tensors of an unpadded layer by the ends of their names, the inverse of `read`.

    Raises:
        ValueError: the layer has biases of the experts, or not exactly one of correction bias and table.
    """
    experts, tensors = layer.experts, {}
    if experts.fc1_biases is not None or experts.fc2_biases is not None:
        raise ValueError("layer.experts: expected no biases in deepseek_v4, got some")
    if (layer.router_bias is None) == (layer.tid2eid is None):
        raise ValueError("layer: expected exactly one of router_bias and tid2eid in deepseek_v4")
    assert experts.fc1_scales is not None
    assert experts.fc2_scales is not None
    inner = experts.intermediate_size
    for index in range(experts.num_experts):
        for part, weights, scales in (
            ("w1", experts.fc1_weights[index, inner:], experts.fc1_scales[index, inner:]),
            ("w2", experts.fc2_weights[index], experts.fc2_scales[index]),
            ("w3", experts.fc1_weights[index, :inner], experts.fc1_scales[index, :inner]),
        ):
            tensors[f"experts.{index}.{part}.weight"] = weights.view(torch.int8)
            tensors[f"experts.{index}.{part}.scale"] = scales.view(torch.float8_e8m0fnu)
    tensors["gate.weight"] = layer.router_weight
    for name, tensor in (("gate.bias", layer.router_bias), ("gate.tid2eid", layer.tid2eid)):
        if tensor is not None:
            tensors[name] = tensor
    return tensors | {f"shared_experts.{name}": tensor for name, tensor in layer.shared_experts.items()}
