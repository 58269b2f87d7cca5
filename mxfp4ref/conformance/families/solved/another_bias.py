"""Whether another fc2 bias explains the errors: solved by expert, and each token tried without its own equations."""

from __future__ import annotations

import torch

from mxfp4ref.conformance.families.sampled import Sample

__all__ = ["of_another_fc2_bias"]

_LEVERAGE = 0.9  # of a token, above which the others say too little of it
_EXPLAINED = 0.9  # of the errors' squares that roundings do not make
_FEWEST = 4  # tokens


def of_another_fc2_bias(some: list[Sample]) -> bool:
    """Whether a row for each expert, times the routing weights, predicts the errors of tokens not fitted to."""
    ids = sorted({e for s in some for e in s.experts.tolist()})
    weights = torch.zeros(len(some), len(ids), dtype=torch.float64)
    for row, sample in zip(weights, some, strict=True):
        for weight, expert in zip(sample.weights, sample.experts.tolist(), strict=True):
            row[ids.index(expert)] += weight
    errors = torch.stack([s.error for s in some])
    units = (
        torch.stack([s.noise for s in some]).mean(1, keepdim=True).sqrt()
    )  # each token counts by its roundings
    weights, errors = weights / units, errors / units
    hat = weights @ torch.linalg.pinv(weights)
    leverage = hat.diagonal()
    told = leverage < _LEVERAGE
    if int(told.sum()) < _FEWEST:
        return False
    rest = ((errors - hat @ errors) / (1 - leverage.clamp(max=_LEVERAGE))[:, None])[told]
    total, quiet = errors[told].square().sum(), (1 / (1 - leverage[told])).sum() * errors.shape[1]
    left = float((rest.square().sum() - quiet) / (total - quiet).clamp(min=1e-300))
    return left <= 1 - _EXPLAINED
