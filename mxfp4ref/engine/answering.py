"""A kernel under test that answers recorded calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from mxfp4ref.conformance.isolation.execution import Outcome, execute_within
from mxfp4ref.conformance.isolation.worker import Worker
from mxfp4ref.conformance.kernels.adapters import KernelError
from mxfp4ref.conformance.kernels.loading import is_stand_in, load_kernel
from mxfp4ref.engine.replay_report import ReplayOptions
from mxfp4ref.formats.experts import Sm90Experts
from mxfp4ref.formats.resize import to_logical
from mxfp4ref.model.call import MoeCall

__all__ = ["answering"]


@contextmanager
def answering(options: ReplayOptions) -> Iterator[Callable[[MoeCall], Outcome] | None]:
    """What runs the options' kernel on a call, in a process of its own; None where there is no kernel.

    It gets a call's experts in logical layout and brings them into its own, as it does with a golden case's.

    Raises:
        KernelError: there is no such kernel, or it does not run whole calls.
    """
    spec, device = options.kernel, options.device
    if spec is None:
        yield None
        return
    with ExitStack() as stack:
        worker = None if is_stand_in(spec) else stack.enter_context(Worker(spec, device, options.timeout))
        kernel = load_kernel(spec, device) if worker is None else worker.kernel
        if "moe" not in kernel.kinds:
            raise KernelError(f"kernel: expected one that runs whole calls, got {spec!r}")

        def answer(call: MoeCall) -> Outcome:
            if not call.experts.tactics_show:
                return Outcome(problem="skipped", message=f"{spec} is run on MXFP4 weights only")
            if isinstance(call.experts, Sm90Experts):
                call = replace(call, experts=to_logical(call.experts))
            if worker is not None:
                return worker.execute_call(options.timeout, call, repeat=True)
            return execute_within(options.timeout, kernel, ("moe", call, {"output": call.input}))

        yield answer
