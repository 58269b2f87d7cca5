"""In a running engine: the oracle in the kernel's place (`swap`), or beside it (`shadow`).

`import mxfp4ref.engine` does what `MXFP4REF` in the environment says, which is also what vLLM and sglang do when they
load their plugins. Without it, nothing happens.
"""

from __future__ import annotations

import os

from mxfp4ref._lazy import lazy

__all__ = ["Counts", "counts", "restore", "shadow", "start", "swap"]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "counting": ("Counts",),
        "modes": ("counts", "restore", "shadow", "start", "swap"),
    },
)

if os.environ.get("MXFP4REF"):
    __getattr__("start")()
