"""GEMMs that round otherwise than the kernel's, or read their scales and codes otherwise."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref import _ieee
from mxfp4ref._spans import spans
from mxfp4ref.defects.definition import defect
from mxfp4ref.defects.variants.gemm import (
    GemmVariant,
    Term,
    accumulate,
    in_pieces,
    tensor_core_sum,
    to_fp64,
)
from mxfp4ref.defects.variants.rounding import bf16
from mxfp4ref.formats.mxfp4 import GROUP_SIZE, decode_ue8m0, dequantize
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.dense import dense_gemm
from mxfp4ref.model.forward import Stages
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.gemm.order import group_order

_BOTH = "fc1_gemm fc2_gemm"
_ORDER_MODELS = "models of the group order"


@defect("gemm.decode_scales", "vllm#51946")
def scale_as_integer(scales: Tensor) -> Tensor:
    """scale byte 120 used as the number 120.0"""
    return scales.to(torch.float32)


def _has_scale_0_or_255(call: MoeCall) -> bool:
    scales = (
        s.view(torch.uint8) for s in (call.experts.fc1_scales, call.experts.fc2_scales) if s is not None
    )
    return any(bool(((s == 0) | (s == 255)).any()) for s in scales)


@defect("stages", "TransformerEngine#3262", "triton#11624", applies=_has_scale_0_or_255)
def scale_ocp_ends(call: MoeCall) -> Stages:
    """scale byte 0 as 2^-127 and 255 as NaN where the kernel has 0 and Inf"""
    gemm = GemmVariant(decode_scales=decode_ue8m0, accumulate=no_ftz_gemm)  # 2^-127 is subnormal
    return Stages(fc1_gemm=gemm, fc2_gemm=gemm)


@defect("gemm.decode_codes", "loaders that know int4 only")
def codes_as_int4(codes: Tensor) -> Tensor:
    """codes read as two's complement integers -8 .. 7"""
    return torch.where(codes < 8, codes, codes - 16).to(torch.float64)


def _dequantized(packed: Tensor, scales: Tensor) -> Tensor:
    return dequantize(packed, scales, convention="sm90", dtype=torch.bfloat16)


@defect(_BOTH, "every dequantising kernel")
def scale_before_mma(
    x: Tensor, packed: Tensor, scales: Tensor, *, positions: Tensor, **tactic: object
) -> Tensor:
    """weights scaled and rounded to bf16 before the product, one chain of tensor-core steps through K"""

    def piece(x: Tensor, packed: Tensor, scales: Tensor, positions: Tensor) -> Tensor:
        weights = fp32.bf16_to_fp64(_dequantized(packed, scales))
        return tensor_core_sum(to_fp64(x), weights).to(torch.float32)

    return in_pieces(piece, x, packed, scales, positions)


@defect("gemm.group_sum", "other tensor cores", kind="arithmetic")
def fraction_bits_24(x: Tensor, weights: Tensor) -> Tensor:
    """tensor core keeps 24 fraction bits below the largest exponent"""
    return tensor_core_sum(x, weights, fraction_bits=24)


@defect("gemm.group_sum", "other tensor cores", kind="arithmetic")
def fraction_bits_26(x: Tensor, weights: Tensor) -> Tensor:
    """tensor core keeps 26 fraction bits below the largest exponent"""
    return tensor_core_sum(x, weights, fraction_bits=26)


@defect("gemm.group_sum", "models that take a step for an exact sum", kind="arithmetic")
def fraction_bits_unlimited(x: Tensor, weights: Tensor) -> Tensor:
    """tensor core truncates terms only 2^46 times smaller than the largest, and the sum"""
    return tensor_core_sum(x, weights, fraction_bits=46)  # what float64 holds exactly


@defect("gemm.group_sum", "models that take a step for IEEE arithmetic", kind="arithmetic")
def step_rounds_to_nearest(x: Tensor, weights: Tensor) -> Tensor:
    """tensor-core step rounds its result to nearest even"""
    return tensor_core_sum(x, weights, toward_zero=False)


@defect("gemm.group_sum", "models without the C operand", kind="arithmetic")
def no_carry_between_steps(x: Tensor, weights: Tensor) -> Tensor:
    """both steps of a group start from zero and are added in float32"""
    return tensor_core_sum(x, weights, chain=False)


@defect("gemm.group_sum", "instructions with k = 32", kind="arithmetic")
def one_32_wide_step(x: Tensor, weights: Tensor) -> Tensor:
    """a group is one step of 32 products"""
    return tensor_core_sum(x, weights, step_size=32)


@defect("gemm.group_sum", "Ampere's mma.m16n8k8", kind="arithmetic")
def four_8_wide_steps(x: Tensor, weights: Tensor) -> Tensor:
    """a group is four steps of 8 products"""
    return tensor_core_sum(x, weights, step_size=8)


@defect("gemm.order", "the obvious loop", kind="arithmetic")
def groups_ascending(num_groups: int, tile_k: int) -> list[int]:
    """K groups in ascending order"""
    return list(range(num_groups))


@defect("gemm.order", "the loop backwards", kind="arithmetic")
def groups_descending(num_groups: int, tile_k: int) -> list[int]:
    """K groups in descending order"""
    return list(range(num_groups))[::-1]


