"""Experts of GGUF files, in ggml's MXFP4 blocks.

A block is a UE8M0 byte and 16 bytes of codes: byte j has the code of element j in its low nibble and that of element
j + 16 in its high nibble, where everything else here has two neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mxfp4ref._choices import ScaleRule
from mxfp4ref.checkpoint.format import CheckpointFormat, Found, Storage, check_sizes
from mxfp4ref.checkpoint.gguf_file import type_of
from mxfp4ref.checkpoint.shards import CheckpointError, Shards
from mxfp4ref.formats.experts import Experts
from mxfp4ref.formats.mxfp4 import GROUP_SIZE

__all__ = ["GGML_BLOCKS"]

_BLOCK = 1 + GROUP_SIZE // 2
_GATE, _UP, _DOWN = "gate_weights", "up_weights", "down_weights"


def _find(format: CheckpointFormat, shards: Shards, prefix: str) -> Found:
    for role in (_GATE, _UP, _DOWN):
        name = prefix + format.names[role]
        if name in shards.files and (kind := type_of(shards.files[name], name)) != "MXFP4":
            raise CheckpointError(f"{shards.label(name)}: expected MXFP4, got {kind}")
    name = prefix + format.names[_GATE]
    blocks = shards.check(name, shards.read([name])[name], torch.uint8, ("E", "I", "H * 17/32"))
    count, inner, width = blocks.shape
    hidden = width // _BLOCK * GROUP_SIZE
    if width % _BLOCK:
        raise CheckpointError(
            f"{shards.label(name)}: expected MXFP4 blocks of {_BLOCK} bytes, got rows of {width}"
        )
    check_sizes(shards.label(name), count, hidden, inner)
    return Found(range(count), hidden, inner, (torch.uint8, None))


def _load(
    format: CheckpointFormat,
    shards: Shards,
    prefix: str,
    found: Found,
    ids: Sequence[int],
    rule: ScaleRule | None,
) -> Experts:
    count, hidden, inner = len(found.ids), found.hidden_size, found.intermediate_size
    weights = {_UP: (inner, hidden), _GATE: (inner, hidden), _DOWN: (hidden, inner)}
    biases = {role.replace("weights", "biases"): rows for role, (rows, _) in weights.items()}
    biases = {
        role: rows for role, rows in biases.items() if prefix + format.names.get(role, "") in shards.files
    }
    stored = shards.read([prefix + format.names[role] for role in (*weights, *biases)])
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    for role, (rows, depth) in weights.items():
        name = prefix + format.names[role]
        shape = (count, rows, depth // GROUP_SIZE * _BLOCK)
        parts[role] = unpack_blocks(shards.check(name, stored[name], torch.uint8, shape)[list(ids)])
    added = {}
    for role, rows in biases.items():
        name = prefix + format.names[role]
        added[role] = _narrow(
            shards, name, shards.check(name, stored[name], torch.float32, (count, rows))[list(ids)]
        )
    if added and len(added) != len(weights):
        raise CheckpointError(f"{prefix}*: expected biases of gate, up and down, found {', '.join(added)}")
    fc1_weights, fc1_scales = (torch.cat(pair, dim=1) for pair in zip(parts[_UP], parts[_GATE], strict=True))
    fc1_biases = torch.cat([added["up_biases"], added["gate_biases"]], dim=1) if added else None
    return Experts(fc1_weights, fc1_scales, *parts[_DOWN], fc1_biases, added.get("down_biases"))


def unpack_blocks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Packed codes `[..., K/2]` and scales `[..., K/32]` of `[..., K/32 * 17] uint8` blocks."""
    blocks = blocks.reshape(*blocks.shape[:-1], -1, _BLOCK)
    halves = blocks[..., 1:]
    codes = torch.cat([halves & 15, halves >> 4], dim=-1)
    return (codes[..., 0::2] | codes[..., 1::2] << 4).flatten(-2), blocks[..., 0].contiguous()


def _narrow(shards: Shards, name: str, values: Tensor) -> Tensor:
    narrow = values.to(torch.bfloat16)
    if not torch.equal(narrow.to(torch.float32).view(torch.int32), values.view(torch.int32)):
        raise CheckpointError(f"{shards.label(name)}: expected biases that bfloat16 can hold, got others")
    return narrow


def _dump(format: CheckpointFormat, experts: Experts) -> dict[str, Tensor]:
    raise ValueError(f"layer.format: expected a format of safetensors files to write to, got {format.name}")


GGML_BLOCKS = Storage(_find, _load, _dump)
