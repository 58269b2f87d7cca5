"""In a server: the oracle in the kernel's place (`swap`) or beside it (`shadow`); calls recorded, and replayed.

`import mxfp4ref.engine` does what `MXFP4REF` in the environment says, which is also what vLLM and sglang do when they
load their plugins. Without it, nothing happens.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mxfp4ref._lazy import lazy

if TYPE_CHECKING:
    from mxfp4ref.engine.counting import Counts
    from mxfp4ref.engine.fitting import Fit, fitting_kernels
    from mxfp4ref.engine.invariance import Invariance
    from mxfp4ref.engine.modes import counts, restore, shadow, start, swap
    from mxfp4ref.engine.recorder import Recorder
    from mxfp4ref.engine.replaying import ReplayOptions, ReplayReport, ReplayResult, replay

__all__ = [
    "Counts",
    "Fit",
    "Invariance",
    "Recorder",
    "ReplayOptions",
    "ReplayReport",
    "ReplayResult",
    "counts",
    "fitting_kernels",
    "replay",
    "restore",
    "shadow",
    "start",
    "swap",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "counting": ("Counts",),
        "fitting": ("Fit", "fitting_kernels"),
        "invariance": ("Invariance",),
        "modes": ("counts", "restore", "shadow", "start", "swap"),
        "recorder": ("Recorder",),
        "replaying": ("ReplayOptions", "ReplayReport", "ReplayResult", "replay"),
    },
)

if os.environ.get("MXFP4REF"):
    __getattr__("start")()
