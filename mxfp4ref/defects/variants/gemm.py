"""The kernel's GEMM in replaceable parts, slower than the kernel's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mxfp4ref._compiled import as_numpy, loops
from mxfp4ref._spans import spans
from mxfp4ref.formats.generations import Generation
from mxfp4ref.formats.mxfp4 import E2M1_VALUES, GROUP_SIZE, decode_ue8m0, unpack_codes
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.gemm.order import first_pair_swapped, group_order
from mxfp4ref.sm90.tactics import Tactic
from mxfp4ref.sm90.tensor_core import FRACTION_BITS, STEP_SIZE

__all__ = ["GemmVariant", "Term", "accumulate", "in_pieces", "tensor_core_sum", "to_fp64"]


_ROWS, _COLUMNS = 32, 128  # of a piece


@dataclass(frozen=True)
class Term:
    """One K group of a tile of the product, on its way into the accumulators."""

    t: Tensor  # [B, M, N] float32
    scale: Tensor  # [B, M, N] float32
    swapped: (
        Tensor  # [B, M, 1] bool: the second product is rounded alone (docs/arithmetic.md, "The exception")
    )


def accumulate(terms: list[Term]) -> Tensor:
    """The kernel's way, with every rounding and flush."""
    first, *rest = terms
    acc = fp32.mul(first.t, first.scale)
    if rest:
        second, *rest = rest
        acc = fp32.fma(second.t, second.scale, acc)
        if bool(first.swapped.any()):
            early = fp32.fma(first.t, first.scale, fp32.mul(second.t, second.scale))
            acc = torch.where(first.swapped, early, acc)
    for term in rest:
        acc = fp32.fma(term.t, term.scale, acc)
    return acc


def tensor_core_sum(
    x: Tensor,
    weights: Tensor,
    *,
    step_size: int = STEP_SIZE,
    fraction_bits: int = FRACTION_BITS,
    toward_zero: bool = True,
    chain: bool = True,
) -> Tensor:
    """`x @ weights^T` by tensor-core steps along K, each given the last one's result, `[B, M, N] float64`.

    Args:
        x: `[B, M, K] float64`, numbers of at most 24 bits.
        weights: `[B, N, K] float64`, numbers of at most 8 bits.
        step_size: products a step.
        fraction_bits, toward_zero: what a step keeps of its terms, and how it rounds its result.
        chain: False starts every step from zero and adds their results in float32.
    """
    if not chain:
        acc = x.new_zeros(x.shape[0], x.shape[1], weights.shape[1], dtype=torch.float32)
        for block in spans(x.shape[2], step_size):
            factors = x[..., block], weights[..., block]
            alone = tensor_core_sum(
                *factors, step_size=step_size, fraction_bits=fraction_bits, toward_zero=toward_zero
            )
            acc = fp32.add(acc, alone.to(torch.float32))
        return acc.to(torch.float64)
    compiled = _compiled_steps() if x.device.type == "cpu" else None
    how = step_size, fraction_bits, toward_zero
    return _by_steps(x, weights, *how) if compiled is None else _by_loops(compiled, x, weights, *how)


def _by_loops(compiled: Any, x: Tensor, weights: Tensor, *how: int) -> Tensor:
    out = torch.empty(x.shape[0], x.shape[1], weights.shape[1], dtype=torch.float64, device="cpu")
    compiled.tensor_core_sum(
        as_numpy(x, np.float64), as_numpy(weights, np.float64), *how, as_numpy(out, np.float64)
    )
    return out


def _compiled_steps() -> Any:
    consequence = "defects of the GEMM take 20 times as long as need be"
    return loops("mxfp4ref.defects.variants.gemm_loops", _try_out_steps, consequence)


def _try_out_steps(compiled: Any) -> None:
    generator = torch.Generator("cpu").manual_seed(0)
    x, weights = (
        torch.randn(2, 3, 64, generator=generator, device="cpu").bfloat16().double() for _ in range(2)
    )
    for how in ((16, 25, True), (8, 24, False)):
        if not torch.equal(_by_loops(compiled, x, weights, *how), _by_steps(x, weights, *how)):
            raise ArithmeticError("some sums of a trial are wrong")


def _by_steps(x: Tensor, weights: Tensor, step_size: int, fraction_bits: int, toward_zero: bool) -> Tensor:
    acc = x.new_zeros(x.shape[0], x.shape[1], weights.shape[1])
    for block in spans(x.shape[2], step_size):
        acc = _step(x[:, :, None, block], weights[:, None, :, block], acc, fraction_bits, toward_zero)
    return acc


