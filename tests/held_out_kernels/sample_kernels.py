"""A judge's sample of the kinds that the issue names: each an instance as it would happen in a real kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mxfp4ref import MoeCall, quantize
from mxfp4ref.formats.mxfp4 import pack_codes, unpack_codes
from mxfp4ref.routing import PRESETS, ROUTERS, RoutedScaling, routing_weights
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.fp32 import to_bf16
from mxfp4ref.sm90.swiglu import swiglu
from mxfp4ref.sm90.tactics import Tactic
from tests.held_out_kernels.by_hand import Rows, layer, right_gemm, with_experts
from tests.held_out_kernels.definition import wrong


def _gated(call: MoeCall) -> bool:
    return call.experts.fc1_weights.shape[1] == 2 * _inner(call)


def _inner(call: MoeCall) -> int:
    assert call.experts.fc2_scales is not None
    return call.experts.fc2_scales.shape[-1] * 32


def _routed(preset: str, named: dict[str, Any]) -> dict[str, Tensor]:
    """The right router's answer."""
    named = dict(named)
    if "routed_scaling" in named:
        named["routed_scaling"] = RoutedScaling(named["routed_scaling"])
    routing = ROUTERS[preset](**named)
    return {"ids": routing.ids, "scales": routing.scales}


# The public reports.


@wrong(
    stage="fc1",
    says=(
        r"fc1|gemm ?1|first gemm|w13|gate|up",
        r"scale|exponent|factor|accumulator",
        r"0\.25\b|1/4|quarter|2\^-2|2\*\*-2|-2\b|4 ?x|4 times|four|two (too|lower|less|steps)|2 (too|lower|less)|129",
    ),
    story="the exponent bias of fc1's UE8M0 scales is 129 (somebody counted the two of E2M1's own): all 4x too small",
)
def ue8m0_bias_129_in_fc1(call: MoeCall) -> Tensor:
    assert call.experts.fc1_scales is not None
    scales = (call.experts.fc1_scales.int() - 2).clamp(0, 255).to(torch.uint8)
    return layer(with_experts(call, fc1_scales=scales))


@wrong(
    stage="input",
    says=(
        r"weight|router|routing",
        r"input|before gemm ?1|before the first|activations? (in|x)|\bx\b|twice|squared|again|as well|hidden state",
    ),
    story="apply_router_weight_on_input scales x (and rounds it), and the epilogue multiplies the weights in again",
)
def weight_on_the_input_and_in_the_sum(call: MoeCall) -> Tensor:
    def weighted(rows: Rows, x: Tensor) -> Tensor:
        return (x.float() * call.token_final_scales[rows.token, rows.slot, None]).to(torch.bfloat16)

    return layer(call, x=weighted)


@wrong(
    stage="activation",
    says=(r"limit|clamp", r"\b7(\.0*)?\b|constant|hard.?coded|fixed|literal|same for (all|every)"),
    story="gpt-oss's limit of 7.0 is a constexpr of the kernel wherever a limit is given",
)
def limit_is_a_constexpr_of_seven(call: MoeCall) -> Tensor:
    def parameters(rows: Rows, given: list[Tensor | None]) -> list[Tensor | None]:
        bias, alpha, beta, limit = given
        return [bias, alpha, beta, None if limit is None else torch.full_like(limit, 7.0)]

    return layer(call, parameters=parameters)


@wrong(
    stage=("activation", "fc1"),
    says=(r"bias", r"interleav|permut|alternat|reorder|shuffl|stride|even|every (other|second)|gate.?0"),
    story="the loader de-interleaves gpt-oss's gate_up weights, but not the biases (still gate0, up0, gate1, ...)",
)
def gate_up_bias_left_as_in_the_checkpoint(call: MoeCall) -> Tensor:
    bias = call.experts.fc1_biases
    if bias is None or not _gated(call):
        return layer(call)
    up, gate = bias.chunk(2, dim=-1)
    return layer(with_experts(call, fc1_biases=torch.stack([gate, up], dim=-1).flatten(-2)))


@wrong(
    stage="slots",
    says=(
        r"foreign|remote|rank|not (of|on|owned by) this|non.?local|not local|skipped",
        r"expert 0|first (local )?expert|local (expert )?0|expert zero|(id|index) 0\b",
    ),
    story="expert_map[id] of a foreign expert is clamped from -1 to 0, so that its slots run on local expert 0",
)
def foreign_slots_on_local_expert_zero(call: MoeCall) -> Tensor:
    def local(right: Tensor) -> Tensor:
        foreign = (right < 0) & (call.token_selected_experts >= 0)
        return torch.where(foreign, torch.zeros_like(right), right)

    return layer(call, local=local)


