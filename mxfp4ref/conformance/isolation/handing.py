"""Handing the inputs of a case to a kernel that may do anything with them, and telling what it did."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.conformance.comparison import differing, first_difference
from mxfp4ref.conformance.isolation.plain import (
    Like,
    TensorError,
    address,
    alias,
    geometry,
    like,
    raw_bytes,
    tensor_of,
    without_modes,
)
from mxfp4ref.conformance.kernels.adapters import Arguments, poisoned

__all__ = ["Handed", "to_device"]

_COPY_BYTES = 1 << 26
_SAMPLES, _SAMPLE = 256, 1 << 16  # evenly spaced in a larger tensor
_ROWS_BEYOND = 256  # behind `output`, as many as the largest tile has: who writes whole tiles writes there


class Handed:
    """Copies of a kernel's arguments, for it to do as it likes with; views of tensors whose copies might not fit.

    Attributes:
        positional, keywords: the copies. `output` has to be poisoned before each run.
    """

    def __init__(self, arguments: Arguments, rows_left: Tensor | None = None) -> None:
        """`rows_left`, `[M] bool`: rows of `output` that a kernel leaves as they are, and of a new tensor unset."""
        self._rows_left = rows_left
        self._output: Tensor | None = arguments[1].get("output")
        self.positional, self.keywords = _copied(arguments)
        self._given = _by_name((self.positional, self.keywords))
        self._given.pop("output", None)
        self._returned: list[dict[str, Tensor]] = []
        self._before = {name: _noted(tensor) for name, tensor in _tensors(self._given)}

    def poison_output(self) -> None:
        """Give the kernel a new `output`, if it takes one, which holds the poison."""
        if self._output is not None:
            rows = len(self._output)
            whole = poisoned(self._output.new_empty(rows + _ROWS_BEYOND, *self._output.shape[1:]))
            self.keywords["output"] = output = whole[:rows]
            self._beyond = whole[rows:], raw_bytes(whole[rows:])
            self._place = geometry(output), address(output)

    def disagreement(self, outputs: Mapping[str, Any], kept: Mapping[str, bytes]) -> str:
        """How the `output` that was given, unless it was left alone, disagrees with what the kernel gave; or "".

        Args:
            outputs, kept: what it gave, and the bytes of that with zeros in the rows that it leaves.
        """
        if self._output is None or "output" not in kept:
            return ""
        given = self.keywords["output"]
        before, place = self._place
        if (after := geometry(given)) != before:
            return f"output: the kernel changed the tensor that it was given from {before} to {after}"
        if address(given) != place:
            return "output: the kernel put the given tensor elsewhere: views of it see nothing of the result"
        if raw_bytes(self._beyond[0]) != self._beyond[1]:
            return "output: the kernel wrote behind the end of the tensor that it was given"
        if outputs["output"] is given or (written := raw_bytes(given)) == raw_bytes(self._output):
            return ""
        if self.zeros_in_rows_left(written) == kept["output"]:
            return ""
        return (
            "output: the kernel returned another tensor than it was given, and wrote other bits into that one"
        )

    def keep(self, outputs: Mapping[str, Any]) -> None:
        """Take what a run has returned as its caller has it: a kernel may still write there."""
        self._returned.append({name: alias(tensor) for name, tensor in outputs.items()})

    def changed_after(self, runs: Sequence[Mapping[str, bytes]]) -> str:
        """Which output no longer holds what it held when it was returned, the bytes of each run, in words; or ""."""
        for number, (outputs, before) in enumerate(zip(self._returned, runs, strict=True)):
            for name, tensor in outputs.items():
                try:
                    changed = self.zeros_in_rows_left(raw_bytes(tensor)) != before[name]
                except TensorError:
                    changed = True
                if changed:
                    return (
                        f"{name}, of run {number + 1} of {len(runs)}, was changed after it had been returned"
                    )
        return ""

    def changes(self) -> str:
        """What the kernel has changed in its inputs, in words, or ""."""
        found = dict(_tensors(self._given))
        changes = []
        for name, before in self._before.items():
            change = _change(found[name], *before) if name in found else ", which is gone"
            if change:
                changes.append(f"{name}{change}")
        if self._rows_left is not None and (change := self._change_of_rows_left(self._rows_left)):
            changes.append(change)
        changes += [f"{name}, which is new" for name in found if name not in self._before]
        return "; ".join(changes)

    def zeros_in_rows_left(self, raw: bytes) -> bytes:
        """An output's bytes with zeros in the rows that a kernel leaves, whatever they hold: goldens have zeros."""
        if self._rows_left is None:
            return raw
        rows = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(len(self._rows_left), -1)
        return bytes(rows.masked_fill(self._rows_left[:, None], 0).numpy())

    def _change_of_rows_left(self, rows_left: Tensor) -> str:
        if self._output is None:
            return ""
        before = self._output.cpu()
        try:
            output = tensor_of(raw_bytes(self.keywords["output"]), like(before))
        except (TensorError, RuntimeError):
            return "output, which is gone"
        changed = rows_left & differing(output, before).any(1)
        if not bool(changed.any()):
            return ""
        tokens = changed.nonzero().flatten().tolist()
        return (
            f"output at {len(tokens)} tokens without an expert of this rank, the first of them {tokens[0]}: with "
            "enable_alltoall=True the kernel does not write these rows"
        )


