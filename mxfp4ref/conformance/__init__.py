"""Run any kernel over the goldens, compare every bit, and name what is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mxfp4ref._lazy import lazy

if TYPE_CHECKING:
    from mxfp4ref.conformance.bounds.call_bounds import Bounds, bound
    from mxfp4ref.conformance.comparison import assert_bits_equal, differing, first_difference
    from mxfp4ref.conformance.diagnosis import Diagnosis, NothingDiffers, diagnose
    from mxfp4ref.conformance.kernels.adapters import Kernel, KernelError, Skip
    from mxfp4ref.conformance.kernels.loading import load_kernel
    from mxfp4ref.conformance.options import Options, Search
    from mxfp4ref.conformance.results import CaseResult, Report
    from mxfp4ref.conformance.suite import Interrupted, run, run_case

__all__ = [
    "Bounds",
    "CaseResult",
    "Diagnosis",
    "Interrupted",
    "Kernel",
    "KernelError",
    "NothingDiffers",
    "Options",
    "Report",
    "Search",
    "Skip",
    "assert_bits_equal",
    "bound",
    "diagnose",
    "differing",
    "first_difference",
    "load_kernel",
    "run",
    "run_case",
]

# Lazy, because pytest loads the plugin of this package at every start, and that must not load torch.
__getattr__, __dir__ = lazy(
    __name__,
    {
        "kernels.adapters": ("Kernel", "KernelError", "Skip"),
        "bounds.call_bounds": ("Bounds", "bound"),
        "comparison": ("assert_bits_equal", "differing", "first_difference"),
        "diagnosis": ("Diagnosis", "NothingDiffers", "diagnose"),
        "kernels.loading": ("load_kernel",),
        "options": ("Options", "Search"),
        "results": ("CaseResult", "Report"),
        "suite": ("Interrupted", "run", "run_case"),
    },
)
