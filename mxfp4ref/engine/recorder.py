"""A recorder for Python scripts whose flashinfer has none, or one that leaves out lists: before 0.6.12.

It writes the folders that flashinfer's own recorder writes (`mxfp4ref.engine.recordings`), always as safetensors.
"""

from __future__ import annotations

import enum
import functools
import importlib
import json
import os
import runpy
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from mxfp4ref._files import read_file, replacing, write_file
from mxfp4ref.engine.recordings import FUNCTIONS
from mxfp4ref.model.forward import MoeTrace

__all__ = ["Recorder", "run_script"]

_WHERE = (
    "flashinfer.fused_moe.core",
    "mxfp4ref.model.flashinfer",
)  # of the functions, in the order of `FUNCTIONS`


@dataclass
class Recorder:
    """Writes calls into a folder; use it as a context manager around the calls.

    Attributes:
        folder: where each call becomes a folder of its own; made if it is missing, and added to if it is not.
        max_calls, max_bytes: what is written at most; further calls are counted only.
        left_out: how many calls were not recorded.
        problems: why they were not, each reason once.
    """

    folder: Path
    max_calls: int = 1000
    max_bytes: int = 20 << 30
    left_out: int = 0
    problems: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._inside = threading.local()
        self._lock = threading.Lock()
        self._calls = self._bytes = 0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, recording its calls; a call that it makes of another such function is not recorded again."""

        @functools.wraps(function)
        def recorded(*arguments: Any, **named: Any) -> Any:
            if getattr(self._inside, "now", False):
                return function(*arguments, **named)
            self._inside.now = True
            try:
                call = self._begin(function, arguments, named)
                result = function(*arguments, **named)
                if call is not None:
                    self._end(call, result)
                return result
            finally:
                self._inside.now = False

        return recorded

    @contextmanager
    def recording(self) -> Iterator[Recorder]:
        """While this lasts flashinfer's function and this package's drop-in are recorded, wherever they are imported.

        flashinfer is imported if it is installed.
        """
        replaced: list[tuple[Any, str, Any]] = []
        for module_name, name in zip(_WHERE, FUNCTIONS, strict=True):
            try:
                original = getattr(importlib.import_module(module_name), name)
            except (ImportError, AttributeError, RuntimeError, OSError):
                continue  # not installed, or not for this machine
            wrapped = self.wrap(original)
            for module in list(sys.modules.values()):
                for attribute, value in list(vars(module).items()) if hasattr(module, "__dict__") else ():
                    if value is original:
                        replaced.append((module, attribute, original))
                        setattr(module, attribute, wrapped)
        try:
            yield self
        finally:
            for module, attribute, original in replaced:
                setattr(module, attribute, original)

    def _begin(
        self, function: Callable[..., Any], arguments: Sequence[Any], named: dict[str, Any]
    ) -> Path | None:
        """Write the inputs; the call's folder, or None where it is not recorded."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            self._leave_out("a CUDA graph captured it: run without graphs to record it")
            return None
        try:
            tensors: dict[str, Tensor] = {}
            values = {f"arg_{i}": value for i, value in enumerate(arguments)}
            values |= {f"kwarg_{name}": value for name, value in named.items()}
            stored = {key: _stored(key, value, tensors) for key, value in values.items()}
            size = sum(tensor.nbytes for tensor in tensors.values())
            with self._lock:
                if self._calls >= self.max_calls or self._bytes + size > self.max_bytes:
                    limits = f"{self.max_calls:,} calls or {self.max_bytes / 2**30:g} GiB"
                    self._leave_out(f"the limit of {limits} is reached")
                    return None
                self._calls += 1
                self._bytes += size
                number = self._calls
            time = datetime.now().strftime("%Y%m%d_%H%M%S_%f")[:-3]
            path = self.folder / f"{time}_pid{os.getpid()}_{function.__name__}_call{number:04d}"
            path.mkdir(parents=True)
            _save(tensors, path / "inputs.safetensors")
            metadata = {
                "function_name": function.__name__,
                "module": function.__module__,
                "call_sequence": number,
                "timestamp": time,
                "process_id": os.getpid(),
                "input_metadata": {k: v for k, v in stored.items() if k not in tensors},
                "output_metadata": {},
                "tensor_info": {"input_tensor_keys": list(tensors), "output_tensor_keys": []},
                "tensor_format": "safetensors",
                "versions": {"torch": torch.__version__, "python": sys.version} | _release(function),
                "execution_status": "inputs_saved",
                "graph_capture": False,
            }
            _append(path / "metadata.jsonl", metadata)
        except Exception as error:  # the script goes on, whatever the disk or an argument is like
            self._leave_out(f"{type(error).__name__}: {error}")
            return None
        return path

    def _end(self, path: Path, result: Any) -> None:
        """Write the output."""
        try:
            tensors: dict[str, Tensor] = {}
            if isinstance(result, MoeTrace):
                result = [result.output]
            stored = {"result": _stored("result", result, tensors)}
            _save(tensors, path / "outputs.safetensors")
            metadata = json.loads((path / "metadata.jsonl").read_text(encoding="utf-8"))
            metadata["output_metadata"] = {k: v for k, v in stored.items() if k not in tensors}
            metadata["tensor_info"]["output_tensor_keys"] = list(tensors)
            metadata["execution_status"] = "completed"
            _append(path / "metadata.jsonl", metadata)
        except Exception as error:
            self._leave_out(f"{type(error).__name__}: {error}")

    def _leave_out(self, problem: str) -> None:
        self.left_out += 1
        if problem not in self.problems:
            self.problems += (problem,)


