"""Suite `finalize`: the weighted sum over a token's experts, in slot order, one FMA each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.formats.experts import Experts
from mxfp4ref.formats.mxfp4 import pack_codes
from mxfp4ref.goldens.cases.definition import Content, define, moe_content
from mxfp4ref.goldens.cases.source import Source, float32, int32
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.finalize import finalize

_H, _I = 128, 128


def _opposed(experts: Experts) -> Experts:
    """The second half of the experts are the first with fc2 negated: their outputs cancel."""
    half = experts.num_experts // 2
    first = experts.slice(0, half)
    joined: dict[str, Any] = {
        name: None if value is None else torch.cat((value, value)) for name, value in vars(first).items()
    }
    weights = torch.cat((first.fc2_weights, first.fc2_weights ^ 0x88))
    biases = None if first.fc2_biases is None else torch.cat((first.fc2_biases, -first.fc2_biases))
    return replace(Experts(**joined), fc2_weights=weights, fc2_biases=biases)


@define(catches="bf16_finalize weights_bf16 last_slot_dropped", unique_for="the sum over slots alone")
def cancelling_experts(source: Source) -> MoeCall:
    """Pairs of experts with opposite outputs and equal weights, in different slots: the output is the
    rounding of the sum. Other slot orders, an unfused product, bf16 sums and bf16 weights all show.
    """
    experts = _opposed(source.experts(4, _H, _I))
    pairs = source.distinct("pairs", 8, 2, 2)
    order = source.distinct("order", 8, 4, 4).long()
    ids = torch.cat((pairs, pairs + 2), dim=1).gather(1, order)
    half = source.weights(8, 2)
    scales = torch.cat((half, half), dim=1).gather(1, order)
    return MoeCall(source.normal("input", 8, _H), ids.to(torch.int32), scales, experts)


@define(catches="weights_bf16 weight_before_gemm2", unique_for="the routing weights' precision alone")
def weights_differ_in_last_bits(source: Source) -> MoeCall:
    """Opposed experts whose weights differ in the last bits only: rounding the weights to bf16, or
    multiplying them in before GEMM2, leaves exactly nothing or something else.
    """
    experts = _opposed(source.experts(2, _H, _I))
    first = source.weights(8, 1)
    scales = torch.cat((first, first * (1 + 2.0**-12)), dim=1)
    return MoeCall(source.normal("input", 8, _H), int32([[0, 1]] * 8), scales, experts)


@define(catches="last_slot_dropped bf16_finalize", unique_for="the order of the slots alone")
def slot_order(source: Source) -> MoeCall:
    """Weights from 2^-12 to 2^6 in random slots: summing by expert id, or from the last slot, rounds
    otherwise; ids are never in ascending order.
    """
    experts = _opposed(source.experts(4, _H, _I))
    ids = source.distinct("ids", 8, 4, 4)
    power = torch.exp2(source.range("power", 0, 18, 8, 4).to(torch.float32) - 12)
    return MoeCall(source.normal("input", 8, _H), ids, source.weights(8, 4) * power, experts)


@define(catches="rsf_post_hoc", unique_for="weights that carry a routed scaling factor")
def weights_with_a_routed_factor(source: Source) -> Content:
    """Weights that sum to 2.5 a token, as of a router with routed_scaling_factor 2.5: a kernel that normalises them,
    or knows the model and applies the factor once more, may be right on weights that sum to 1 or to anything.
    """
    weights = source.weights(8, 4).double()
    scales = (2.5 * weights / weights.sum(1, keepdim=True)).float()  # sums of four such numbers are exact
    x, ids = source.normal("input", 8, _H), source.distinct("ids", 8, 4, 8)
    return moe_content(MoeCall(x, ids, scales, source.experts(8, _H, _I)), compact=True)


@define(catches="bias1_ignored bias2_ignored bias2_unweighted", unique_for="both biases with ordinary values")
def biases_inside_weight(source: Source) -> MoeCall:
    """Both biases and unequal weights: the fc2 bias belongs inside the routing weight, once for each slot."""
    return MoeCall(
        source.normal("input", 8, _H),
        source.distinct("ids", 8, 2, 3),
        source.weights(8, 2),
        source.experts(3, _H, _I, biases=True),
    )


@define(catches="bias2_ignored bias2_unweighted", unique_for="the rounding of the fc2 bias's addition")
def biases_cancel(source: Source) -> MoeCall:
    """The fc2 bias is the negative of a likely output: what is left depends on where each sum is rounded."""
    experts = _opposed(source.experts(4, _H, _I, biases=True))
    half = source.weights(8, 1)
    ids = torch.cat((source.distinct("ids", 8, 1, 2), source.distinct("ids", 8, 1, 2) + 2), dim=1)
    scales = torch.cat((half, half), dim=1)
    return MoeCall(source.normal("input", 8, _H), ids.to(torch.int32), scales, experts)


@define(catches="ep_sentinel_aliases", unique_for="tokens and slots without an expert")
def missing_experts(source: Source) -> MoeCall:
    """Slots of -1 in any place, tokens without any expert (zeros, of whatever was in the output before)."""
    ids = source.distinct("ids", 8, 4, 4)
    missing = source.bytes("missing", 8, 4) < 96
    missing[0], missing[4], missing[7] = True, True, True
    missing[1] = torch.tensor([True, False, False, False])
    missing[2] = torch.tensor([False, False, False, True])
    return MoeCall(
        source.normal("input", 8, _H),
        torch.where(missing, -1, ids).to(torch.int32),
        source.weights(8, 4),
        source.experts(4, _H, _I),
    )


@define(unique_for="padded rows that are not finite")
def padded_rows_not_finite(source: Source) -> Content:
    """Rows that are no tokens, all slots -1, hold NaN and Inf, as a padded batch's memory may, and so do some of
    their weights: zeros. Computed as some expert with weight 0 they would be 0 * Inf.
    """
    x, ids, scales = source.normal("input", 8, _H), source.distinct("ids", 8, 2, 2), source.weights(8, 2)
    padded = torch.tensor([1, 4, 6, 7])
    ids[padded], scales[padded] = -1, 0.0
    x[padded] = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.nan]).to(x.dtype)[:, None]
    scales[4], scales[7] = torch.nan, torch.inf
    return moe_content(MoeCall(x, ids, scales, source.experts(2, _H, _I)), compact=True)


@define(unique_for="padded slots beside experts that give Inf")
def padded_slots_beside_infinite_experts(source: Source) -> Content:
    """The first and the last expert give Inf and NaN for every token, by scale bytes of 255, and no token goes to
    them: a slot of -1 that is computed as either of them with weight 0, or any weight, gives NaN.
    """
    experts = source.experts(3, _H, _I)
    assert experts.fc2_scales is not None
    fc2_scales = experts.fc2_scales.clone()
    fc2_scales[0], fc2_scales[2] = 255, 255
    ids = torch.where(source.distinct("slot", 8, 3, 3) == 0, 1, -1)
    scales = source.weights(8, 3).masked_fill(ids < 0, 0.0)
    scales[4:].masked_fill_(ids[4:] < 0, 0.5)
    call = MoeCall(
        source.normal("input", 8, _H), ids.to(torch.int32), scales, replace(experts, fc2_scales=fc2_scales)
    )
    return moe_content(call, compact=True)


@define(unique_for="routing weights outside (0, 1]")
def unusual_weights(source: Source) -> MoeCall:
    """Weights that are zero, negative, subnormal or large, and products that underflow or overflow: FMA with
    subnormals flushed.
    """
    unusual = float32([0.0, -1.0, 2.0**-130, 2.0**-126, 3.0e38, -0.5, 2.0**-124, 1.0])
    which = (source.bytes("which", 8, 2) & 7).long()
    return MoeCall(
        source.normal("input", 8, _H),
        source.distinct("ids", 8, 2, 2),
        unusual[which],
        source.experts(2, _H, _I),
    )


@define(unique_for="flushed products of ordinary experts")
def underflowing_products(source: Source) -> MoeCall:
    """Small outputs and small weights: every product, and the sums of some, lie around 2^-126, where a result
    that rounds to less is flushed.
    """
    experts = source.experts(2, _H, _I, fc2_scales=(66, 70))
    scales = source.weights(8, 2) * 2.0**-66
    return MoeCall(source.normal("input", 8, _H), source.distinct("ids", 8, 2, 2), scales, experts)


def _one_hot_experts(rows_from: list[int], sign: list[int]) -> Experts:
    """Experts whose output j is +- the activation of inputs 2i (gate) and 2i + 1 (up), i = j + rows_from."""
    row, column = torch.arange(2 * _I), torch.arange(_I // 2)
    fc1 = torch.zeros(2 * _I, 2 * _I, dtype=torch.uint8)
    fc1[row, torch.cat((2 * row[:_I] + 1, 2 * row[:_I]))] = 2  # the code of 1
    fc2 = torch.zeros(len(rows_from), 2 * _I, _I, dtype=torch.uint8)
    for expert, (first, code) in enumerate(zip(rows_from, (2 | 8 * (s < 0) for s in sign), strict=True)):
        fc2[expert, column, column + first] = code
    count = len(rows_from)
    return Experts(
        fc1_weights=pack_codes(fc1).repeat(count, 1, 1),
        fc1_scales=torch.full((count, 2 * _I, 2 * _I // 32), 127, dtype=torch.uint8),
        fc2_weights=pack_codes(fc2),
        fc2_scales=torch.full((count, 2 * _I, _I // 32), 127, dtype=torch.uint8),
    )


def _activations(first_half: float, second_half: float) -> Tensor:
    """Inputs whose activations are the given numbers times a power of two for each token and column.

    A gate of 32 has a sigmoid of 1, so that an activation is 32 times its up.
    """
    values = torch.tensor([first_half, second_half]).repeat_interleave(_I // 2)
    powers = torch.exp2(torch.arange(_I) % 4 - 2.0)
    up = (values * powers / 32).expand(8, _I)
    return torch.stack((torch.full_like(up, 32.0), up), dim=-1).flatten(1).to(torch.bfloat16)


@define()
def flush_boundary_of_products(source: Source) -> MoeCall:
    """Products of 2^-126 (1 - 2^-24), times powers of two from 1/4 to 2: rounded to 24 bits they are below
    2^-126 and flushed, though the subnormal grid would round the middle one up to 2^-126.
    """
    ids = torch.zeros(8, 1, dtype=torch.int32)
    scales = torch.full((8, 1), (1 - 2.0**-24)) * 2.0**-100
    scales[4:] = -scales[4:]
    return MoeCall(_activations(2.0**-26, 2.0**-26), ids, scales, _one_hot_experts([0], [1]))


@define()
def flush_boundary_of_sums(source: Source) -> MoeCall:
    """Sums over two slots of 2^-126 (1 - 2^-24), as 2^-125 - (2^24 + 1) 2^-150: rounded to 24 bits they are
    below 2^-126 and flushed, though the subnormal grid would round them up to 2^-126.
    """
    scales = torch.tensor([[2.0**-100, 172961 * 2.0**-120]]).repeat(8, 1)
    scales[4:] = -scales[4:]
    x = _activations(97 * 2.0**-30, 2.0**-25)
    return MoeCall(x, int32([[1, 0]] * 8), scales, _one_hot_experts([0, _I // 2], [-1, 1]))


@define("finalize", unique_for="one stage alone")
def stage_cancelling(source: Source) -> Content:
    """The weighted sum over a token's slots alone: eight slots that nearly cancel, skipped slots, fc2 biases.
    Another order of the slots, or a product that is rounded by itself, shows.
    """
    half = source.normal("fc2_output", 8, 4, 64)
    y = torch.cat((half, -half), dim=1)
    local = source.range("local", 0, 4, 8, 8).to(torch.int64) - 1
    weights = source.weights(8, 4)
    scales = torch.cat((weights, weights * (1 + 2.0**-20)), dim=1)
    biases = source.normal("fc2_biases", 4, 64)
    total: Tensor = finalize(y, local, scales, biases)
    return Content(
        {
            "fc2_output": y,
            "local_experts": local.to(torch.int32),
            "token_final_scales": scales,
            "fc2_biases": biases,
            "output_float32": total,
            "output": fp32.to_bf16(total),
        }
    )
