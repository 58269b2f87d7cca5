"""Stored cases: reading and verifying them, what they ask for, and writing them from nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mxfp4ref._lazy import lazy

if TYPE_CHECKING:
    from mxfp4ref.goldens.case import Case, derive, tensor_bytes
    from mxfp4ref.goldens.runs import Run, run_stage
    from mxfp4ref.goldens.store import GoldenError, Goldens, find_root, open_goldens

__all__ = [
    "Case",
    "GoldenError",
    "Goldens",
    "Run",
    "derive",
    "find_root",
    "open_goldens",
    "run_stage",
    "tensor_bytes",
]

# Lazy, so that the names of the cases are there without torch. The function `runs` has the name of its module.
__getattr__, __dir__ = lazy(
    __name__,
    {
        "case": ("Case", "derive", "tensor_bytes"),
        "runs": ("Run", "run_stage"),
        "store": ("GoldenError", "Goldens", "find_root", "open_goldens"),
    },
)
