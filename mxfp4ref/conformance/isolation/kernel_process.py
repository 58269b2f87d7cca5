"""The process of a kernel that is isolated, and the form of its answers: a header in JSON, and bytes.

Requests are pickled, since they come from the kit; answers may be whatever a kernel wrote into the pipe.
"""

from __future__ import annotations

import faulthandler
import json
import os
import pickle
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import IO, Any

from mxfp4ref._files import mismatch, parse_json
from mxfp4ref.conformance.isolation.execution import collect, in_thread
from mxfp4ref.conformance.isolation.interference import interference
from mxfp4ref.conformance.isolation.plain import Like, of_exception, raw_bytes
from mxfp4ref.conformance.isolation.processes import end_with_parent
from mxfp4ref.conformance.isolation.standard_streams import FOR_GOOD
from mxfp4ref.conformance.isolation.surroundings import listed
from mxfp4ref.conformance.kernels.adapters import KernelError
from mxfp4ref.conformance.kernels.loading import environment, load_kernel
from mxfp4ref.goldens import Case
from mxfp4ref.goldens.case import EXPERT_TENSORS
from mxfp4ref.goldens.runs import Run
from mxfp4ref.model.call import MoeCall

__all__ = ["LOAD", "LOADED", "RESULT", "request_of", "serve", "unframed"]

LOAD, LOADED, RESULT = "load", "loaded", "result"  # names of answers, beside those of what `collect` reports

_MAGIC = b"mxfp4ref"
_ANSWER = {"name": str, "blobs": [int], "*": object}
_HEADER = 1 << 16  # bytes, at most


def _framed(name: str, header: dict[str, Any], blobs: list[bytes]) -> list[bytes]:
    text = json.dumps({"name": name, **header, "blobs": [len(blob) for blob in blobs]}).encode()
    return [_MAGIC, len(text).to_bytes(8, "little"), text, *blobs]


def unframed(stream: IO[bytes], largest: Callable[[], int]) -> tuple[dict[str, Any], list[bytes]] | None:
    """The next answer in a pipe, or None where the pipe ends, be it within one; ValueError where it is none."""
    start = stream.read(len(_MAGIC) + 8)
    if not start.startswith(_MAGIC[: len(start)]):
        raise ValueError
    if len(start) < len(_MAGIC) + 8:
        return None
    length = int.from_bytes(start[len(_MAGIC) :], "little")
    if length > _HEADER:
        raise ValueError
    if len(text := stream.read(length)) < length:
        return None
    header: dict[str, Any] = parse_json(text)
    if mismatch(header, _ANSWER, "answer"):
        raise ValueError
    sizes: list[int] = header["blobs"]
    if sum(sizes) > largest() or min(sizes, default=0) < 0:
        raise ValueError
    blobs = [stream.read(size) for size in sizes]
    return (header, blobs) if [len(blob) for blob in blobs] == sizes else None


def request_of(case: Case, run: Run, expected: Mapping[str, Like], repeat: bool) -> bytes:
    """What a run needs, without the expected values; generated weights are generated anew."""
    if not isinstance(run.inputs, MoeCall):
        return pickle.dumps((case.kind, run.inputs, None, expected, repeat))
    outputs = set(case.output_tensors.values())
    inputs = {name: tensor for name, tensor in case.tensors.items() if name not in outputs}
    return pickle.dumps(
        ("moe", replace(case, tensors=inputs, output_tensors={}), run.inputs.kernel, expected, repeat)
    )


def _same_experts(one: Case, other: Case) -> bool:
    """Whether two cases, which may have one name, have the same experts."""
    stored = [
        {n: raw_bytes(t) for n, t in case.tensors.items() if n in EXPERT_TENSORS} for case in (one, other)
    ]
    return one.derived == other.derived and stored[0] == stored[1]


class _Answers:
    """The child's end of the pipe for answers, with stdout given to what the kernel prints."""

    def __init__(self) -> None:
        self._pipe = os.dup(1)
        self._identity = self._stat()
        os.dup2(2, 1)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]

    def send(self, name: str, header: dict[str, Any] | None = None, blobs: list[bytes] | None = None) -> None:
        if (
            self._stat() != self._identity
        ):  # the kernel has closed it, and a file of its own may be in its place
            os._exit(1)
        _wait_for(self._pipe)
        for part in _framed(name, header or {}, blobs or []):
            view = memoryview(part)
            while view:
                view = view[os.write(self._pipe, view) :]

    def _stat(self) -> tuple[int, int]:
        try:
            found = os.fstat(self._pipe)
        except OSError:
            return (-1, -1)
        return found.st_dev, found.st_ino


def _wait_for(number: int) -> None:
    """Make a pipe one that is waited for, which a kernel's event loop may have changed."""
    if os.name == "posix":
        os.set_blocking(number, True)


def serve() -> None:
    """The process of a kernel: load it, run it on request."""
    requests, answers = os.fdopen(os.dup(0), "rb", closefd=False), _Answers()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    faulthandler.enable(all_threads=False)
    end_with_parent()
    spec, device = pickle.load(requests)
    answers.send(LOAD)
    try:
        kernel = load_kernel(spec, device)
        about = {"name": kernel.name, "kinds": kernel.kinds, "forces_tile_k": kernel.forces_tile_k}
        about |= {"device": kernel.device, "forces_tactics": kernel.forces_tactics}
        known = {
            "kernel": {**about, "generation": kernel.generation.name},
            "environment": environment(kernel.device),
        }
        answers.send(LOADED, {"error": "", **known})
    except BaseException as error:
        message = str(error) if isinstance(error, KernelError) else of_exception(error)
        answers.send(LOADED, {"error": message})
        return
    latest: Case | None = None
    while True:
        _wait_for(requests.fileno())
        try:
            kind, inputs, tactics, expected, repeat = pickle.load(requests)
        except EOFError:
            return
        if isinstance(inputs, Case):
            if inputs.derived and latest is not None and _same_experts(latest, inputs):
                vars(inputs)["experts"] = latest.experts  # generated before
            latest = inputs
            inputs = latest.call(tactics)
        undo = interference()
        found, _ = in_thread(
            lambda *told: collect(kernel, kind, inputs, expected, *told, repeat=repeat),  # noqa: B023
            reported=answers.send,
        )
        faulthandler.cancel_dump_traceback_later()  # which could end the process in a later run
        assert found is not None
        if replaced := undo():  # the next run is not to suffer from it, and this kernel may need it
            found = replace(found, left=listed([f"{replaced}{FOR_GOOD}", *filter(None, [found.left])]))
            if __package__ in replaced and not found.problem:  # what reads its outputs here
                words = f"the kernel replaced {replaced}: what it returned cannot be known"
                found = replace(found, problem="interfered", message=words)
        if found.problem == "input modified":
            latest = None
        blobs = [one[name] for one in found.runs for name in expected]
        stages = [
            (n, str(kept.dtype).removeprefix("torch."), kept.shape) for n, (kept, _) in found.stages.items()
        ]
        header = {
            "problem": found.problem,
            "message": found.message,
            "seconds": found.seconds,
            "left": found.left,
        }
        answers.send(
            RESULT,
            {**header, "runs": len(found.runs), "stages": stages},
            [*blobs, *(blob for _, blob in found.stages.values())],
        )