def _noted(tensor: Tensor) -> tuple[str, int, Like, bytes | int]:
    content = _samples(tensor) if _is_large(tensor) else raw_bytes(tensor)
    return geometry(tensor), address(tensor), like(tensor), content


def _change(tensor: Tensor, shape: str, place: int, kind: Like, content: bytes | int) -> str:
    try:
        after = geometry(tensor)
    except TensorError as error:
        return f" from {shape} to {error}"
    if shape != after:
        return f" from {shape} to {after}"
    if isinstance(content, int):
        if _samples(tensor) != content:
            return " somewhere"
    elif (got := raw_bytes(tensor)) != content:
        return f" {first_difference(tensor_of(got, kind), tensor_of(content, kind))}"
    # What it then wrote into the old place, other views see.
    return ", which lies elsewhere in memory now" if address(tensor) != place else ""


def to_device(inputs: Any, device: str) -> Any:
    """The inputs on the kernel's device (the same tensors where they are there already)."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {name: to_device(value, device) for name, value in inputs.items()}
    return _rebuilt(inputs, lambda value: to_device(value, device))


def _by_name(arguments: Arguments) -> dict[str, Any]:
    positional, keywords = arguments
    return {**{f"argument {i}": value for i, value in enumerate(positional)}, **keywords}


def _is_large(tensor: Tensor) -> bool:
    return tensor.numel() * tensor.element_size() > _COPY_BYTES


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach() if _is_large(value) else value.clone()
    if isinstance(value, Mapping):
        return {name: _copied(item) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    return _rebuilt(value, _copied)


def _samples(tensor: Tensor) -> int:
    """A checksum of parts of a large tensor."""
    checksum = 0
    with without_modes():
        flat = tensor.contiguous().flatten()
        for start in range(0, flat.numel(), -(-flat.numel() // _SAMPLES)):
            checksum = zlib.crc32(raw_bytes(flat[start : start + _SAMPLE]), checksum)
    return checksum


def _rebuilt(value: Any, convert: Callable[[Any], Any]) -> Any:
    """A dataclass with all its fields converted; anything else as it is."""
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: convert(getattr(value, f.name)) for f in fields(value) if f.init})
    return value


def _tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested mappings, sequences and dataclasses, with a name for it."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _tensors(item, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _tensors(item, f"{path}[{index}]")
    elif is_dataclass(value) and not isinstance(value, type):
        for item in fields(value):
            yield from _tensors(getattr(value, item.name), f"{path}.{item.name}" if path else item.name)