def _swapped(
    num_groups: int, tile_k: int, *, first: bool = False, last: bool = False, at: int = -2
) -> list[int]:
    """The group at this place of each K tile swapped with the next, in the first and last tile if asked for."""
    order = []
    for tile in spans(num_groups, tile_k // GROUP_SIZE):
        groups = list(range(tile.start, tile.stop))
        if (tile.start > 0 or first) and (tile.stop < num_groups or last):
            groups[at], groups[at + 1] = groups[at + 1], groups[at]
        order += groups
    return order


@defect("gemm.order", _ORDER_MODELS, kind="arithmetic")
def swap_in_first_tile(num_groups: int, tile_k: int) -> list[int]:
    """last two groups swapped in the first K tile as well"""
    return _swapped(num_groups, tile_k, first=True)


@defect("gemm.order", _ORDER_MODELS, kind="arithmetic")
def swap_in_last_tile(num_groups: int, tile_k: int) -> list[int]:
    """last two groups swapped in the last K tile as well"""
    return _swapped(num_groups, tile_k, last=True)


@defect("gemm.order", _ORDER_MODELS, kind="arithmetic")
def swap_in_every_tile(num_groups: int, tile_k: int) -> list[int]:
    """last two groups swapped in every K tile"""
    return _swapped(num_groups, tile_k, first=True, last=True)


@defect("gemm.order", _ORDER_MODELS, kind="arithmetic")
def swap_at_tile_start(num_groups: int, tile_k: int) -> list[int]:
    """first two groups of a K tile swapped instead of the last two"""
    return _swapped(num_groups, tile_k, at=0)


@defect("gemm.order", _ORDER_MODELS, kind="arithmetic")
def tile_k_64(num_groups: int, tile_k: int) -> list[int]:
    """group order of a K tile of 64, which no tactic has"""
    return group_order(num_groups, 64)


@defect("gemm.accumulate", "code without FMA", kind="arithmetic")
def unfused_multiply_add(terms: list[Term]) -> Tensor:
    """t * scale rounded and flushed before it is added"""
    acc = torch.zeros_like(terms[0].t)
    for term in terms:
        acc = fp32.add(fp32.mul(term.t, term.scale), acc)
    return acc


@defect("gemm.accumulate", "compilers", kind="arithmetic")
def first_pair_reversed(terms: list[Term]) -> Tensor:
    """the second group's product rounded alone and the first one's fused, in other elements than the
    kernel's
    """
    return accumulate([*terms[1::-1], *terms[2:]])


@defect("gemm.accumulate", "scales multiplied in bf16", kind="arithmetic")
def group_sums_bf16(terms: list[Term]) -> Tensor:
    """t rounded to bf16 before the scale"""
    return accumulate([replace(term, t=bf16(term.t)) for term in terms])


def _by_parts(terms: list[Term], size: int) -> Tensor:
    """So many terms at a time from zero, then their sums in order."""
    total, *rest = (accumulate(terms[part]) for part in spans(len(terms), size))
    for part in rest:
        total = fp32.add(total, part)
    return total


@defect("gemm.accumulate", "two-level accumulation of FP8 kernels", kind="arithmetic")
def tile_sums(terms: list[Term]) -> Tensor:
    """four groups (K = 128) summed from zero, then added to the total"""
    return _by_parts(terms, -(-len(terms) // max(1, len(terms) // 4)))


@defect("gemm.accumulate", "split-K and stream-K kernels", kind="arithmetic")
def split_k(terms: list[Term]) -> Tensor:
    """K cut in two halves that are added in float32"""
    return _by_parts(terms, -(-len(terms) // 2))


@defect("gemm.accumulate", "models that keep the tensor core only", kind="arithmetic")
def groups_float64(terms: list[Term]) -> Tensor:
    """exact t, but all groups summed in float64 and rounded once"""
    acc = torch.zeros_like(terms[0].t, dtype=torch.float64)
    for term in terms:
        acc += term.t.to(torch.float64) * term.scale.to(torch.float64)
    return fp32.round_fp64(acc)


@defect("gemm.accumulate", "code compiled without flush-to-zero", kind="arithmetic")
def no_ftz_gemm(terms: list[Term]) -> Tensor:
    """subnormal products and sums of the group accumulation kept"""
    acc = torch.zeros_like(terms[0].t)
    for term in terms:
        acc = _ieee.fma(term.t, term.scale, acc)
    return acc


@defect(_BOTH, "NumPy references", kind="arithmetic")
def float64_gemm(x: Tensor, packed: Tensor, scales: Tensor, **tactic: object) -> Tensor:
    """dequantised weights, float64 accumulation, one rounding"""
    return dense_gemm(x, _dequantized(packed, scales))


@defect(_BOTH, "torch references in float32", kind="arithmetic")
def float32_gemm(x: Tensor, packed: Tensor, scales: Tensor, **tactic: object) -> Tensor:
    """dequantised weights, float32 accumulation in ascending K"""
    acc = torch.zeros(*x.shape[:2], packed.shape[1], dtype=torch.float32, device=x.device)
    for group in spans(x.shape[2], GROUP_SIZE):
        codes = packed[..., group.start // 2 : group.stop // 2]
        weights = _dequantized(codes, scales[..., group.start // GROUP_SIZE, None])
        factors = fp32.widen(x[..., group]).unbind(-1)
        for factor, weight in zip(factors, fp32.widen(weights).unbind(-1), strict=True):
            acc += factor.unsqueeze(2) * weight.unsqueeze(1)  # the product is exact: a sum, fused or not
    return acc
