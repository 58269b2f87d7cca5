"""The invariance of recorded calls and of kernels under test."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from mxfp4ref.conformance.isolation.execution import execute
from mxfp4ref.conformance.isolation.worker import Worker
from mxfp4ref.conformance.kernels.adapters import KernelError
from mxfp4ref.conformance.kernels.loading import is_stand_in, load_kernel
from mxfp4ref.engine.autotune import read_autotune_cache
from mxfp4ref.engine.calls import Layers, arguments_of, read_call, release_of
from mxfp4ref.engine.fitting import fitting_kernels
from mxfp4ref.engine.invariance import Invariance, invariance
from mxfp4ref.engine.recordings import Incomplete, Recording, find_recordings
from mxfp4ref.goldens import open_goldens
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward

__all__ = ["of_kernel", "of_recordings"]

# K tiles of either GEMM show in the first two, which an installed package does not have.
_CASES = ("gemm/mirrored_hidden_1536", "gemm/mirrored_inner_1536", "gemm/wide_exponents")
Found = Iterator[tuple[str, Invariance | str]]


def of_recordings(folder: Path, ranks: tuple[int, ...], autotune_cache: Path | None = None) -> Found:
    """Name and invariance of each recorded call below a folder, or why there is none.

    Args:
        folder: of one call or of many.
        ranks: as for `invariance`.
        autotune_cache: chooses the tactics of each batch; without it all run those of the recorded output.

    Raises:
        FileNotFoundError, ValueError: the autotune cache is none.
    """
    cache = None if autotune_cache is None else read_autotune_cache(autotune_cache)
    layers = Layers()
    for recording in find_recordings(folder):
        try:
            arguments = arguments_of(recording)
            _, call = read_call(recording, arguments, layers)
            call = _as_recorded(call, recording)
        except (Incomplete, NotImplementedError, TypeError, ValueError) as error:
            yield recording.name, f"left out: {error}"
            continue
        release = release_of(recording.metadata())

        def run(
            other: MoeCall,
            call: MoeCall = call,
            arguments: dict[str, object] = arguments,
            release: str | None = release,
        ) -> Tensor:
            prediction = (
                cache.predict(other, arguments, release) if cache and _same_layer(other, call) else None
            )
            return forward(other if prediction is None else replace(other, kernel=prediction.kernel))

        yield recording.name, invariance(call, run, ranks=ranks)


def _same_layer(one: MoeCall, other: MoeCall) -> bool:
    """Whether an autotune cache has both under one layer: the shares of ranks have other shapes."""
    return (one.ep_size, one.tp_size) == (other.ep_size, other.tp_size)


def _as_recorded(call: MoeCall, recording: Recording) -> MoeCall:
    """The call with the first tiles by which the oracle gives the recorded output, if there are any."""
    try:
        fits = fitting_kernels(call, recording.output(), first=True)
    except (Incomplete, TypeError, ValueError):
        return call
    return replace(call, kernel=fits[0].kernel) if fits else call


def of_kernel(
    spec: str,
    cases: Sequence[str],
    ranks: tuple[int, ...],
    goldens: Path | None = None,
    device: str | None = None,
) -> Found:
    """Name and invariance of a kernel on each golden case.

    It runs in a process of its own, as in `suite.run`, unless it is one of this package's own.

    Raises:
        KernelError: there is no such kernel, it does not run whole calls, or it failed.
        GoldenError: there is no such case.
    """
    with ExitStack() as stack:
        worker = None if is_stand_in(spec) else stack.enter_context(Worker(spec, device))
        kernel = load_kernel(spec, device) if worker is None else worker.kernel
        if "moe" not in kernel.kinds:
            raise KernelError(f"kernel: expected one that runs whole calls, got {spec!r}")

        def run(call: MoeCall, *, repeat: bool = False) -> Tensor:
            if worker is None:
                outcome = execute(kernel, "moe", call, {"output": call.input}, repeat=repeat)
            else:
                outcome = worker.execute_call(None, call, repeat=repeat)
            if outcome.message:
                raise KernelError(
                    f"{spec}: {outcome.problem or 'wrong output'} on {call.num_tokens} tokens: {outcome.message}"
                )
            return outcome.outputs["output"]

        stored = open_goldens(goldens)
        known = stored.names()
        for name in cases or [name for name in _CASES if name in known]:
            case = stored.load(name)
            if case.kind != "moe":
                raise ValueError(
                    f"--case: expected a case of kind moe, got {name}, which is of kind {case.kind}"
                )
            run(case.call(), repeat=True)  # bits that chance decides would be taken for the batch's doing
            yield f"{spec}, {name}", invariance(case.call(), run, ranks=ranks)
