"""Run any kernel over the goldens, compare every bit, and name what is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mxfp4ref._lazy import lazy

if TYPE_CHECKING:
    from mxfp4ref.conformance.comparison import assert_bits_equal
    from mxfp4ref.conformance.diagnosis import Diagnosis, diagnose
    from mxfp4ref.conformance.kernels import Kernel, KernelError, load_kernel
    from mxfp4ref.conformance.suite import CaseResult, Report, run, run_case

__all__ = [
    "CaseResult",
    "Diagnosis",
    "Kernel",
    "KernelError",
    "Report",
    "assert_bits_equal",
    "diagnose",
    "load_kernel",
    "run",
    "run_case",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "comparison": ("assert_bits_equal",),
        "diagnosis": ("Diagnosis", "diagnose"),
        "kernels": ("Kernel", "KernelError", "load_kernel"),
        "suite": ("CaseResult", "Report", "run", "run_case"),
    },
)
