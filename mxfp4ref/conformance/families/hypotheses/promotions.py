"""Hypotheses on how a GEMM's partial sums are scaled: after another number of steps, or in the exponent field."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypothesis import Hypothesis
from mxfp4ref.defects.variants.gemm import GemmVariant, Term, in_pieces, tensor_core_sum, to_fp64
from mxfp4ref.formats.generations import Generation
from mxfp4ref.formats.mxfp4 import E2M1_VALUES, GROUP_SIZE, decode_ue8m0, unpack_codes
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.gemm.order import group_order
from mxfp4ref.sm90.tactics import Tactic
from mxfp4ref.sm90.tensor_core import STEP_SIZE

__all__ = ["promotion_hypotheses"]

_STEPS = GROUP_SIZE // STEP_SIZE  # of a K group


@dataclass(frozen=True)
class _Promoted:
    """A GEMM whose partial sums are scaled and added up after other numbers of tensor-core steps, called like one.

    Attributes:
        first: steps before the first time.
        every: steps from then on.
        of_last: whether the scale is that of the last step's K group; else that of the first step's.
    """

    first: int
    every: int
    of_last: bool

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
        order = group_order(scales.shape[2], tactic.tile_k, generation)
        steps = [_STEPS * group + half for group in order for half in range(_STEPS)]
        ends = [self.first, *range(self.first + self.every, len(steps), self.every), len(steps)]
        values = torch.tensor(E2M1_VALUES, dtype=torch.float64, device=x.device)

        def piece(x: Tensor, packed: Tensor, scales: Tensor, _: Tensor) -> Tensor:
            rows, weights = _by_step(to_fp64(x)), _by_step(values[unpack_codes(packed).long()])
            factors = decode_ue8m0(scales, convention="sm90")
            acc = torch.zeros(*x.shape[:2], packed.shape[1], device=x.device)
            for start, end in zip([0, *ends], ends, strict=False):
                some = steps[start:end]
                if some:
                    t = tensor_core_sum(*(m[:, :, some].flatten(2).contiguous() for m in (rows, weights)))
                    group = some[-1 if self.of_last else 0] // _STEPS
                    acc = fp32.fma(t.float(), factors[:, None, :, group].expand_as(acc).contiguous(), acc)
            return fp32.add(acc, torch.zeros_like(acc))

        return in_pieces(piece, x, packed, scales, positions)


def _by_step(matrix: Tensor) -> Tensor:
    return matrix.view(*matrix.shape[:2], -1, STEP_SIZE)


def _added_exponents(terms: list[Term]) -> Tensor:
    """Each sum scaled by adding the scale's exponent to its exponent field, whatever it is."""
    acc = torch.zeros_like(terms[0].t)
    for term in terms:
        exponent = (term.scale.contiguous().view(torch.int32) >> 23) - 127
        acc = fp32.add((term.t.contiguous().view(torch.int32) + (exponent << 23)).view(torch.float32), acc)
    return acc


def _gemms() -> Iterator[tuple[str, Callable[..., Tensor], float]]:
    yield (
        "a K group's sum is scaled by adding the scale's exponent to its exponent field: a sum of zero becomes a "
        "power of two, or for a scale below 1 a huge negative number",
        GemmVariant(accumulate=_added_exponents),
        1.2,
    )
    for of_last, half, which in ((True, "last", "after"), (False, "first", "before")):
        yield (
            f"partial sums are scaled and added up in the middle of each K group, 16 of K too early or too late: the "
            f"{half} 16 of each 32 get the scale of the group {which}",
            _Promoted(1, _STEPS, of_last),
            1.3,
        )
    for groups in (2, 4):
        for of_last, which in ((True, "last"), (False, "first")):
            yield (
                f"partial sums are scaled and added up after each {groups * GROUP_SIZE} of K instead of each "
                f"{GROUP_SIZE}, by the scale of the {which} K group of them",
                _Promoted(groups * _STEPS, groups * _STEPS, of_last),
                1.4,
            )


def promotion_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """In one GEMM or in both."""
    if not call.experts.quantized:
        return
    for fcs in (("fc1",), ("fc2",), ("fc1", "fc2")):
        where = f"in GEMM{fcs[0][-1]}" if len(fcs) == 1 else "in both GEMMs"
        for words, gemm, cost in _gemms():
            yield Hypothesis(
                "order of sums",
                fcs,
                f"{where} {words}",
                lambda p, g=gemm, fcs=fcs: p.staging(**{f"{fc}_gemm": g for fc in fcs}),
                cost + 0.1 * (len(fcs) - 1),
            )
