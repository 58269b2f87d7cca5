"""Named wrong pipelines: what a conformance run must catch and name.

A `Defect` is the kernel with one thing wrong in it. The mistakes have been seen in real code of this field; the
arithmetic variants are pipelines that mean the same and round otherwise. Every one of them gives other bits
than the kernel on some call.

    for defect in DEFECTS.values():
        if defect.target == "moe" and defect.applies(call):
            print(defect.name, torch.equal(defect.run(call), forward(call)))
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from mxfp4ref._validate import did_you_mean
from mxfp4ref.defects import (
    activation,
    arguments,
    dequantize,
    finalize,
    gemm,
    humming,
    rounding,
    routing,
    step_and_situ,
    ungated,
    weights,
)
from mxfp4ref.defects.definition import DEFINED, Defect
from mxfp4ref.defects.dequantize import DequantizeCall, dequantize_call
from mxfp4ref.defects.variants.router import RoutingCall, route

__all__ = ["DEFECTS", "Defect", "DequantizeCall", "RoutingCall", "dequantize_call", "get_defect", "route"]

# In the order in which data flows; importing them registers their defects.
_FAMILIES = (
    *(weights, arguments, gemm, rounding, activation, step_and_situ, ungated, finalize, routing, dequantize),
    humming,
)
DEFECTS: Mapping[str, Defect] = MappingProxyType(
    {name: DEFINED[name] for family in _FAMILIES for name in vars(family) if name in DEFINED}
)


def get_defect(name: str) -> Defect:
    """The defect of that name.

    Raises:
        ValueError: there is none; the message has the names closest to it.
    """
    if name in DEFECTS:
        return DEFECTS[name]
    hint = did_you_mean(name, DEFECTS)
    raise ValueError(f"name: expected one of the {len(DEFECTS)} defects, got {name!r}{hint}")
