"""Right but for some sizes, where another path is taken; and two mistakes at once."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref import MoeCall, Stages, forward
from mxfp4ref.sm90.fp32 import to_bf16
from mxfp4ref.sm90.tactics import Tactic
from tests.held_out_kernels.by_hand import layer, right_gemm, with_experts
from tests.held_out_kernels.definition import wrong


@wrong(
    stage="finalize",
    says=("weight", "bf16|bfloat16|round"),
    story="above 512 tokens another path rounds the routing weights to bf16",
)
def large_batches_round_the_weights(call: MoeCall) -> Tensor:
    if call.num_tokens <= 512:
        return forward(call)
    return forward(replace(call, token_final_scales=call.token_final_scales.bfloat16().float()))


@wrong(
    stage=("slots", "finalize"),
    says=("slot", "7|last|eighth|drop|missing|omit|not added|skipped"),
    story="a sum written out for seven slots is taken for top_k = 8",
)
def eighth_slot_left_out(call: MoeCall) -> Tensor:
    if call.top_k != 8:
        return forward(call)
    return layer(call, local=lambda right: right.index_fill(1, torch.tensor([7]), -1))


@wrong(
    stage="finalize",
    says=("token|row", "last|odd|end", "half|weight|slot|factor|0\\.5"),
    story="with an odd number of tokens the last one is weighted by half",
)
def odd_number_of_tokens(call: MoeCall) -> Tensor:
    weights = call.token_final_scales.clone()
    if call.num_tokens % 2:
        weights[-1] /= 2
    return forward(replace(call, token_final_scales=weights))


@wrong(
    stage=("fc1", "input"),
    says=("tail|last|end|beyond|remain", "group|\\bK\\b|hidden|tile|128|channel"),
    story="where the hidden size is padded, the whole last tile of 128 is taken for padding",
)
def padded_hidden_loses_a_tile(call: MoeCall) -> Tensor:
    padded = not bool(call.input[:, -64:].any())

    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        x = x.clone()
        x[:, -128:] = 0
        return right_gemm(x, packed, scales, tactic)

    return layer(call, gemm1=gemm) if padded and call.num_tokens else forward(call)


@wrong(
    stage="slots",
    says=("expert", "(above|beyond|from|of) (8|eight|7)\\b|expert (0|zero)|first expert"),
    story="a table of eight experts: those beyond are taken for expert 0",
)
def experts_beyond_eight_are_the_first(call: MoeCall) -> Tensor:
    return layer(call, local=lambda right: torch.where(right >= 8, 0, right))


@wrong(
    stage=("activation", "finalize"),
    says=("limit|clamp|round|fp16|float16",),
    story="two mistakes: no limit, and weights rounded to fp16",
)
def no_limit_and_fp16_weights(call: MoeCall) -> Tensor:
    weights = call.token_final_scales.half().float()
    limit = call.experts.swiglu_limit
    free = None if limit is None else torch.full_like(limit, torch.inf)
    return forward(replace(with_experts(call, swiglu_limit=free), token_final_scales=weights))


@wrong(
    stage=("fc2", "finalize"),
    says=("scale|bias|truncat|toward zero|cut|2x|double|twice",),
    story="two mistakes: fc2's scales doubled, and the output cut off instead of rounded",
)
def doubled_fc2_scales_and_truncated_output(call: MoeCall) -> Tensor:
    scales = call.experts.fc2_scales
    assert scales is not None
    raised = (scales.int() + 1).clamp(0, 255).to(torch.uint8)

    def cut(x: Tensor) -> Tensor:
        kept = (x.view(torch.int32) >> 16 << 16).view(torch.float32)
        return to_bf16(torch.where(x.isfinite(), kept, x))

    return forward(with_experts(call, fc2_scales=raised), replace(Stages(), round_output=cut))


@wrong(
    stage=("slots", "finalize"),
    says=("expert|slot|weight", "next|off by one|shift|last|drop|missing|omit"),
    story="two mistakes: experts off by one, and the last slot left out",
)
def next_expert_and_no_last_slot(call: MoeCall) -> Tensor:
    def local(right: Tensor) -> Tensor:
        moved = torch.where(right < 0, right, (right + 1) % call.experts.num_experts)
        return moved.index_fill(1, torch.tensor([right.shape[1] - 1]), -1)

    return layer(call, local=local)
