"""GGUF files: their tensors, and their metadata as keys of config.json. Read by the `gguf` package, an extra."""

from __future__ import annotations

import errno
import functools
import itertools
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mxfp4ref.checkpoint.error import CheckpointError

__all__ = ["metadata", "tensor_names", "tensors", "type_of"]

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


def tensor_names(file: Path) -> list[str]:
    """The names of a file's tensors.

    Raises:
        CheckpointError: it is no GGUF file, or the package `gguf` is not installed.
    """
    return [tensor.name for tensor in _open(file).tensors]


def type_of(file: Path, name: str) -> str:
    """ggml's name for the type of one of a file's tensors, as "MXFP4" or "Q8_0".

    Raises:
        CheckpointError: the file has no such tensor, or cannot be read.
    """
    return str(_find(file, name).tensor_type.name)


def tensors(file: Path, wanted: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of a file, mapped: MXFP4 and other quantised ones as uint8 blocks along the last dimension.

    Raises:
        CheckpointError: the file has no such tensor, or cannot be read.
    """
    found = {}
    for name in wanted:
        tensor = _find(file, name)
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
    name = "" if architecture is None else str(_contents(file, architecture))
    values: dict[str, Any] = {"model_type": name}
    for key, field in fields.items():
        owner, _, rest = key.partition(".")
        if owner != name or rest in _ELSEWHERE:
            continue
        value = _contents(file, field)
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


def _contents(file: Path, field: Any) -> Any:
    try:
        return field.contents()
    except ValueError as error:  # text that is not UTF-8
        raise CheckpointError(
            f"{file}: {field.name}: expected a value that can be read, got: {error}"
        ) from None


def _find(file: Path, name: str) -> Any:
    tensor = next((tensor for tensor in _open(file).tensors if tensor.name == name), None)
    if tensor is None:
        raise CheckpointError(f"{name}: expected in {file}, not there")
    return tensor


@functools.lru_cache(maxsize=8)
def _read(file: Path, size: int, changed: int) -> Any:
    try:
        from gguf import GGUFReader  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise CheckpointError(
            f"{file}: expected the package gguf to read it: pip install 'mxfp4ref[gguf]' ({error})"
        ) from None

    class Whole(GGUFReader):  # type: ignore[misc, unused-ignore]
        """What the header counts has to be there: without that an array of 2^60 is read for as many steps."""

        def _get(self, offset: int, dtype: Any, count: int = 1, *order: Any, **named: Any) -> Any:
            found = super()._get(offset, dtype, count, *order, **named)
            if offset < 0 or len(found) < int(count):
                raise ValueError(f"it ends before what it says is at {offset:,}")
            return found

    try:
        with np.errstate(over="raise"):  # of offsets
            reader = Whole(file)
    except Exception as error:  # whatever a file that is none makes of the reader
        raise CheckpointError(f"{file}: expected a GGUF file, got {type(error).__name__}: {error}") from None
    ordered = sorted(reader.tensors, key=lambda tensor: tensor.data_offset)
    for one, other in itertools.pairwise(ordered):
        if one.data_offset + one.n_bytes > other.data_offset:
            raise CheckpointError(
                f"{file}: expected tensors beside each other, {other.name} lies in {one.name}"
            )
    return reader


def _open(file: Path) -> Any:
    try:
        if file.exists() and not file.is_file():  # a pipe would be waited for
            raise OSError(errno.EINVAL, "expected a regular file", str(file))
        status = file.stat()
    except OSError as error:
        raise CheckpointError(f"{file}: expected a GGUF file, which cannot be read: {error}") from None
    return _read(file, status.st_size, status.st_mtime_ns)
