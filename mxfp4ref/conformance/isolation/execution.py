"""Running a kernel that may do anything: raise, hang, write nothing, write into its inputs, change its process.

A run has two halves. `collect` runs the kernel and keeps nothing of what it gave but bytes; with isolation that is
all that happens in the kernel's process. `judge` looks at these bytes, where the kernel has never been.

In this process a kernel runs in a thread, abandoned when its time is over, which may compute on; what never gives
up the interpreter's lock cannot be stopped. `worker.Worker` runs it in a process, which is killed and replaced.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.conformance.comparison import differing, first_difference
from mxfp4ref.conformance.isolation.handing import Handed, to_device
from mxfp4ref.conformance.isolation.interference import interference
from mxfp4ref.conformance.isolation.plain import (
    Like,
    TensorError,
    fill_new_memory,
    like,
    of_exception,
    printable,
    raw_bytes,
    stage_bytes,
    tensor_of,
    without_modes,
)
from mxfp4ref.conformance.isolation.processes import KERNEL_THREAD
from mxfp4ref.conformance.isolation.surroundings import surroundings
from mxfp4ref.conformance.kernels.adapters import (
    INTERMEDIATES,
    Kernel,
    Skip,
    is_poison,
    outputs_by_name,
    poisoned,
    raised_words,
    rows_left,
)

__all__ = [
    "PROBLEMS",
    "Collected",
    "Outcome",
    "collect",
    "execute",
    "execute_within",
    "in_thread",
    "judge",
    "likes",
]

# What can be wrong with a run before any value is looked at.
PROBLEMS = (
    *("raised", "timed out", "crashed", "interfered", "layout differs", "wrong output", "not written"),
    *("input modified", "unstable", "skipped"),
)
_clock = time.perf_counter
_gettrace, _settrace, _getprofile, _setprofile = sys.gettrace, sys.settrace, sys.getprofile, sys.setprofile
# What `collect` reports: what it is about to do.
ARGUMENTS, RUN, CHECKS = "arguments", "run", "checks"


@dataclass(frozen=True)
class Collected:
    """What a kernel gave, as bytes.

    Attributes:
        runs: for each run that came to its end, the outputs' bytes by name.
        stages: intermediates of the first run, where the kernel returned some.
        problem, message, left: as in `Outcome`.
        seconds: the first run's time.
    """

    runs: tuple[Mapping[str, bytes], ...] = ()
    stages: Mapping[str, tuple[Like, bytes]] = field(default_factory=dict)
    problem: str = ""
    message: str = ""
    seconds: float = 0.0
    left: str = ""


@dataclass(frozen=True)
class Outcome:
    """What came of running a kernel on one set of inputs.

    Attributes:
        outputs: by name, on the CPU; intermediates too where the kernel returns them.
        problem: one of `PROBLEMS`, or "" when there are outputs to compare.
        message: the problem in words; or, beside outputs, what is wrong even if these are right: the status is
            "wrong output" then.
        seconds: the first run's time.
        left: settings that the kernel had changed and that were put back, in words, or "".
    """

    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    problem: str = ""
    message: str = ""
    seconds: float = 0.0
    left: str = ""


def execute(
    kernel: Kernel, kind: str, inputs: Any, expected: Mapping[str, Tensor], *, repeat: bool = True
) -> Outcome:
    """Run a kernel on the inputs of a case, twice, in this process, and look at everything but the values.

    Args:
        kernel: what to run.
        kind: the case's kind.
        inputs: a `MoeCall` for kind "moe", else arguments by name. The kernel gets copies.
        expected: tensors of the dtypes and shapes that the outputs have to have, by name.
        repeat: run it a second time, on the same inputs, and compare the bits.
    """
    return execute_within(None, kernel, (kind, inputs, expected), repeat=repeat)


def execute_within(
    seconds: float | None, kernel: Kernel, run: tuple[str, Any, Mapping[str, Tensor]], *, repeat: bool = True
) -> Outcome:
    """As `execute`, for `run` = (kind, inputs, expected), with a limit for each time the kernel runs."""
    kind, inputs, expected = run
    wanted = likes(expected, kernel.device)
    undo, restore = interference(), surroundings()  # of a run that has not come to its end, too
    collected, message = in_thread(
        lambda *told: collect(kernel, kind, inputs, wanted, *told, repeat=repeat), seconds
    )
    replaced, left = undo(), restore()
    if replaced:
        words = (
            f"the kernel replaced {replaced}: a verdict needs a kernel that does not, or a process of its own"
        )
        return Outcome(problem="interfered", message=words, seconds=collected.seconds if collected else 0.0)
    if collected is None:
        return Outcome(problem="timed out", message=message, seconds=seconds or 0.0, left=left)
    return judge(collected, wanted)


def likes(expected: Mapping[str, Tensor], device: str) -> dict[str, Like]:
    """What a kernel's outputs have to be."""
    where = torch.device(device).type
    return {name: replace(like(tensor), device=where) for name, tensor in expected.items()}


