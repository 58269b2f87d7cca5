"""Folders as flashinfer's recorder writes them, without flashinfer.

Held against what the recorder of flashinfer 0.7.2.post1 (`flashinfer/api_logging.py`) wrote for the same arguments:
names of files, keys of tensors and every field of metadata.jsonl that is written here; eager and in a graph, in both
formats.
"""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from mxfp4ref.model.call import MoeCall
from tests.helpers.drop_in import arguments_of

TIME = "20261127_101500_123"


def write_call(
    root: Path,
    call: MoeCall | dict[str, Any],
    output: Tensor | None,
    *,
    positional: tuple[str, ...] = (),
    pid: int = 7,
    number: int = 1,
    form: str = "safetensors",
    release: str = "0.7.2.post1",
) -> Path:
    """A call that was made without a graph; without an output it did not return."""
    arguments = arguments_of(call) if isinstance(call, MoeCall) else call
    path = root / f"{TIME}_pid{pid}_cutlass_fused_moe_call{number:04d}"
    path.mkdir(parents=True)
    _write(path, arguments, output, positional, form, _metadata(number, pid, release, graph=False))
    return path


def write_flushes(
    root: Path,
    calls: list[tuple[MoeCall, Tensor]],
    *,
    pid: int = 7,
    number: int = 1,
    form: str = "safetensors",
) -> Path:
    """A call in a CUDA graph: what its buffers held after each replay. Without any, it was captured only."""
    path = root / f"{TIME}_pid{pid}_cutlass_fused_moe_call{number:04d}"
    path.mkdir(parents=True)
    metadata = _metadata(number, pid, "0.7.2.post1", graph=True)
    if not calls:
        (path / "metadata.jsonl").write_text(json.dumps(metadata) + "\n", encoding="utf-8")
    for index, (call, output) in enumerate(calls, 1):
        flush = path / "graph_flushes" / f"flush_{index:04d}"
        flush.mkdir(parents=True)
        told = metadata | {"graph_capture_flushed": True, "graph_capture_flush_index": index}
        for folder in (path, flush):
            _write(folder, arguments_of(call), output, (), form, told)
    return path


def _write(
    path: Path,
    arguments: dict[str, Any],
    output: Tensor | None,
    positional: tuple[str, ...],
    form: str,
    metadata: dict[str, Any],
) -> None:
    named = {name: value for name, value in arguments.items() if name not in positional}
    keyed = {f"arg_{i}": arguments[name] for i, name in enumerate(positional)}
    keyed |= {f"kwarg_{name}": value for name, value in named.items()}
    tensors: dict[str, Tensor] = {}
    # Tensors that are arguments themselves are told by their file alone.
    values = {key: _value(value, key, tensors) for key, value in keyed.items()}
    values = {key: value for key, value in values.items() if not isinstance(keyed[key], Tensor)}
    _save(tensors, path / "inputs", form)
    metadata = metadata | {"input_metadata": values, "output_metadata": {}}
    lines = [json.dumps(metadata)]
    if output is not None:
        outputs: dict[str, Tensor] = {}
        result = _value([output], "result", outputs)
        _save(outputs, path / "outputs", form)
        lines.append(
            json.dumps(metadata | {"output_metadata": {"result": result}, "execution_status": "completed"})
        )
    (path / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _metadata(number: int, pid: int, release: str, *, graph: bool) -> dict[str, Any]:
    return {
        "function_name": "cutlass_fused_moe",
        "module": "flashinfer.fused_moe.core",
        "call_sequence": number,
        "timestamp": TIME,
        "process_id": pid,
        "input_metadata": {},
        "versions": {"flashinfer": release},
        "execution_status": "graph_capture_pending_flush" if graph else "inputs_saved",
        "graph_capture": graph,
    }


def _value(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[key] = value
        return {
            "type": "torch.Tensor",
            "shape": list(value.shape),
            "dtype": str(value.dtype),
            "stride": list(value.stride()),
            "device": str(value.device),
            "requires_grad": value.requires_grad,
            "is_contiguous": value.is_contiguous(),
            "tensor_key": key,
        }
    if isinstance(value, torch.dtype):
        return {"type": "torch.dtype", "value": str(value)}
    if isinstance(value, enum.Enum):
        return {"type": "enum", "name": f"{type(value).__name__}.{value.name}", "value": value.value}
    if isinstance(value, list):
        items = [_value(item, f"{key}__{i}", tensors) for i, item in enumerate(value)]
        return {"type": "list", "length": len(value), "items": items, "truncated": False}
    return value


def _save(tensors: dict[str, Tensor], path: Path, form: str) -> None:
    if form == "pt":
        torch.save(tensors, path.with_suffix(".pt"))
    else:
        owned = {name: tensor.clone() for name, tensor in tensors.items()}
        safetensors.torch.save_file(owned, path.with_suffix(".safetensors"))
