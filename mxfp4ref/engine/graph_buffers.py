"""Whether what was recorded of a call in a CUDA graph is still what the kernel read and wrote.

flashinfer's recorder keeps references to the tensors that a captured call was given and gave, and reads them after a
replay of the *whole graph*, and once more when the process ends. So their memory is not handed out again, but may be
written: engines give all layers one output buffer, or add in place. Each sign here is one that a wrong kernel does
not give.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mxfp4ref.conformance.comparison import differing
from mxfp4ref.engine.calls import arguments_of
from mxfp4ref.engine.recordings import FLUSHES, Incomplete, Recording, Unreadable

__all__ = ["GraphBuffers"]


class GraphBuffers:
    """The calls of a replay, among which those are looked for that share a buffer."""

    def __init__(self, recordings: Sequence[Recording]) -> None:
        self._recordings = recordings

    def overwritten(self, recording: Recording, output: Tensor) -> str:
        """How it shows that the recorded input or output is not the call's own, or "".

        Args:
            recording: a call in a CUDA graph, whose output is not what its inputs give.
            output: its recorded output.
        """
        inputs = _input_tensors(recording)
        if _same(output, inputs["input"]):
            return "a CUDA graph has overwritten its input: what was recorded of it are the output's bits"
        for other in self._in_same_flush(recording):
            try:
                same_output = _same(output, other.output())
                others = _input_tensors(other) if same_output else {}
            except (Incomplete, Unreadable, NotImplementedError):
                continue
            if same_output and not _all_same(inputs, others):
                return (
                    f"a CUDA graph has overwritten its output: what was recorded of it are the bits of {other.name}, "
                    "which has other inputs; the engine gives both one buffer"
                )
        before = self._flush_before(recording)
        if before is None:
            return ""
        try:
            stale = _same(output, before.output()) and not _all_same(inputs, _input_tensors(before))
        except (Incomplete, Unreadable, NotImplementedError):
            return ""
        if stale:
            return (
                f"recorded without a replay of its graph, as the process ended: the output is still that of "
                f"{before.name}, the inputs have been overwritten since"
            )
        return ""

    def _in_same_flush(self, recording: Recording) -> Iterator[Recording]:
        """Other calls of the same process that may have been read at the same time."""
        flushed = recording.path.parent.name == FLUSHES
        for other in self._recordings:
            same_process = other.path != recording.path and other.process == recording.process
            if same_process and (not flushed or other.path.name == recording.path.name):
                yield other

    def _flush_before(self, recording: Recording) -> Recording | None:
        """The flush before, if this is the last one of its call."""
        flushes = [r for r in self._recordings if r.path.parent == recording.path.parent]
        last = recording.path.parent.name == FLUSHES and flushes[-1].path == recording.path
        return flushes[-2] if last and len(flushes) > 1 else None


def _input_tensors(recording: Recording) -> dict[str, Tensor]:
    """The recorded tensors by argument; the `output` argument is no input."""
    found: dict[str, Tensor] = {}
    for name, value in arguments_of(recording).items():
        for index, item in enumerate(value if isinstance(value, list | tuple) else [value]):
            if isinstance(item, Tensor) and name not in ("output", "workspace_buffer"):
                found[name if item is value else f"{name}[{index}]"] = item
    return found


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether all bits agree, of tensors that are not one value throughout, which says nothing."""
    if (one.dtype, one.shape) != (other.dtype, other.shape) or not one.numel():
        return False
    constant = not bool(differing(one, one.flatten()[0].expand_as(one)).any())
    return not constant and not bool(differing(one, other).any())


def _all_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape)
        and torch.equal(_bytes(tensor), _bytes(other[name]))
        for name, tensor in one.items()
    )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