def _step(x: Tensor, weights: Tensor, carried: Tensor, fraction_bits: int, toward_zero: bool) -> Tensor:
    """`tensor_core.step` in float64, for other adders."""
    products = x * weights  # at most 32 bits: exact
    largest = (_power_of_two(x) * _power_of_two(weights)).amax(-1).maximum(_power_of_two(carried))
    unit = largest * 2.0**-fraction_bits
    per_unit = torch.where(unit == 0, 0.0, 1 / unit)
    # Integers below 2^32, summed exactly in any order.
    total = (products * per_unit.unsqueeze(-1)).trunc_().sum(-1) + (carried * per_unit).trunc_()
    bits = total.mul_(unit).view(torch.int64)
    if not toward_zero:
        bits = bits + ((1 << 28) - 1 + ((bits >> 29) & 1))
    result = (bits & -(1 << 29)).view(torch.float64)
    result = torch.where(result.abs() >= 2.0**128, result * torch.inf, result)
    ordinary = x.isfinite().all(-1) & weights.isfinite().all(-1) & carried.isfinite()
    return torch.where(ordinary, result, products.sum(-1) + carried)


def _power_of_two(x: Tensor) -> Tensor:
    """2^exponent: the largest power of two not above |x|, at least 2^-126; 0 for 0."""
    power = (x.view(torch.int64) & (0x7FF << 52)).view(torch.float64)
    return torch.where(x == 0, 0.0, power.clamp(min=2.0**-126))


def to_fp64(x: Tensor) -> Tensor:
    return fp32.bf16_to_fp64(x) if x.dtype == torch.bfloat16 else x.to(torch.float64)


def in_pieces(
    piece: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    positions: Tensor,
    *,
    columns_at_once: int = _COLUMNS,
) -> Tensor:
    """A GEMM on rows and columns that fit into a cache, `[B, M, N] float32`."""
    out = torch.empty(*x.shape[:2], packed.shape[1], dtype=torch.float32, device=x.device)
    for rows in spans(x.shape[1], _ROWS):
        for columns in spans(packed.shape[1], columns_at_once):
            factors = x[:, rows], packed[:, columns], scales[:, columns]
            out[:, rows, columns] = piece(*factors, positions[:, rows])
    return out


@dataclass(frozen=True)
class GemmVariant:
    """The kernel's group-scaled GEMM with something changed, called like `group_scaled_gemm`.

    Attributes:
        decode_codes: codes, int64, to float64 values of at most 8 bits, each by itself.
        decode_scales: scale bytes to float32 factors.
        group_sum: `x @ weights^T` of groups, `[B, M, 32]` and `[B, N, 32]` to `[B, M, N]`, all float64.
        order: `(num_groups, tile_k)` to the order of the groups; None for the generation's.
        accumulate: the terms, in that order, to float32 accumulators.
        add_zero: the epilogue's addition of +0.
    """

    decode_codes: Callable[[Tensor], Tensor] = lambda codes: _values(codes.device)[codes]
    decode_scales: Callable[[Tensor], Tensor] = lambda scales: decode_ue8m0(scales, convention="sm90")
    group_sum: Callable[[Tensor, Tensor], Tensor] = tensor_core_sum
    order: Callable[[int, int], list[int]] | None = None
    accumulate: Callable[[list[Term]], Tensor] = accumulate
    add_zero: bool = True

    def __call__(
        self,
        x: Tensor,
        packed: Tensor,
        scales: Tensor,
        *,
        tactic: Tactic,
        generation: Generation,
        positions: Tensor,
    ) -> Tensor:
        every_byte = torch.arange(256, dtype=torch.uint8, device=x.device)
        pairs = self.decode_codes(unpack_codes(every_byte[:, None]).to(torch.int64))

        def decode(packed: Tensor) -> Tensor:
            return pairs.index_select(0, packed.flatten().to(torch.int32)).view(*packed.shape[:-1], -1)

        def piece(x: Tensor, packed: Tensor, scales: Tensor, positions: Tensor) -> Tensor:
            num_groups = scales.shape[2]
            swapped = first_pair_swapped(x, positions, tactic, generation).unsqueeze(-1)
            groups = _by_group(to_fp64(x))
            # Weights take 16 times their room as float64, sums do not: few rows have theirs added in one go.
            t = torch.cat(
                [
                    self.group_sum(groups, _by_group(decode(packed[:, some]))).to(torch.float32)
                    for some in spans(packed.shape[1], _COLUMNS)
                ],
                dim=2,
            )
            t = t.view(-1, num_groups, *t.shape[1:])
            factors = self.decode_scales(scales).transpose(1, 2).unsqueeze(2).expand_as(t)
            if self.order is None:
                order = group_order(num_groups, tactic.tile_k, generation)
            else:
                order = self.order(num_groups, tactic.tile_k)
            acc = self.accumulate([Term(t[:, group], factors[:, group], swapped) for group in order])
            return fp32.add(acc, torch.zeros_like(acc)) if self.add_zero else acc

        at_once = _COLUMNS * max(1, _ROWS // max(x.shape[1], 1))
        return in_pieces(piece, x, packed, scales, positions, columns_at_once=at_once)


def _by_group(x: Tensor) -> Tensor:
    """`[B, M, K]` as `[B * G, M, 32]`."""
    return x.view(*x.shape[:2], -1, GROUP_SIZE).transpose(1, 2).flatten(0, 1)


def _values(device: torch.device) -> Tensor:
    return torch.tensor(E2M1_VALUES, dtype=torch.float64, device=device)
