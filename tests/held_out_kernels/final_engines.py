"""Wrong loaders, schedulers, pipelines and engines, and a few epilogues, routers and quantisers."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mxfp4ref import MoeCall, quantize
from mxfp4ref.formats.generations import BYTEWISE, WORDWISE
from mxfp4ref.formats.layout import deinterleave_weights_sm90, interleave_weights_sm90
from mxfp4ref.formats.mxfp4 import E2M1_VALUES, decode_ue8m0, unpack_codes
from mxfp4ref.model.forward import select_local
from mxfp4ref.routing import PRESETS, routing_weights
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.activation import clamp, sigmoid
from mxfp4ref.sm90.fp32 import to_bf16, to_fp16
from mxfp4ref.sm90.gemm.cpu import group_scaled_gemm
from mxfp4ref.sm90.tactics import Tactic
from tests.held_out_kernels.by_hand import Rows, layer, local_experts, right_routing, with_experts
from tests.held_out_kernels.definition import wrong

NOT_DONE = (
    r"skip|drop|miss|left out|los[te]|not (comput|summ|add|writ|stor|cover)|unwritten|ignor|zero|absent|stale"
)
OTHER = (
    r"another|other|previous|before|next|follow|neighbou?r|wrong|instead|shift|of expert|one (late|behind|on)"
)


# Input rows and slots


@wrong(
    stage="input",
    says=(
        r"row|token",
        r"modulo|mod |% ?8|\b8\b|eight",
        r"input|hidden|gather|\bx\b|GEMM ?1|fc1|token|activations? of",
    ),
    story="the gather keeps 8 token ids and uses them for the whole tile: row r of an expert is row r % 8",
)
def gather_array_holds_eight_token_ids(call: MoeCall) -> Tensor:
    def x(rows: Rows, taken: Tensor) -> Tensor:
        first = torch.arange(len(taken)) - rows.position
        return taken[first + rows.position % 8]

    return layer(call, x=x)


@wrong(
    stage="slots",
    says=(
        r"expert|\bids?\b",
        r"int64|64.bit|eight.byte|stride|every (second|other)|odd|interleav|expert 0|zero|half|twice|//|pair",
    ),
    story="the router hands over int64 ids, the kernel takes the pointer as int32: every second id is a high word",
)
def ids_of_int64_behind_an_int32_pointer(call: MoeCall) -> Tensor:
    ids = call.token_selected_experts
    words = ids.long().contiguous().view(torch.int32).flatten()[: ids.numel()].view_as(ids)
    local = select_local(words, call.experts.num_experts, call.ep_size, call.ep_rank)
    return layer(call, local=lambda _: local)


@wrong(
    stage="slots",
    says=(
        r"expert|\bids?\b|slots?",
        rf"{NOT_DONE}|foreign|range|rank|offset|shift|one too",
        r"last|highest|largest|end|one (fewer|less|short|too)|E ?- ?1|expert \d+|offset|shift",
    ),
    story="the number of experts is taken for the largest id: a rank's share is one expert short, and starts earlier",
)
def a_ranks_share_from_the_largest_id(call: MoeCall) -> Tensor:
    share = (call.num_global_experts - 1) // call.ep_size
    moved = call.token_selected_experts.long() - call.ep_rank * share
    local = torch.where((moved < 0) | (moved >= share), -1, moved)
    return layer(call, local=lambda _: local)


# GEMM1 and the activation


@wrong(
    stage="fc1",
    says=(
        r"\bup\b|w3",
        r"gate|w1",
        r"same|cop(y|ies)|both|twice|repeat|equal|duplicat|instead|place of|taken from|those of|is the|with the",
    ),
    story="the loader's table of names has w1 for the shards of w1 and of w3: the up rows are the gate's once more",
)
def w3_shard_filled_from_the_w1_tensor(call: MoeCall) -> Tensor:
    if not call.activation.gated:
        return layer(call)
    changes: dict[str, Tensor | None] = {}
    for name in ("fc1_weights", "fc1_scales", "fc1_biases"):
        if (tensor := getattr(call.experts, name)) is not None:
            gate = tensor.chunk(2, 1)[1]
            changes[name] = torch.cat((gate, gate), 1)
    return layer(with_experts(call, **changes))


@wrong(
    stage="fc1",
    says=(
        r"scale",
        r"last|\bend\b|tail|final|K tile|groups? (of K )?\d",
        r"expert|next|follow|ahead|early|overwrit",
    ),
    story="scales are released before the last K tile is used: the next expert's are there by then",
)
def fc1_scale_stage_refilled_before_the_last_k_tile(call: MoeCall) -> Tensor:
    scales = call.experts.fc1_scales
    assert scales is not None
    groups, active = call.kernel.tactics[0].tile_k // 32, _active(call)
    moved = scales.clone()
    for expert, following in pairwise(active):
        moved[expert, :, -groups:] = scales[following, :, -groups:]
    return layer(with_experts(call, fc1_scales=moved))


@wrong(
    stage="fc1",
    says=(
        r"trunc|toward(s)? zero|cut|chop|upper half|round",
        r"\bup\b|first half|half of the (rows|columns)",
    ),
    story="GEMM1's epilogue rounds the gate to bf16 with cvt.rn, but takes the upper half word of the up accumulator",
)
def up_half_stored_by_its_upper_words(call: MoeCall) -> Tensor:
    def fc1(rows: Rows, acc: Tensor) -> Tensor:
        out = to_bf16(acc)
        if call.activation.gated:
            half = acc.shape[1] // 2
            up = acc[:, :half].contiguous()
            out[:, :half] = (up.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
        return out

    return layer(call, fc1=fc1)


@wrong(
    stage=("activation", "fc1"),
    says=(r"bias", r"expert", OTHER),
    story="the epilogue has two buffers for fc1's bias and fills one for two experts: the second gets the first's",
)
def bias_buffer_refilled_every_second_expert(call: MoeCall) -> Tensor:
    biases, active = call.experts.fc1_biases, _active(call)
    if biases is None:
        return layer(call)
    moved = biases.clone()
    for first, second in zip(active[::2], active[1::2], strict=False):
        moved[second] = biases[first]
    return layer(with_experts(call, fc1_biases=moved))


@wrong(
    stage="activation",
    says=(
        r"beta",
        r"limit|clamp",
        r"exchang|swap|cross|place of|instead|each other|revers|mixed|order|taken (for|as|from)|used as|is the",
    ),
    story="the launcher passes alpha, limit, beta by position and the kernel declares alpha, beta, limit",
)
def launcher_passes_limit_where_beta_stands(call: MoeCall) -> Tensor:
    beta, limit = call.experts.swiglu_beta, call.experts.swiglu_limit
    if beta is None and limit is None:
        return layer(call)
    return layer(with_experts(call, swiglu_beta=limit, swiglu_limit=beta))


@wrong(
    stage="activation",
    says=(r"sigmoid|silu|swish|alpha", r"\bup\b"),
    story="a slip of a variable: the gate is multiplied by the sigmoid of up rather than of itself",
)
def sigmoid_fed_from_the_up_variable(call: MoeCall) -> Tensor:
    def swiglu(
        fc1: Tensor, bias: Tensor | None, alpha: Tensor | None, beta: Tensor | None, limit: Tensor | None
    ) -> Tensor:
        value = fp32.widen(fc1)
        if bias is not None:
            value = fp32.add(value, fp32.widen(bias))
        up, gate = (half.contiguous() for half in value.chunk(2, -1))
        if alpha is beta is limit is None:
            return fp32.mul(fp32.mul(gate, sigmoid(up)), up)
        if limit is not None:
            limit = limit.expand_as(up)
            up, gate = clamp(up, limit), fp32.minimum(gate, limit)
        stretched = up if alpha is None else fp32.mul(up, alpha.expand_as(up))
        raised = up if beta is None else fp32.add(up, beta.expand_as(up))
        return fp32.mul(fp32.mul(gate, sigmoid(stretched)), raised)

    return layer(call, swiglu=swiglu)


# GEMM2


@wrong(
    stage="fc2",
    says=(
        r"layout|interleav|order|permut|shuffl|arrang",
        r"generation|older|bytewise|another release|0\.6|\bbytes?\b|nibble|weights|code",
    ),
    story="w2 is interleaved by a helper kept from an older release, whose kernel wanted another order of the bytes",
)
def w2_prepared_for_the_other_kernel_generation(call: MoeCall) -> Tensor:
    weights = call.experts.fc2_weights
    own = call.kernel.generation
    other = BYTEWISE if own == WORDWISE else WORDWISE
    if weights.shape[1] % 16 or weights.shape[2] % 32 or own not in (BYTEWISE, WORDWISE):
        return layer(call)
    taken = deinterleave_weights_sm90(interleave_weights_sm90(weights, other), own)
    return layer(with_experts(call, fc2_weights=taken))


@wrong(
    stage="fc2",
    says=(
        r"code|nibble|byte|pack|w2",
        r"\brows?\b|axis|dimension|\bN\b|transpos|layout|order|permut|rearrang",
    ),
    story="the exporter packs two neighbouring output rows of w2 into a byte, the loader reshapes to two of K a byte",
)
def w2_codes_packed_in_pairs_of_rows(call: MoeCall) -> Tensor:
    weights = call.experts.fc2_weights
    codes = unpack_codes(weights)
    packed = codes[:, 0::2] | codes[:, 1::2] << 4  # [E, H/2, I]
    return layer(with_experts(call, fc2_weights=packed.reshape(weights.shape)))


@wrong(
    stage="fc2",
    says=(r"tile|block|column", r"last|\bend\b|tail|final|partial|later|some", NOT_DONE),
    story="Triton's grouped order of tiles forgets that the last group has fewer than 8 row blocks: some never run",
)
def grouped_raster_with_a_short_last_group(call: MoeCall) -> Tensor:
    block_m, block_n, group = 16, 64, 8

    def fc2(rows: Rows, acc: Tensor) -> Tensor:
        out = to_bf16(acc)
        blocks = (torch.bincount(rows.expert, minlength=call.experts.num_experts) + block_m - 1) // block_m
        of_row = (blocks.cumsum(0) - blocks)[rows.expert] + rows.tile(block_m)
        num_m, num_n = int(blocks.sum()), -(-out.shape[1] // block_n)
        done = torch.zeros(num_m, num_n, dtype=torch.bool)
        for pid in range(num_m * num_n):
            within = pid % (group * num_n)
            m, n = pid // (group * num_n) * group + within % group, within // group
            if m < num_m:
                done[m, n] = True
        kept = done.repeat_interleave(block_n, 1)[of_row, : out.shape[1]]
        return torch.where(kept, out, torch.zeros_like(out))

    return layer(call, fc2=fc2)


@wrong(
    stage="fc2",
    says=(
        r"half|fp16|float16|round|precision|significand|1[01] bits",
        r"group|accumul|partial|pair|two|K tile|chunk|inside|64|sum",
    ),
    story="products are accumulated in half over two K groups, and promoted to float32 only then",
)
def fc2_half_accumulators_promoted_every_two_groups(call: MoeCall) -> Tensor:
    def gemm2(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
        parts = _by_group(x, packed, scales, tactic)
        total = torch.zeros_like(parts[0])
        for group in range(0, len(parts), 2):
            pair = parts[group]
            if group + 1 < len(parts):
                pair = fp32.add(pair, parts[group + 1])
            total = fp32.add(total, fp32.widen(to_fp16(pair)))
        return total

    return layer(call, gemm2=gemm2)


@wrong(
    stage="fc2",
    says=(
        r"expert",
        r"another|other experts|permut|order|sort|wrong|instead|position|place|exchang|swap|\bof expert \d|->|mapp",
    ),
    story="GEMM2's problems are launched longest first, but its pointers to w2 are still listed by expert",
)
def longest_problem_first_pointers_by_expert(call: MoeCall) -> Tensor:
    def expert2(rows: Rows) -> Tensor:
        counts = torch.bincount(rows.expert, minlength=call.experts.num_experts)
        active = counts.nonzero().flatten()
        launched = active[torch.argsort(counts[active], descending=True, stable=True)]
        whose = torch.zeros_like(counts)
        whose[launched] = active
        return whose[rows.expert]

    return layer(call, expert2=expert2)


# The weighted sum


@wrong(
    stage="finalize",
    says=(r"weight", r"first|same|\bone\b|slot 0|single|all (its|the) slots|every slot|equal|another slot"),
    story="a token is sent to a rank once, for all of its experts there, with the weight of the first of them",
)
def token_dispatched_once_with_one_weight(call: MoeCall) -> Tensor:
    def weights(local: Tensor, given: Tensor) -> Tensor:
        first = (local >= 0).int().argmax(1, keepdim=True)
        return given.gather(1, first).expand_as(given).contiguous()

    return layer(call, weights=weights)


@wrong(
    stage="finalize",
    says=(
        r"stride|pitch|offset|shift|displac|moved|rotat|wrap|padding|pads|padded",
        r"\brows?\b|token|column|output",
    ),
    story="the output's rows lie 64 elements further apart than they are long, and are read as if they were dense",
)
def combine_buffer_viewed_without_its_row_padding(call: MoeCall) -> Tensor:
    def output(sums: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(to_bf16(sums), (0, 64))
        return padded.flatten()[: sums.numel()].view(sums.shape).clone()

    return layer(call, output=output)


# Routers, a quantiser and a dequantiser


@wrong(
    kind="routing",
    stage="routing",
    says=(r"tie|equal|same (score|value|logit)", r"expert|\bids?\b"),
    story="top-k by k rounds of argmax, each of which masks every score that equals the one found",
)
def argmax_rounds_mask_by_value(**inputs: Any) -> dict[str, Tensor]:
    if "n_group" in inputs or "tid2eid" in inputs:
        return right_routing(inputs)
    preset, padded = PRESETS[inputs["preset"]], inputs.get("padded")
    logits = inputs["logits"]
    if padded is not None:
        logits = logits.masked_fill(padded[:, None], 0.0)
    scores = preset.score(logits)
    left = scores + inputs["correction_bias"] if "correction_bias" in inputs else scores.clone()
    ids = []
    for _ in range(inputs["top_k"]):
        best = left.max(1, keepdim=True).values
        ids.append((left == best).int().argmax(1))
        left = left.masked_fill(left == best, -torch.inf)
    chosen = torch.stack(ids, 1).int()
    in_weights = inputs.get("routed_scaling") == "in_weights"
    scales = routing_weights(
        scores,
        chosen,
        normalize=preset.normalize,
        epsilon=preset.epsilon,
        factor=inputs["routed_scaling_factor"] if in_weights else 1.0,
    )
    if padded is not None:
        chosen = chosen.masked_fill(padded[:, None], -1)
        scales = scales.masked_fill(padded[:, None], 0.0)
    return {"ids": chosen, "scales": scales}


@wrong(
    kind="routing",
    stage="routing",
    mode="bounded",
    says=(
        r"weight|scale",
        r"normali[sz]|sum|too (small|low)|smaller|below|less than|times|factor|divid|k ?\+ ?1",
    ),
    story="with a slot for a fused shared expert weights are normalised over k + 1 experts, of which k are kept",
)
def normalised_with_the_runner_up(**inputs: Any) -> dict[str, Tensor]:
    if "tid2eid" in inputs:
        return right_routing(inputs)
    top_k = inputs["top_k"]
    routed = right_routing({**inputs, "top_k": top_k + 1})
    return {name: tensor[:, :top_k].contiguous() for name, tensor in routed.items()}


@wrong(
    kind="quantize",
    stage="quantize",
    says=(r"scale", r"group|block", r"odd|even|second|pair|neighbou?r|before|previous|other|64|first of"),
    story="a thread quantises two groups, each by its own scale, and stores the first group's scale byte for both",
)
def first_scale_byte_stored_for_two_groups(**inputs: Any) -> dict[str, Tensor]:
    packed, scales = quantize(inputs["values"], rule=inputs["rule"])
    stored = scales.clone()
    stored[..., 1::2] = scales[..., 0 : scales.shape[-1] - scales.shape[-1] % 2 : 2]
    return {"packed": packed, "scales": stored}


@wrong(
    kind="dequantize",
    stage="dequantize",
    says=(
        r"scale",
        r"modulo|mod |%|tile|repeat|interleav|cycl|order|index|permut|wrong group|other group|another group",
    ),
    story="scales are spread with repeat() for repeat_interleave(): element k has scale k % G, not k // 32",
)
def scales_spread_with_repeat(**inputs: Any) -> dict[str, Tensor]:
    packed, scales = inputs["packed"], inputs["scales"]
    dtype = getattr(torch, inputs["dtype"])
    codes = unpack_codes(packed).long()
    values = torch.tensor(E2M1_VALUES, dtype=torch.float64)[codes]
    spread = decode_ue8m0(scales, convention=inputs["convention"], dtype=torch.float64).repeat(1, 32)
    product = (values * spread).to(dtype)
    bits, nan = (torch.int16, 0x7FFF) if dtype == torch.bfloat16 else (torch.int32, 0x7FFFFFFF)
    return {"values": torch.where(product.isnan(), nan, product.view(bits)).to(bits).view(dtype)}


def _active(call: MoeCall) -> list[int]:
    """This rank's experts that have rows, ascending."""
    local = local_experts(call)
    active: list[int] = local[local >= 0].unique().tolist()
    return active


def _by_group(x: Tensor, packed: Tensor, scales: Tensor, tactic: Tactic) -> Tensor:
    """Each K group's scaled accumulators, `[G, R, N] float32`: a GEMM each, of one K tile whose rest is zeros."""
    groups, width = scales.shape[1], tactic.tile_k
    taken = x.unflatten(1, (groups, 32)).transpose(0, 1)
    codes = packed.unflatten(1, (groups, 16)).transpose(0, 1)
    wide_x = torch.nn.functional.pad(taken, (0, width - 32)).contiguous()
    wide_codes = torch.nn.functional.pad(codes, (0, width // 2 - 16)).contiguous()
    wide_scales = torch.nn.functional.pad(scales.T[..., None], (0, width // 32 - 1), value=127).contiguous()
    return group_scaled_gemm(wide_x, wide_codes, wide_scales, tactic=tactic)
