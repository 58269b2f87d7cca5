"""The findings on cases that are no call of MXFP4 weights: W4A8, routers, quantisers, dequantisation and layouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mxfp4ref.conformance.findings.finding import Finding
from mxfp4ref.conformance.humming_words import residual_finding
from mxfp4ref.conformance.routers.routing_words import routing_finding
from mxfp4ref.conformance.values.format_words import format_finding
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.humming import call_of

__all__ = ["finding_of_stage"]


def finding_of_stage(
    kind: str, inputs: Any, outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> Finding | None:
    """What is wrong with the outputs of a case of that kind; None for kinds of which nothing is said."""
    if kind == "routing":
        return routing_finding(inputs, outputs, expected)
    if kind in ("quantize", "dequantize", "layout"):
        return format_finding(kind, inputs, outputs, expected)
    if kind == "w4a8":
        call = inputs if isinstance(inputs, MoeCall) else call_of(inputs)
        return residual_finding(call, outputs, expected)
    return None
