"""A search that takes any NaN for another one where their bits alone tell a kernel from what predicts it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.families.engine import Result, investigate
from mxfp4ref.conformance.families.hypothesis import Pipeline
from mxfp4ref.conformance.families.telling import told

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
    found, finding = [m for m in again.matches if m.exact], again.finding
    if finding.exact and bool(alike.isnan()[differing(alike, want)].all()):
        # NaN is what many mistakes give: alone it shows none but those that concern it.
        found = [m for m in found if "nan" in m.hypothesis.words.lower()]
        finding = told(found, again.evidence, [pipeline.call])
    if not found:
        return result
    sentence = f"{finding.sentence}; but for the bits of NaN, which are others than the SM90 kernel's 0x7FFF"
    matches = tuple(replace(m, exact=False) for m in found)
    finding = replace(finding, sentence=sentence, exact=False)
    return replace(again, matches=matches, finding=finding, tried=result.tried + again.tried)
