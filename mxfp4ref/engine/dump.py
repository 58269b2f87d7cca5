"""A call as files, in the form in which flashinfer's own recorder writes calls."""

from __future__ import annotations

import enum
import json
import os
import shutil
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from mxfp4ref._files import replacing, write_file
from mxfp4ref.engine.arguments import loaded_release
from mxfp4ref.engine.counting import rank
from mxfp4ref.engine.install import FUNCTION, MODULE

__all__ = ["write_call"]

_LEFT_OUT = ("output", "workspace_buffer")  # written by the kernel, not read; the workspace takes gigabytes


def write_call(folder: Path, number: int, given: Mapping[str, Any], output: Tensor, expected: Tensor) -> Path:
    """Write a call's arguments, the kernel's output and the expected one; returns the new folder in `folder`.

    It has `inputs.safetensors`, `outputs.safetensors` and `metadata.jsonl` as flashinfer 0.7.2.post1 writes them for
    a call by keywords with `FLASHINFER_DUMP_SAFETENSORS=1`, and `expected.safetensors`. It gets its name when it is
    complete. Ranks have folders of their own.

    Raises:
        OSError: it cannot be written.
    """
    who = rank()
    time = datetime.now().strftime("%Y%m%d_%H%M%S_%f")[:-3]
    folder = folder if who is None else folder / f"rank{who}"
    name = f"{time}_pid{os.getpid()}_{FUNCTION}_call{number:04d}"
    tensors: dict[str, Tensor] = {}
    values = {
        f"kwarg_{key}": _described(value, f"kwarg_{key}", tensors)
        for key, value in given.items()
        if key not in _LEFT_OUT
    }
    outputs: dict[str, Tensor] = {}
    result = _described([output], "result", outputs)
    metadata = {
        "function_name": FUNCTION,
        "module": MODULE,
        "call_sequence": number,
        "timestamp": time,
        "process_id": os.getpid(),
        # Tensors that are arguments themselves, and not in a list, are in the file alone.
        "input_metadata": {key: value for key, value in values.items() if key not in tensors},
        "output_metadata": {"result": result},
        "tensor_info": {"input_tensor_keys": list(tensors), "output_tensor_keys": list(outputs)},
        "tensor_details": {key: _details(tensor) for key, tensor in (tensors | outputs).items()},
        "tensor_format": "safetensors",
        "versions": {"torch": torch.__version__, "flashinfer": loaded_release()},
        "execution_status": "completed",
        "graph_capture": False,
    }
    final, temporary = folder / name, folder / f".writing-{name}"
    temporary.mkdir(parents=True)
    try:
        _save(tensors, temporary / "inputs.safetensors")
        _save(outputs, temporary / "outputs.safetensors")
        _save({"result__0": expected}, temporary / "expected.safetensors")
        write_file(temporary / "metadata.jsonl", json.dumps(metadata) + "\n")
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _described(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON; its tensors go into `tensors`."""
    if isinstance(value, Tensor):
        tensors[key] = value
        return {"type": "torch.Tensor", "tensor_key": key, **_details(value)}
    if isinstance(value, (list, tuple)):
        items = [_described(item, f"{key}__{number}", tensors) for number, item in enumerate(value)]
        return {"type": type(value).__name__, "length": len(value), "items": items, "truncated": False}
    if isinstance(value, torch.dtype):
        return {"type": "torch.dtype", "value": str(value)}
    if isinstance(value, enum.Enum):
        return {"type": "enum", "name": f"{type(value).__name__}.{value.name}", "value": value.value}
    return value


def _details(tensor: Tensor) -> dict[str, Any]:
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype),
        "stride": list(tensor.stride()),
        "device": str(tensor.device),
    }


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    # Each with storage of its own, which is what the format has room for.
    owned = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    with replacing(path) as partial:
        safetensors.torch.save_file(owned, partial)
