"""Layers of a checkpoint, read and written; one at a time."""

from __future__ import annotations

import math
import os.path
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from mxfp4ref._files import replacing
from mxfp4ref._validate import check_choice, check_float, check_int, shown
from mxfp4ref.checkpoint.deepseek_v4 import DEEPSEEK_V4
from mxfp4ref.checkpoint.format import CheckpointFormat
from mxfp4ref.checkpoint.gpt_oss import GPT_OSS, GPT_OSS_ORIGINAL
from mxfp4ref.checkpoint.layer import CheckpointLayer
from mxfp4ref.checkpoint.shards import CheckpointError, Shards, open_shards, read_json
from mxfp4ref.formats.resize import resize_experts

__all__ = ["FORMATS", "find_layers", "read_layer", "save", "write_layer"]

FORMATS = {format.name: format for format in (DEEPSEEK_V4, GPT_OSS, GPT_OSS_ORIGINAL)}


def find_layers(shards: Shards) -> dict[int, tuple[CheckpointFormat, str]]:
    """The layers with experts, ascending: number -> (format, prefix).

    Raises:
        CheckpointError: there is none, or a layer is there under two prefixes.
    """
    layers: dict[int, tuple[CheckpointFormat, str]] = {}
    for name in shards.files:
        for format in FORMATS.values():
            if match := format.pattern.match(name):
                found = layers.setdefault(int(match[2]), (format, match[1]))
                if found != (format, match[1]):
                    raise CheckpointError(f"{name}: expected one set of experts, {found[1]}* are there too")
    if not layers:
        raise CheckpointError(
            f"{shards.root}: expected experts in the naming of {', '.join(FORMATS)}, found none among "
            f"{len(shards.files)} tensors: {', '.join(sorted(shards.files)[:3])}, ..."
        )
    return dict(sorted(layers.items()))


def read_layer(
    checkpoint: str | Path,
    layer: int,
    *,
    alpha: float | None = None,
    beta: float | None = None,
    limit: float | None = None,
    multiple: int = 128,
) -> CheckpointLayer:
    """Read one layer of a checkpoint; other layers are not touched.

    Args:
        checkpoint: a folder with safetensors files, an index and a config.json; or one safetensors file.
        layer: its number in the tensors' names.
        alpha, beta, limit: the SwiGLU parameters of every expert. By default DeepSeek-V4 has a limit only,
            `swiglu_limit` of config.json (0 is none, as in its own code; so is an argument of inf), and
            gpt-oss has 1.702, 1 and `swiglu_limit`.
        multiple: pad H and I, each half of fc1 by itself, to a multiple of this: 128 is what the kernel
            takes. 32 leaves every published model as it is.

    Raises:
        TypeError, ValueError: an argument is wrong, or there is no such layer.
        CheckpointError: a file or a tensor is missing, damaged or not as expected, or config.json does not
            say what was not given.
    """
    check_int("layer", layer, minimum=0)
    check_int("multiple", multiple, minimum=1)
    shards = open_shards(checkpoint)
    layers = find_layers(shards)
    if layer not in layers:
        raise ValueError(f"layer: expected one of {_ranges(list(layers))} in {shards.root}, got {layer}")
    format, prefix = layers[layer]
    config = _read_config(shards.root)

    def setting(role: str, kind: type) -> Any:
        return _setting(config, kind, format.config_keys[role])

    found = format.read(format, shards, prefix, setting("num_experts", int))
    for role in ("hidden_size", "intermediate_size"):
        size, configured = getattr(found, role), setting(role, int)
        if configured not in (None, size):
            keys = " or ".join(format.config_keys[role])
            raise CheckpointError(f"{prefix}*: expected {keys}={configured} of config.json, got {size}")
    if limit is None:
        limit = setting("limit", float)
        if limit is None:
            keys = " or ".join(format.config_keys["limit"])
            raise CheckpointError(f"config.json in {shards.root}: expected {keys}, or an argument limit")
        limit = math.inf if limit == format.no_limit else limit
    count = found.experts.num_experts
    experts = replace(
        found.experts,
        swiglu_alpha=_per_expert("alpha", format.alpha if alpha is None else alpha, count),
        swiglu_beta=_per_expert("beta", format.beta if beta is None else beta, count),
        swiglu_limit=_per_expert("limit", limit, count),
    )
    hidden, inner = (size + -size % multiple for size in (found.hidden_size, found.intermediate_size))
    return replace(
        found,
        experts=resize_experts(experts, hidden, inner),
        top_k=setting("top_k", int),
        routed_scaling_factor=setting("routed_scaling_factor", float),
    )


def write_layer(path: str | Path, layer: CheckpointLayer) -> None:
    """Write a layer to one safetensors file, under the names and in the layout of its format, unpadded.

    What `read_layer` reads from a published checkpoint comes back bit for bit. The SwiGLU parameters, top_k
    and the routed scaling factor are no tensors of a checkpoint and have to be in its config.json.

    Raises:
        ValueError: an unknown format, experts that are not MXFP4, padding that is not zero, or tensors that
            the format has and the layer has not, or the other way round.
        CheckpointError: the file cannot be written.
    """
    check_choice("layer.format", layer.format, tuple(FORMATS))
    if not layer.experts.quantized:
        raise ValueError("layer.experts: expected MXFP4 weights, got bfloat16")
    bare = resize_experts(layer.experts, layer.hidden_size, layer.intermediate_size)
    format = FORMATS[layer.format]
    tensors = format.write(format, replace(layer, experts=bare))
    save(path, {f"{layer.prefix}{name}": tensor.contiguous() for name, tensor in tensors.items()})


def save(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file, whole or not at all.

    It is written beside its place and moved there, so that tensors stay good that are mapped from a file
    of the same name.

    Raises:
        CheckpointError: the file cannot be written.
    """
    try:
        with replacing(Path(path)) as partial:
            safetensors.torch.save_file(tensors, partial)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: expected a file that can be written, got: {error}") from None


def _read_config(root: Path) -> dict[str, Any]:
    path = (root if root.is_dir() else root.parent) / "config.json"
    return read_json(path) if os.path.lexists(path) else {}


def _setting(config: Mapping[str, Any], kind: type, names: Sequence[str]) -> Any:
    """The first of the names that config.json has, None if it has none."""
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if kind is int and type(value) is not int:
            raise CheckpointError(f"config.json: {name}: expected int, got {shown(value)}")
        try:
            check_float(name, value)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"config.json: {error}") from None
        return value
    return None


def _per_expert(name: str, value: float | None, num_experts: int) -> Tensor | None:
    if value is None or (name == "limit" and value == math.inf):
        return None
    check_float(name, value)
    if name == "limit" and value <= 0:
        raise ValueError(f"{name}: expected a positive float32 number, got {value}")
    return torch.full((num_experts,), value, dtype=torch.float32, device="cpu")


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers in words, as "0 to 2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join(" to ".join(map(str, run)) for run in runs)
