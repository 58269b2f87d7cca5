"""Kernels of which something false was once called proven: near underflow, and of sums in few bits."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward
from mxfp4ref.formats.mxfp4 import dequantize
from mxfp4ref.sm90.tactics import Tactic
from tests.held_out_kernels.by_hand import layer, with_experts
from tests.held_out_kernels.definition import wrong

FC2 = "GEMM ?2|fc2|second GEMM"
TINY = 2.0**-100


@wrong(
    stage="fc2",
    says=(f"{FC2}|underflow|subnormal", "scale|group|underflow|subnormal"),
    story="where all outputs are tiny every third token takes another path, with fc2's scales one K group late",
)
def tiny_tokens_have_late_fc2_scales(call: MoeCall) -> Tensor:
    right = forward(call)
    scales = call.experts.fc2_scales
    assert scales is not None
    if not right.numel() or not bool((right.float().abs() < TINY).all()):
        return right
    right[2::3] = forward(with_experts(call, fc2_scales=scales.roll(1, 2)))[2::3]
    return right


@wrong(
    stage="finalize",
    says=("weight|underflow|subnormal", "slot|underflow|subnormal"),
    story="where all outputs are tiny the last token's routing weights are those of its slots in reverse",
)
def tiny_token_has_its_weights_in_reverse(call: MoeCall) -> Tensor:
    right = forward(call)
    if not right.numel() or not bool((right.float().abs() < TINY).all()):
        return right

    def weights(local: Tensor, weights: Tensor) -> Tensor:
        return torch.cat([weights[:-1], weights[-1:].flip(1)])

    return layer(call, weights=weights)


@wrong(
    stage="fc2",
    says=(FC2, "bf16|bfloat16|round|precis|order|sum|accum"),
    story="GEMM2 adds its products one by one in bf16",
)
def fc2_products_added_in_bf16(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        weights = dequantize(packed, scales, convention="sm90", dtype=torch.float32)
        total = torch.zeros(len(x), len(weights), dtype=torch.bfloat16)
        for k in range(x.shape[1]):
            total = (total.float() + x[:, k, None].float() * weights[:, k]).bfloat16()
        return total.float()

    return layer(call, gemm2=gemm)
