"""Kernels under test: named stand-ins, flashinfer's own, and anybody's function by its import path.

A kernel is named by a string:

    oracle                     this package's own forward
    defect:NAME                a named wrong pipeline of `mxfp4ref.defects`
    torch-bf16                 dequantise to bf16, torch matmuls: the reference that most projects use
    flashinfer                 the installed flashinfer's kernel, with layouts made by its own helpers
    flashinfer-w4a8            the same with FP8 activations (use_wfp4afp8_humming)
    package.module:function    a function with flashinfer's signature, SM90 layouts; also file.py:function
    logical:package.module:f   the same signature with weights and scales in logical layout
    plain:package.module:f     f(x, ids, scales, w1, s1, w2, s2, **parameters), logical layout
    stage:KIND:package.module:f    one stage; KIND and its arguments are those of the golden cases
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from typing import Any

import torch

from mxfp4ref._validate import check_instance, shown
from mxfp4ref._version import __version__
from mxfp4ref.conformance.isolation.interference import interference
from mxfp4ref.conformance.isolation.plain import printable
from mxfp4ref.conformance.isolation.surroundings import modes_of_torch, settings_of_the_kit
from mxfp4ref.conformance.kernel_names import wrong_name
from mxfp4ref.conformance.kernels.adapters import (
    Kernel,
    KernelError,
    keyword_arguments,
    logical_arguments,
    plain_arguments,
    sm90_arguments,
    whole_arguments,
)
from mxfp4ref.conformance.kernels.flashinfer_kernel import flashinfer_kernel, flashinfer_w4a8_kernel
from mxfp4ref.conformance.kernels.importing import check_takes, import_function
from mxfp4ref.conformance.kernels.stand_ins import defect_kernel, torch_bf16
from mxfp4ref.goldens import GoldenError, Goldens
from mxfp4ref.goldens.runs import run_stage
from mxfp4ref.goldens.store import KINDS

__all__ = ["check_device", "environment", "is_stand_in", "load_kernel", "load_kernel_here", "runnable"]


def load_kernel_here(spec: str | Callable[..., Any], device: str | None = None) -> Kernel:
    """As `load_kernel`, into a process that gives verdicts: what an import replaces is put back, and told.

    The working directory, the umask and the standard streams are put back without a word: reports are written later.

    Raises:
        TypeError, KernelError: as of `load_kernel`; or the import replaced a function that a verdict
            rests on, or left one of torch's modes switched on.
    """
    if isinstance(spec, str) and spec.startswith("flashinfer"):  # whose imports are known
        return load_kernel(spec, device)
    undo, restore, modes = interference(), settings_of_the_kit(), modes_of_torch()
    try:
        kernel = load_kernel(spec, device)
    finally:
        replaced = undo()
        restore()
    if left := [name for name in modes_of_torch() if name not in modes]:
        raise KernelError(
            f"kernel: importing {kernel.name} left torch's mode {left[0]} switched on, which sees all that the kit "
            "computes: a verdict needs a kernel that does not, or a process of its own"
        )
    if replaced:
        raise KernelError(
            f"kernel: importing {kernel.name} replaced {replaced}: a verdict needs a kernel that does not, or a "
            "process of its own"
        )
    return kernel


def load_kernel(spec: str | Callable[..., Any], device: str | None = None) -> Kernel:
    """The kernel of a name as above, or one made of a callable with flashinfer's signature.

    Args:
        spec: the name, or the callable itself.
        device: where its tensors go; by default the CPU, and CUDA for `flashinfer`.

    Raises:
        TypeError: it is neither.
        KernelError: it names nothing that can be imported, or nothing that can run here.
    """
    if device is not None:
        check_device(device)
    if not isinstance(spec, str):
        if not callable(spec):
            raise TypeError(f"kernel: expected a name or a callable, got {type(spec).__name__} {shown(spec)}")
        name = printable(getattr(spec, "__qualname__", type(spec).__name__), 200)
        return Kernel(name, ("moe",), sm90_arguments(spec), spec, device=device or "cpu")
    if wrong := wrong_name(spec):
        raise KernelError(wrong)
    head, _, rest = spec.partition(":")
    if spec == "oracle":
        return Kernel(spec, KINDS, whole_arguments, run_stage, forces_tile_k=True, device=device or "cpu")
    if spec == "torch-bf16":
        return Kernel(spec, ("moe",), whole_arguments, torch_bf16, device=device or "cpu")
    if spec == "flashinfer":
        return flashinfer_kernel(device or "cuda")
    if spec == "flashinfer-w4a8":
        return flashinfer_w4a8_kernel(device or "cuda")
    if head == "defect":
        return defect_kernel(rest, device or "cpu")
    if head in ("logical", "plain"):
        function = import_function(rest)
        prepare = logical_arguments(function) if head == "logical" else plain_arguments
        check_takes(spec, function)
        return Kernel(spec, ("moe",), prepare, function, device=device or "cpu")
    if head == "stage":
        kind, _, path = rest.partition(":")
        function = import_function(path)
        return Kernel(spec, (kind,), keyword_arguments, function, device=device or "cpu")
    function = import_function(spec)
    check_takes(spec, function)
    return Kernel(spec, ("moe",), sm90_arguments(function), function, device=device or "cpu")


def runnable(spec: str, goldens: Goldens, names: Iterable[str]) -> list[str]:
    """The cases that a kernel may run, as far as its name tells; nobody else's code is imported.

    One that cannot be read is among them: running it says so.
    """
    if is_stand_in(spec):
        kernel = load_kernel(spec)
    else:
        head, _, rest = spec.partition(":")
        kind = {"stage": rest.partition(":")[0], "flashinfer-w4a8": "w4a8"}.get(head, "moe")
        kernel = Kernel(spec, (kind,), whole_arguments, run_stage, forces_tile_k=spec == "flashinfer")

    def may_run(name: str) -> bool:
        try:
            case = goldens.about(name)
        except GoldenError:
            return True
        return not kernel.unable(case["kind"], case["parameters"])

    return [name for name in names if may_run(name)]


def is_stand_in(spec: str) -> bool:
    """Whether a name is of this package's own, which needs no process of its own."""
    return spec in ("oracle", "torch-bf16") or spec.startswith("defect:")


def check_device(device: str) -> None:
    """Raise KernelError unless tensors can be put on a device and read from it, here."""
    check_instance("device", device, str)
    try:
        wanted = torch.device(device)
        if wanted.type == "cuda":
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            if (wanted.index or 0) >= count:
                raise KernelError(
                    f"device: expected one that is here, got {device!r}; torch sees {count} GPUs"
                )
        elif wanted.type != "cpu":
            torch.zeros(1, device=wanted).cpu()
    except KernelError:
        raise
    except Exception as error:
        first = printable(error).split("\\n")[0]
        raise KernelError(f"device: expected cpu, cuda or cuda:N, got {shown(device)}: {first}") from None


def environment(device: str) -> dict[str, str]:
    """Versions and machine, for the report."""
    found = {"mxfp4ref": __version__, "python": platform.python_version(), "torch": torch.__version__}
    found["machine"] = platform.platform()
    if device.startswith("cuda") and torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)}
    return found
