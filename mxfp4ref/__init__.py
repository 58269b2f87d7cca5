"""Bit-exact reference of the SM90 W4A16 MXFP4 mixture-of-experts kernel."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mxfp4ref.call import MoeCall
    from mxfp4ref.experts import Experts, Sm90Experts
    from mxfp4ref.moe import MoeTrace, Stages, forward, moe_forward, trace
    from mxfp4ref.mxfp4 import decode_ue8m0, dequantize, fp32_to_ue8m0, quantize
    from mxfp4ref.oracle import torch_ref_cutlass_fused_moe

__all__ = [
    "Experts",
    "MoeCall",
    "MoeTrace",
    "Sm90Experts",
    "Stages",
    "decode_ue8m0",
    "dequantize",
    "forward",
    "fp32_to_ue8m0",
    "moe_forward",
    "quantize",
    "torch_ref_cutlass_fused_moe",
    "trace",
]

# Imported when first used: pytest loads this package's plugin at every start, which must not load torch.
_MODULES = {
    "call": ("MoeCall",),
    "experts": ("Experts", "Sm90Experts"),
    "moe": ("MoeTrace", "Stages", "forward", "moe_forward", "trace"),
    "mxfp4": ("decode_ue8m0", "dequantize", "fp32_to_ue8m0", "quantize"),
    "oracle": ("torch_ref_cutlass_fused_moe",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"mxfp4ref.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
