"""Suite `gemm`: products and sums whose rounding is the output.

With ordinary inputs a float64 GEMM gives the kernel's bits almost everywhere. Here the second half of K takes back
what the first half added ("mirrored"), so that the output is the rounding error and every other arithmetic shows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref.formats.experts import Experts
from mxfp4ref.goldens.cases.definition import Content, define, moe_content
from mxfp4ref.goldens.cases.source import Source
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90.gemm.cpu import group_scaled_gemm
from mxfp4ref.sm90.tactics import TILE_K, Tactic

# The sums cancel to about 2^-22 of their terms: larger scales bring them back to a moderate size.
_FC1_MIRRORED = (133, 143)
_FC2_MIRRORED = (128, 138)


def _one_expert(source: Source, num_tokens: int, x: Tensor, experts: Experts) -> MoeCall:
    """Every token to expert 0 with weight 1: nothing but the GEMMs and the activation is in the output."""
    ids = torch.zeros(num_tokens, 1, dtype=torch.int32)
    return MoeCall(x, ids, torch.ones(num_tokens, 1), experts)


def _mirrored(t: Tensor) -> Tensor:
    """The second half of the last dimension becomes a copy of the first."""
    first, _ = t.chunk(2, dim=-1)
    return torch.cat((first, first), dim=-1)


def mirror_hidden(x: Tensor, experts: Experts) -> tuple[Tensor, Experts]:
    """Inputs whose second half is minus the first, under weights whose halves are equal."""
    assert experts.fc1_scales is not None
    first, _ = x.chunk(2, dim=-1)
    mirrored = replace(
        experts, fc1_weights=_mirrored(experts.fc1_weights), fc1_scales=_mirrored(experts.fc1_scales)
    )
    return torch.cat((first, -first), dim=-1), mirrored


def _mirror_inner(experts: Experts) -> Experts:
    """The second half of I is minus the first: the same gate rows, up rows with all signs changed."""
    assert experts.fc1_scales is not None
    assert experts.fc2_scales is not None
    up, gate = (half.chunk(2, dim=1)[0] for half in experts.fc1_weights.chunk(2, dim=1))
    up_scales, gate_scales = (half.chunk(2, dim=1)[0] for half in experts.fc1_scales.chunk(2, dim=1))
    return replace(
        experts,
        fc1_weights=torch.cat((up, up ^ 0x88, gate, gate), dim=1),
        fc1_scales=torch.cat((up_scales, up_scales, gate_scales, gate_scales), dim=1),
        fc2_weights=_mirrored(experts.fc2_weights),
        fc2_scales=_mirrored(experts.fc2_scales),
    )


def _mirrored_hidden(source: Source, num_tokens: int, hidden: int, inner: int) -> MoeCall:
    experts = source.experts(1, hidden, inner, fc1_scales=_FC1_MIRRORED)
    x, experts = mirror_hidden(source.spread("input", -3, 3, num_tokens, hidden), experts)
    return _one_expert(source, num_tokens, x, experts)


def _mirrored_inner(source: Source, num_tokens: int, hidden: int, inner: int) -> MoeCall:
    experts = _mirror_inner(source.experts(1, hidden, inner, fc2_scales=_FC2_MIRRORED))
    return _one_expert(source, num_tokens, source.normal("input", num_tokens, hidden), experts)


@define(unique_for="the baseline against which the other cases are measured")
def ordinary(source: Source) -> MoeCall:
    """Ordinary inputs, weights and scales: what most tests consist of, kept to show how little it tells
    apart.
    """
    return MoeCall(
        source.normal("input", 16, 256),
        source.distinct("ids", 16, 2, 2),
        source.weights(16, 2),
        source.experts(2, 256, 128),
    )


@define(catches="scale_before_mma", unique_for="one tile in the middle, in GEMM1")
def mirrored_hidden_384(source: Source) -> MoeCall:
    """The second half of GEMM1's K takes back the first, so that its output is its rounding error. H = 384
    allows tile_k 128 only, with one tile in the middle whose last two groups are swapped: ascending order
    is wrong here for every tactic.
    """
    return _mirrored_hidden(source, 16, 384, 128)


@define(catches="scale_before_mma act_kept_fp32", unique_for="one tile in the middle, in GEMM2")
def mirrored_inner_384(source: Source) -> MoeCall:
    """The second half of GEMM2's K takes back the first, so that its output is its rounding error. I = 384
    allows tile_k 128 only, with one tile in the middle whose last two groups are swapped: ascending order
    is wrong here for every tactic.
    """
    return _mirrored_inner(source, 16, 128, 384)


@define(unique_for="all three tile_k tell apart in GEMM1")
def mirrored_hidden_1536(source: Source) -> MoeCall:
    """The second half of GEMM1's K takes back the first, so that its output is its rounding error, and H =
    1536 is three tiles of 512: each of the three tile_k orders the groups in its own way, and none of them
    ascending.
    """
    return _mirrored_hidden(source, 4, 1536, 128)


@define(unique_for="all three tile_k tell apart in GEMM2")
def mirrored_inner_1536(source: Source) -> MoeCall:
    """The second half of GEMM2's K takes back the first, so that its output is its rounding error, and I =
    1536 is three tiles of 512: each of the three tile_k orders the groups in its own way, and none of them
    ascending.
    """
    return _mirrored_inner(source, 4, 128, 1536)


@define(unique_for="pairs of tile_k that share an output")
def mirrored_both_512(source: Source) -> MoeCall:
    """In both GEMMs the second half of K takes back the first, so that their outputs are their rounding
    errors, with 512 for H and I, where tile_k 128 swaps groups and 256 and 512 do not.
    """
    experts = source.experts(1, 512, 512, fc1_scales=_FC1_MIRRORED, fc2_scales=(124, 144))
    x, experts = mirror_hidden(source.spread("input", -3, 3, 4, 512), _mirror_inner(experts))
    return _one_expert(source, 4, x, experts)


@define(unique_for="truncation in the tensor core")
def wide_exponents(source: Source) -> MoeCall:
    """Inputs over 25 binades, the second half of K minus the first: in most steps the small products are
    truncated, so that the tensor core's 25 fraction bits, its truncation and its step of 16 all show.
    """
    experts = source.experts(1, 384, 128, fc1_scales=(124, 134))
    x, experts = mirror_hidden(source.spread("input", -20, 5, 16, 384), experts)
    return _one_expert(source, 16, x, experts)


@define(unique_for="cancellation inside one step of the tensor core")
def wide_exponents_within_a_step(source: Source) -> MoeCall:
    """Inputs over 25 binades within each half of a group, large and small products of both signs, the largest
    of which cancel inside one step.
    """
    experts = source.experts(1, 256, 128, fc1_scales=(131, 141))
    x = source.spread("input", -21, -10, 16, 256).view(16, 16, 16)
    weights = experts.fc1_weights.view(1, 256, 16, 8).clone()
    large = source.spread("large", 2, 4, 16, 16)
    # Elements 0 and 1 of every step of 16 have the same weight and opposite large inputs.
    x[..., 0], x[..., 1] = large, -large
    weights[..., 0] = (weights[..., 0] & 15) * 17
    experts = replace(experts, fc1_weights=weights.flatten(-2))
    return _one_expert(source, 16, x.flatten(1), experts)


@define()
def underflow_in_gemm1(source: Source) -> MoeCall:
    # Zero codes in the first tile: what happens there depends on the tactic's tile_n (goldens must not).
    """Products around 2^-126 in every group but the first of a row: results are flushed to zero one by one,
    before the sum could lift them. Inputs include bf16 subnormals.
    """
    experts = source.experts(1, 256, 128, fc1_scales=(114, 124), fc2_scales=(230, 240))
    weights = experts.fc1_weights.clone()
    weights[..., :32] = 0
    # Gate rows get ordinary numbers, from the second quarter of K; up rows tiny ones from the rest.
    gate = weights[:, 128:]
    gate[..., 64:] = 0
    weights[:, :128, 32:64] = 0
    x = torch.cat((source.normal("ordinary", 16, 128), source.spread("tiny", -127, -120, 16, 128)), dim=1)
    return _one_expert(source, 16, x, replace(experts, fc1_weights=weights))


@define(unique_for="flushed products and sums in GEMM2")
def underflow_in_gemm2(source: Source) -> MoeCall:
    """Products and sums around 2^-126 in GEMM2: small activations under the smallest scales."""
    experts = source.experts(1, 256, 256, fc1_scales=(64, 68), fc2_scales=(34, 46))
    weights = experts.fc2_weights.clone()
    weights[..., :32] = 0
    gate_scales = torch.full_like(experts.fc2_scales[:, :, :8], 122)  # type: ignore[index]
    scales = torch.cat((source.range("up", 76, 84, 1, 256, 8), gate_scales), dim=1)
    experts = replace(experts, fc1_scales=scales, fc2_weights=weights)
    return _one_expert(source, 16, source.normal("input", 16, 256), experts)


@define(catches="subnormal_input_flushed")
def subnormal_inputs(source: Source) -> MoeCall:
    """Every input is a bf16 subnormal, lifted by large scales: the tensor core takes them at their value."""
    bits = source.words("input", 8, 256) & 0x807F
    x = torch.where(bits >= 1 << 15, bits - (1 << 16), bits).to(torch.int16).view(torch.bfloat16)
    return _one_expert(source, 8, x, source.experts(1, 256, 128, fc1_scales=(246, 251)))


def _odd_tokens(source: Source, odd: float, even: float) -> Tensor:
    """N(0, 1) inputs, odd and even tokens scaled apart.

    In even positions the order of the first two groups depends on the kernel's tile_n, in odd ones it does not.
    """
    scale = torch.tensor([even, odd]).repeat(4).unsqueeze(1)
    return (source.normal("input", 8, 256).to(torch.float32) * scale).to(torch.bfloat16)


@define(catches="first_pair_reversed")
def first_group_overflows(source: Source) -> MoeCall:
    """In odd tokens the first group's product overflows and the second would have brought it back: the first
    is rounded alone, so that the sum is Inf. In even tokens, where that depends on the tactic, nothing
    overflows.
    """
    experts = source.experts(1, 256, 128, fc2_scales=(249, 251))
    return _one_expert(source, 8, _odd_tokens(source, 1.0, 2.0**-6), experts)


@define(catches="first_pair_reversed no_ftz_gemm")
def first_groups_underflow(source: Source) -> MoeCall:
    """In odd tokens the first two groups' products lie around 2^-126: the first is flushed when it is below,
    the second is fused. All other groups are zero.
    """
    experts = source.experts(1, 256, 128, fc2_scales=(1, 3))
    weights = experts.fc2_weights.clone()
    weights[..., 32:] = 0
    return _one_expert(source, 8, _odd_tokens(source, 2.0**-2, 2.0**6), replace(experts, fc2_weights=weights))


@define(unique_for="overflow of sums")
def overflow(source: Source) -> MoeCall:
    """Sums of GEMM2 that leave the float32 range in some columns and not in others: Inf of their sign, and not
    the largest number.
    """
    experts = source.experts(1, 256, 128, fc2_scales=(238, 250))
    weights = experts.fc2_weights.clone()
    weights[..., :32] = 0
    experts = replace(experts, fc2_weights=weights)
    return _one_expert(source, 16, source.normal("input", 16, 256), experts)


@define(unique_for="NaN and Inf in the input of tokens")
def non_finite_inputs(source: Source) -> MoeCall:
    """NaN and Inf of both signs and -0 in the input of some tokens; the other tokens must not notice."""
    x = source.normal("input", 16, 256)
    x[1, 17], x[3, 5], x[5, 200], x[7, 3], x[7, 4] = torch.nan, torch.inf, -torch.inf, torch.inf, -torch.inf
    x[9] = -0.0
    return MoeCall(x, source.distinct("ids", 16, 2, 2), source.weights(16, 2), source.experts(2, 256, 128))


@define(unique_for="uneven numbers of rows")
def uneven_experts(source: Source) -> MoeCall:
    """31 tokens for one expert, 12 for another, one for a third and none for the last, 33 tokens in all: rows
    of an expert start anywhere, and tiles are partly empty.
    """
    token = torch.arange(33)
    first = torch.where(token == 30, 2, torch.where(token == 31, 3, 1))
    second = torch.where((token % 3 == 0) & (first == 1), 3, -1)
    ids = torch.stack((first, second), dim=1).to(torch.int32)
    return MoeCall(source.normal("input", 33, 128), ids, source.weights(33, 2), source.experts(4, 128, 128))


def _gemm(x: Tensor, packed: Tensor, scales: Tensor, tiles: tuple[int, ...]) -> Content:
    tensors = {"x": x, "packed": packed, "scales": scales}
    for tile in tiles:
        sums = group_scaled_gemm(x[None], packed[None], scales[None], tactic=Tactic((64, 16, tile)))
        tensors[f"accumulators.tile_k_{tile}"] = sums[0]
    return Content(tensors)


@define("gemm", unique_for="one group alone")
def single_group(source: Source) -> Content:
    """One GEMM with a single group of K: two tensor-core steps and one product with the scale."""
    return _gemm(
        source.spread("x", -12, 12, 16, 32),
        source.bytes("packed", 64, 16),
        source.range("scales", 100, 140, 64, 1),
        (128,),
    )


@define("gemm", unique_for="one GEMM alone")
def four_groups(source: Source) -> Content:
    """One GEMM with four groups of K, wide exponents, scale bytes from 60 to 190, and a row of zeros, whose
    sums are +0 and never -0.
    """
    x = source.spread("x", -10, 3, 16, 128)
    x[3] = -0.0
    return _gemm(x, source.bytes("packed", 64, 64), source.range("scales", 60, 190, 64, 4), (128,))


@define("gemm", unique_for="the order of groups alone")
def every_tile_k(source: Source) -> Content:
    """One GEMM with K = 1536, whose second half takes back the first, and the accumulators of each tile_k:
    another order of the groups shows.
    """
    half = source.normal("x", 8, 768)
    return _gemm(
        torch.cat((half, -half), dim=1),
        _mirrored(source.bytes("packed", 32, 768)),
        _mirrored(source.range("scales", 124, 130, 32, 48)),
        TILE_K,
    )


def _in_turn(source: Source, rows: tuple[int, ...], hidden: int, inner: int) -> MoeCall:
    """So many rows for each expert, a token each, the experts' rows one after the other among the tokens."""
    ids = torch.cat([torch.full((n,), expert) for expert, n in enumerate(rows)])
    order = torch.arange(len(ids)).view(-1, 2).T.flatten()
    experts = source.experts(len(rows), hidden, inner)
    x = source.normal("input", len(ids), hidden)
    return MoeCall(x, ids[order, None].to(torch.int32), source.weights(len(ids), 1), experts)


@define(catches="scales_of_next_expert", unique_for="stale tiles where K is one tile")
def experts_of_one_k_tile(source: Source) -> Content:
    """Four experts with 18, 1, 2 and 17 rows, and one tile of K in both GEMMs: what a tile holds of the expert
    before (weights, scales, accumulators, rows of the input) is neither multiplied away nor overwritten by a
    later tile, and a token has one expert, whose mistake is in no other's sum.
    """
    return moe_content(_in_turn(source, (18, 1, 2, 17), 128, 128), compact=True)


@define(catches="scales_of_next_expert", unique_for="stale tiles behind experts without rows")
def experts_between_empty_ones(source: Source) -> Content:
    """Five experts, of which the second and fourth have no row, and two tiles of K in GEMM2: the expert before by
    number is not the one that was computed before, and a stale tile of either shows, as does one of the last
    expert.
    """
    return moe_content(_in_turn(source, (9, 0, 5, 0, 4), 128, 256), compact=True)
