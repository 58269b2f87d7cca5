"""A search that takes any NaN for another one where their bits alone tell a kernel from what predicts it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.families.engine import Result, investigate
from mxfp4ref.conformance.families.hypothesis import Finding, Pipeline
from mxfp4ref.conformance.families.telling import told
from mxfp4ref.conformance.findings.finding import added

__all__ = ["investigated"]

_NAN = 0x7FFF  # the SM90 kernel's


def investigated(pipeline: Pipeline, got: Tensor, want: Tensor, **how: Any) -> Result:
    """As `investigate`; where nothing predicts every bit, what does but for the bits of NaN, which is not exact.

    Where NaN is right and has other bits, no hypothesis gives these: they are the kernel's habit.
    """
    nan = torch.full_like(got.view(torch.int16), _NAN).view(got.dtype)
    alike = torch.where(got.isnan(), nan, got)
    others = differing(alike, got)
    if not bool(others.any()) or not bool(differing(alike, want).any()):
        return investigate(pipeline, got, want, **how)
    tried = 0
    if not bool((others & want.isnan()).any()):
        result = investigate(pipeline, got, want, **how)
        if any(m.exact for m in result.matches):
            return result
        tried = result.tried
    again = investigate(pipeline, alike, want, **how)
    found, finding = list(again.matches), again.finding
    only_nan = bool(alike.isnan()[differing(alike, want)].all())
    if only_nan and not found:
        return replace(again, finding=Finding())
    if only_nan and finding.exact:
        # NaN is what many mistakes give: alone it shows none but those that concern it.
        found = [m for m in found if m.exact and "nan" in m.hypothesis.words.lower()]
        finding = told(found, again.evidence, [pipeline.call])
    if finding.sentence:
        besides = "; but for the bits of NaN, which are others than the SM90 kernel's 0x7FFF"
        finding = replace(finding, sentence=added(finding.sentence, besides), exact=False)
    matches = tuple(replace(m, exact=False) for m in found)
    return replace(again, matches=matches, finding=finding, tried=tried + again.tried)
