"""Fresh mistakes of November: loading, buffers, ranks, routers and the sum, and calls that hold two at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward
from mxfp4ref.formats.layout import halves_to_interleaved
from mxfp4ref.routing.models import PRESETS
from mxfp4ref.routing.route import routing_weights
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.fp32 import to_bf16, widen
from mxfp4ref.sm90.tactics import Tactic
from tests.held_out_kernels.by_hand import Rows, layer, right_gemm, right_routing, with_experts
from tests.held_out_kernels.definition import wrong

WEIGHT = "routing|weight|final.scale"
GONE = "missing|left out|lack|drop|lost|zero|skip|not (written|computed|added|counted)|omit|ignor|without"
MIXED = "permut|order|interleav|swap|exchang|transpos|each other|another|instead"
CUT, FP16 = "truncat|toward(s)? zero|cut off|rounded down", "fp16|float16|half.precision|binary16|1[01] bits"
OTHER = "another|next|previous|before|after|shift|off by|stride|instead|wrong|neighbou?r|swap|exchang"


@wrong(
    stage="activation",
    says=("bias", "expert", "half|halves|stride|offset|gate|shift|another|previous|overlap|instead"),
    story="fc1's bias of expert e is read at e * I, not at e * 2I",
)
def november_bias_with_half_the_stride(call: MoeCall) -> Tensor:
    biases = call.experts.fc1_biases
    if biases is None:
        return forward(call)
    experts, rows = biases.shape
    at = torch.arange(experts)[:, None] * (rows // 2) + torch.arange(rows)
    return forward(with_experts(call, fc1_biases=biases.flatten()[at]))


@wrong(
    stage="finalize",
    says=("bias", FP16 + "|reinterpret|\\bbits|dtype|data ?type"),
    story="fc2's bias is bf16, the kernel's template reads its bits as fp16",
)
def november_bias_bits_as_fp16(call: MoeCall) -> Tensor:
    def total(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        return finalize(by_slot, local, weights, None if bias is None else bias.view(torch.float16))

    return layer(call, finalize=total)


@wrong(
    stage="activation",
    says=("alpha|beta|limit|parameter", MIXED + "|mix|layout|of expert|taken"),
    story="alpha, beta and limit are stored by expert, [E, 3], and read by parameter, [3, E]",
)
def november_parameters_transposed(call: MoeCall) -> Tensor:
    experts = call.experts
    given = [experts.swiglu_alpha, experts.swiglu_beta, experts.swiglu_limit]
    if any(one is None for one in given):
        return forward(call)
    alpha, beta, limit = torch.stack(given, 1).flatten().chunk(3)  # type: ignore[arg-type]
    return forward(with_experts(call, swiglu_alpha=alpha, swiglu_beta=beta, swiglu_limit=limit))


@wrong(
    stage=("input", "finalize"),
    says=(WEIGHT, "input|before (GEMM ?1|fc1)|early|hidden|\\bx\\b"),
    story="apply_router_weight_on_input is on, as for Llama 4: the input is multiplied with the routing weight and "
    "rounded, the sum has weights of 1",
)
def november_weights_on_the_input(call: MoeCall) -> Tensor:
    def weighted(rows: Rows, x: Tensor) -> Tensor:
        return to_bf16(
            fp32.mul(widen(x), call.token_final_scales[rows.token, rows.slot, None].expand(x.shape))
        )

    return layer(call, x=weighted, weights=lambda local, weights: torch.ones_like(weights))


@wrong(
    stage="finalize",
    says=(WEIGHT, "normali[sz]|divided|\\bsum (of|to|is)|sums? to|add up to"),
    story="the kernel renormalises again, over the slots of this rank: the routing weights are divided by their sum",
)
def november_renormalised_on_the_rank(call: MoeCall) -> Tensor:
    def weights(local: Tensor, given: Tensor) -> Tensor:
        total = torch.where(local >= 0, given, 0.0).sum(1, keepdim=True)
        return torch.where(total == 0, given, given / total)

    return layer(call, weights=weights)


@wrong(
    stage="finalize",
    says=(WEIGHT, "token|row|strid|\\b8\\b|buffer", OTHER + "|zero|stale|padd"),
    story="the CUDA graph's buffer of routing weights has 8 columns, the kernel reads k a token, one after another",
)
def november_weights_in_a_wider_buffer(call: MoeCall) -> Tensor:
    tokens, top_k = call.token_final_scales.shape
    buffer = torch.zeros(tokens, max(top_k, 8))
    buffer[:, :top_k] = call.token_final_scales
    return forward(replace(call, token_final_scales=buffer.flatten()[: tokens * top_k].view(tokens, top_k)))


@wrong(
    stage="finalize",
    says=("input|residual|hidden|\\bx\\b", "\\badd|plus|on top|residual|\\+|start"),
    story="the fused residual is on, though the model adds it too: the input is added to the sum",
)
def november_residual_added(call: MoeCall) -> Tensor:
    return layer(call, output=lambda sums: to_bf16(fp32.add(sums, widen(call.input))))


@wrong(
    stage="fc2",
    says=("expert", MIXED + "|of expert|(other|wrong) expert|\\beven|\\bodd"),
    story="the second weights were saved by two ranks that had every other expert each; the loader concatenates",
)
def november_experts_of_round_robin_files(call: MoeCall) -> Tensor:
    experts, ids = call.experts, list(range(call.experts.num_experts))
    order = ids[::2] + ids[1::2]
    assert experts.fc2_scales is not None
    given = {"fc2_weights": experts.fc2_weights[order], "fc2_scales": experts.fc2_scales[order]}
    return forward(with_experts(call, **given))


@wrong(
    stage=("finalize", "slots"),
    says=(
        "expert",
        "last|shared|expert \\d",
        "extra|additional|(every|all|each) token|once more|added|shared",
    ),
    story="shared-expert fusion is on for a model without one: the last local expert is added to each token, with "
    "weight 1",
)
def november_last_expert_is_shared(call: MoeCall) -> Tensor:
    last = (call.ep_rank + 1) * call.experts.num_experts - 1
    ids = torch.full((call.num_tokens, 1), last, dtype=torch.int32)
    shared = forward(replace(call, token_selected_experts=ids, token_final_scales=torch.ones(ids.shape)))
    return to_bf16(fp32.add(widen(forward(call)), widen(shared)))


@wrong(
    stage=("fc2", "slots", "finalize"),
    says=("expert", "last|highest|largest|final|one expert|single expert|expert \\d", GONE),
    story="finalize is launched on another stream and does not wait for GEMM2's last group: the rows of the last "
    "expert that has any are still zero",
)
def november_sum_before_the_last_group(call: MoeCall) -> Tensor:
    def fc2(rows: Rows, acc: Tensor) -> Tensor:
        used = rows.expert.unique()
        late = rows.expert == (used[-1] if len(used) > 1 else -1)
        return to_bf16(acc.masked_fill(late[:, None], 0.0))

    return layer(call, fc2=fc2)


@wrong(
    stage="finalize",
    says=("mean|average|divided|\\bnumber|count|1/|quotient|factor", "slot|expert|token|\\bk\\b|top.?k"),
    story="the combine step averages: each token's sum is divided by how many of its slots this rank has",
)
def november_mean_over_the_slots(call: MoeCall) -> Tensor:
    def total(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        count = (local >= 0).sum(1, keepdim=True).clamp(min=1)
        return finalize(by_slot, local, weights, bias) / count

    return layer(call, finalize=total)


@wrong(
    stage=("slots", "finalize"),
    says=("slot|expert|weight", GONE + "|prun", "small|\\blow|threshold|below|less than|light|quarter"),
    story="dynamic expert pruning is on: slots whose weight is below a quarter of the token's largest are skipped",
)
def november_light_slots_pruned(call: MoeCall) -> Tensor:
    weights = call.token_final_scales
    light = weights < 0.25 * weights.amax(1, keepdim=True)
    return layer(call, local=lambda local: torch.where(light, -1, local))


@wrong(
    stage=("activation", "finalize"),
    says=("bias", MIXED + "|gate|alternat", "slot|once|only|" + GONE, "fc2|GEMM ?2|second"),
    story="gpt-oss's fc1 bias keeps its rows gate0, up0, gate1, ... and fc2's bias is added in a token's first slot "
    "only",
)
def november_biases_as_published_and_once(call: MoeCall) -> Tensor:
    biases = call.experts.fc1_biases
    if biases is not None and call.experts.gated:
        call = with_experts(call, fc1_biases=halves_to_interleaved(biases))

    def total(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        values = widen(by_slot)
        if bias is not None:
            mine = local >= 0
            first = mine & (mine.cumsum(1) == 1)
            values[first] = fp32.add(values[first], widen(bias[local[first]]))
        return finalize(values, local, weights)

    return layer(call, finalize=total)


@wrong(
    stage=("fc1", "finalize"),
    says=("gate", "scale|factor|twice|doubl|\\b2\\b", CUT),
    story="the gate's rows have their exponents one too high, folded in for a sigmoid by tanh, and the output is "
    "truncated to bf16",
)
def november_gate_doubled_and_cut_off(call: MoeCall) -> Tensor:
    experts = call.experts
    assert experts.fc1_scales is not None
    scales = experts.fc1_scales.clone()
    if experts.gated:
        gate = scales[:, experts.intermediate_size :]
        gate += (gate < 254).to(torch.uint8)
    return layer(with_experts(call, fc1_scales=scales), output=_cut)


def _cut(values: Tensor) -> Tensor:
    return (values.contiguous().view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


@wrong(
    stage=("fc2", "finalize"),
    says=(WEIGHT, "slot", OTHER + "|rotat|roll", "last|final|tail", "group|\\bK\\b|column|\\b32\\b"),
    story="each slot takes the routing weight of the next one, and GEMM2's loop ends a group of K too early",
)
def november_next_weight_and_a_group_less(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        less = packed.clone()
        less[:, -16:] = 0
        return right_gemm(x, less, scales, tactic)

    return layer(call, gemm2=gemm, weights=lambda local, weights: weights.roll(-1, 1))


@wrong(
    stage=("input", "activation"),
    says=("token|row", OTHER + "|pair|\\bodd", "activation|GEMM ?2", CUT),
    story="the gather loads two tokens at once and exchanges them, and the activation is truncated to bf16",
)
def november_pairs_of_tokens_and_a_cut(call: MoeCall) -> Tensor:
    def gathered(rows: Rows, x: Tensor) -> Tensor:
        other = rows.token ^ 1
        return call.input[torch.where(other < call.num_tokens, other, rows.token)]

    return layer(call, x=gathered, activation=lambda rows, activated: _cut(activated))


@wrong(
    stage="finalize",
    says=(WEIGHT, FP16, "order|revers|backward|last slot first"),
    story="the routing weights are stored in fp16, and the slots are added from the last to the first",
)
def november_weights_in_fp16_from_the_end(call: MoeCall) -> Tensor:
    def total(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        return finalize(by_slot.flip(1), local.flip(1), weights.half().float().flip(1), bias)

    return layer(call, finalize=total)


def _scores(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Each expert's score, and what selects: with the bias, where there is one."""
    logits, padded = inputs["logits"], inputs.get("padded")
    logits = logits if padded is None else logits.masked_fill(padded[:, None], 0.0)
    scores, bias = PRESETS[inputs["preset"]].score(logits), inputs.get("correction_bias")
    return scores, scores if bias is None else scores + bias


