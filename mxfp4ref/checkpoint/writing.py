"""Layers of a checkpoint, written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mxfp4ref._files import name_in_utf8, replacing
from mxfp4ref._validate import check_choice, check_instance, no_storage, shown
from mxfp4ref.checkpoint.format import ROUTER, CheckpointFormat
from mxfp4ref.checkpoint.formats import FORMATS
from mxfp4ref.checkpoint.layer import CheckpointLayer
from mxfp4ref.checkpoint.shards import CheckpointError, Shards, open_shards
from mxfp4ref.formats.experts import Experts
from mxfp4ref.formats.resize import resize_experts

__all__ = ["open_of_others", "save", "write_layer", "writing"]


def write_layer(path: str | Path, layer: CheckpointLayer, *, format: CheckpointFormat | None = None) -> None:
    """Write a layer to one safetensors file, under the names and in the layout of its format, unpadded.

    What `read_layer` reads from a published checkpoint comes back bit for bit. The SwiGLU parameters, top_k
    and the routed scaling factor are no tensors of a checkpoint and have to be in its config.json.

    Args:
        path: the file.
        layer: as `read_layer` gives it.
        format: its format if that is none of `FORMATS` (`read_name_map`).

    Raises:
        TypeError: experts that were not read yet.
        ValueError: an unknown format, experts that are not MXFP4, a part of the experts only, padding that is not
            zero, or tensors that the format has and the layer has not, or the other way round.
        CheckpointError: the file cannot be written.
    """
    if format is None:
        check_choice("layer.format", layer.format, tuple(FORMATS))
        format = FORMATS[layer.format]
    check_instance("layer.experts", layer.experts, Experts)
    assert isinstance(layer.experts, Experts)
    if not layer.experts.quantized:
        raise ValueError("layer.experts: expected MXFP4 weights, got bfloat16")
    if layer.fused:
        raise ValueError(
            "layer.experts: expected the experts of the checkpoint, got the shared one among them"
        )
    if layer.expert_ids is not None:
        raise ValueError(
            f"layer.experts: expected all {layer.num_experts}, got those of {shown(layer.expert_ids)}"
        )
    if layer.shared_experts and not format.shared:
        raise ValueError(f"layer: expected neither tid2eid nor shared_experts in {format.name}")
    bare = resize_experts(layer.experts, layer.hidden_size, layer.intermediate_size)
    tensors = format.storage.dump(format, bare)
    for role in ROUTER:
        tensor = getattr(layer, role)
        if tensor is not None and role not in format.names:
            raise ValueError(f"layer: expected no {role} in {format.name}, got a tensor")
        if tensor is not None:
            tensors[format.names[role]] = tensor
    if "tid2eid" in format.names and layer.router_bias is None and layer.tid2eid is None:
        raise ValueError(f"layer: expected router_bias or tid2eid in {format.name}, got neither")
    tensors |= {format.shared + name: tensor for name, tensor in layer.shared_experts.items()} | dict(
        layer.others
    )
    save(path, {f"{layer.prefix}{name}": tensor.contiguous() for name, tensor in tensors.items()})


def save(path: str | Path, tensors: dict[str, Tensor], *, about: str = "") -> None:
    """Write a safetensors file, whole or not at all.

    It is written beside its place and moved there, so that tensors stay good that are mapped from a file
    of the same name.

    Args:
        path, tensors: the file and what is in it.
        about: what of this package wrote it, for `open_of_others`.

    Raises:
        CheckpointError: the file cannot be written, or a tensor has no bits of its elements to write.
    """
    for key, tensor in tensors.items():
        if kind := no_storage(tensor):
            raise CheckpointError(f"{key}: expected a tensor with dense storage, got a {kind} tensor")
    tensors = {key: tensor.resolve_neg().resolve_conj() for key, tensor in tensors.items()}
    with writing(path), replacing(Path(path)) as partial, name_in_utf8(partial) as name:
        safetensors.torch.save_file(tensors, name, {_WRITER: about} if about else None)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Inside, what says that the file cannot be written is a CheckpointError."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: expected a file that can be written, got: {error}") from None


def open_of_others(path: str | Path) -> Shards:
    """The tensors of a file or folder, as `open_shards`, that `save` was not told to be of this package.

    Raises:
        CheckpointError: as of `open_shards`; or it was: no server gave these.
    """
    shards = open_shards(path)
    for file in sorted(set(shards.files.values())):
        if by := _written_by(file):
            raise CheckpointError(
                f"{file}: expected what a server gave, got what {by} of this package wrote, as `mxfp4ref layer "
                "--output` does; `mxfp4ref compare` compares it"
            )
    return shards


def _written_by(file: Path) -> str:
    try:
        with name_in_utf8(file) as name, safe_open(name, "pt") as opened:
            return str((opened.metadata() or {}).get(_WRITER, ""))
    except (SafetensorError, OSError):  # told by whoever reads it; or GGUF
        return ""


_WRITER = "mxfp4ref"  # a key of the file's metadata
