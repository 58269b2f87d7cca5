"""Calls on disk as flashinfer's recorder writes them (`FLASHINFER_LOGLEVEL=10`), read without flashinfer.

A call is a folder, named by time, process, function and number: 20261127_101500_123_pid7_cutlass_fused_moe_call0001.
It holds

    metadata.jsonl                      a JSON object a line, the last one being the latest state
    inputs.safetensors or inputs.pt     tensors `arg_0`, `kwarg_input`, ..., in lists `kwarg_quant_scales__0`
    outputs.safetensors or outputs.pt   `result`, or `result__0` of a list
    graph_flushes/flush_0001/           the same files again: the buffers after each replay of a CUDA graph

Inputs are written before the call, outputs after it, so that a process that dies leaves the former. In a CUDA graph
both are read after the *whole graph* has run, and once more when the process ends. Read in the source of 0.7.2.post1;
0.6.12 to 0.6.17 write the same. Before 0.6.12 tensors in lists, such as `quant_scales`, are not kept.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxfp4ref._files import folders_below, name_in_utf8, parse_json, read_file
from mxfp4ref._validate import no_storage
from mxfp4ref._words import listed
from mxfp4ref.checkpoint.shards import open_tensors
from mxfp4ref.formats.generations import generation_named
from mxfp4ref.sm90.tactics import Sm90Kernel, Tactic

__all__ = ["FLUSHES", "FUNCTIONS", "Incomplete", "Recording", "Unreadable", "find_recordings"]

FUNCTIONS = ("cutlass_fused_moe", "torch_ref_cutlass_fused_moe")
FLUSHES = "graph_flushes"
_FOLDER = re.compile(
    r"(?P<time>\d{8}_\d{6}_\d{3})_pid(?P<pid>\d{1,20})_(?P<function>.+)_call(?P<number>\d+)", re.ASCII
)
_NUMBERED = re.compile(r"arg_\d{1,3}", re.ASCII)
_NOT_KEPT = (
    "flashinfer's recorder keeps tensors in lists from 0.6.12 on; `mxfp4ref record` does for older releases"
)


class Unreadable(ValueError):
    """What lies in the folder is damaged, or not what the recorder writes."""


class Incomplete(Exception):
    """The folder lacks what a comparison needs, without anything being wrong with what is there."""


@dataclass(frozen=True)
class Recording:
    """One recorded call; its tensors are read when they are asked for.

    Attributes:
        path: the folder.
        process: where it was found and which process there made it, by their ids: `process1`, `node1/process2`. Of
            another recording of the same server it has the same name.
        call: which of its calls: `call0001`, `call0002 flush_0001`; with the time where a process has two of these.
    """

    path: Path
    process: str
    call: str

    @property
    def name(self) -> str:
        return self.call if self.process == "." else f"{self.process}/{self.call}"

    def metadata(self) -> dict[str, Any]:
        """The latest state that `metadata.jsonl` tells.

        Raises:
            Unreadable: there is no such file, or no JSON object in it.
        """
        return _metadata(self.path)

    def of_this_package(self) -> bool:
        """Whether the call was one of `torch_ref_cutlass_fused_moe`, and none of flashinfer's kernel."""
        return str(self.metadata().get("module")).partition(".")[0] == "mxfp4ref"

    def in_graph(self) -> bool:
        """Whether a CUDA graph captured the call, so that its tensors were read after the whole graph."""
        return self.path.parent.name == FLUSHES or self.metadata().get("graph_capture") is True

    def returned(self) -> bool:
        """Whether the call did, so that its output was written."""
        return bool(self._files("outputs"))

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments of the call, on the CPU; files are mapped into memory, not copied.

        Raises:
            Unreadable, Incomplete: the folder does not hold them.
        """
        metadata = self.metadata()
        tensors = self._tensors("inputs", metadata)
        stored = metadata.get("input_metadata")
        if not isinstance(stored, dict):
            raise Unreadable(f"metadata.jsonl: expected an object under input_metadata, got {stored!r:.80}")
        values: dict[str, Any] = {key: _value(key, value, tensors) for key, value in stored.items()}
        if other := [key for key in tensors.keys() & stored.keys() if not _is_tensor(stored[key])]:
            key = sorted(other)[0]
            raise Unreadable(f"inputs: expected one value of {key}, got {stored[key]!r:.80} and a tensor")
        # Tensors in lists have keys such as kwarg_quant_scales__0, and are part of the list's value.
        within = {key for key in tensors if key not in values and key.partition("__")[0] in values}
        values |= {key: tensor for key, tensor in tensors.items() if key not in within}
        keywords = {k.removeprefix("kwarg_"): v for k, v in values.items() if k.startswith("kwarg_")}
        numbered = {k: v for k, v in values.items() if _NUMBERED.fullmatch(k)}
        if unknown := values.keys() - numbered.keys() - {f"kwarg_{name}" for name in keywords}:
            raise Unreadable(
                f"inputs: expected arg_0, arg_1, ... and kwarg_NAME, got {sorted(unknown)[0]!r:.80}"
            )
        positional = sorted(numbered, key=lambda key: int(key.removeprefix("arg_")))
        if positional != [f"arg_{i}" for i in range(len(positional))]:
            raise Unreadable(
                f"inputs: expected arg_0, arg_1, ... without a gap, got {', '.join(positional)[:80]}"
            )
        return [numbered[key] for key in positional], keywords

    def output(self) -> Tensor:
        """The call's output, whether it returned a tensor, a tuple or a list.

        Raises:
            Unreadable, Incomplete: the folder does not hold it.
        """
        metadata = self.metadata()
        stored = metadata.get("output_metadata")
        result = stored.get("result") if isinstance(stored, dict) else None
        if isinstance(result, dict) and "items" not in result and not self._files("outputs"):
            raise Incomplete(f"no recorded output: the call returned a list; {_NOT_KEPT}")
        tensors = self._tensors("outputs", metadata)
        for key in ("result", "result__0", "result_0"):
            if key in tensors:
                return tensors[key]
        raise Unreadable(f"outputs: expected a tensor named result, got {listed(tensors)}")

    def _files(self, kind: str) -> list[Path]:
        # The order in which flashinfer's own replay looks for them.
        return [path for suffix in _LOADERS if (path := self.path / f"{kind}.{suffix}").is_file()]

    def _tensors(self, kind: str, metadata: Mapping[str, Any]) -> dict[str, Tensor]:
        files = self._files(kind)
        if not files and kind == "inputs" and self.returned():
            raise Unreadable("no recorded inputs, which are written before the output that is there")
        if not files:
            raise Incomplete(_missing(kind, str(metadata.get("execution_status"))))
        load = _LOADERS[files[0].suffix.removeprefix(".")]
        try:
            tensors = load(files[0])
        except Exception as error:  # whatever a damaged or hostile file makes the loader raise
            what = str(error).strip().partition("\n")[0]
            raise Unreadable(
                f"{files[0].name}: cannot be read: {what or type(error).__name__:.200}"
            ) from error
        if not isinstance(tensors, dict) or not all(
            isinstance(k, str) and type(t) is Tensor and not no_storage(t) and t.device.type == "cpu"
            for k, t in tensors.items()
        ):
            raise Unreadable(f"{files[0].name}: expected tensors by name, and nothing else")
        return {key: tensor.resolve_neg() for key, tensor in tensors.items()}  # which torch.save keeps lazy


def find_recordings(root: Path) -> list[Recording]:
    """Every recorded call of the function below a folder, in the order of their names.

    Of a call in a CUDA graph each flush is one; what lies beside the flushes is the last of them once more. Links are
    followed; a call that several lead to is found once.

    Raises:
        OSError: a folder cannot be read, or a link outside of calls leads nowhere.
    """
    root = Path(os.path.abspath(root))  # "." has no name
    calls: list[Path] = []
    for path, folders, files in folders_below(root):
        if path.name != FLUSHES and _is_call(path, files):
            calls.append(path)
        links = files if calls[-1:] != [path] else [name for name in files if name == FLUSHES]
        for link in (path / name for name in links):
            if link.is_symlink() and not link.exists():
                raise FileNotFoundError(
                    f"{link}: expected a file or folder, got a link to {os.readlink(link)}"
                )
        if path.parent.name == FLUSHES:
            folders.clear()
    flushed = {path.parent.parent for path in calls if path.parent.name == FLUSHES}
    found = [path for path in calls if path not in flushed]
    names = _by_number({path: _names(path, root) for path in found})
    count = Counter((process, call) for process, call, _ in names.values())
    recordings = [
        Recording(path, process, call if count[process, call] == 1 else f"{time} {call}")
        for path, (process, call, time) in names.items()
    ]
    return sorted(recordings, key=lambda recording: (recording.process, recording.path))


def _by_number(names: Mapping[Path, tuple[str, int | None, str, str]]) -> dict[Path, tuple[str, str, str]]:
    """Process, call and time, with the number of the process among those of its folder in place of its id."""
    processes: dict[str, set[int]] = {}
    for above, pid, _, _ in names.values():
        if pid is not None:
            processes.setdefault(above, set()).add(pid)
    numbered = {}
    for path, (above, pid, call, time) in names.items():
        process = "" if pid is None else f"process{sorted(processes[above]).index(pid) + 1}"
        numbered[path] = (
            "/".join(filter(None, ("" if above == "." and process else above, process))),
            call,
            time,
        )
    return numbered


def _names(path: Path, root: Path) -> tuple[str, int | None, str, str]:
    """The folder above, the id of the process, call and time of a folder."""
    folder = path.parent.parent if path.parent.name == FLUSHES else path
    above = (
        folder.parent.relative_to(root).as_posix() if folder.is_relative_to(root) and folder != root else "."
    )
    flush = "" if folder == path else f" {path.name}"
    if (found := _FOLDER.fullmatch(folder.name)) is None:
        return above, None, folder.name + flush, ""
    return above, int(found["pid"]), f"call{found['number']}{flush}", found["time"]


def _is_call(path: Path, files: list[str]) -> bool:
    """Whether it is a call of the function, as far as folder and metadata tell; damaged ones count."""
    named = _FOLDER.fullmatch((path.parent.parent if path.parent.name == FLUSHES else path).name)
    if named is not None:
        return named["function"] in FUNCTIONS
    if "metadata.jsonl" not in files:
        return False
    try:
        return _metadata(path).get("function_name") in FUNCTIONS
    except Unreadable:
        return True


def _metadata(path: Path) -> dict[str, Any]:
    try:
        text = read_file(path / "metadata.jsonl").decode()
    except FileNotFoundError:
        raise Unreadable(
            "metadata.jsonl: missing; the recorder writes it after the inputs, so that it failed or the process died "
            "before"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise Unreadable(f"metadata.jsonl: cannot be read: {error}") from error
    for line in reversed(text.split("\n")):
        try:
            value = parse_json(line)
        except ValueError:
            continue  # a line that was not written to its end; the one before is whole
        if isinstance(value, dict):
            return value
    raise Unreadable("metadata.jsonl: expected a JSON object a line, found none")


def _missing(kind: str, status: str) -> str:
    if status == "graph_capture_pending_flush":
        return f"no recorded {kind}: captured in a CUDA graph that was not replayed before the process ended"
    if kind == "outputs":
        return "no recorded output: the call raised, or the process died in it"
    return "no recorded inputs"


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    with open_tensors(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def _load_pt(path: Path) -> dict[str, Tensor]:
    with name_in_utf8(path) as name:
        loaded: dict[str, Tensor] = torch.load(name, map_location="cpu", weights_only=True, mmap=True)
    return loaded


_LOADERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {"pt": _load_pt, "safetensors": _load_safetensors}


def _is_tensor(value: Any) -> bool:
    return isinstance(value, dict) and value.get("type") == "torch.Tensor"


def _value(key: str, value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """An argument from what the recorder made of it in JSON."""
    if not isinstance(value, dict):
        return value
    kind = value.get("type")
    if kind == "torch.Tensor" and isinstance(stored := value.get("tensor_key"), str):
        if stored not in tensors:
            raise Unreadable(f"inputs: expected a tensor {stored:.80}, which metadata.jsonl names")
        return tensors[stored]
    if kind == "torch.dtype" and isinstance(
        dtype := getattr(torch, str(value.get("value")).removeprefix("torch."), None), torch.dtype
    ):
        return dtype
    if kind == "enum" and "value" in value:
        return value["value"]
    if kind == "Sm90Kernel" and "gemm1" in value:
        return _kernel(value)
    if kind in ("list", "tuple") and isinstance(value.get("items"), list) and value.get("truncated") is False:
        items = [_value(key, item, tensors) for item in value["items"]]
        return items if kind == "list" else tuple(items)
    name = key.removeprefix("kwarg_").replace("arg_", "argument ")
    if kind in ("list", "tuple") and "items" not in value:
        raise Incomplete(f"{name}: recorded as text only; {_NOT_KEPT}")
    raise Incomplete(f"{name}: recorded as {json.dumps(value)[:100]}, which does not tell its value")


def _kernel(value: Mapping[str, Any]) -> Sm90Kernel:
    try:
        gemm1, gemm2 = (
            Tactic(**{name: tuple(sizes) for name, sizes in value[gemm].items()})
            for gemm in ("gemm1", "gemm2")
        )
        return Sm90Kernel(gemm1, gemm2, generation_named(value["generation"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Unreadable(
            f"inputs: expected the tactics of a kernel, got {json.dumps(value)[:100]}: {error}"
        ) from None
