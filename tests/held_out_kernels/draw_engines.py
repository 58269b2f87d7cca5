"""A draw of engines: routers, loaders, ranks, graphs and what lies around the kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mxfp4ref import MoeCall
from mxfp4ref.formats.mxfp4 import dequantize, pack_codes, unpack_codes
from mxfp4ref.goldens import run_stage
from mxfp4ref.routing import routing_weights, select_experts
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.fp32 import to_bf16
from tests.held_out_kernels.by_hand import layer, local_experts, with_experts
from tests.held_out_kernels.definition import wrong

__all__: list[str] = []


def _right(kind: str, inputs: Any) -> dict[str, Tensor]:
    found: Any = run_stage(kind, inputs)
    return dict(found)


# --- ranks


@wrong(
    stage="slots",
    says=(
        "rank|expert|offset|range",
        r"revers|mirror|other rank|another rank|wrong rank|of rank \d|descend|offset|range|"
        r"start|backward|\d+ to \d+",
    ),
    story="the launcher numbers expert ranks from the end: rank r takes the slots of rank ep_size - 1 - r",
)
def expert_ranks_numbered_from_the_end(call: MoeCall) -> Tensor:
    experts, size = call.experts.num_experts, call.ep_size
    start = (size - 1 - call.ep_rank) * experts
    ids = call.token_selected_experts.long()

    def mapped(local: Tensor) -> Tensor:
        if size == 1:
            return local
        mine = (ids >= start) & (ids < start + experts)
        return torch.where(mine, ids - start, -1)

    return layer(call, local=mapped)


@wrong(
    stage="finalize",
    says=("bias", r"rank|every|also|all ranks|added|\beach\b|not (left out|skipped)|should not|twice|again"),
    story="each tensor rank adds the fc2 bias, not the first alone",
)
def fc2_bias_added_by_each_tensor_rank(call: MoeCall) -> Tensor:
    bias = call.experts.fc2_biases
    return layer(call, finalize=lambda by_slot, local, weights, _: finalize(by_slot, local, weights, bias))


@wrong(
    stage=("finalize", "input", "slots"),
    says=(
        r"token|\brow",
        r"shift|roll|rotat|block|permut|other token|another token|wrong token|swap|exchang|"
        r"those of|moved|half",
    ),
    story="the combine after all-to-all starts with the next rank's tokens: the output's blocks of M"
    " / ep_size rotate",
)
def combine_starts_at_the_next_ranks_tokens(call: MoeCall) -> Tensor:
    out = layer(call)
    if call.ep_size == 1 or len(out) % call.ep_size:
        return out
    return out.roll(-(len(out) // call.ep_size), dims=0)


@wrong(
    stage=("finalize", "slots"),
    says=(
        r"token|\brow",
        r"stale|uninit|not (written|zeroed|cleared)|unwritten|previous|left|memory|"
        r"no (local )?expert|without (a |any )?(local )?expert|garbage|before|should be (0|"
        r"zero)|zero",
    ),
    story="the output is made by empty_like and tokens without an expert of this rank are not"
    " cleared: they keep what the"
    " token before left",
)
def output_of_tokens_without_local_expert_not_cleared(call: MoeCall) -> Tensor:
    out = layer(call).clone()
    nobody = (local_experts(call) < 0).all(dim=1)
    for token in range(1, len(out)):
        if nobody[token]:
            out[token] = out[token - 1]
    return out


# --- engines


@wrong(
    stage=("finalize", "slots", "routing"),
    says=("weight|final.?scale|routing.?scale", r"512|token|first|chunk|modulo|wrap|shift|earlier"),
    story="beyond 512 tokens the engine launches in chunks and forgets to move the pointer of the routing weights",
)
def second_chunk_reads_weights_of_the_first(call: MoeCall) -> Tensor:
    return layer(call, weights=lambda local, w: w[torch.arange(len(w)) % 512])


@wrong(
    stage=("input", "slots", "finalize"),
    says=(
        r"token|\brow",
        r"32|beyond|after|last|zero|missing|\btail|\bends?\b|not (computed|written)|from \d+",
    ),
    story="a graph captured for 32 tokens is replayed for more: the tokens beyond keep zeros",
)
def graph_of_32_tokens_replayed_for_more(call: MoeCall) -> Tensor:
    out = layer(call).clone()
    out[32:] = 0
    return out


@wrong(
    stage=("activation", "fc1", "finalize"),
    says=(
        r"bias(es)?\b|(routing|slot|final).{0,8}(weight|scale)|1 ?/ ?k|"
        r"equal weight|weights?.{0,20} equal|equally|uniform|averag|\bmean\b",
    ),
    story="two at once: the gate half of the fc1 biases is not loaded, and every slot has weight 1 / k",
)
def gate_biases_not_loaded_and_slots_weighted_alike(call: MoeCall) -> Tensor:
    bias = call.experts.fc1_biases
    if bias is not None:
        bias = bias.clone()
        if call.experts.fc1_weights.shape[1] == 2 * call.experts.fc2_weights.shape[2] * 2:
            bias[..., bias.shape[-1] // 2 :] = 0
        call = with_experts(call, fc1_biases=bias)
    return layer(call, weights=lambda local, w: torch.full_like(w, 1 / w.shape[1]))


# --- loaders


@wrong(
    stage="fc1",
    says=("scale", r"expert|\brow|permut|\border|transpos|shuffl|interleav|mix|layout|stride"),
    story="the checkpoint's scales are taken as [rows, experts, groups] and viewed as [experts, rows, groups]",
)
def loader_views_scales_with_rows_before_experts(call: MoeCall) -> Tensor:
    scales = call.experts.fc1_scales
    assert scales is not None
    return layer(with_experts(call, fc1_scales=scales.transpose(0, 1).contiguous().view(scales.shape)))


@wrong(
    stage="fc2",
    says=("expert", r"zero|not (loaded|copied)|missing|empty|never|drop|lost|skip|no output|without"),
    story="the loader's loop over experts ends one early for w2: the last expert's codes stay zero",
)
def loader_ends_one_expert_early_for_w2(call: MoeCall) -> Tensor:
    codes = call.experts.fc2_weights
    if len(codes) == 1:
        return layer(call)
    codes = codes.clone()
    codes[-1] = 0
    return layer(with_experts(call, fc2_weights=codes))


# --- routers


@wrong(
    kind="routing",
    stage="routing",
    says=("group",),
    story="a group's score is its best expert's alone, not the sum of its two best",
)
def group_scored_by_its_best_alone(**inputs: Any) -> dict[str, Tensor]:
    if inputs["preset"] != "deepseek_v3":
        return _right("routing", inputs)
    scores = torch.sigmoid(inputs["logits"].float().double()).float()
    bias, groups, k = inputs["correction_bias"], inputs["n_group"], inputs["top_k"]
    chosen = scores + bias
    best = chosen.unflatten(1, (groups, -1)).amax(-1)
    order = torch.argsort(best, dim=1, descending=True, stable=True)[:, : inputs["topk_group"]]
    inside = torch.zeros_like(best, dtype=torch.bool).scatter_(1, order, True)
    chosen = chosen.masked_fill(~inside.repeat_interleave(chosen.shape[1] // groups, 1), -torch.inf)
    ids = select_experts(chosen, k).ids
    factor = inputs["routed_scaling_factor"]
    return {"ids": ids, "scales": routing_weights(scores, ids, normalize="sum", epsilon=1e-20, factor=factor)}


# --- formats


def _nearest_codes(values: Tensor, scales: Tensor) -> Tensor:
    """E2M1 codes `[.., K]`, to nearest, ties to the even code, of values over 2^(scale - 127)."""
    scaled = values.double() * torch.exp2(127.0 - scales.double()).repeat_interleave(32, -1)
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    size = scaled.abs().clamp(max=6.0)
    distance = (size[..., None] - table).abs()
    distance = distance + (torch.arange(8) % 2) * 1e-12  # the even code of two
    code = distance.argmin(-1)
    code = code + 8 * torch.signbit(scaled)
    return code.masked_fill((scales == 255).repeat_interleave(32, -1), 0).to(torch.uint8)


@wrong(
    kind="quantize",
    stage="quantize",
    says=(
        "scale|exponent|block|group",
        r"64|two groups|pair|neighbou?r|shared|larger|both|max(imum)? of|other group|"
        r"another group|too (large|high)|higher",
    ),
    story="the block size is 64 instead of 32: two neighbouring groups share the larger of their scales",
)
def quantiser_takes_blocks_of_64(**inputs: Any) -> dict[str, Tensor]:
    right = _right("quantize", inputs)
    scales = (
        right["scales"]
        .unflatten(-1, (-1, 2))
        .amax(-1, keepdim=True)
        .expand(*right["scales"].shape[:-1], -1, 2)
    )
    scales = scales.flatten(-2).contiguous()
    codes = _nearest_codes(inputs["values"].float(), scales)
    kept = (scales == right["scales"]).repeat_interleave(32, -1)
    codes = torch.where(kept, unpack_codes(right["packed"]), codes)
    return {"packed": pack_codes(codes), "scales": scales}


@wrong(
    kind="dequantize",
    stage="dequantize",
    says=(
        r"2\.5|0\.83|5 ?/ ?6|\bcodes?\b.{0,30}\b(5|13|0x5|0xd|0101|101)\b|\b3\.0\b|(value|"
        r"magnitude|\+-|±|of|every|all) ?3s?\b",
    ),
    story="a typing error in the table of E2M1: code 5 is 2.5 instead of 3",
)
def dequantise_table_has_two_and_a_half(**inputs: Any) -> dict[str, Tensor]:
    dtype = getattr(torch, inputs["dtype"])
    convention = inputs["convention"]
    values = dequantize(inputs["packed"], inputs["scales"], convention=convention, dtype=torch.float32)
    code = unpack_codes(inputs["packed"])
    three = (code & 7) == 5
    half = torch.full_like(code, 0x11)  # code 1, 0.5: five of these
    halves = dequantize(pack_codes(half & 1), inputs["scales"], convention=convention, dtype=torch.float32)
    new = (halves.double() * 5).float() * torch.where(code >= 8, -1.0, 1.0)
    result = torch.where(three, new, values)
    return {"values": result if dtype is torch.float32 else to_bf16(result)}
