"""Whether each column of GEMM2's result has its own factor: fitted to half of the tokens, tried on the others."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref.conformance.families.sampled import Sample
from mxfp4ref.conformance.findings.finding import Evidence

__all__ = ["column_factors"]

_FEWEST = 4  # tokens
_LOUD = 4.0  # times the roundings
# Of the errors' squares that roundings do not make: the most that may be left, and times more for another fc2 bias.
_LEFT, _LEAST, _WORSE = 0.1, 0.005, 4
_SEEN = 100.0  # of a column's squares, in those of its roundings, from which its factor is told
_ALIKE = 2.0**-5  # factors that differ by less are one


def column_factors(some: list[Sample]) -> Evidence | None:
    """What follows, if factors that are the same for all tokens explain the errors."""
    loud = [s for s in some if s.loudness > _LOUD]
    if len(loud) < _FEWEST:
        return None
    error, noise = (torch.stack([getattr(s, name) for s in loud]) for name in ("error", "noise"))
    sums, bias, ones = (
        torch.stack([s.weights @ part(s) for s in loud])
        for part in (lambda s: s.y - s.bias, lambda s: s.bias, lambda s: torch.ones_like(s.y))
    )
    left = max(1 - _explained(error, sums, noise), _LEAST)
    if left > _LEFT or any(1 - _explained(error, one, noise) < _WORSE * left for one in (bias, ones)):
        return None  # another fc2 bias gives that as well
    # Where it is nearly zero, a factor of nearly zero explains the error but nothing of what is there.
    gained = _fitted(error, sums, noise)
    there = torch.minimum(error.square().sum(0), (sums + error).square().sum(0)).sum()
    rest = ((error - gained * sums).square() - noise).sum()
    if float(rest) > _LEFT * float(there):
        return None
    seen = (sums.square() / noise).sum(0) > _SEEN
    factors = 1 + gained[seen]
    low, high = (float(factors.quantile(q)) for q in (0.02, 0.98))
    if high - low < _ALIKE * max(abs(low), abs(high)):
        return None
    if bool(((factors - 1).abs().minimum(factors.abs()) < _ALIKE).all()):
        return None  # columns that are not there, or hold something else, are no product
    return Evidence(
        ("fc2", "finalize"),
        "each column of GEMM2's result has a factor of its own, the same in all tokens that were looked at, from "
        f"{low:.3g} to {high:.3g}: scales of output columns, or of rows of fc2's weights",
        3,
    )


def _fitted(error: Tensor, sums: Tensor, noise: Tensor) -> Tensor:
    """By column, what `sums` has to be multiplied with to give the error."""
    found: Tensor = (error * sums / noise).sum(0) / (sums.square() / noise).sum(0).clamp(min=1e-300)
    return found


def _explained(error: Tensor, sums: Tensor, noise: Tensor) -> float:
    """The part of every second token's error that the other tokens' factors predict, of either half the smaller."""
    found = []
    for half in (0, 1):
        fit, other = slice(half, None, 2), slice(1 - half, None, 2)
        factors = _fitted(error[fit], sums[fit], noise[fit])
        rest = ((error[other] - factors * sums[other]).square() / noise[other]).sum()
        total, quiet = (error[other].square() / noise[other]).sum(), error[other].numel()
        found.append(float((total - rest) / (total - quiet).clamp(min=1e-300)))
    return min(found)
