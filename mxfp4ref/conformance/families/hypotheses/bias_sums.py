"""Hypotheses on the weighted sum: the fc2 biases are added to the rows' sum, when it is finished or first of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypothesis import Hypothesis, of_sum
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90 import fp32

__all__ = ["bias_sum_hypotheses"]

_Maybe = Tensor | None


def bias_sum_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """For a call whose fc2 biases are added on this rank."""
    if call.experts.fc2_biases is None or call.tp_rank != 0:
        return
    for weighted, with_weight, cost in (
        (False, "without the routing weight", 1.0),
        (True, "with its weight", 1.2),
    ):
        for where in ("to the finished sum of the rows, slot by slot", "before all rows, slot by slot"):
            first = where.startswith("before")
            words = f"the fc2 bias is added {where}, {with_weight}"
            yield of_sum("fc2 bias", ("finalize",), words, _sum(weighted, first=first), cost + 0.2 * first)
        words = f"the sum of the fc2 biases, {with_weight}, is added to the finished sum of the rows"
        yield of_sum("fc2 bias", ("finalize",), words, _sum(weighted, first=None), cost + 0.3)


def _sum(weighted: bool, *, first: bool | None) -> Callable[..., Tensor]:
    """Rows and biases one after the other; with `first` None each in a sum of its own."""

    def run(y: Tensor, local: Tensor, weights: Tensor, bias: _Maybe = None) -> Tensor:
        def added(total: Tensor, row: Tensor, slot: int, by_weight: bool) -> Tensor:
            weight = weights[:, slot, None].expand_as(row).contiguous()
            more = fp32.fma(weight, row, total) if by_weight else fp32.add(total, row)
            return torch.where(local[:, slot, None] >= 0, more, total)

        def rows(total: Tensor) -> Tensor:
            for slot in range(local.shape[1]):
                total = added(total, fp32.widen(y[:, slot].contiguous()), slot, True)
            return total

        def biases(total: Tensor) -> Tensor:
            if bias is None:
                return total
            for slot in range(local.shape[1]):
                total = added(total, fp32.widen(bias[local[:, slot].clamp(min=0)]), slot, weighted)
            return total

        zero = torch.zeros(len(y), y.shape[2], dtype=torch.float32, device=y.device)
        if first is None:
            return fp32.add(rows(zero), biases(zero))
        return rows(biases(zero)) if first else biases(rows(zero))

    return run
