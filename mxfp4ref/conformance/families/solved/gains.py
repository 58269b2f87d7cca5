"""What the activation gains with GEMM1's output; whether errors are as of one factor on it, of one row, or a bias."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref.conformance.families.sampled import Sample

__all__ = ["gains", "grows_alike", "of_another_fc2_bias", "of_one_row"]

_FEWEST = 5  # tokens
_FAR = 4.0  # standard errors
_PARALLEL, _LOUD = 0.99, 8.0  # the cosine of the angle between errors, and how many roundings these are
_COLUMNS = 16  # that an error has at least, in effect
_LEVERAGE = 0.9  # of a token, above which the others say too little of it
_EXPLAINED = 0.9  # of the errors' squares that roundings do not make
_TOLD = 4  # tokens of which they do not


def gains(sample: Sample) -> Tensor:
    """What the activation gains with up and with gate, `[n, 2I]`, for SwiGLU without parameters."""
    sigmoid = torch.sigmoid(sample.gate)
    return torch.cat((sample.gate * sigmoid, sample.up * sigmoid * (1 + sample.gate * (1 - sigmoid))), 1)


def grows_alike(some: list[Sample]) -> bool:
    """Whether errors are as of a factor on GEMM1's output that tokens share, as no roundings to nearest give it.

    Of each token the factor is fitted, less what are sums of the right rows.
    """
    found = []
    for sample in some:
        up, gate = gains(sample).chunk(2, 1)
        more = torch.einsum("n,nhi,ni->h", sample.weights, sample.second, up * sample.up + gate * sample.gate)
        direction = sample.beside_rows(more)
        found.append(float(sample.error @ direction / (direction @ direction).clamp(min=1e-300)))
    factors = torch.tensor(found, dtype=torch.float64)
    if len(factors) < _FEWEST:
        return False
    return bool(factors.mean().abs() > _FAR * factors.std() * len(factors) ** -0.5)


def of_one_row(some: list[Sample]) -> bool:
    """Whether errors of tokens that share no expert are multiples of one row, which therefore none of them has.

    Of a token's own experts' weights GEMM2 makes no row that it makes of others' too.
    """
    loud = [s for s in some if s.loudness > _LOUD and _spread(s.error) >= _COLUMNS]
    if len(loud) < _FEWEST:
        return False
    first, *others = loud
    unit = first.error / first.error.norm()
    apart = [s for s in others if not set(s.experts.tolist()) & set(first.experts.tolist())]
    return bool(apart) and all(float((s.error @ unit).abs() / s.error.norm()) > _PARALLEL for s in others)


def _spread(error: Tensor) -> float:
    """As how many columns of one size the error is."""
    return float(error.square().sum().square() / error.pow(4).sum())


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
    if int(told.sum()) < _TOLD:
        return False
    rest = ((errors - hat @ errors) / (1 - leverage.clamp(max=_LEVERAGE))[:, None])[told]
    total, quiet = errors[told].square().sum(), (1 / (1 - leverage[told])).sum() * errors.shape[1]
    left = float((rest.square().sum() - quiet) / (total - quiet).clamp(min=1e-300))
    return left <= 1 - _EXPLAINED
