"""GGUF files: their tensors, their metadata as keys of config.json, and experts in ggml's MXFP4 blocks.

A block is a UE8M0 byte and 16 bytes of codes: byte j has the code of element j in its low nibble and that of element
j + 16 in its high nibble, where everything else here has two neighbours. Read by the `gguf` package, an extra.
"""

from __future__ import annotations

import errno
import functools
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mxfp4ref._choices import ScaleRule
from mxfp4ref.checkpoint.format import CheckpointFormat, Found, Storage, check_sizes
from mxfp4ref.checkpoint.shards import CheckpointError, Shards
from mxfp4ref.formats.experts import Experts
from mxfp4ref.formats.mxfp4 import GROUP_SIZE

__all__ = ["GGML_BLOCKS", "metadata", "tensor_names", "tensors"]

_BLOCK = 1 + GROUP_SIZE // 2
_KEYS = {
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "embedding_length": "hidden_size",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
    "expert_gating_func": "scoring_func",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
    "expert_shared_count": "n_shared_experts",
    "swiglu_clamp_exp": "swiglu_limit",
    "hash_layer_count": "num_hash_layers",
}
_SCORES = {1: "softmax", 2: "sigmoid", 4: "sqrtsoftplus"}
# What says nothing about the experts, as far as its names sound like it.
_ELSEWHERE = ("expert_shared_feed_forward_length", "swiglu_clamp_shexp", "leading_dense_block_count")
_GATE, _UP, _DOWN = "gate_weights", "up_weights", "down_weights"


def tensor_names(file: Path) -> list[str]:
    """The names of a file's tensors.

    Raises:
        CheckpointError: it is no GGUF file, or the package `gguf` is not installed.
    """
    return [tensor.name for tensor in _open(file).tensors]


def tensors(file: Path, wanted: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of a file, mapped: MXFP4 and other quantised ones as uint8 blocks along the last dimension.

    Raises:
        CheckpointError: the file has no such tensor, or cannot be read.
    """
    by_name = {tensor.name: tensor for tensor in _open(file).tensors}
    found = {}
    for name in wanted:
        if name not in by_name:
            raise CheckpointError(f"{name}: expected in {file}, not there")
        tensor = by_name[name]
        if tensor.tensor_type.name == "BF16":
            found[name] = torch.from_numpy(np.array(tensor.data)).view(torch.bfloat16)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that nobody may write to it, and nobody does
                found[name] = torch.from_numpy(np.asarray(tensor.data))
    return found


def metadata(file: Path) -> dict[str, Any]:
    """What the file says of the model, by the keys of config.json.

    Raises:
        CheckpointError: it is no GGUF file, or says of the routing what no key says.
    """
    fields = _open(file).fields
    architecture = fields.get("general.architecture")
    name = "" if architecture is None else str(architecture.contents())
    values: dict[str, Any] = {"model_type": name}
    for key, field in fields.items():
        owner, _, rest = key.partition(".")
        if owner != name or rest in _ELSEWHERE:
            continue
        value = field.contents()
        if isinstance(value, list) and rest in _KEYS:
            if len(set(value)) != 1:
                raise CheckpointError(
                    f"{file}: {key}: expected the same value for all layers, got {value[:8]}"
                )
            value = value[0]
        if rest == "expert_gating_func":
            if name == "gpt-oss":  # whose router is a matter of the format
                continue
            value = _SCORES.get(value, f"number {value}")
        if rest in _KEYS:
            values[_KEYS[rest]] = value
        elif "." not in rest:
            values.setdefault(rest, value)
    return values


@functools.lru_cache(maxsize=8)
def _read(file: Path, size: int, changed: int) -> Any:
    try:
        from gguf import GGUFReader  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise CheckpointError(
            f"{file}: expected the package gguf to read it: pip install 'mxfp4ref[gguf]' ({error})"
        ) from None
    try:
        return GGUFReader(file)
    except Exception as error:  # whatever a file that is none makes of the reader
        raise CheckpointError(f"{file}: expected a GGUF file, got {type(error).__name__}: {error}") from None


def _open(file: Path) -> Any:
    try:
        if file.exists() and not file.is_file():  # a pipe would be waited for
            raise OSError(errno.EINVAL, "expected a regular file", str(file))
        status = file.stat()
    except OSError as error:
        raise CheckpointError(f"{file}: expected a GGUF file, which cannot be read: {error}") from None
    return _read(file, status.st_size, status.st_mtime_ns)


def _find(format: CheckpointFormat, shards: Shards, prefix: str) -> Found:
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
