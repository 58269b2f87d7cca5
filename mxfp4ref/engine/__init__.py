"""In a server: calls that a running engine recorded, replayed; a recorder for engines without one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mxfp4ref._lazy import lazy

if TYPE_CHECKING:
    from mxfp4ref.engine.fitting import Fit, fitting_kernels
    from mxfp4ref.engine.invariance import Invariance
    from mxfp4ref.engine.recorder import Recorder
    from mxfp4ref.engine.replaying import ReplayOptions, ReplayReport, ReplayResult, replay

__all__ = [
    "Fit",
    "Invariance",
    "Recorder",
    "ReplayOptions",
    "ReplayReport",
    "ReplayResult",
    "fitting_kernels",
    "replay",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "fitting": ("Fit", "fitting_kernels"),
        "invariance": ("Invariance",),
        "recorder": ("Recorder",),
        "replaying": ("ReplayOptions", "ReplayReport", "ReplayResult", "replay"),
    },
)
