"""Running a kernel that may do anything: raise, hang, die, write nothing, write into its inputs.

A time limit works in one of two ways. In this process the kernel runs in a thread, which is abandoned when
the time is over: it may go on using the processor or the GPU, and a kernel that never gives up the
interpreter's lock cannot be stopped at all. With `Worker` it runs in a process of its own, which is killed
and replaced; that also survives a crash.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.conformance.adapters import Kernel, Skip, is_poison, outputs_by_name, poisoned
from mxfp4ref.conformance.comparison import differing, first_difference
from mxfp4ref.conformance.kernels import load_kernel
from mxfp4ref.goldens import Case
from mxfp4ref.goldens.runs import runs

__all__ = ["PROBLEMS", "Outcome", "Worker", "execute", "execute_within", "to_device"]

# What can be wrong with a run before any value is looked at.
PROBLEMS = (
    *("raised", "timed out", "crashed", "layout differs", "wrong output", "not written"),
    *("input modified", "unstable", "skipped"),
)

_COPY_BYTES = 1 << 26
_SAMPLES, _SAMPLE = 256, 1 << 16  # evenly spaced in a larger tensor


@dataclass(frozen=True)
class Outcome:
    """What came of running a kernel on one set of inputs.

    Attributes:
        outputs: by name, on the CPU; intermediates too where the kernel returns them.
        problem: one of `PROBLEMS`, or "" when there are outputs to compare.
        message: the problem in words.
        seconds: the first run's time.
    """

    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    problem: str = ""
    message: str = ""
    seconds: float = 0.0


def execute(
    kernel: Kernel, kind: str, inputs: Any, expected: Mapping[str, Tensor], *, repeat: bool = True
) -> Outcome:
    """Run a kernel on the inputs of a case, twice, and look at everything but the values.

    Args:
        kernel: what to run.
        kind: the case's kind.
        inputs: a `MoeCall` for kind "moe", else arguments by name.
        expected: tensors of the dtypes and shapes that the outputs have to have, by name.
        repeat: run it a second time, on the same inputs, and compare the bits.
    """
    try:
        positional, keywords = kernel.prepare(kind, to_device(inputs, kernel.device))
    except Skip as reason:
        return Outcome(problem="skipped", message=str(reason))
    except ValueError as error:
        return Outcome(problem="layout differs", message=str(error))
    arguments = {**{f"argument {i}": value for i, value in enumerate(positional)}, **keywords}
    watched = {name: tensor for name, tensor in _tensors(arguments) if name != "output"}
    before = {name: _remember(tensor) for name, tensor in watched.items()}

    first = _run_once(kernel, kind, positional, keywords, expected)
    changes = [_restore(name, tensor, before[name]) for name, tensor in watched.items()]
    changes = [change for change in changes if change]
    if changes and not first.problem:
        return replace(first, problem="input modified", message=f"the kernel wrote into {'; '.join(changes)}")
    if first.problem or not repeat:
        return first
    if "output" in keywords:
        keywords["output"] = poisoned(keywords["output"])
    second = _run_once(kernel, kind, positional, keywords, expected)
    if second.problem:
        return replace(second, message=f"in a second run: {second.message}")
    for name in expected:
        difference = first_difference(second.outputs[name], first.outputs[name])
        if difference is not None:
            count = int(differing(second.outputs[name], first.outputs[name]).sum())
            message = f"a second run on the same inputs gave {count:,} other elements in {name}; {difference}"
            return replace(first, problem="unstable", message=message)
    return first


def execute_within(seconds: float | None, function: Callable[[], Outcome]) -> Outcome:
    """Run `function` in a thread that is abandoned after so many seconds."""
    if seconds is None:
        return function()
    results: list[Outcome] = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    thread.join(seconds)
    if results:
        return results[0]
    return Outcome(problem="timed out", message=f"no result within {seconds:g} s", seconds=seconds)


class Worker:
    """A process of its own for a kernel given by its name; started when needed, killed when it hangs.

    Use it as a context manager.
    """

    def __init__(self, spec: str, device: str | None = None) -> None:
        self._arguments = (spec, device)
        self._process: SpawnProcess | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def execute(self, seconds: float | None, case: Case, index: int, *, repeat: bool = True) -> Outcome:
        """As the function `execute` for a run of a case, by its place in `runs(case)`.

        "crashed" when the process dies, "timed out" when the kernel takes longer than `seconds`.
        """
        try:
            connection = self._connection if self._process else self._start()
            # A fresh copy of the case: without the tensors that have been generated, which may be large.
            connection.send_bytes(pickle.dumps((replace(case), index, repeat)))
            connection.recv_bytes()  # the inputs are there, the kernel starts
            if not connection.poll(seconds):
                self._stop()
                message = f"no result within {seconds:g} s; its process was killed"
                return Outcome(problem="timed out", message=message, seconds=seconds or 0.0)
            outcome: Outcome = pickle.loads(connection.recv_bytes())
        except (EOFError, ConnectionError):
            code = self._stop()
            died = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            return Outcome(problem="crashed", message=f"the kernel's process died: {died}")
        return outcome

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, *self._arguments), daemon=True)
        self._process.start()
        theirs.close()
        return self._connection

    def _stop(self) -> int:
        """End the process, if it has not ended by itself, and return its exit code."""
        if self._process is None:
            return 0
        self._connection.close()
        self._process.join(1)
        self._process.kill()
        self._process.join()
        code = self._process.exitcode or 0
        self._process = None
        return code


def _serve(connection: Connection, spec: str, device: str | None) -> None:
    kernel = load_kernel(spec, device)
    latest, all_runs = "", []
    while True:
        try:
            case, index, repeat = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        if case.id != latest:
            latest, all_runs = case.id, runs(case)
        one = all_runs[index]
        connection.send_bytes(b"started")
        # Plain pickling copies the outputs; torch's own way would share memory with a process that may die.
        outcome = execute(kernel, case.kind, one.inputs, one.expected, repeat=repeat)
        connection.send_bytes(pickle.dumps(outcome))


def _run_once(
    kernel: Kernel,
    kind: str,
    positional: tuple[Any, ...],
    keywords: dict[str, Any],
    expected: Mapping[str, Tensor],
) -> Outcome:
    _poison_freed_memory(expected, kernel.device)
    start = time.perf_counter()
    try:
        with torch.no_grad():
            result = kernel.function(*positional, **keywords)
        if kernel.device.startswith("cuda"):
            torch.cuda.synchronize(kernel.device)
    except Exception as error:
        return Outcome(problem="raised", message=_excerpt(error), seconds=time.perf_counter() - start)
    seconds = time.perf_counter() - start
    outputs = outputs_by_name(kind, result, keywords)
    for name, like in expected.items():
        got = outputs.get(name)
        if not isinstance(got, Tensor):
            message = f"{name}: expected a {_describe(like)} tensor, got {type(got).__name__}"
            return Outcome(problem="wrong output", message=message, seconds=seconds)
        if got.dtype != like.dtype or got.shape != like.shape:
            message = f"{name}: expected {_describe(like)}, got {_describe(got)}"
            return Outcome(problem="wrong output", message=message, seconds=seconds)
        if got.dtype == torch.bfloat16 and bool((left := is_poison(got)).any()):
            where = (
                "nothing" if bool(left.all()) else f"all but {int(left.sum()):,} of {got.numel():,} elements"
            )
            first = left.nonzero()[0].tolist()
            message = f"{name}: the kernel wrote {where}; the first element not written is {first}"
            return Outcome(problem="not written", message=message, seconds=seconds)
    # A copy: the kernel may give the same memory back next time.
    kept = {
        name: value.detach().cpu().clone() for name, value in outputs.items() if isinstance(value, Tensor)
    }
    return Outcome(kept, seconds=seconds)


def _remember(tensor: Tensor) -> Tensor | int:
    """A copy, or of a large tensor, whose copy might not fit, a checksum of samples."""
    if tensor.numel() * tensor.element_size() <= _COPY_BYTES:
        return tensor.clone()
    flat = tensor.contiguous().flatten()
    checksum = 0
    for start in range(0, flat.numel(), -(-flat.numel() // _SAMPLES)):
        checksum = zlib.crc32(
            flat[start : start + _SAMPLE].cpu().view(torch.uint8).numpy().tobytes(), checksum
        )
    return checksum


def _restore(name: str, tensor: Tensor, before: Tensor | int) -> str:
    """What has changed in a tensor, or ""; later runs get the old values again where there is a copy."""
    if isinstance(before, int):
        return "" if _remember(tensor) == before else name
    change = first_difference(tensor, before)
    if change is None:
        return ""
    tensor.copy_(before)
    return f"{name} {change}"


def _poison_freed_memory(expected: Mapping[str, Tensor], device: str) -> None:
    """Fill memory of the outputs' sizes and free it: an allocator that reuses it hands the poison out."""
    for like in expected.values():
        if like.dtype == torch.bfloat16:
            poisoned(torch.empty(like.shape, dtype=like.dtype, device=device))


def to_device(inputs: Any, device: str) -> Any:
    """The inputs on the kernel's device (the same tensors where they are there already)."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {name: to_device(value, device) for name, value in inputs.items()}
    if is_dataclass(inputs) and not isinstance(inputs, type):
        moved = {f.name: to_device(getattr(inputs, f.name), device) for f in fields(inputs) if f.init}
        return replace(inputs, **moved)
    return inputs


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


def _excerpt(error: BaseException) -> str:
    """The exception and the innermost frames, without this package's own."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    where = "; ".join(f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in frames[-3:])
    return f"{type(error).__name__}: {error}" + (f" ({where})" if where else "")


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
