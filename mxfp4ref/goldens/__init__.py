"""Stored cases: reading and verifying them, what they ask for, and writing them from nothing."""

from mxfp4ref.goldens.case import Case, GoldenError, derive, tensor_bytes
from mxfp4ref.goldens.runs import Run, run_stage, runs
from mxfp4ref.goldens.store import Goldens, find_root, open_goldens

__all__ = [
    "Case",
    "GoldenError",
    "Goldens",
    "Run",
    "derive",
    "find_root",
    "open_goldens",
    "run_stage",
    "runs",
    "tensor_bytes",
]
