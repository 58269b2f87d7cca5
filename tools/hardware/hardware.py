"""Launching the real kernel on a GPU, and what machine it ran on.

Works with an installed flashinfer or with the archive that `build_kernel.py` packs (unpack it and put the folder
on PYTHONPATH). The kernel is the package's: `mxfp4ref.conformance.kernels.flashinfer_kernel`.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mxfp4ref import MoeCall
from mxfp4ref.conformance import Kernel


def launcher(kernel: Kernel, call: MoeCall, **options: Any) -> Callable[[], Tensor]:
    """Prepare a call; the result launches the kernel on it, each time into the same output.

    Args:
        kernel: the installed flashinfer, by `flashinfer_kernel`.
        call: on the kernel's device; where the kernel can be told its tactics, it runs with those of the call.
        options: further arguments of flashinfer's function, such as `enable_pdl`.

    Before each launch the output is filled with NaN: compare it with `call.written_over(expected, torch.nan)`.
    """
    positional, keywords = kernel.prepare("moe", call)
    output: Tensor = keywords["output"]

    def launch() -> Tensor:
        output.fill_(torch.nan)
        kernel.function(*positional, **{**keywords, **options})
        return output

    return launch


def count_differences(got: Tensor, expected: Tensor) -> int:
    """How many bf16 or fp16 elements differ in any bit."""
    return int((got.view(torch.int16) != expected.view(torch.int16)).sum())


@dataclass(frozen=True)
class Provenance:
    """Where a record comes from."""

    gpu: str
    driver: str
    cuda: str
    torch: str
    python: str
    flashinfer: str

    @classmethod
    def of_this_machine(cls) -> Provenance:
        import flashinfer

        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = (
            subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
        )
        return cls(
            gpu=torch.cuda.get_device_name(),
            driver=driver,
            cuda=str(torch.version.cuda),
            torch=torch.__version__,
            python=platform.python_version(),
            flashinfer=flashinfer.__version__,
        )

    def as_dict(self) -> dict[str, str]:
        return asdict(self)
