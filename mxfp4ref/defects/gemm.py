"""GEMMs that round otherwise than the kernel's, or read their scales and codes otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.defects.defect import Defect, on_stages
from mxfp4ref.defects.ieee import ieee_fma
from mxfp4ref.defects.rounding import bf16
from mxfp4ref.defects.variants.gemm import (
    COLUMNS_AT_ONCE,
    ROWS_AT_ONCE,
    GemmVariant,
    Term,
    accumulate,
    tensor_core_sum,
    to_fp64,
)
from mxfp4ref.formats.mxfp4 import GROUP_SIZE, decode_ue8m0, dequantize
from mxfp4ref.model.dense import dense_gemm
from mxfp4ref.model.forward import Stages
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.gemm.analysis import spans
from mxfp4ref.sm90.gemm.order import group_order

__all__ = ["GEMM_DEFECTS"]

# Orders of the groups.


def _ascending(num_groups: int, tile_k: int) -> list[int]:
    return list(range(num_groups))


def _descending(num_groups: int, tile_k: int) -> list[int]:
    return list(range(num_groups))[::-1]


def _swap(first_tile: bool, last_tile: bool, at_start: bool = False) -> Callable[[int, int], list[int]]:
    """The kernel's order, with the swap in the first or last tile as well, or of a tile's first two groups."""

    def order(num_groups: int, tile_k: int) -> list[int]:
        size = tile_k // GROUP_SIZE
        groups = list(range(num_groups))
        for tile in spans(num_groups, size):
            if (tile.start > 0 or first_tile) and (tile.stop < num_groups or last_tile):
                i = tile.start if at_start else tile.stop - 2
                groups[i], groups[i + 1] = groups[i + 1], groups[i]
        return groups

    return order


# Ways to add up the terms.


def _unfused(terms: list[Term]) -> Tensor:
    acc = torch.zeros_like(terms[0].t)
    for term in terms:
        acc = fp32.add(fp32.mul(term.t, term.scale.expand_as(acc)), acc)
    return acc


def _ieee(terms: list[Term]) -> Tensor:
    acc = torch.zeros_like(terms[0].t)
    for term in terms:
        acc = ieee_fma(term.t, term.scale, acc)
    return acc


def _first_pair_reversed(terms: list[Term]) -> Tensor:
    return accumulate([terms[1], terms[0], *terms[2:]] if len(terms) > 1 else terms)


def _bf16_sums(terms: list[Term]) -> Tensor:
    return accumulate([replace(term, t=bf16(term.t)) for term in terms])


def _partial_sums(terms: list[Term], parts: int) -> Tensor:
    """Parts of equal length, each from zero, then added in order."""
    size = -(-len(terms) // parts)
    first, *rest = (accumulate(terms[start : start + size]) for start in range(0, len(terms), size))
    for part in rest:
        first = fp32.add(first, part)
    return first


def _in_float64(terms: list[Term]) -> Tensor:
    acc = torch.zeros_like(terms[0].t, dtype=torch.float64)
    for term in terms:
        acc += term.t.to(torch.float64) * term.scale.to(torch.float64)
    return fp32.round_fp64(acc)


# GEMMs on dequantised weights.


def _dequantized(packed: Tensor, scales: Tensor) -> Tensor:
    return dequantize(packed, scales, convention="sm90", dtype=torch.bfloat16)


def _tensor_core_gemm(x: Tensor, packed: Tensor, scales: Tensor, **tactic: object) -> Tensor:
    out = torch.empty(*x.shape[:2], packed.shape[1], dtype=torch.float32, device=x.device)
    for rows in spans(x.shape[1], ROWS_AT_ONCE):
        for columns in spans(packed.shape[1], COLUMNS_AT_ONCE):
            weights = fp32.bf16_to_fp64(_dequantized(packed[:, columns], scales[:, columns]))
            out[:, rows, columns] = tensor_core_sum(to_fp64(x[:, rows]), weights).to(torch.float32)
    return out


def _float64_gemm(x: Tensor, packed: Tensor, scales: Tensor, **tactic: object) -> Tensor:
    return dense_gemm(x, _dequantized(packed, scales))


def _float32_gemm(x: Tensor, packed: Tensor, scales: Tensor, **tactic: object) -> Tensor:
    acc = torch.zeros(*x.shape[:2], packed.shape[1], dtype=torch.float32, device=x.device)
    for group in spans(x.shape[2], GROUP_SIZE):
        codes = packed[..., group.start // 2 : group.stop // 2]
        weights = _dequantized(codes, scales[..., group.start // GROUP_SIZE, None])
        factors = fp32.widen(x[..., group]).unbind(-1)
        for factor, weight in zip(factors, fp32.widen(weights).unbind(-1), strict=True):
            acc += factor.unsqueeze(2) * weight.unsqueeze(1)  # the product is exact: a sum, fused or not
    return acc


def _both(gemm: Callable[..., Tensor]) -> Stages:
    return Stages(fc1_gemm=gemm, fc2_gemm=gemm)


def _variant(name: str, summary: str, seen_in: str, **changes: Any) -> Defect:
    return on_stages(name, summary, (seen_in,), _both(GemmVariant(**changes)), kind="arithmetic")


_INT4 = tuple(float(code if code < 8 else code - 16) for code in range(16))

GEMM_DEFECTS: tuple[Defect, ...] = (
    on_stages(
        "scale_as_integer",
        "scale byte 120 used as the number 120.0",
        ("vllm#51946",),
        _both(GemmVariant(decode_scale=lambda scales: scales.to(torch.float32))),
    ),
    on_stages(
        "scale_ocp_ends",
        "scale byte 0 as 2^-127 and 255 as NaN where the kernel has 0 and Inf",
        ("TransformerEngine#3262", "triton#11624"),
        _both(GemmVariant(decode_scale=decode_ue8m0, accumulate=_ieee)),
        applies=lambda call: any(
            bool(torch.isin(scales.view(torch.uint8), torch.tensor([0, 255], device=scales.device)).any())
            for scales in (call.experts.fc1_scales, call.experts.fc2_scales)
        ),
    ),
    on_stages(
        "codes_as_int4",
        "codes read as two's complement integers -8 .. 7",
        ("loaders that know int4 only",),
        _both(GemmVariant(group_sum=tensor_core_sum, codes=_INT4)),
    ),
    on_stages(
        "scale_before_mma",
        "weights scaled and rounded to bf16 before the product, one chain of tensor-core steps through K",
        ("every dequantising kernel",),
        _both(_tensor_core_gemm),
    ),
    _variant(
        "fraction_bits_24",
        "tensor core keeps 24 fraction bits below the largest exponent",
        "other tensor cores",
        group_sum=partial(tensor_core_sum, fraction_bits=24),
    ),
    _variant(
        "fraction_bits_26",
        "tensor core keeps 26 fraction bits below the largest exponent",
        "other tensor cores",
        group_sum=partial(tensor_core_sum, fraction_bits=26),
    ),
    _variant(
        "fraction_bits_unlimited",
        "tensor core truncates terms only 2^46 times smaller than the largest, and the sum",
        "models that take a step for an exact sum",  # 46 bits is what float64 holds exactly
        group_sum=partial(tensor_core_sum, fraction_bits=46),
    ),
    _variant(
        "step_rounds_to_nearest",
        "tensor-core step rounds its result to nearest even",
        "models that take a step for IEEE arithmetic",
        group_sum=partial(tensor_core_sum, toward_zero=False),
    ),
    _variant(
        "no_carry_between_steps",
        "both steps of a group start from zero and are added in float32",
        "models without the C operand",
        group_sum=partial(tensor_core_sum, chain=False),
    ),
    _variant(
        "one_32_wide_step",
        "a group is one step of 32 products",
        "instructions with k = 32",
        group_sum=partial(tensor_core_sum, step_size=32),
    ),
    _variant(
        "four_8_wide_steps",
        "a group is four steps of 8 products",
        "Ampere's mma.m16n8k8",
        group_sum=partial(tensor_core_sum, step_size=8),
    ),
    _variant("groups_ascending", "K groups in ascending order", "the obvious loop", order=_ascending),
    _variant("groups_descending", "K groups in descending order", "the loop backwards", order=_descending),
    _variant(
        "swap_in_first_tile",
        "last two groups swapped in the first K tile as well",
        "models of the group order",
        order=_swap(True, False),
    ),
    _variant(
        "swap_in_last_tile",
        "last two groups swapped in the last K tile as well",
        "models of the group order",
        order=_swap(False, True),
    ),
    _variant(
        "swap_in_every_tile",
        "last two groups swapped in every K tile",
        "models of the group order",
        order=_swap(True, True),
    ),
    _variant(
        "swap_at_tile_start",
        "first two groups of a K tile swapped instead of the last two",
        "models of the group order",
        order=_swap(False, False, at_start=True),
    ),
    _variant(
        "tile_k_64",
        "group order of a K tile of 64, which no tactic has",
        "models of the group order",
        order=lambda num_groups, tile_k: group_order(num_groups, 64),
    ),
    _variant(
        "unfused_multiply_add",
        "t * scale rounded and flushed before it is added",
        "code without FMA",
        accumulate=_unfused,
    ),
    _variant(
        "first_pair_reversed",
        "the second group's product rounded alone and the first one's fused, in other elements than the kernel's",
        "compilers",
        accumulate=_first_pair_reversed,
    ),
    _variant(
        "group_sums_bf16",
        "t rounded to bf16 before the scale",
        "scales multiplied in bf16",
        accumulate=_bf16_sums,
    ),
    _variant(
        "tile_sums",
        "four groups (K = 128) summed from zero, then added to the total",
        "two-level accumulation of FP8 kernels",
        accumulate=lambda terms: _partial_sums(terms, max(1, len(terms) // 4)),
    ),
    _variant(
        "split_k",
        "K cut in two halves that are added in float32",
        "split-K and stream-K kernels",
        accumulate=partial(_partial_sums, parts=2),
    ),
    _variant(
        "groups_float64",
        "exact t, but all groups summed in float64 and rounded once",
        "models that keep the tensor core only",
        accumulate=_in_float64,
    ),
    _variant(
        "no_ftz_gemm",
        "subnormal products and sums of the group accumulation kept",
        "code compiled without flush-to-zero",
        accumulate=_ieee,
    ),
    on_stages(
        "float64_gemm",
        "dequantised weights, float64 accumulation, one rounding",
        ("NumPy references",),
        _both(_float64_gemm),
        kind="arithmetic",
    ),
    on_stages(
        "float32_gemm",
        "dequantised weights, float32 accumulation in ascending K",
        ("torch references in float32",),
        _both(_float32_gemm),
        kind="arithmetic",
    ),
)
