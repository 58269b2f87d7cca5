"""Where a checkpoint's tensors lie: safetensors files, one or many, read through a memory map.

Nothing is read before it is asked for: an index names the file of every tensor, and a tensor that `read`
returns is a view of the mapped file. Safetensors and JSON hold no code, so that a hostile checkpoint can be
wrong but not run anything; names in an index cannot leave its folder.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mxfp4ref._files import name_in_utf8, parse_json, read_file
from mxfp4ref._validate import check_tensor, shown
from mxfp4ref.checkpoint import gguf_file
from mxfp4ref.checkpoint.error import CheckpointError
from mxfp4ref.formats.mxfp4 import SCALE_DTYPES
from mxfp4ref.formats.quantize import fp32_to_ue8m0

__all__ = ["CheckpointError", "Shards", "open_shards", "open_tensors", "read_json"]

INDEX = "model.safetensors.index.json"
GGUF = ".gguf"
# The last four are torch's and the library's, where a file cannot be mapped or a dtype is not known to them.
_UNREADABLE = (SafetensorError, OSError, RuntimeError, LookupError, TypeError, ValueError)


@dataclass(frozen=True)
class Shards:
    """Tensors by name, in the files that hold them.

    Attributes:
        root: the checkpoint's folder, or its only file.
        files: the file of each tensor. With an index it is the index's word, verified on reading.
    """

    root: Path
    files: Mapping[str, Path]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of these names as stored, memory-mapped; each file is opened once.

        Raises:
            CheckpointError: a name is unknown, or its file is missing, damaged or does not hold it.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            if name not in self.files:
                raise CheckpointError(f"{name}: expected in the checkpoint {self.root}, not there")
            by_file.setdefault(self.files[name], []).append(name)
        tensors: dict[str, Tensor] = {}
        for file, wanted in by_file.items():
            tensors |= _read_file(file, wanted)
        return tensors

    def label(self, name: str) -> str:
        """The tensor's name and file, as error messages begin."""
        return f"{name} ({self.files[name].name})"

    def check(
        self,
        name: str,
        tensor: Tensor,
        dtype: torch.dtype | Sequence[torch.dtype],
        shape: Sequence[int | str],
    ) -> Tensor:
        """Return the tensor if it has one of the dtypes and the shape, as `check_tensor`.

        Raises:
            CheckpointError: it has not.
        """
        try:
            return check_tensor(self.label(name), tensor, dtype=dtype, shape=shape)
        except (TypeError, ValueError) as error:
            raise CheckpointError(str(error)) from None

    def check_scales(self, name: str, scales: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """Return stored scales if they can be UE8M0 bytes.

        Args:
            name, scales: as for `check`.
            dtype: what all scales of the layer have: uint8, float8_e8m0fnu, or float32.
            shape: what the weights call for.

        Raises:
            CheckpointError: another dtype or shape.
        """
        allowed = (*SCALE_DTYPES, torch.float32)
        return self.check(name, scales, dtype if dtype in allowed else allowed, shape)

    def to_bytes(self, name: str, scales: Tensor) -> Tensor:
        """Scales that `check_scales` let pass as UE8M0 bytes, exactly or not at all.

        Raises:
            CheckpointError: a float32 scale is no power of two.
        """
        if scales.dtype != torch.float32:
            return scales.view(torch.uint8)
        try:
            return fp32_to_ue8m0(scales)
        except ValueError as error:
            raise CheckpointError(f"{self.label(name)}: {str(error).removeprefix('values: ')}") from None

    def scale_bytes(self, name: str, scales: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """`check_scales`, then `to_bytes`."""
        return self.to_bytes(name, self.check_scales(name, scales, dtype, shape))


def open_shards(checkpoint: str | Path) -> Shards:
    """Find the tensors of a checkpoint.

    Args:
        checkpoint: a folder with `model.safetensors.index.json` or, without one, any `*.safetensors` files
            (`model.safetensors`, or the numbered files of OpenAI's original format) or `*.gguf` files; or one file.

    Raises:
        CheckpointError: there is no such thing, the index is malformed or points out of the folder, or two
            files hold a tensor of the same name.
    """
    root = Path(checkpoint)
    if os.path.lexists(root / INDEX):
        return Shards(root, _read_index(root / INDEX))
    is_file = os.path.lexists(root) and not root.is_dir()
    found = [root] if is_file else sorted(root.glob("*.safetensors")) or sorted(root.glob(f"*{GGUF}"))
    if not found:
        raise CheckpointError(f"{root}: expected {INDEX} or a *.safetensors or *.gguf file there, found none")
    files: dict[str, Path] = {}
    for file in found:
        for name in _names(file):
            if name in files:
                raise CheckpointError(f"{name}: expected in one file, is in {files[name]} and {file}")
            files[name] = file
    return Shards(root, files)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: it cannot be read or is no JSON object.
    """
    try:
        value = parse_json(read_file(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected a JSON file, got {type(error).__name__}: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _read_index(index: Path) -> dict[str, Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{index}: expected an object "weight_map" that names the file of each tensor')
    for name, file in weight_map.items():
        # A bare name, on Windows too. It may be a symbolic link: download caches are made of them.
        if not isinstance(file, str) or not file.endswith(".safetensors") or set(file) & set("/\\:\0"):
            raise CheckpointError(
                f"{index}: {name}: expected the name of a .safetensors file beside it, got {shown(file)}"
            )
    return {name: index.parent / file for name, file in weight_map.items()}


@contextmanager
def open_tensors(file: Path) -> Iterator[Any]:
    """A safetensors file, as its library opens it, which says of each that cannot be read that it is not there."""
    if file.exists() and not file.is_file():  # a pipe would be waited for
        raise OSError(errno.EINVAL, "expected a regular file", str(file))
    os.close(os.open(file, os.O_RDONLY))
    with name_in_utf8(file) as name, safe_open(name, framework="pt") as reader:
        yield reader


def _names(file: Path) -> list[str]:
    if file.suffix == GGUF:
        return gguf_file.tensor_names(file)
    try:
        with open_tensors(file) as reader:
            return list(reader.keys())
    except _UNREADABLE as error:
        raise CheckpointError(f"{file}: expected a safetensors file, got: {error}") from None


def _read_file(file: Path, wanted: Sequence[str]) -> dict[str, Tensor]:
    if file.suffix == GGUF:
        return gguf_file.tensors(file, wanted)
    tensors = {}
    name = wanted[0]
    try:
        with open_tensors(file) as reader:
            present = set(reader.keys())
            for name in wanted:
                if name not in present:
                    raise CheckpointError(f"{name}: expected in {file}, where the index puts it, not there")
                tensors[name] = reader.get_tensor(name)
    except CheckpointError:
        raise
    except _UNREADABLE as error:
        raise CheckpointError(f"{name}: expected in {file}, which cannot be read: {error}") from None
    return tensors
