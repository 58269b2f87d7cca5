"""What goes wrong between a checkpoint and a launch: shards, buffers, ranks, modes, other models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxfp4ref import MoeCall, dequantize, forward, quantize
from mxfp4ref.goldens.runs import routing_options
from mxfp4ref.routing.models import PRESETS
from mxfp4ref.routing.presets import ROUTERS
from mxfp4ref.sm90.finalize import finalize
from mxfp4ref.sm90.fp32 import to_bf16
from tests.held_out_kernels.by_hand import Rows, layer, right_routing, with_experts
from tests.held_out_kernels.definition import wrong
from tests.held_out_kernels.serving import _encoded

ANOTHER = (
    "swap|shift|rotat|roll|exchang|permut|interleav|shuffl|transpos|strid|modulo|another|map|instead of|order"
    "|\\bnext\\b|previous|neighbou?r"
)
RANDOM = "random|nois|scatter|irregular|no pattern|unrelated|perturb|stochastic"


# Loaders


@wrong(
    stage="fc1",
    says=(
        "gate|\\bw1\\b|half|halves|shard|fc1|GEMM ?1",
        "\\brows?\\b|column|block|feature|index|half|halves|shard",
        ANOTHER,
    ),
    story="a loader that gathers two shards of w1 appends the second one first, those of w3 in order",
)
def shards_of_w1_gathered_in_reverse(call: MoeCall) -> Tensor:
    if not call.activation.gated:
        return forward(call)
    inner = call.experts.intermediate_size
    rows = torch.arange(2 * inner)
    rows[inner:] = rows[inner:].roll(inner // 2)
    scales = call.experts.fc1_scales
    assert scales is not None
    changed = with_experts(call, fc1_weights=call.experts.fc1_weights[:, rows], fc1_scales=scales[:, rows])
    return forward(changed)


@wrong(
    stage="fc1",
    says=("expert", f"{ANOTHER}|wrong expert|other expert|modulo|half|halves|expert \\d+"),
    story="the second of two loader threads opens w13's first files too: expert e + E/2 is expert e",
)
def second_loader_thread_reads_the_first_files(call: MoeCall) -> Tensor:
    count = call.experts.num_experts
    file = torch.arange(count) % max((count + 1) // 2, 1)
    return layer(call, expert1=lambda rows: file[rows.expert])


@wrong(
    stage="fc2",
    says=("scale|exponent", f"{ANOTHER}|wrong group|other group"),
    story="columns of w2's scales are gathered from two shards in turn, not shard by shard",
)
def shards_of_w2_scales_dealt_alternately(call: MoeCall) -> Tensor:
    scales = call.experts.fc2_scales
    assert scales is not None
    half = scales.shape[2] // 2
    column = torch.arange(scales.shape[2])
    column[: 2 * half] = column[: 2 * half].view(2, half).T.flatten()
    return layer(with_experts(call, fc2_scales=scales[:, :, column].contiguous()))


@wrong(
    stage="fc2",
    says=(
        "column|\\brows?\\b|feature|hidden|index|channel",
        "zero|(are|is|as|be) 0\\b|missing|last|tail|remain|beyond|left out|drop|from \\d+"
        "|not (written|computed|loaded|there)",
    ),
    story="w2 is copied to the device 48 rows at a time, and what remains of the hidden size stays zero",
)
def w2_staged_by_48_rows_without_the_rest(call: MoeCall) -> Tensor:
    weights = call.experts.fc2_weights.clone()
    weights[:, weights.shape[1] // 48 * 48 :] = 0
    return layer(with_experts(call, fc2_weights=weights))


@wrong(
    stage="activation",
    says=("bias", f"\\bup\\b|half|halves|both|same|gate|{ANOTHER}"),
    story="both halves of fc1's bias are narrowed from the same offset: the gate's bias is a copy of up's",
)
def both_halves_of_the_bias_narrowed_from_zero(call: MoeCall) -> Tensor:
    bias = call.experts.fc1_biases
    if bias is None or not call.activation.gated:
        return forward(call)
    return layer(with_experts(call, fc1_biases=bias.chunk(2, 1)[0].repeat(1, 2)))


@wrong(
    stage="activation",
    says=(
        "alpha|sigmoid",
        "1 ?/|divid|invers|reciproc|temperature|factor|other value|instead of|smaller|0\\.\\d",
    ),
    story="the loader takes alpha of the config for a temperature and stores its reciprocal",
)
def alpha_stored_as_a_temperature(call: MoeCall) -> Tensor:
    if call.experts.swiglu_alpha is None:
        return forward(call)
    return layer(with_experts(call, swiglu_alpha=1 / call.experts.swiglu_alpha))


# The scheduler and what it sends to the experts


@wrong(
    stage=("input", "slots", "fc1"),
    says=(
        "\\brows?\\b|token|input",
        "\\b16\\b|sixteen|wrap|modulo|overwr|stale|another|later rows|beyond|capacity|permut|map|instead of",
    ),
    story="an expert's receive buffer is a ring of 16 rows: later rows overwrite those not yet multiplied",
)
def receive_buffer_wraps_after_16_rows(call: MoeCall) -> Tensor:
    def received(rows: Rows, x: Tensor) -> Tensor:
        place = rows.expert * 16 + rows.position % 16
        writer = torch.zeros(16 * call.experts.num_experts, dtype=torch.int64)
        writer.scatter_reduce_(0, place, torch.arange(len(place)), "amax", include_self=False)
        return x[writer[place]]

    return layer(call, x=received)


@wrong(
    stage=("input", "fc1"),
    says=(
        "input|hidden|\\bx\\b|GEMM ?1|fc1",
        f"{RANDOM}|jitter|uniform|multiplied (by|with)|factor|per.element|each element"
        "|(by|within|up to|about) \\d(\\.\\d+)? ?%|percent",
    ),
    story="a model left in training mode: the router's jitter, within 2 %, scales the experts' input too",
)
def training_jitter_on_the_hidden_states(call: MoeCall) -> Tensor:
    random = torch.Generator().manual_seed(17)
    jitter = 0.98 + 0.04 * torch.rand(call.input.shape, generator=random)
    return layer(replace(call, input=to_bf16(call.input.float() * jitter)))


@wrong(
    stage="activation",
    says=(
        "zero|missing|drop|mask|lost|left out|(are|is|as) 0\\b",
        f"{RANDOM}|1\\.1|10/9|factor|scaled|10 ?%|tenth"
        "|(some|single|individual|of the|those) (elements|columns|values|entries)",
    ),
    story="dropout is still on: a tenth of the activation is zero, the others are divided by 0.9",
)
def training_dropout_of_a_tenth(call: MoeCall) -> Tensor:
    def dropped(rows: Rows, activated: Tensor) -> Tensor:
        random = torch.Generator().manual_seed(23)
        kept = torch.rand(activated.shape, generator=random) >= 0.1
        return to_bf16(torch.where(kept, activated / 0.9, 0.0))

    return layer(call, activation=dropped)


@wrong(
    stage=("activation", "fc2"),
    says=(
        "activation|GEMM ?2|fc2|intermediate|column|block|group|\\bK\\b",
        "rotat|hadamard|walsh|transform|mix(ed|es|ing)|linear combination|combin\\w+ of|orthogonal|butterfly"
        "|sums? and differences",
    ),
    story="the online Hadamard rotation by 32 before w2 is on for a checkpoint that was not rotated",
)
def online_hadamard_before_w2(call: MoeCall) -> Tensor:
    matrix = torch.ones(1, 1)
    for _ in range(5):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])

    def rotated(rows: Rows, activated: Tensor) -> Tensor:
        blocks = to_bf16(activated).double().unflatten(1, (-1, 32))
        return to_bf16((blocks @ matrix.double() / 32**0.5).float().flatten(1))

    return layer(call, activation=rotated)


# Ranks, and what they send back


@wrong(
    stage="slots",
    says=(
        "slot|\\bids?\\b|term|contribution",
        "stop|break|skip|drop|missing|left out|ignor|not (added|computed|summed|counted)"
        "|(after|behind|following|later).*(first|-1|foreign|pad|another rank|other rank)",
    ),
    story="the loop over a token's ids breaks at the first that is not of this rank where it should go on",
)
def id_loop_breaks_at_the_first_foreign(call: MoeCall) -> Tensor:
    def reached(local: Tensor) -> Tensor:
        return local.masked_fill((local < 0).cumsum(1) > 0, -1)

    return layer(call, local=reached)


@wrong(
    stage=("slots", "finalize"),
    says=(
        "experts? \\[?0|first (local )?expert|local expert|one expert|some experts|replica",
        "twice|doubl|two times|factor|once more|repeat|\\b2\\.0|x ?2\\b|2x|by 2\\b",
    ),
    story="expert 0 has a replica on this rank, and both answer: its terms are added once more at the end",
)
def redundant_replica_answers_too(call: MoeCall) -> Tensor:
    def summed(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        replica = torch.where(local == 0, local, -1)
        both = torch.cat([local, replica], 1)
        return finalize(torch.cat([by_slot, by_slot], 1), both, torch.cat([weights, weights], 1), bias)

    return layer(call, finalize=summed)


@wrong(
    stage="finalize",
    says=("weight|scale", f"{ANOTHER}|other (tokens?|slots?)|wrong (tokens?|slots?)|sorted|place|position"),
    story="routing weights come back by row, expert by expert, and are read by token and slot",
)
def weights_returned_expert_by_expert(call: MoeCall) -> Tensor:
    def sorted_by_expert(local: Tensor, weights: Tensor) -> Tensor:
        order = torch.argsort(local.flatten(), stable=True)
        return weights.flatten()[order].view_as(weights)

    return layer(call, weights=sorted_by_expert)


@wrong(
    stage="finalize",
    says=(
        "token|\\brows?\\b|batch|chunk|half",
        "\\badd|plus|accumulat(es|ed)\\b|stale|earlier|previous|left ?over|uninit|on top|another"
        "|not (cleared|zeroed|initiali)",
    ),
    story="the second micro-batch reuses the accumulators of the first one without clearing them",
)
def second_micro_batch_on_top_of_the_first(call: MoeCall) -> Tensor:
    def output(sums: Tensor) -> Tensor:
        half = (len(sums) + 1) // 2
        return to_bf16(torch.cat([sums[:half], sums[half:] + sums[: len(sums) - half]]))

    return layer(call, output=output)


@wrong(
    stage="finalize",
    says=(
        "bf16|bfloat16|round|precision",
        "partial|\\beach\\b|\\bper\\b|node|\\bhalf\\b|halves|intermediate|in between|twice|double|accumulat"
        "|before .{0,40}(add|sum|weigh)",
    ),
    story="experts of the lower and of the upper half of a rank sit on two nodes, whose sums travel as bf16",
)
def sums_of_two_nodes_sent_as_bf16(call: MoeCall) -> Tensor:
    def summed(by_slot: Tensor, local: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        upper = local >= call.experts.num_experts // 2
        nodes = [local.masked_fill(upper, -1), local.masked_fill(~upper, -1)]
        one, two = (to_bf16(finalize(by_slot, node, weights, bias)).float() for node in nodes)
        return one + two

    return layer(call, finalize=summed)


@wrong(
    stage="finalize",
    says=(
        "output|sum|result|weight|scale",
        "0\\.5|0\\.25|quarter|1/[248]|divid|factor|power of two|2\\^-|averag|\\bmean\\b"
        "|(number|count) of ranks|_size",
    ),
    story="the all-reduce is one with AVG: the output is divided by the number of tensor or expert ranks",
)
def all_reduce_takes_the_average(call: MoeCall) -> Tensor:
    return layer(call, output=lambda sums: to_bf16(sums / (call.tp_size * call.ep_size)))


@wrong(
    stage="finalize",
    says=(
        "tanh|soft.?cap|saturat|squash|compress|bounded|limit|clamp|non.?linear|shrink|shrunk"
        "|large (values|outputs|magnitudes|sums)",
        "output|sum|result|finalize|\\b5\\b|value|magnitude",
    ),
    story="another model's soft cap is applied to the layer's output, 5 tanh(y / 5)",
)
def output_soft_capped_at_five(call: MoeCall) -> Tensor:
    return layer(call, output=lambda sums: to_bf16(5 * torch.tanh(sums / 5)))


# Before the layer


@wrong(
    kind="routing",
    stage="routing",
    says=(
        "bias",
        "sum|normali[sz]|denominator|divid|divisor|total|\\bweights?\\b|scales",
    ),
    story="unbiased scores are divided by the sum of the biased ones, which were at hand from the top-k",
)
def weights_divided_by_the_biased_sum(**inputs: Any) -> dict[str, Tensor]:
    routed = ROUTERS[inputs["preset"]](inputs["logits"], **routing_options(inputs))
    if "correction_bias" not in inputs:
        return right_routing(inputs)
    scores = PRESETS[inputs["preset"]].score(inputs["logits"])
    ids = routed.ids.long().clamp(min=0)
    right = scores.gather(1, ids).sum(1, keepdim=True)
    biased = (scores + inputs["correction_bias"]).gather(1, ids).sum(1, keepdim=True)
    scales = torch.where(routed.ids < 0, routed.scales, routed.scales * (right / biased))
    return {"ids": routed.ids, "scales": scales}


@wrong(
    kind="quantize",
    stage="quantize",
    says=(
        "scale|exponent|amax|maximum|largest",
        "\\b16\\b|half|halves|sixteen|saturat|too (small|low)|smaller|lower|below|subset|part of|missing",
    ),
    story="a quantiser written for NVFP4 looks for the largest magnitude in the first 16 of a group's 32",
)
def largest_of_the_first_sixteen(*, values: Tensor, rule: str) -> dict[str, Tensor]:
    seen = values.unflatten(-1, (-1, 32)).clone()
    seen[..., 16:] = 0
    return _encoded(values, quantize(seen.flatten(-2), rule=rule)[1])


@wrong(
    kind="dequantize",
    stage="dequantize",
    says=(
        "scale|exponent",
        f"{ANOTHER}|repeat|wrong group|other group|\\bk %",
    ),
    story="scales are expanded by repeat, not repeat_interleave: element k has the scale of group k mod G",
)
def scales_expanded_by_repeat(
    *, packed: Tensor, scales: Tensor, convention: str, dtype: str
) -> dict[str, Tensor]:
    groups = scales.shape[-1]
    kind = getattr(torch, dtype)
    each = torch.stack(
        [
            dequantize(packed, scales[..., g : g + 1].expand_as(scales), convention=convention, dtype=kind)
            for g in range(groups)
        ]
    )
    columns = torch.arange(each.shape[-1])
    return {"values": each[columns % groups, ..., columns].movedim(0, -1).contiguous()}
