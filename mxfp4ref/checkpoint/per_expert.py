"""Experts with three matrices of their own, gate, up and down, each with its scales.

The low nibble of a byte is the even index along K, as everywhere in this package. Weights are `[N, K/2]` int8 or
uint8, scales `[N, K/32]` float8_e8m0fnu, uint8, or float32 as long as each is a power of two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mxfp4ref._choices import ScaleRule
from mxfp4ref.checkpoint.format import CheckpointFormat, Found, Storage, check_sizes
from mxfp4ref.checkpoint.shards import Shards
from mxfp4ref.formats.experts import Experts
from mxfp4ref.formats.mxfp4 import GROUP_SIZE, PACKED_DTYPES

__all__ = ["PER_EXPERT", "names_of"]

_MATRICES = ("gate", "up", "down")


def names_of(format: CheckpointFormat, expert: int) -> dict[str, str]:
    """The ends of the names of an expert's tensors, by role."""
    roles = [f"{matrix}_{kind}" for matrix in _MATRICES for kind in ("weights", "scales")]
    return {role: format.names[role].replace("{expert}", str(expert)) for role in roles}


def _find(format: CheckpointFormat, shards: Shards, prefix: str) -> Found:
    ids = tuple(format.experts_of(shards, prefix))
    weights, scales = (prefix + names_of(format, ids[0])[f"gate_{kind}"] for kind in ("weights", "scales"))
    first = shards.read([weights])[weights]
    inner, packed = shards.check(weights, first, PACKED_DTYPES, ("I", "H/2")).shape
    check_sizes(shards.label(weights), len(ids), 2 * packed, inner)
    return Found(ids, 2 * packed, inner, (first.dtype, shards.read([scales])[scales].dtype))


def _load(
    format: CheckpointFormat,
    shards: Shards,
    prefix: str,
    found: Found,
    ids: Sequence[int],
    rule: ScaleRule | None,
) -> Experts:
    names = [{role: prefix + name for role, name in names_of(format, expert).items()} for expert in ids]
    tensors = shards.read([name for of_expert in names for name in of_expert.values()])
    hidden, inner = found.hidden_size, found.intermediate_size
    shapes = (
        (2 * inner, hidden // 2),
        (2 * inner, hidden // GROUP_SIZE),
        (hidden, inner // 2),
        (hidden, inner // GROUP_SIZE),
    )
    experts = Experts(*(torch.empty(len(ids), *shape, dtype=torch.uint8, device="cpu") for shape in shapes))
    # One dtype for all experts: a mixture means that somebody converted half of them.
    weight_dtype, scale_dtype = found.dtypes
    assert scale_dtype is not None
    for index, matrix, weights, scales in _matrices(experts):
        name = names[index][f"{matrix}_weights"]
        weights.copy_(shards.check(name, tensors[name], weight_dtype, weights.shape).view(torch.uint8))
        name = names[index][f"{matrix}_scales"]
        scales.copy_(shards.scale_bytes(name, tensors[name], scale_dtype, scales.shape))
    return experts


def _dump(format: CheckpointFormat, experts: Experts) -> dict[str, Tensor]:
    if experts.fc1_biases is not None or experts.fc2_biases is not None:
        raise ValueError(f"layer.experts: expected no biases in {format.name}, got some")
    weight_dtype, scale_dtype = format.dtypes
    tensors = {}
    for index, matrix, weights, scales in _matrices(experts):
        names = names_of(format, index)
        tensors[names[f"{matrix}_weights"]] = weights.view(weight_dtype)
        tensors[names[f"{matrix}_scales"]] = scales.view(scale_dtype)
    return tensors


def _matrices(experts: Experts) -> Iterator[tuple[int, str, Tensor, Tensor]]:
    """Each expert's number and, as views, the weights and scales of its three matrices."""
    assert experts.fc1_scales is not None
    assert experts.fc2_scales is not None
    up, gate = slice(0, experts.intermediate_size), slice(experts.intermediate_size, None)
    for index in range(experts.num_experts):
        yield index, "up", experts.fc1_weights[index, up], experts.fc1_scales[index, up]
        yield index, "gate", experts.fc1_weights[index, gate], experts.fc1_scales[index, gate]
        yield index, "down", experts.fc2_weights[index], experts.fc2_scales[index]


PER_EXPERT = Storage(_find, _load, _dump)
