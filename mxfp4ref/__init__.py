"""Bit-exact reference of the SM90 W4A16 MXFP4 mixture-of-experts kernel."""

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
