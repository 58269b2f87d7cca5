"""What happened around kernels: loaders, routers, quantisers, ranks, the engine's buffers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward
from mxfp4ref.formats.mxfp4 import E2M1_VALUES, decode_ue8m0, pack_codes
from mxfp4ref.goldens import run_stage
from mxfp4ref.routing import deepseek_v3
from mxfp4ref.sm90.finalize import finalize

from .by_hand import layer, local_experts, with_experts
from .definition import wrong


def _is_gated(call: MoeCall) -> bool:
    return call.experts.fc1_weights.shape[1] == 4 * call.experts.fc2_weights.shape[2]


@wrong(
    stage=("finalize", "slots"),
    says=(
        r"routing|final_scales|slot",
        r"weight|scales",
        r"next|rotat|roll|shift|swap|permut|another|other|exchang|slot \d|\+ ?1|order",
    ),
    story="the top-k loop writes the weights of the round before: each slot is weighted with the next one's",
)
def weights_a_round_late(call: MoeCall) -> Tensor:
    if call.unscaled:
        return forward(call)
    return forward(replace(call, token_final_scales=call.token_final_scales.roll(-1, dims=1)))


@wrong(
    stage="slots",
    says=(
        r"rank|offset|local|\bEP\b|range|expert",
        (
            r"(other|another|opposite|wrong|foreign|different) rank|opposite|revers|mirror|offset|"
            r"rank \d|ids? (from|of)|ranges?|begin|start|first expert|descend"
        ),
    ),
    story="the device mesh was built in descending order: a rank takes the ids of the rank opposite",
)
def mesh_in_descending_order(call: MoeCall) -> Tensor:
    return forward(replace(call, ep_rank=call.ep_size - 1 - call.ep_rank))


@wrong(
    stage="finalize",
    says=(r"(?<![\d.])2\.50*(?![\d])(?! ?%)|5/2",),
    story="DeepSeek-V3's factor of 2.5 is the layer's default and multiplied into the weights of every model",
)
def factor_of_another_model(call: MoeCall) -> Tensor:
    if call.unscaled:
        return forward(call)
    return forward(replace(call, token_final_scales=call.token_final_scales * 2.5))


@wrong(
    stage=("finalize", "slots"),
    says=(
        r"token|row",
        (
            r"no (local )?expert|without|not written|unwritten|never written|uninitiali|stale|"
            r"(hold|is|are|equals?|has|have) (the|its|their) (own )?input|input's (row|value)|"
            r"input (is )?(left|kept|returned|copied)|no slot|all slots|untouched|not zero"
        ),
    ),
    story="the output aliases the input, and rows of tokens without an expert of this rank are never written",
)
def output_aliases_the_input(call: MoeCall) -> Tensor:
    out = forward(call).clone()
    none = (local_experts(call) < 0).all(dim=1)
    out[none] = call.input[none]
    return out


@wrong(
    stage="routing",
    kind="routing",
    says=("group", r"bias|raw|uncorrected"),
    story="groups are chosen by the scores without the correction bias, experts within them with it",
)
def groups_chosen_without_the_bias(**case: Any) -> dict[str, Tensor]:
    right: dict[str, Tensor] = run_stage("routing", case)  # type: ignore[assignment]
    groups = case.get("n_group", 1)
    bias = case.get("correction_bias")
    if case["preset"] != "deepseek_v3" or groups == 1 or bias is None:
        return right
    logits = case["logits"]
    scores = torch.sigmoid(logits.float())
    best = scores.unflatten(1, (groups, -1)).topk(2, dim=-1).values.sum(dim=-1)
    taken = torch.zeros_like(best, dtype=torch.bool).scatter(1, best.topk(case["topk_group"]).indices, True)
    mask = taken.repeat_interleave(scores.shape[1] // groups, dim=1)
    ids, scales = [], []
    for token in range(len(logits)):
        one = deepseek_v3(
            logits[token : token + 1],
            torch.where(mask[token], bias.float(), -1e4),
            top_k=case["top_k"],
            n_group=1,
            topk_group=1,
            routed_scaling_factor=case.get("routed_scaling_factor", 2.5),
        )
        ids.append(one.ids)
        scales.append(one.scales)
    return {"ids": torch.cat(ids).to(right["ids"].dtype), "scales": torch.cat(scales)}


@wrong(
    stage="routing",
    kind="routing",
    says=(
        "order|sort|ascend|permut|slot|by id|(?:another|other) (?:order|slot|id)",
        "\\bids?\\b|weight|expert|scale",
    ),
    story="ids are sorted for the dispatch, and the weights stay in the order of the scores",
)
def ids_sorted_for_the_dispatch(**case: Any) -> dict[str, Tensor]:
    right: dict[str, Tensor] = run_stage("routing", case)  # type: ignore[assignment]
    return {"ids": right["ids"].sort(dim=1).values, "scales": right["scales"]}


@wrong(
    stage="quantize",
    kind="quantize",
    says=(
        r"scale|max|group|largest",
        r"negativ|\bsign|\babs|positive",
    ),
    story="the largest value of a group is taken without its absolute, so large negative ones saturate",
)
def largest_without_absolute(**case: Any) -> dict[str, Tensor]:
    values = case["values"]
    right: dict[str, Tensor] = run_stage("quantize", case)  # type: ignore[assignment]
    scales = run_stage("quantize", {**case, "values": values.clamp(min=0)})["scales"]  # type: ignore[index,call-overload]
    groups = values.double().unflatten(-1, (-1, 32))
    scaled = groups.abs() / decode_ue8m0(scales, "ocp", torch.float64)[..., None]
    grid = torch.tensor(E2M1_VALUES[:8], dtype=torch.float64)
    distance = (scaled[..., None] - grid).abs()
    even = torch.tensor([0.0, 1.0] * 4, dtype=torch.float64)
    nearest = torch.where(distance == distance.amin(dim=-1, keepdim=True), even, 2.0).argmin(dim=-1)
    nearest = torch.where(scaled >= 6, 7, nearest)
    codes = (nearest + 8 * torch.signbit(groups)).to(torch.uint8)
    packed = pack_codes(codes.flatten(-2))
    changed = (scales != right["scales"]).repeat_interleave(16, dim=-1)
    return {"packed": torch.where(changed, packed, right["packed"]), "scales": scales}


@wrong(
    stage=("fc1", "activation"),
    says=(
        r"bias",
        r"interleav|permut|alternat|\beven\b|\bodd\b|order|shuffl",
    ),
    story="fc1's weights were de-interleaved on loading, its bias stayed gate, up, gate, up as in the checkpoint",
)
def bias_left_as_in_the_checkpoint(call: MoeCall) -> Tensor:
    bias = call.experts.fc1_biases
    if bias is None or not _is_gated(call):
        return forward(call)
    up, gate = bias.chunk(2, dim=1)
    return forward(with_experts(call, fc1_biases=torch.stack([gate, up], dim=-1).flatten(1).contiguous()))


@wrong(
    stage="fc2",
    says=(
        r"scale",
        (
            r"127|\b1\.0\b|not loaded|ignor|constant|unscaled|left out|missing|\bunit|uniform|2\^0|"
            r"(are|is|were) (all )?(1|one)\b|replaced by (1|one)\b|not applied|taken as (1|one)\b"
        ),
    ),
    story="the loader knows no name for w2's scales: they keep what they were created with, 127",
)
def w2_scales_as_created(call: MoeCall) -> Tensor:
    scales = call.experts.fc2_scales
    assert scales is not None
    return forward(with_experts(call, fc2_scales=torch.full_like(scales, 127)))


@wrong(
    stage=("fc2", "finalize"),
    says=(
        r"scale",
        r"bias",
        r"previous|before|preceding|shift|roll|off.by.one|another|other|lower|neighbou?r|[-−] ?1",
    ),
    story="for models with biases the loader writes w2's scales and bias one expert further than w2 itself",
)
def w2_beside_its_scales_and_bias(call: MoeCall) -> Tensor:
    experts = call.experts
    assert experts.fc2_scales is not None
    if experts.fc2_biases is None:
        return forward(call)
    scales, bias = experts.fc2_scales.roll(1, dims=0), experts.fc2_biases.roll(1, dims=0)
    return forward(with_experts(call, fc2_scales=scales, fc2_biases=bias))


@wrong(
    stage=("finalize", "slots"),
    says=(
        r"weight|final_scales|routing",
        r"256|chunk|modulo|(another|other|earlier|of|of the|first) tokens?",
    ),
    story="the engine hands tokens over in chunks of 256, and the routing weights of the first chunk with each",
)
def weights_of_the_first_chunk(call: MoeCall) -> Tensor:
    tokens = torch.arange(len(call.input)) % 256
    return forward(replace(call, token_final_scales=call.token_final_scales[tokens]))


@wrong(
    stage="slots",
    says=(
        r"rank|expert|local|id",
        (
            r"round.robin|strid|modulo|\bmod\b|interleav|alternat|cyclic|every (2nd|4th|second|"
            r"fourth|\d)|spread|% ?ep"
        ),
    ),
    story="the map of experts to ranks is round robin, while the loader gave each rank a contiguous range",
)
def map_of_ranks_is_round_robin(call: MoeCall) -> Tensor:
    def cyclic(local: Tensor) -> Tensor:
        if call.ep_size == 1:
            return local
        ids = call.token_selected_experts.long()
        mine = (
            (ids >= 0)
            & (ids < call.ep_size * call.experts.num_experts)
            & (ids % call.ep_size == call.ep_rank)
        )
        return torch.where(mine, ids // call.ep_size, -1)

    return layer(call, local=cyclic)


@wrong(
    stage="fc1",
    says=(
        r"scale",
        r"row|strid|pitch",
        (
            r"(other|another|wrong) row|strid|pitch|2 ?n\b|2 ?[r*·x×]|doubl|twice|modulo|"
            r"every (2nd|second|other)|of row|row \d"
        ),
    ),
    story="taken for NVFP4: the pitch of fc1's scales is K/16, so row n reads those of row 2n, and again from 0",
)
def pitch_of_scales_as_for_nvfp4(call: MoeCall) -> Tensor:
    scales = call.experts.fc1_scales
    assert scales is not None
    rows = 2 * torch.arange(scales.shape[1]) % scales.shape[1]
    return forward(with_experts(call, fc1_scales=scales[:, rows].contiguous()))


@wrong(
    stage=("slots", "finalize"),
    says=(
        r"slot|expert",
        (
            r"first|second|only one|\bone (slot|expert)|drop|missing|\blast\b|\blost\b|left out|"
            r"not (added|summed|counted)"
        ),
    ),
    story="the all-to-all sends a token once to each rank, and with it only the first of its experts there",
)
def one_expert_a_rank_is_sent(call: MoeCall) -> Tensor:
    def first(local: Tensor) -> Tensor:
        if call.ep_size == 1:
            return local
        mine = local >= 0
        return torch.where(mine & (mine.cumsum(dim=1) == 1), local, -1)

    return layer(call, local=first)


@wrong(
    stage=("finalize", "fc2"),
    says=(
        r"bias",
        r"fp16|(?<!b)float16|half.?precision|dtype|reinterpret|misread|bit pattern|read as|\bf16",
    ),
    story="the buffer of fc2's bias is declared as fp16, and the bf16 bits in it are read as such",
)
def bias_buffer_declared_fp16(call: MoeCall) -> Tensor:
    def declared(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None:
            return finalize(by_slot, local, weights, None)
        taken = bias.contiguous().view(torch.float16).float()[local.clamp(min=0)]
        return finalize(by_slot.float() + taken, local, weights, None)

    return layer(call, finalize=declared)