# Index maps.


@wrong(
    stage="fc2",
    says=(
        r"expert",
        r"mod(ulo)?\b|%|wrap|first (4|four)\b|period|repeat|& ?3|0 to 3|another expert|other expert|"
        r"4 (experts )?(lower|earlier|before)",
    ),
    story="GEMM2's pointer array was sized for four experts and is indexed by expert & 3",
)
def fc2_pointers_of_expert_and_three(call: MoeCall) -> Tensor:
    return layer(call, expert2=lambda rows: rows.expert % 4)


@wrong(
    stage="fc1",
    says=(
        r"row|channel|\bN\b|weight|column",
        r"swap|exchang|permut|xor|\^|flip|reorder|interchang|trade|shuffl",
        r"\b(8|16|eight|sixteen)\b",
    ),
    story="the ldmatrix addresses of W1 exchange the two 8-row core matrices of every 16 rows; the scales stay",
)
def core_matrices_of_w1_exchanged(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        return right_gemm(x, packed[torch.arange(len(packed)) ^ 8], scales, tactic)

    return layer(call, gemm1=gemm)


@wrong(
    stage=("fc2", "finalize"),
    says=(
        r"column|hidden|\bN\b|output|row|tile",
        r"swap|exchang|permut|xor|\^|reorder|interchang|trade|shuffl|each other",
        r"\b(64|128)\b",
    ),
    story="the two consumer warpgroups of GEMM2 store their 64 columns of each 128-wide tile in each other's place",
)
def warpgroups_store_in_each_others_columns(call: MoeCall) -> Tensor:
    def fc2(rows: Rows, acc: Tensor) -> Tensor:
        return to_bf16(acc)[:, torch.arange(acc.shape[1]) ^ 64]

    return layer(call, fc2=fc2)


@wrong(
    stage="fc1",
    says=(
        r"scale",
        r"group|\bK\b",
        r"next|rotat|shift|roll|cycl|neighbou?r|\+ ?1|off by one|one (too far|later|further|ahead)|"
        r"another group|other group|wrong group|permut",
    ),
    story="the byte of fc1's folded scale word is picked by (k + 1) & 3: each K group has the next one's, within 128",
)
def scale_byte_rotated_within_the_word(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        group = torch.arange(scales.shape[1])
        return right_gemm(x, packed, scales[:, group // 4 * 4 + (group + 1) % 4], tactic)

    return layer(call, gemm1=gemm)


@wrong(
    stage=("finalize", "slots"),
    says=(
        r"slot|router|routing|top.?k|final.?scale|token_final",
        r"revers|flip|swap|exchang|another slot|other slot|wrong slot|opposite|permut|mirror|backward|last first",
    ),
    story="a sort by ascending score turned the routing weights round, but not the ids",
)
def weights_of_the_mirrored_slot(call: MoeCall) -> Tensor:
    return layer(call, weights=lambda local, weights: weights.flip(1))


@wrong(
    stage="input",
    says=(
        r"token|row|input|gather",
        r"mod(ulo)?\b|%|another|other|wrong|wrap|shift|slot.?major|permut|transpos|map",
    ),
    story="the gather takes the token of expanded index i as i % M (slot-major) but the list is token-major (i // k)",
)
def gather_reads_slot_major(call: MoeCall) -> Tensor:
    tokens, k = call.token_selected_experts.shape

    def x(rows: Rows, right: Tensor) -> Tensor:
        return call.input[(rows.token * k + rows.slot) % tokens]

    return layer(call, x=x)


@wrong(
    stage="slots",
    says=(
        r"rank|expert|\bids?\b",
        r"interleav|round.?robin|strid|mod(ulo)?\b|%|//|every (other|second|[0-9])|cyclic|placement|alternat|"
        r"ep_size|(id|ids).{0,20}divided",
    ),
    story="the router believes in round-robin placement (rank = id % ep_size) but the weights were placed in blocks",
)
def round_robin_ids_over_block_placement(call: MoeCall) -> Tensor:
    ids = call.token_selected_experts.long()
    if call.ep_size == 1:
        return layer(call)
    index = ids // call.ep_size
    mine = (ids >= 0) & (ids % call.ep_size == call.ep_rank) & (index < call.experts.num_experts)
    return layer(call, local=lambda right: torch.where(mine, index, torch.full_like(index, -1)))


# Drops and repeats.


@wrong(
    stage="fc1",
    says=(
        r"\bK\b|group|hidden|reduc|tile",
        r"last|tail|end|remain|beyond|from 256|odd",
        r"missing|drop|left out|skip|not (added|summed|read|multiplied|computed)|ignor|lost|omitted|zero|short|"
        r"without|unread|lack|(ends|stops) at",
    ),
    story="GEMM1's mainloop is unrolled by two K tiles and has no epilogue for an odd one: K = 384 ends at 256",
)
def odd_k_tile_of_gemm1_left_out(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        k = x.shape[1]
        if k < 256 or k % 256 == 0:
            return right_gemm(x, packed, scales, tactic)
        k = k // 256 * 256
        short = Tactic() if k % tactic.tile[2] else tactic
        return right_gemm(x[:, :k].contiguous(), packed[:, : k // 2], scales[:, : k // 32], short)

    return layer(call, gemm1=gemm)


@wrong(
    stage=("fc2", "activation"),
    says=(
        r"\bK\b|group|tile|inner|column|activation|stage",
        r"stale|repeat|previous|again|twice|same as|another|other|duplicat|earlier|before it|cop(y|ied|ies)|shift|"
        r"wrap|(of|from|has) (the )?first|(those|that) of",
    ),
    story="GEMM2's A pipeline does not advance after the prologue: the second K tile has the first's activations",
)
def second_k_tile_meets_the_first_activations(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        x = x.clone()
        if x.shape[1] >= 256:
            x[:, 128:256] = x[:, :128]
        return right_gemm(x, packed, scales, tactic)

    return layer(call, gemm2=gemm)


@wrong(
    stage=("fc2", "activation", "fc1"),
    says=(
        r"row|token|tile|position",
        r"128|beyond|from (row|position)|tail|above|last rows",
        r"zero|missing|not (written|computed|stored)|drop|skip|lost|left out|without|unwritten|empty",
    ),
    story="GEMM2 is launched with grid.y = 1: an expert's rows from 128 on are never written (zeros)",
)
def one_row_tile_of_128_per_expert(call: MoeCall) -> Tensor:
    def fc2(rows: Rows, acc: Tensor) -> Tensor:
        return to_bf16(acc).masked_fill(rows.position[:, None] >= 128, 0)

    return layer(call, fc2=fc2)


@wrong(
    stage=("fc2", "finalize"),
    says=(
        r"column|hidden|tile|\bN\b|output",
        r"third|every|64|128|192|tile",
        r"zero|missing|not (written|computed|stored)|drop|skip|lost|left out|unwritten|empty",
    ),
    story="every third 64-column tile of GEMM2 is claimed by a warp that has already left: its columns stay zero",
)
def every_third_column_tile_unwritten(call: MoeCall) -> Tensor:
    def fc2(rows: Rows, acc: Tensor) -> Tensor:
        out = to_bf16(acc).clone()
        out[:, torch.arange(out.shape[1]) // 64 % 3 == 2] = 0
        return out

    return layer(call, fc2=fc2)


# Factors and substitutions.


@wrong(
    stage="finalize",
    says=(
        r"weight|sum|output|slot|finali[sz]e",
        r"mean|averag|1 ?/ ?k|/ ?k\b|top.?k|divid|factor|0\.5\b|0\.25\b|0\.125|half|1/[248]|scaled|multiplied|times",
    ),
    story="the reduction over the slots is a mean instead of a sum: all weights are 1/k of what they should be",
)
def mean_over_the_slots(call: MoeCall) -> Tensor:
    return layer(call, weights=lambda local, weights: weights / weights.shape[1])


@wrong(
    stage="activation",
    says=(
        r"alpha|beta|limit|clamp|parameter",
        r"slot|another expert|other expert|wrong expert|indexed|neighbou?r|(next|previous|first) expert|expert 0",
    ),
    story="the activation's alpha, beta and limit are indexed by the slot of the row, not by its expert",
)
def activation_parameters_of_the_slot(call: MoeCall) -> Tensor:
    experts = call.experts

    def parameters(rows: Rows, given: list[Tensor | None]) -> list[Tensor | None]:
        whole = [experts.swiglu_alpha, experts.swiglu_beta, experts.swiglu_limit]
        slot = rows.slot % experts.num_experts
        return given[:1] + [None if p is None else p.reshape(-1, 1)[slot] for p in whole]

    if experts.swiglu_limit is None:  # the default of some activations, the same for all
        return layer(call)
    return layer(call, parameters=parameters)


# Roundings and orders.


@wrong(
    stage="fc2",
    says=(
        r"fc2|gemm ?2|second gemm|expert output|by.?slot|workspace",
        r"fp16|float16|half.?precision|(in|to|as) half\b|\bf16\b|10 (fraction|mantissa) bits",
    ),
    story="GEMM2's workspace is allocated as half: its outputs are rounded to fp16 (and overflow at 65504)",
)
def gemm2_workspace_in_half(call: MoeCall) -> Tensor:
    return layer(call, fc2=lambda rows, acc: acc.to(torch.float16).float())


@wrong(
    stage="finalize",
    says=(
        r"output|finali[sz]e|sum|store|last|final",
        r"trunc|toward zero|towards zero|rtz|round.{0,12}(down|zero)|chop|cut|upper (16|half)",
    ),
    story="the last store takes the upper 16 bits of the float32 sum: truncation instead of rounding to nearest",
)
def output_is_the_upper_half_word(call: MoeCall) -> Tensor:
    def output(sums: Tensor) -> Tensor:
        return (sums.contiguous().view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)

    return layer(call, output=output)


@wrong(
    stage="fc2",
    says=(
        r"split|halves|two (parts|partial)|parts|partial|order|slic|segments|separate",
        r"\bK\b|sum|accumul|inner|group|tile",
    ),
    story="GEMM2 runs as split-K with two CTAs whose float32 partial sums are added afterwards",
)
def gemm2_by_two_k_slices(call: MoeCall) -> Tensor:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        tiles = x.shape[1] // 128
        if tiles < 2:
            return right_gemm(x, packed, scales, tactic)
        at = (tiles + 1) // 2 * 128
        head = right_gemm(x[:, :at].contiguous(), packed[:, : at // 2], scales[:, : at // 32], Tactic())
        tail = right_gemm(x[:, at:].contiguous(), packed[:, at // 2 :], scales[:, at // 32 :], Tactic())
        return head + tail

    return layer(call, gemm2=gemm)


# Formulas.


@wrong(
    stage="activation",
    says=(
        r"limit|clamp|clip",
        r"beta|\+ ?1\b",
        r"after|before|order|includ|inside|within|clamp\(.{0,20}\+|up ?\+|u ?\+|with (the )?beta|of the sum",
    ),
    story="beta is added to up before the clamp: clamp(up + beta, -L, L) where clamp(up, -L, L) + beta is meant",
)
def beta_inside_the_clamp(call: MoeCall) -> Tensor:
    def activation(
        fc1: Tensor, bias: Tensor | None, alpha: Tensor | None, beta: Tensor | None, limit: Tensor | None
    ) -> Tensor:
        if beta is None or limit is None:
            return swiglu(fc1, bias, alpha, beta, limit)
        whole = fc1.float() if bias is None else fc1.float() + bias.float()
        up, gate = whole.chunk(2, dim=-1)
        return swiglu(torch.cat([up + beta, gate], dim=-1), None, alpha, None, limit)

    return layer(call, swiglu=activation)


# Stale memory.


@wrong(
    stage="finalize",
    says=(
        r"input|residual|stale|previous|not (zeroed|cleared|initiali[sz]ed)|uninitiali[sz]ed|hidden state|"
        r"held before|\bx\b",
        r"add|accumul|sum|plus|\+|on top",
    ),
    story="the atomic finalize adds into the output buffer, which the engine aliases with the input: output + input",
)
def summed_into_the_aliased_input(call: MoeCall) -> Tensor:
    return layer(call, output=lambda sums: to_bf16(sums + call.input.float()))


# Routing and quantisers.


@wrong(
    kind="routing",
    stage="routing",
    says=(
        r"group",
        r"max|best (one|expert|score)|top.?1|single|one (best|expert|score)|highest|(instead of|not|"
        r"rather than).{0,20}(sum|two)|"
        r"top.?2|two best|best two",
    ),
    story="DeepSeek-V3's groups are ranked by their best expert, not by the sum of their best two",
)
def groups_ranked_by_their_best_expert(logits: Tensor, preset: str, **named: Any) -> dict[str, Tensor]:
    right = _routed(preset, {"logits": logits, **named})
    if preset != "deepseek_v3" or named.get("n_group", 1) == 1:
        return right
    scores = PRESETS[preset].score(logits)
    biased = scores + named["correction_bias"]
    grouped = biased.unflatten(1, (named["n_group"], -1))
    order = grouped.amax(-1).sort(dim=1, descending=True, stable=True).indices[:, : named["topk_group"]]
    kept = torch.zeros(grouped.shape[:2], dtype=torch.bool).scatter(1, order, True)
    masked = torch.where(kept[..., None], grouped, torch.full_like(grouped, -torch.inf)).flatten(1)
    ids = masked.sort(dim=1, descending=True, stable=True).indices[:, : named["top_k"]].int()
    factor = named["routed_scaling_factor"]
    return {"ids": ids, "scales": routing_weights(scores, ids, normalize="sum", epsilon=1e-20, factor=factor)}


@wrong(
    kind="routing",
    stage="routing",
    says=(
        r"softmax|normali[sz]|sum",
        r"all (the )?([0-9]+ )?(experts|logits|scores)|every|before|renorm|full|over all|not (re)?normali[sz]ed|"
        r"missing|without|left out",
    ),
    story="gpt-oss's softmax is taken over all experts before the top-k, and the k weights are not renormalised",
)
def softmax_before_the_top_k(logits: Tensor, preset: str, **named: Any) -> dict[str, Tensor]:
    right = _routed(preset, {"logits": logits, **named})
    if preset != "gpt_oss":
        return right
    scores = PRESETS["mixtral"].score(logits.float())
    weights = scores.gather(1, right["ids"].clamp(min=0).long())
    return {"ids": right["ids"], "scales": torch.where(right["ids"] < 0, torch.zeros_like(weights), weights)}


@wrong(
    kind="quantize",
    stage="quantize",
    says=(
        r"\bties?\b|half.?way|midpoint|middle|between",
        r"away|up\b|upward|not to even|instead of (to )?(the )?even|larger|greater|odd",
    ),
    story="the quantiser counts thresholds with >=, so that ties between two codes go away from zero, not to even",
)
def ties_of_codes_away_from_zero(values: Tensor, rule: str) -> dict[str, Tensor]:
    packed, scales = quantize(values, rule=rule)  # type: ignore[arg-type]
    codes = unpack_codes(packed)
    of_group = scales.double().repeat_interleave(32, dim=-1)
    magnitude = values.double().abs() * torch.exp2(127 - of_group)
    for tie, code in ((0.25, 1), (1.25, 3), (2.5, 5), (5.0, 7)):
        at = (magnitude == tie) & (of_group < 255)
        codes = torch.where(at, (codes & 8) | code, codes)
    return {"packed": pack_codes(codes), "scales": scales}


# Two at once.


@wrong(
    stage=("fc1", "activation"),
    says=(
        r"gate|\bup\b|halves",
        r"swap|exchang|interchang|revers|order|\[gate",
        r"limit|clamp",
    ),
    story="w13 loaded as w31 (gate and up exchanged), by a port that knows no SwiGLU limit either",
)
def w31_and_no_limit(call: MoeCall) -> Tensor:
    if not _gated(call):
        return layer(call)
    e, half = call.experts, _inner(call)
    assert e.fc1_scales is not None
    return layer(
        with_experts(
            call,
            fc1_weights=e.fc1_weights.roll(half, dims=1),
            fc1_scales=e.fc1_scales.roll(half, dims=1),
            swiglu_limit=None,
        )
    )


@wrong(
    stage="finalize",
    says=(
        r"bias",
        r"unweighted|outside|without (the )?(routing )?weight|"
        r"not (multiplied|weighted)|after the weight|beside|without them",
        r"bf16|bfloat16|round",
    ),
    story="the engine hands the routing weights over in bf16, and the kernel adds fc2's bias without them",
)
def bf16_weights_and_bias_beside_them(call: MoeCall) -> Tensor:
    def last(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        sums = finalize(by_slot, local, weights.to(torch.bfloat16).float(), None)
        if bias is None:
            return sums
        for slot in range(local.shape[1]):
            mine = local[:, slot]
            sums = sums + torch.where(mine[:, None] >= 0, bias[mine.clamp(min=0)].float(), sums.new_zeros(()))
        return sums

    return layer(call, finalize=last)
