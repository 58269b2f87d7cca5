"""A call as files, in the form in which flashinfer's own recorder writes calls, always as safetensors."""

from __future__ import annotations

import enum
import json
import os
import shutil
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from mxfp4ref._files import name_in_utf8, read_file, replacing, write_file
from mxfp4ref._validate import no_storage
from mxfp4ref.engine.arguments import loaded_release
from mxfp4ref.engine.counting import rank
from mxfp4ref.engine.install import FUNCTION, MODULE
from mxfp4ref.sm90.tactics import Sm90Kernel

__all__ = ["Stored", "write_call", "write_inputs", "write_outputs"]

_LEFT_OUT = ("output", "workspace_buffer")  # written by the kernel, not read; the workspace takes gigabytes


@dataclass(frozen=True)
class Stored:
    """Values by key as JSON, and their tensors, on the CPU and none sharing memory with another.

    Attributes:
        values: of the values that are not tensors; a tensor is told by its file alone.
        details: form and place of each tensor, as it was.
    """

    values: dict[str, Any]
    tensors: dict[str, Tensor]
    details: dict[str, Any]

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Stored:
        stored = cls({}, {}, {})
        values = {key: stored._add(key, value) for key, value in given.items()}
        stored.values.update({key: value for key, value in values.items() if key not in stored.tensors})
        return stored

    def _add(self, key: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            if kind := no_storage(value):
                raise ValueError(f"{key}: expected a tensor with dense storage, got a {kind} tensor")
            here = value.detach().resolve_neg().resolve_conj().cpu().contiguous()
            known = {tensor.untyped_storage().data_ptr() for tensor in self.tensors.values()}
            self.tensors[key] = here.clone() if here.untyped_storage().data_ptr() in known else here
            shape, stride = list(value.shape), list(value.stride())
            about = {"shape": shape, "dtype": str(value.dtype), "stride": stride, "device": str(value.device)}
            self.details[key] = about
            return {"type": "torch.Tensor", "tensor_key": key, **about}
        if isinstance(value, torch.dtype):
            return {"type": "torch.dtype", "value": str(value)}
        if isinstance(value, enum.Enum):
            return {"type": "enum", "name": f"{type(value).__name__}.{value.name}", "value": value.value}
        if isinstance(value, Sm90Kernel):  # an argument that flashinfer does not have
            tactics = {f.name: vars(getattr(value, f.name)) for f in fields(value) if f.name != "generation"}
            return {"type": "Sm90Kernel", **tactics, "generation": value.generation.name}
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            items = [self._add(f"{key}__{i}", item) for i, item in enumerate(value)]
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {"type": kind, "length": len(value), "items": items, "truncated": False}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        return {"type": type(value).__name__, "repr": str(value)[:1000]}


def write_inputs(
    folder: Path, function: str, module: str, number: int, inputs: Stored, recorder: str = ""
) -> Path:
    """Write a call's arguments, by `arg_0` or `kwarg_input`; returns the call's new folder in `folder`.

    It has `inputs.safetensors` and `metadata.jsonl` as flashinfer 0.7.2.post1 writes them with
    `FLASHINFER_DUMP_SAFETENSORS=1`; `recorder` tells it from those that others write meanwhile.

    Raises:
        OSError: it cannot be written.
    """
    time = datetime.now().strftime("%Y%m%d_%H%M%S_%f")[:-3]
    path = folder / f"{time}_pid{os.getpid()}_{function}_call{number:04d}"
    path.mkdir(parents=True)
    try:
        _save(inputs.tensors, path / "inputs.safetensors")
        release = loaded_release() if module.startswith("flashinfer") else ""
        metadata = {
            "function_name": function,
            "module": module,
            "call_sequence": number,
            "timestamp": time,
            "process_id": os.getpid(),
            "input_metadata": inputs.values,
            "output_metadata": {},
            "tensor_info": {"input_tensor_keys": list(inputs.tensors), "output_tensor_keys": []},
            "tensor_details": inputs.details,
            "tensor_format": "safetensors",
            "versions": {"torch": torch.__version__, "python": sys.version}
            | ({"flashinfer": release} if release else {}),
            "execution_status": "inputs_saved",
            "graph_capture": False,
        } | ({"recorder": recorder} if recorder else {})
        write_file(path / "metadata.jsonl", json.dumps(metadata) + "\n")
    except BaseException:  # half of a call is none
        shutil.rmtree(path, ignore_errors=True)
        raise
    return path


def write_outputs(path: Path, result: Any) -> None:
    """Add what the call returned to the folder of its inputs.

    Raises:
        OSError: it cannot be written.
    """
    outputs = Stored.of({"result": result})
    _save(outputs.tensors, path / "outputs.safetensors")
    before = read_file(path / "metadata.jsonl").decode()
    metadata = json.loads(before)
    metadata["output_metadata"] = outputs.values
    metadata["tensor_info"]["output_tensor_keys"] = list(outputs.tensors)
    metadata["tensor_details"] |= outputs.details
    metadata["execution_status"] = "completed"
    write_file(path / "metadata.jsonl", before + json.dumps(metadata) + "\n")


def write_call(folder: Path, number: int, given: Mapping[str, Any], output: Tensor, expected: Tensor) -> Path:
    """Write a call of flashinfer's, the kernel's output and, in `expected.safetensors`, the right one.

    It gets its name when it is complete. Ranks have folders of their own.

    Returns:
        The call's new folder.

    Raises:
        OSError: it cannot be written.
    """
    who = rank()
    folder = folder if who is None else folder / f"rank{who}"
    inputs = Stored.of({f"kwarg_{key}": value for key, value in given.items() if key not in _LEFT_OUT})
    temporary = folder / f".writing-{uuid.uuid4().hex}"
    try:
        path = write_inputs(temporary, FUNCTION, MODULE, number, inputs)
        write_outputs(path, [output])
        _save(Stored.of({"result": [expected]}).tensors, path / "expected.safetensors")
        return path.rename(folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        with replacing(path) as partial, name_in_utf8(partial) as name:
            safetensors.torch.save_file(tensors, name)
    except SafetensorError as error:
        raise OSError(f"{path.name} cannot be written: {error}") from error
