"""The kernel's weighted sum over a token's experts in replaceable parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mxfp4ref.sm90 import fp32

__all__ = ["FinalizeVariant", "as_they_come", "fused"]


def fused(acc: Tensor, scale: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    return fp32.fma(scale, fp32.add(y, bias), acc)


def as_they_come(local: Tensor, scales: Tensor) -> Tensor:
    return torch.arange(local.shape[1], device=local.device).expand_as(local)


@dataclass(frozen=True)
class FinalizeVariant:
    """The kernel's finalize with something changed, called like `finalize`.

    Attributes:
        step: the sum so far, a slot's weight, its row and the row's bias to the next sum, all `[M, H] float32`.
            Where the layer has no bias it is -0, which changes no number.
        order: local expert indices and weights, `[M, k]` each, to the order of each token's slots, `[M, k] int64`.
        first: what a sum starts from.
    """

    step: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = fused
    order: Callable[[Tensor, Tensor], Tensor] = as_they_come
    first: float = 0.0

    def __call__(
        self, fc2_output: Tensor, local: Tensor, scales: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        order = self.order(local, scales)
        fc2_output = fc2_output.gather(1, order.unsqueeze(2).expand_as(fc2_output))
        local, scales = local.gather(1, order), scales.gather(1, order)
        acc = torch.full_like(fc2_output[:, 0], self.first, dtype=torch.float32)
        for expert, scale, row in zip(local.unbind(1), scales.unbind(1), fc2_output.unbind(1), strict=True):
            y = fp32.widen(row)
            b = torch.full_like(y, -0.0) if bias is None else fp32.widen(bias[expert.clamp(min=0)])
            acc = torch.where(expert[:, None] >= 0, self.step(acc, scale[:, None].expand_as(y), y, b), acc)
        return torch.where((local >= 0).any(1, keepdim=True), acc, 0.0)
