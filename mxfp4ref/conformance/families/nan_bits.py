"""A search that takes any NaN for another one where their bits alone tell a kernel from what predicts it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.families.engine import Result, investigate
from mxfp4ref.conformance.families.hypothesis import Pipeline
from mxfp4ref.conformance.families.search import Match

__all__ = ["investigated"]

_NAN = 0x7FFF  # the SM90 kernel's


def investigated(pipeline: Pipeline, got: Tensor, want: Tensor, **how: Any) -> Result:
    """As `investigate`; where nothing predicts every bit, what does but for the bits of NaN, which is not exact."""
    result = investigate(pipeline, got, want, **how)
    nan = torch.full_like(got.view(torch.int16), _NAN).view(got.dtype)
    alike = torch.where(got.isnan(), nan, got)
    if any(m.exact for m in result.matches) or not bool(differing(alike, got).any()):
        return result
    if not bool(differing(alike, want).any()):
        return result
    again = investigate(pipeline, alike, want, **how)
    told = [m for m in again.matches if m.exact]
    # NaN is what most mistakes in weights and scales give: alone it shows none of them.
    if not told or (bool(alike.isnan()[differing(alike, want)].all()) and _weights_alone(told)):
        return result
    sentence = (
        f"{again.finding.sentence}; but for the bits of NaN, which are others than the SM90 kernel's 0x7FFF"
    )
    matches = tuple(replace(m, exact=False) for m in again.matches)
    finding = replace(again.finding, sentence=sentence, exact=False)
    return replace(again, matches=matches, finding=finding, tried=result.tried + again.tried)


def _weights_alone(matches: list[Match]) -> bool:
    return all(set(m.hypothesis.stages) <= {"fc1", "fc2"} for m in matches)
