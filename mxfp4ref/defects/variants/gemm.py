"""The kernel's GEMM in replaceable parts, slower than the kernel's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mxfp4ref.formats.generations import Generation
from mxfp4ref.formats.mxfp4 import E2M1_VALUES, GROUP_SIZE, decode_ue8m0, unpack_codes
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.gemm.analysis import analyse, spans
from mxfp4ref.sm90.gemm.order import first_pair_swapped, group_order
from mxfp4ref.sm90.gemm.sums import codes_by_group, group_sums
from mxfp4ref.sm90.tactics import Tactic
from mxfp4ref.sm90.tensor_core import FRACTION_BITS, STEP_SIZE

__all__ = [
    "COLUMNS_AT_ONCE",
    "ROWS_AT_ONCE",
    "GemmVariant",
    "Term",
    "accumulate",
    "tensor_core_sum",
    "to_fp64",
]

ROWS_AT_ONCE = 64
COLUMNS_AT_ONCE = 256

# The sums of one K group, [B, M, 32] float64 by [B, N, 32] float64, as [B, M, N] float64.
GroupSum = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Term:
    """One K group of a tile of the product, on its way into the accumulators."""

    group: int
    t: Tensor  # [B, M, N] float32
    scale: Tensor  # [B, 1, N], float32 or float64
    swapped: Tensor  # [B, M, 1] bool: the second product is rounded alone (the specification, section 3)


def accumulate(terms: list[Term]) -> Tensor:
    """The kernel's way, with every rounding and flush."""
    first, *rest = terms
    acc = fp32.mul(first.t, first.scale.expand_as(first.t))
    if rest:
        second, *rest = rest
        acc = _fma(second, acc)
        if bool(first.swapped.any()):
            early = _fma(first, fp32.mul(second.t, second.scale.expand_as(second.t)))
            acc = torch.where(first.swapped, early, acc)
    for term in rest:
        acc = _fma(term, acc)
    return acc


def tensor_core_sum(
    x: Tensor,
    weights: Tensor,
    *,
    step_size: int = STEP_SIZE,
    fraction_bits: int = FRACTION_BITS,
    toward_zero: bool = True,
    chain: bool = True,
    carried: Tensor | None = None,
) -> Tensor:
    """`x @ weights^T` by tensor-core steps along K, each given the last one's result, `[B, M, N] float64`.

    Args:
        x: `[B, M, K] float64`, numbers of at most 24 bits.
        weights: `[B, N, K] float64`, numbers of at most 8 bits.
        step_size: products a step.
        fraction_bits, toward_zero: what a step keeps of its terms, and how it rounds its result.
        chain: False starts every step from zero and adds their results in float32.
        carried: `[B, M, N] float64`, the start of the chain, or None for zero.
    """
    acc = x.new_zeros(x.shape[0], x.shape[1], weights.shape[1]) if carried is None else carried
    for start in range(0, x.shape[2], step_size):
        some = slice(start, start + step_size)
        factors = x[:, :, None, some], weights[:, None, :, some]
        if chain:
            acc = _step(*factors, acc, fraction_bits, toward_zero)
        else:
            alone = _step(*factors, torch.zeros_like(acc), fraction_bits, toward_zero)
            acc = fp32.add(acc.to(torch.float32), alone.to(torch.float32)).to(torch.float64)
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


def _fma(term: Term, acc: Tensor) -> Tensor:
    return fp32.fma(term.t, term.scale.expand_as(acc), acc)


def to_fp64(x: Tensor) -> Tensor:
    return fp32.bf16_to_fp64(x) if x.dtype == torch.bfloat16 else x.to(torch.float64)


def _kernel_scale(scales: Tensor) -> Tensor:
    return decode_ue8m0(scales, convention="sm90")


@dataclass(frozen=True)
class GemmVariant:
    """The kernel's group-scaled GEMM with something changed, called like `group_scaled_gemm`.

    Attributes:
        group_sum: the sums of a group; None for the kernel's own.
        decode_scale: scale bytes to factors.
        codes: the values of the 16 codes, if `group_sum` is given.
        order: `(num_groups, tile_k)` to the order of the groups.
        accumulate: the terms, in that order, to float32 accumulators.
        add_zero: the epilogue's addition of +0.
    """

    group_sum: GroupSum | None = None
    decode_scale: Callable[[Tensor], Tensor] = _kernel_scale
    codes: tuple[float, ...] = E2M1_VALUES
    order: Callable[[int, int], list[int]] = group_order
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
        out = torch.empty(*x.shape[:2], packed.shape[1], dtype=torch.float32, device=x.device)
        order = self.order(scales.shape[2], tactic.tile_k)
        swapped = first_pair_swapped(x, positions, tactic, generation).unsqueeze(-1)
        for rows in spans(x.shape[1], ROWS_AT_ONCE):
            for columns in spans(packed.shape[1], COLUMNS_AT_ONCE):
                factor = self.decode_scale(scales[:, columns]).permute(2, 0, 1).unsqueeze(2)
                sums = self._sums(x[:, rows], packed[:, columns])
                acc = self.accumulate([Term(g, sums[g], factor[g], swapped[:, rows]) for g in order])
                out[:, rows, columns] = fp32.add(acc, torch.zeros_like(acc)) if self.add_zero else acc
        return out

    def _sums(self, x: Tensor, packed: Tensor) -> list[Tensor]:
        if self.group_sum is None:
            blocks = analyse(x, groups_at_once=x.shape[2] // GROUP_SIZE)
            return list(group_sums(blocks, blocks.chunks[0], codes_by_group(packed)).unbind(0))
        values = torch.tensor(self.codes, dtype=torch.float64, device=x.device)
        x = to_fp64(x)
        sums = []
        for group in spans(x.shape[2], GROUP_SIZE):
            codes = unpack_codes(packed[..., group.start // 2 : group.stop // 2])
            sums.append(self.group_sum(x[..., group], values[codes.to(torch.int64)]).to(torch.float32))
        return sums
