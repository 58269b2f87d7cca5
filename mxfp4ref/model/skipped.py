"""How many slots the drop-in has skipped that `strict=True` would have refused: `strict="count"`."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from mxfp4ref.model.call import PADDING_ID, MoeCall

__all__ = ["SkippedSlots", "count_skipped_slots", "reset_skipped_slots", "skipped_slots"]


@dataclass(frozen=True)
class SkippedSlots:
    """Counts since the process began, or since they were reset.

    Attributes:
        calls: calls with at least one such slot.
        owned_by_none: slots whose id is neither an expert's nor padding.
        repeated: slots that name an expert which an earlier slot of the token names.
    """

    calls: int = 0
    owned_by_none: int = 0
    repeated: int = 0


_counts: dict[torch.device, Tensor] = {}  # [3] int64 a device: counting must not wait for a GPU
_lock = threading.Lock()


def count_skipped_slots(call: MoeCall) -> None:
    """Count a call. Nothing waits for a GPU, and a CUDA graph counts at every replay.

    Raises:
        RuntimeError: a CUDA graph is being captured, and nothing was counted on that device before.
    """
    ids = call.token_selected_experts
    ordered = ids.sort(dim=1).values
    outside = (ordered < PADDING_ID) | (ordered >= call.num_global_experts)
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != PADDING_ID) & ~outside[:, 1:]
    slots = torch.stack([outside.sum(), repeated.sum()])
    found = torch.cat([slots.any().to(torch.int64)[None], slots])
    with _lock:
        if ids.device not in _counts:
            if ids.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"{ids.device}: a CUDA graph cannot capture the first call that counts skipped slots; make the "
                    "same call once before the capture"
                )
            _counts[ids.device] = torch.zeros_like(found)
        # Streams may add at the same time; on a GPU this is an atomic addition, `+=` is none.
        _counts[ids.device].index_add_(0, torch.arange(len(found), device=ids.device), found)


def skipped_slots() -> SkippedSlots:
    """The counts of all devices together; waits for GPUs that count."""
    with _lock:
        totals = [counts.tolist() for counts in _counts.values()]
    return SkippedSlots(*map(sum, zip(*totals, strict=True)))


def reset_skipped_slots() -> None:
    """Count from zero again."""
    with _lock:
        for counts in _counts.values():
            counts.zero_()