@wrong(
    stage="routing",
    kind="routing",
    says=("\\bsum|denomin|normali|divi[ds]|softmax", "k ?\\+ ?1|too many|one more|extra|additional|beyond"),
    story="top-k is asked for k + 1 to have room for a shared expert: the weights are normalised over all of them",
)
def november_normalised_over_one_more(**inputs: Any) -> dict[str, Tensor]:
    routed = right_routing(inputs)
    scores, keys = _scores(inputs)
    ids = routed["ids"].long().clamp(min=0)
    further = keys.scatter(1, ids, -torch.inf).argmax(1, keepdim=True)
    raw = scores.double().gather(1, torch.cat((ids, further), 1))
    raw = torch.softmax(raw, 1) if inputs["preset"] == "gpt_oss" else raw
    kept = raw[:, :-1].sum(1, keepdim=True)
    return {**routed, "scales": (routed["scales"].double() * (kept / raw.sum(1, keepdim=True))).float()}


@wrong(
    stage="routing",
    kind="routing",
    says=("\\bids?\\b|expert", MIXED + "|strid|lane|warp|\\b32\\b|renumber|mapp|modulo"),
    story="a lane of the warp holds E / 32 neighbouring experts, the ids are made as if it held every 32nd",
)
def november_ids_of_strided_lanes(**inputs: Any) -> dict[str, Tensor]:
    routed = right_routing(inputs)
    ids, each = routed["ids"], inputs["logits"].shape[1] // 32
    if "tid2eid" in inputs or each < 2:
        return routed
    return {**routed, "ids": torch.where(ids < 0, ids, ids % each * 32 + ids // each)}


@wrong(
    stage="routing",
    kind="routing",
    says=(
        "select|rank|order|chosen|compar|sort|\\bids?\\b",
        "bf16|bfloat16|truncat|precision|rounded|bits|\\bt(ie|ying)|equal",
    ),
    story="score and id share a 32-bit key: experts are selected by scores of 16 bits, equal ones by the higher id",
)
def november_key_of_score_and_id(**inputs: Any) -> dict[str, Tensor]:
    if "tid2eid" in inputs:
        return right_routing(inputs)
    preset = PRESETS[inputs["preset"]]
    scores, keys = _scores(inputs)
    keys = (keys.contiguous().view(torch.int32) & -65536).view(torch.float32)
    if (groups := inputs.get("n_group", 1)) > 1:
        by_group = keys.view(len(keys), groups, -1)
        best = by_group.topk(2, -1).values.sum(-1).topk(inputs["topk_group"], -1).indices
        inside = torch.zeros(len(keys), groups, 1, dtype=torch.bool).scatter_(1, best[:, :, None], True)
        keys = by_group.masked_fill(~inside, -torch.inf).flatten(1)
    order = keys.flip(1).argsort(dim=1, descending=True, stable=True)[:, : inputs["top_k"]]
    ids = (keys.shape[1] - 1 - order).to(torch.int32)
    factor = inputs.get("routed_scaling_factor", 1.0) if inputs.get("routed_scaling") == "in_weights" else 1.0
    scales = routing_weights(scores, ids, normalize=preset.normalize, epsilon=preset.epsilon, factor=factor)
    if (padded := inputs.get("padded")) is not None:
        ids, scales = ids.masked_fill(padded[:, None], -1), scales.masked_fill(padded[:, None], 0.0)
    return {"ids": ids, "scales": scales}
