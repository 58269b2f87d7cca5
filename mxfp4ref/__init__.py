"""Bit-exact reference of the SM90 W4A16 MXFP4 mixture-of-experts kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mxfp4ref._lazy import lazy
from mxfp4ref._version import __version__

if TYPE_CHECKING:
    from mxfp4ref.formats.experts import Experts, Sm90Experts
    from mxfp4ref.formats.mxfp4 import decode_ue8m0, dequantize
    from mxfp4ref.formats.quantize import fp32_to_ue8m0, quantize
    from mxfp4ref.model.call import MoeCall
    from mxfp4ref.model.flashinfer import torch_ref_cutlass_fused_moe
    from mxfp4ref.model.forward import MoeTrace, Stages, forward, trace
    from mxfp4ref.sm90.tactics import Sm90Kernel, Tactic

__all__ = [
    "Experts",
    "MoeCall",
    "MoeTrace",
    "Sm90Experts",
    "Sm90Kernel",
    "Stages",
    "Tactic",
    "__version__",
    "decode_ue8m0",
    "dequantize",
    "forward",
    "fp32_to_ue8m0",
    "quantize",
    "torch_ref_cutlass_fused_moe",
    "trace",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "formats.experts": ("Experts", "Sm90Experts"),
        "formats.mxfp4": ("decode_ue8m0", "dequantize"),
        "formats.quantize": ("fp32_to_ue8m0", "quantize"),
        "model.call": ("MoeCall",),
        "model.flashinfer": ("torch_ref_cutlass_fused_moe",),
        "model.forward": ("MoeTrace", "Stages", "forward", "trace"),
        "sm90.tactics": ("Sm90Kernel", "Tactic"),
    },
)