def in_thread(
    work: Callable[[Callable[[str], None], Callable[[], bool]], Collected],
    seconds: float | None = None,
    reported: Callable[[str], None] = lambda doing: None,
) -> tuple[Collected | None, str]:
    """What `work` gives, in a thread of its own, with a limit for each time it runs the kernel; or None, and why.

    `work` is given the arguments `report` and `abandoned` of `collect`.

    In a thread an exception such as KeyboardInterrupt is the kernel's, and the thread's settings end with it. What it
    is about to do is told to `reported`, before it does it. A thread that was abandoned ends when its kernel returns:
    settings of the process are no longer its own to put back.
    """
    events: queue.SimpleQueue[str | Collected] = queue.SimpleQueue()
    abandoned = threading.Event()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]

    def report(doing: str) -> None:
        reported(doing)
        if abandoned.is_set():
            raise SystemExit
        events.put(doing)

    def target() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            events.put(work(report, abandoned.is_set))
        except BaseException as error:  # not in the kernel itself
            events.put(Collected(problem="raised", message=of_exception(error)))

    thread = threading.Thread(target=target, daemon=True, name=KERNEL_THREAD)
    doing = ""
    try:
        thread.start()
        while True:
            event = events.get(timeout=seconds if doing == RUN else None)
            if isinstance(event, Collected):
                thread.join()
                return event, ""
            doing = event
    except queue.Empty:
        abandoned.set()
        return None, f"no result within {seconds:g} s"
    except BaseException:  # the run was interrupted, at any place
        abandoned.set()
        raise


def collect(
    kernel: Kernel,
    kind: str,
    inputs: Any,
    expected: Mapping[str, Like],
    report: Callable[[str], None],
    abandoned: Callable[[], bool],
    *,
    repeat: bool = True,
) -> Collected:
    """Run a kernel once or twice and keep the bytes of its outputs.

    `report` is told what comes next; `abandoned` says whether the result is no longer waited for.
    """
    report(ARGUMENTS)
    try:
        handed = Handed(kernel.prepare(kind, to_device(inputs, kernel.device)), rows_left(kind, inputs))
    except Skip as reason:
        return Collected(problem="skipped", message=printable(reason))
    except ValueError as error:
        return Collected(problem="layout differs", message=printable(error))
    except BaseException as error:
        message = f"while its arguments were prepared: {of_exception(error, __file__)}"
        return Collected(problem="raised", message=message)
    found = Collected()
    for where in ("", "in a second run: ") if repeat else ("",):
        with without_modes():  # which the first run may have left switched on
            handed.poison_output()
            _poison_freed_memory(expected, kernel.device)
        fill_new_memory(0xA5 if where else 0)
        one = _run_once(kernel, kind, handed, expected, report, abandoned)
        fill_new_memory(0)
        with without_modes():
            if not one.problem and (changes := handed.changes()):
                one = replace(one, problem="input modified", message=f"the kernel changed {changes}")
        if where and one.problem == "skipped":
            one = replace(one, problem="raised", message=f"Skip: {one.message}")
        first = found if found.runs else one
        message = where + one.message if one.problem else found.message or one.message
        runs, left = (*found.runs, *one.runs), found.left or one.left
        found = replace(first, runs=runs, problem=one.problem, message=message, left=left)
        if found.problem:
            break
    if not found.problem and (words := handed.changed_after(found.runs)):
        found = replace(found, problem="unstable", message=words)
    return found