def run_script(script: str, arguments: Sequence[str], recorder: Recorder, *, module: bool = False) -> int:
    """Run a Python script, or a module, as the main program and record its calls; its exit code.

    Raises:
        Whatever the script raises, but SystemExit.
    """
    before, path = sys.argv, list(sys.path)
    sys.argv = [script, *arguments]
    try:
        with recorder.recording():
            if module:
                sys.path.insert(0, os.getcwd())
                runpy.run_module(script, run_name="__main__", alter_sys=True)
            else:
                sys.path.insert(0, str(Path(script).resolve().parent))
                runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    finally:
        sys.argv, sys.path[:] = before, path
    return 0


def _stored(key: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    """An argument as JSON; its tensors go into `tensors`, on the CPU and none sharing memory with another."""
    if isinstance(value, Tensor):
        here = value.detach().cpu().contiguous()
        known = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
        tensors[key] = here.clone() if here.untyped_storage().data_ptr() in known else here
        about = {"shape": list(value.shape), "dtype": str(value.dtype), "stride": list(value.stride())}
        return {"type": "torch.Tensor", **about, "device": str(value.device), "tensor_key": key}
    if isinstance(value, torch.dtype):
        return {"type": "torch.dtype", "value": str(value)}
    if isinstance(value, enum.Enum):
        return {"type": "enum", "name": f"{type(value).__name__}.{value.name}", "value": value.value}
    if isinstance(value, list | tuple):
        items = [_stored(f"{key}__{i}", item, tensors) for i, item in enumerate(value)]
        return {"type": type(value).__name__, "length": len(value), "items": items, "truncated": False}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return {"type": type(value).__name__, "repr": str(value)[:1000]}


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    with replacing(path) as partial:
        safetensors.torch.save_file(tensors, partial)


def _append(path: Path, record: dict[str, Any]) -> None:
    before = read_file(path).decode() if path.exists() else ""
    write_file(path, before + json.dumps(record) + "\n")


def _release(function: Callable[..., Any]) -> dict[str, str]:
    if not function.__module__.startswith("flashinfer"):
        return {}
    try:
        return {"flashinfer": version("flashinfer-python")}
    except PackageNotFoundError:
        return {}
