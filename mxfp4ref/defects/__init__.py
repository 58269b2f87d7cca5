"""Named wrong pipelines: what a conformance run must catch and name.

A `Defect` is the kernel with one thing wrong in it. The mistakes have been seen in real code of this field; the
arithmetic variants are pipelines that mean the same and round otherwise. Every one of them gives other bits
than the kernel on some call.

    for defect in DEFECTS.values():
        if defect.target == "moe" and defect.applies(call):
            print(defect.name, torch.equal(defect.run(call), forward(call)))
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from mxfp4ref.defects.activation import ACTIVATION_DEFECTS
from mxfp4ref.defects.arguments import ARGUMENT_DEFECTS
from mxfp4ref.defects.defect import Defect
from mxfp4ref.defects.dequantize import DEQUANTIZE_DEFECTS, DequantizeCall, dequantize_call
from mxfp4ref.defects.finalize import FINALIZE_DEFECTS
from mxfp4ref.defects.gemm import GEMM_DEFECTS
from mxfp4ref.defects.rounding import ROUNDING_DEFECTS
from mxfp4ref.defects.routing import ROUTING_DEFECTS
from mxfp4ref.defects.variants.router import RoutingCall, route
from mxfp4ref.defects.weights import WEIGHT_DEFECTS

__all__ = ["DEFECTS", "Defect", "DequantizeCall", "RoutingCall", "dequantize_call", "get_defect", "route"]

_ALL = (
    *WEIGHT_DEFECTS,
    *ARGUMENT_DEFECTS,
    *GEMM_DEFECTS,
    *ROUNDING_DEFECTS,
    *ACTIVATION_DEFECTS,
    *FINALIZE_DEFECTS,
    *ROUTING_DEFECTS,
    *DEQUANTIZE_DEFECTS,
)
DEFECTS: Mapping[str, Defect] = MappingProxyType({defect.name: defect for defect in _ALL})


def get_defect(name: str) -> Defect:
    """The defect of that name.

    Raises:
        ValueError: there is none; the message has the names closest to it.
    """
    if name in DEFECTS:
        return DEFECTS[name]
    close = difflib.get_close_matches(name, DEFECTS, n=3)
    hint = f"; closest: {', '.join(close)}" if close else ""
    raise ValueError(f"name: expected one of the {len(DEFECTS)} defects, got {name!r}{hint}")