def judge(collected: Collected, expected: Mapping[str, Like]) -> Outcome:
    """What came of it: the outputs, or the first problem."""
    outcome = Outcome(seconds=collected.seconds, left=collected.left)
    runs = [{name: tensor_of(one[name], want) for name, want in expected.items()} for one in collected.runs]
    for number, outputs in enumerate(runs):
        for name, got in outputs.items():
            if got.dtype in (torch.bfloat16, torch.float16) and (message := _unwritten(name, got)):
                message = f"{'in a second run: ' if number else ''}{message}"
                return replace(outcome, problem="not written", message=message)
    if collected.problem:
        return replace(outcome, problem=collected.problem, message=collected.message)
    first, second = runs[0], runs[-1]
    for name, got in first.items():
        if collected.runs[0][name] != collected.runs[-1][name]:
            count = int(differing(second[name], got).sum())
            words = f"a second run on the same inputs gave {count:,} other elements in {name}"
            message = f"{words}; {first_difference(second[name], got)}"
            return replace(outcome, problem="unstable", message=message)
    stages = {name: tensor_of(raw, kept) for name, (kept, raw) in collected.stages.items()}
    return replace(outcome, outputs={**stages, **first}, message=collected.message)


def _unwritten(name: str, got: Tensor) -> str:
    left = is_poison(got)
    if not bool(left.any()):
        return ""
    where = "nothing" if bool(left.all()) else f"all but {int(left.sum()):,} of {got.numel():,} elements"
    return f"{name}: the kernel wrote {where}; the first element not written is {left.nonzero()[0].tolist()}"


def _run_once(
    kernel: Kernel,
    kind: str,
    handed: Handed,
    expected: Mapping[str, Like],
    report: Callable[[str], None],
    abandoned: Callable[[], bool],
) -> Collected:
    process, left = os.getpid(), ""
    restore = surroundings()
    report(RUN)
    start = _clock()
    try:
        try:
            result = _call(kernel, handed)
        finally:
            seconds = _clock() - start
            left = "" if abandoned() else restore()
        outputs = outputs_by_name(kind, result, handed.keywords)
        kept = {name: _output(name, outputs.get(name), want) for name, want in expected.items()}
        kept = {name: handed.zeros_in_rows_left(raw) for name, raw in kept.items()}
        disagreement = handed.disagreement(outputs, kept)
        stages = {name: stage_bytes(name, outputs[name]) for name in INTERMEDIATES if name in outputs}
        handed.keep({name: outputs[name] for name in expected})
        del result, outputs  # while its time is limited
    except TensorError as error:
        found = Collected(problem="wrong output", message=printable(error))
    except Skip as reason:
        found = Collected(problem="skipped", message=printable(reason) or "the kernel skips this case")
    except BaseException as error:
        found = Collected(problem="raised", message=raised_words(kernel.name, error))
    else:
        found = Collected((kept,), stages, message=disagreement)
    if os.getpid() != process:  # a copy of this process that the kernel forked off, and that returned, too
        os._exit(0)
    report(CHECKS)
    return replace(found, seconds=seconds, left=left)


def _call(kernel: Kernel, handed: Handed) -> Any:
    trace, profile = _gettrace(), _getprofile()
    with torch.no_grad():
        try:
            result = kernel.function(*handed.positional, **handed.keywords)
            if kernel.device.startswith("cuda"):
                torch.cuda.synchronize(kernel.device)
        finally:
            _settrace(trace)  # before any function of ours is called
            _setprofile(profile)
        return result


def _output(name: str, got: object, want: Like) -> bytes:
    try:
        found = like(got)
    except TensorError as error:
        raise TensorError(f"{name}: expected a {want} tensor, got {error}") from None
    if found != want:
        other = f" on {found.device}, where its inputs are on {want.device}" * (str(found) == str(want))
        raise TensorError(f"{name}: expected {want}, got {found}{other}")
    return raw_bytes(got)


def _poison_freed_memory(expected: Mapping[str, Like], device: str) -> None:
    """Fill memory of the outputs' sizes and free it: an allocator that reuses it hands the poison out."""
    for want in expected.values():
        if want.dtype in (torch.bfloat16, torch.float16):
            poisoned(torch.empty(want.shape, dtype=want.dtype, device=device))
