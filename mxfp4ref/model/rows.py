"""Which rows the experts of a rank get: the slots of a call, sorted by expert."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mxfp4ref._compiled import as_numpy

__all__ = ["Array", "Rows", "local_experts", "route", "select_local"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Rows:
    """R routed rows, expert by expert, in token order within an expert; arrays, or tensors of a device."""

    token: Any  # [R]
    slot: Any  # [R]
    expert: Any  # [R]
    position: Any  # [R], the row's position among all rows of its expert
    ends: list[int]  # where each expert's rows end

    @property
    def used(self) -> list[int]:
        """The experts that have rows."""
        return [expert for expert, (start, end) in enumerate(pairwise([0, *self.ends])) if start < end]

    @property
    def by_expert(self) -> list[tuple[int, slice]]:
        """Each expert that has rows, and which; without any row, an empty piece keeps every shape and dtype."""
        bounds = [0, *self.ends]
        return [(expert, slice(*bounds[expert : expert + 2])) for expert in self.used] or [(0, slice(0, 0))]

    def on(self, device: torch.device) -> Rows:
        """Arrays as tensors."""
        arrays = self.token, self.slot, self.expert, self.position
        token, slot, expert, position = (torch.from_numpy(array).to(device) for array in arrays)
        return Rows(token, slot, expert, position, self.ends)


def select_local(ids: Tensor, num_local: int, ep_size: int, ep_rank: int) -> Tensor:
    """This rank's index of each slot's expert, `[M, k] int64`; -1 where the slot is not this rank's.

    The rank owns the global ids `[ep_rank * num_local, (ep_rank + 1) * num_local)`. Where a token names an
    expert twice only the first slot counts (`docs/arithmetic.md`, section 5).
    """
    local = local_experts(as_numpy(ids.to(torch.int64).cpu(), np.int64), num_local, ep_rank)
    return torch.from_numpy(local).to(ids.device)


def local_experts(ids: Array, num_local: int, ep_rank: int) -> Array:
    """As `select_local`."""
    local = ids.astype(np.int64) - ep_rank * num_local
    local[(local < 0) | (local >= num_local)] = -1
    for slot in range(1, local.shape[1]):
        repeated = (local[:, :slot] == local[:, slot : slot + 1]).any(1)
        local[repeated, slot] = -1
    return local


def route(local: Array, before: Array) -> Rows:
    """The routed rows of some tokens, `before [E]` of each expert's rows being earlier; they are added to it."""
    flat, top_k = local.reshape(-1), local.shape[1]
    counts = np.bincount(flat + 1, minlength=len(before) + 1)[1:]  # without skipped slots, -1
    ends = counts.cumsum()
    routed = np.argsort(flat, kind="stable")[len(flat) - ends[-1] :]  # skipped slots come first
    expert = flat[routed]
    position = np.arange(len(routed)) + (before + counts - ends)[expert]
    before += counts
    return Rows(routed // top_k, routed % top_k, expert, position, ends.tolist())
