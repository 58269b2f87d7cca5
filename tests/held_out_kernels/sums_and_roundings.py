"""Right in the real numbers, wrong in the bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref import MoeCall, Stages, forward
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.fp32 import to_bf16
from mxfp4ref.sm90.tactics import Tactic
from tests.held_out_kernels.by_hand import groups_of, layer, right_gemm
from tests.held_out_kernels.definition import wrong

Maybe = Tensor | None


def _truncated(x: Tensor, bits: int) -> Tensor:
    """float32 with its lowest bits cut off."""
    kept = (x.contiguous().view(torch.int32) >> bits << bits).view(torch.float32)
    return torch.where(x.isfinite(), kept, x)


def _cut(x: Tensor) -> Tensor:
    return to_bf16(_truncated(x.float(), 16))


def _split(parts: int, dtype: torch.dtype) -> Callable[..., Tensor]:
    """A GEMM that cuts K into parts and adds them up in a type."""

    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        size = -(-scales.shape[1] // parts)
        total = torch.zeros(len(x), len(packed), dtype=dtype)
        for at in range(0, scales.shape[1], size):
            k = slice(32 * at, 32 * (at + size)), slice(16 * at, 16 * (at + size)), slice(at, at + size)
            part = right_gemm(
                x[:, k[0]].contiguous(), packed[:, k[1]].contiguous(), scales[:, k[2]].contiguous(), tactic
            )
            total = total + part.to(dtype)
        return total.float()

    return gemm


@wrong(
    stage="fc1",
    says=("split|partial|parts|halves", "bf16|bfloat16|round"),
    story="GEMM1 is cut in two along K and the halves are added in bf16",
)
def fc1_split_k_in_bf16(call: MoeCall) -> Tensor:
    return layer(call, gemm1=_split(2, torch.bfloat16))


@wrong(
    stage="fc2",
    says=("split|partial|parts|halves|order|sum", "\\bK\\b|group|order|split"),
    story="GEMM2 is cut in two along K and the halves are added in float32",
)
def fc2_split_k_in_fp32(call: MoeCall) -> Tensor:
    return layer(call, gemm2=_split(2, torch.float32))


@wrong(
    stage="fc2",
    says=("fp16|float16|half", "accum|sum|group|partial|GEMM ?2|fc2"),
    story="GEMM2 accumulates its K groups in fp16",
)
def fc2_accumulates_in_fp16(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        total = torch.zeros(len(x), len(packed), dtype=torch.float16)
        for part in groups_of(x, packed, scales):
            total = (total.float() + part).half()
        return total.float()

    return layer(call, gemm2=gemm)


@wrong(
    stage="fc1",
    says=("tf32|10 bits|10-bit|truncat|mantissa", "GEMM ?1|fc1|accum|first"),
    story="GEMM1's accumulators pass through tf32",
)
def fc1_accumulators_in_tf32(call: MoeCall) -> Tensor:
    return layer(call, fc1=lambda rows, acc: to_bf16(_truncated(acc, 13)))


@wrong(
    stage="fc1",
    says=("descend|revers|order|backward", "group|\\bK\\b|sum|accum"),
    story="GEMM1 takes the K groups from the last to the first",
)
def fc1_groups_backwards(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        parts = x.unflatten(1, (-1, 32)), packed.unflatten(1, (-1, 16))
        flipped = [part.flip(1).flatten(1) for part in parts]
        wide = replace(tactic, tile=(*tactic.tile[:2], 128))
        return right_gemm(flipped[0], flipped[1], scales.flip(1), wide)

    return layer(call, gemm1=gemm)


@wrong(
    stage=("fc1", "activation"),
    says=(
        "fp32|float32|not rounded|unrounded|no rounding|without rounding|kept",
        "GEMM ?1|fc1|first|activation",
    ),
    story="a fused activation takes GEMM1's accumulators as they are, without their rounding to bf16",
)
def fc1_output_kept_in_fp32(call: MoeCall) -> Tensor:
    return forward(call, replace(Stages(), round_fc1=lambda x: x))


@wrong(
    stage=("fc2", "finalize"),
    says=(
        "fp32|float32|not rounded|unrounded|no rounding|without rounding|kept",
        "GEMM ?2|fc2|second|finalize",
    ),
    story="a fused sum takes GEMM2's accumulators as they are",
)
def fc2_output_kept_in_fp32(call: MoeCall) -> Tensor:
    return forward(call, replace(Stages(), round_fc2=lambda x: x))


@wrong(
    stage="activation",
    says=("truncat|toward zero|towards zero|chop|cut|RZ", "activation"),
    story="the activation is cut off to bf16, not rounded",
)
def activation_truncated(call: MoeCall) -> Tensor:
    return forward(call, replace(Stages(), round_activation=_cut))


@wrong(
    stage="finalize",
    says=("truncat|toward zero|towards zero|chop|cut|RZ", "output|finalize|sum|result"),
    story="the output is cut off to bf16, not rounded",
)
def output_truncated(call: MoeCall) -> Tensor:
    return forward(call, replace(Stages(), round_output=_cut))


@wrong(
    stage="activation",
    says=("fp16|float16|half|twice|double", "activation"),
    story="the activation goes through fp16 on its way to bf16",
)
def activation_through_fp16(call: MoeCall) -> Tensor:
    return forward(call, replace(Stages(), round_activation=lambda x: to_bf16(x.half().float())))


@wrong(
    stage="finalize",
    says=("fp16|float16|half", "output|finalize|sum|accum|slot"),
    story="the sum over slots is accumulated in fp16",
)
def sum_in_fp16(call: MoeCall) -> Tensor:
    def in_fp16(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Maybe) -> Tensor:
        total = torch.zeros(len(by_slot), by_slot.shape[2], dtype=torch.float16)
        for slot in range(by_slot.shape[1]):
            one = slice(slot, slot + 1)
            term = finalize(by_slot[:, one], local[:, one], weights[:, one], bias)
            total = (total.float() + term).half()
        return total.float()

    return layer(call, finalize=in_fp16)


@wrong(
    stage="finalize",
    says=("weight|product|term|expert", "bf16|bfloat16|round"),
    story="each weighted expert output is rounded to bf16 before it is added in float32",
)
def terms_rounded_to_bf16(call: MoeCall) -> Tensor:
    def rounded(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Maybe) -> Tensor:
        total = torch.zeros(len(by_slot), by_slot.shape[2])
        for slot in range(by_slot.shape[1]):
            one = slice(slot, slot + 1)
            total = total + to_bf16(finalize(by_slot[:, one], local[:, one], weights[:, one], bias)).float()
        return total

    return layer(call, finalize=rounded)
