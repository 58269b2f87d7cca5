"""Hypotheses on the input: normalised once more, row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypothesis import Hypothesis, Pipeline
from mxfp4ref.sm90 import fp32

__all__ = ["norm_hypotheses"]

_Norm = Callable[[Tensor], Tensor]


def _norms() -> Iterator[tuple[str, _Norm]]:
    for eps in (0.0, 1e-6, 1e-5):
        yield (
            f"normalised once more to a mean square of 1 (RMS norm, with {eps:g} added under the root)",
            lambda x, e=eps: x / (x.square().mean(1, keepdim=True) + e).sqrt(),
        )
    yield (
        "normalised once more to a mean square of 1 (RMS norm, with 1e-6 added to the root)",
        lambda x: x / (x.square().mean(1, keepdim=True).sqrt() + 1e-6),
    )
    yield (
        "normalised once more to a mean of 0 and a variance of 1 (layer norm)",
        lambda x: torch.nn.functional.layer_norm(x, x.shape[1:], eps=1e-5),
    )
    yield "divided by its length (L2 norm)", lambda x: torch.nn.functional.normalize(x, dim=1)
    yield "divided by its largest magnitude", lambda x: x / x.abs().amax(1, keepdim=True)
    yield "divided by the root of H", lambda x: x / x.shape[1] ** 0.5
    yield "multiplied by the root of H", lambda x: x * x.shape[1] ** 0.5
    yield "of each row less its mean", lambda x: x - x.mean(1, keepdim=True)


def norm_hypotheses() -> Iterator[Hypothesis]:
    """Of bf16 input; rows that are not finite are left."""
    for words, norm in _norms():

        def on(pipeline: Pipeline, norm: _Norm = norm) -> Pipeline:
            x = fp32.widen(pipeline.call.input.contiguous())
            usable = x.isfinite().all(1, keepdim=True) & x.any(1, keepdim=True)
            return pipeline.calling(input=fp32.to_bf16(torch.where(usable, norm(x), x)))

        yield Hypothesis("input", ("input", "fc1"), f"the input (hidden states) is {words}", on, 1.3)
