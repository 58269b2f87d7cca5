"""A second draw: what an engine does around a kernel, loading, maps, weights handed over, ranks, padding, graphs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.fp32 import to_bf16, widen
from tests.held_out_kernels.by_hand import Rows, layer, with_experts
from tests.held_out_kernels.definition import wrong

FC1, FC2 = "GEMM ?1|fc1|first GEMM|w13|gate|\\bup\\b", "GEMM ?2|fc2|second GEMM|down|w2"
MOVED = "swap|exchang|permut|order|neighbou?r|another|other|instead of|from|wrong|mixed"


def _weighted(call: MoeCall, weights: Tensor) -> Tensor:
    return forward(replace(call, token_final_scales=weights, unscaled=False))


@wrong(
    stage="fc1",
    says=(FC1, "scale", f"{MOVED}|interleav|altern|every (other|second)|even|odd|\\bup\\b"),
    story="the checkpoint has gate and up in alternating rows: the loader parts them for the weights, while scales "
    "stay as they were",
)
def second_scales_of_rows_still_alternating(call: MoeCall) -> Tensor:
    scales = call.experts.fc1_scales
    assert scales is not None
    if call.experts.gated:
        up, gate = scales.chunk(2, dim=1)
        scales = torch.stack((gate, up), 2).flatten(1, 2)
    return forward(with_experts(call, fc1_scales=scales))


@wrong(
    stage="fc1",
    says=(FC1, "expert", "another|other|last|wrong|instead of|expert \\d|neighbou?r"),
    story="a rebalance exchanges the first and the last expert in place: fc1 is copied without a temporary, and the "
    "first expert has the last one's, which stays where it was",
)
def second_expert_exchanged_without_a_temporary(call: MoeCall) -> Tensor:
    experts = call.experts
    assert experts.fc1_scales is not None
    weights, scales = experts.fc1_weights.clone(), experts.fc1_scales.clone()
    weights[0], scales[0] = weights[-1], scales[-1]
    return forward(with_experts(call, fc1_weights=weights, fc1_scales=scales))


@wrong(
    stage="finalize",
    says=("weight", "slot", f"{MOVED}|sort|descend|largest|decreas"),
    story="the router's top-k returns weights in descending order beside ids in that of a second, unsorted call; "
    "a token's first slot has its largest weight",
)
def second_weights_sorted_without_their_ids(call: MoeCall) -> Tensor:
    return _weighted(call, torch.sort(call.token_final_scales, dim=1, descending=True).values)


@wrong(
    stage="fc2",
    says=(FC2, "scale", "half|first|second|rank|shard|\\bK\\b|column|group"),
    story="the layer is loaded for two tensor-parallel ranks and merged again; the second shard of fc2's scales was "
    "cut out with the rank still 0, and is the first",
)
def second_scales_of_the_first_shard_twice(call: MoeCall) -> Tensor:
    assert call.experts.fc2_scales is not None
    first = call.experts.fc2_scales.chunk(2, 2)[0]
    return forward(with_experts(call, fc2_scales=torch.cat((first, first), 2)))


def _shifted(parameter: Tensor | None) -> Tensor | None:
    if parameter is None:
        return None
    up, gate = parameter.chunk(2, dim=1)
    return torch.cat((up, gate[:, 64:], torch.zeros_like(gate[:, :64])), 1)


@wrong(
    stage=("fc1", "activation"),
    says=(
        "gate",
        "\\b64\\b|shift|later|next|further|another|other|offset",
        "column|row|position|channel|element",
    ),
    story="w13 is padded by 64 rows at its end before it is cut into up and gate: what stands beside up is the gate "
    "64 rows on, and zeros in the last 64",
)
def second_padded_before_the_cut(call: MoeCall) -> Tensor:
    experts = call.experts
    if not experts.gated:
        return forward(call)
    rows = {name: _shifted(getattr(experts, name)) for name in ("fc1_weights", "fc1_scales", "fc1_biases")}
    return forward(with_experts(call, **rows))


@wrong(
    stage="finalize",
    says=(
        "weight",
        "token|row|half|from|last",
        "stale|old|earlier|before|equal|1 ?/|0\\.\\d|same|constant|other",
    ),
    story="a graph's static routing weights are float32, and the copy into them counts two bytes an element: the "
    "second half of the tokens has what the capture's dummy run left, 1/k",
)
def second_half_of_the_weights_of_the_capture(call: MoeCall) -> Tensor:
    weights = call.token_final_scales.flatten().clone()
    weights[len(weights) // 2 :] = 1 / call.top_k
    return _weighted(call, weights.view_as(call.token_final_scales))


@wrong(
    stage="input",
    says=("weight", f"{FC1}|input|\\bx\\b|token|row", "twice|both|also|times|multipl|squar|scaled|factor"),
    story="the dispatch multiplies its copies of x by the routing weights (apply_router_weight_on_input), and the "
    "kernel gets the same weights again",
)
def second_weights_on_the_input_too(call: MoeCall) -> Tensor:
    def weighted(rows: Rows, x: Tensor) -> Tensor:
        return to_bf16(
            fp32.mul(widen(x), call.token_final_scales[rows.token, rows.slot, None].expand(x.shape))
        )

    return layer(call, x=weighted)


@wrong(
    stage="input",
    says=(
        f"{FC1}|input|\\bx\\b|token",
        "fp8|e4m3|8.?bit|quanti|rounded|\\bbits|precision|mantissa|significa",
    ),
    story="the low-latency all-to-all sends fp8 unless told otherwise: x arrives as e4m3 with a float32 scale for "
    "each 128 columns, and is widened to bf16 again",
)
def second_dispatched_in_fp8(call: MoeCall) -> Tensor:
    def sent(block: Tensor) -> Tensor:
        scale = block.abs().amax(1, keepdim=True).clamp(min=1e-4) / 448
        return ((block / scale).to(torch.float8_e4m3fn).float() * scale).bfloat16()

    blocks = torch.split(call.input.float(), 128, dim=1)
    return forward(replace(call, input=torch.cat([sent(block) for block in blocks], 1)))


@wrong(
    stage=("slots", "input", "finalize"),
    says=("\\brow|token", f"{MOVED}|sort|invers|shuffl"),
    story="tokens are sorted by their first expert before the layer, and brought back by the permutation that sorted "
    "them, not by its inverse",
)
def second_unsorted_by_the_sorting_permutation(call: MoeCall) -> Tensor:
    order = torch.argsort(call.token_selected_experts[:, 0], stable=True)
    return forward(call.select(order))[order]


@wrong(
    stage=("activation", "finalize"),
    says=(
        "\\bup\\b|beta",
        "\\b1(\\.0)?\\b|plus|add|offset",
        "finali|sum|combin|output",
        "two|half|halves|partial|rank|twice|part|separate|expert",
        "round|bf16",
    ),
    story="every model is given gpt-oss's swiglu_beta of 1; and the combine adds up two bf16 outputs, one of the "
    "lower half of the experts and one of the upper",
)
def second_beta_of_one_and_two_rounded_sums(call: MoeCall) -> Tensor:
    def given(rows: Rows, parameters: list[Tensor | None]) -> list[Tensor | None]:
        bias, alpha, _, limit = parameters
        return [bias, alpha, torch.ones(len(rows.token), 1), limit]

    def combined(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        upper = local >= call.experts.num_experts // 2
        parts = (finalize(by_slot, local.where(mine, -1), weights, bias) for mine in (~upper, upper))
        lower_sum, upper_sum = (widen(to_bf16(part)) for part in parts)
        return fp32.add(lower_sum, upper_sum)

    return layer(call, parameters=given, finalize=combined)
