"""Where new tensors are, whatever the caller's default is."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["on_cpu"]


def on_cpu() -> AbstractContextManager[object]:
    """New tensors on the CPU; without torch's context where they are anyway, as it slows every operation."""
    return nullcontext() if torch.empty(0).device.type == "cpu" else torch.device("cpu")
