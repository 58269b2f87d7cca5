"""What the activation gains with GEMM1's output, and whether all tokens' errors are as of one factor on it."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref.conformance.families.sampled import Sample

__all__ = ["gains", "grows_alike"]

_FEWEST = 5  # tokens
_FAR = 4.0  # standard errors


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
