"""Hypotheses on weights that a loader made others of, code and scale together: pruned, or with fewer scales."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypotheses.tensors import largest_of_groups
from mxfp4ref.conformance.families.hypothesis import Hypothesis, Pipeline
from mxfp4ref.conformance.families.solved.tensor_groups import GEMMS
from mxfp4ref.formats.mxfp4 import E2M1_VALUES, GROUP_SIZE, SCALE_BIAS, pack_codes, unpack_codes
from mxfp4ref.formats.quantize import step_tables
from mxfp4ref.model.call import MoeCall

__all__ = ["prepared_weight_hypotheses"]

_BOTH = 0.2  # cost more than of one GEMM
_PRUNED = ((2, 4), (1, 2), (4, 8))  # that are kept, of how many along K
_REACHES = (1, 2, 3, 4, 7, 8, 15)  # exponents, of 1 to 4 bits
_Both = tuple[Tensor, Tensor]  # codes `[E, N, K] uint8` and scale bytes `[E, N, K / 32] int64`


def prepared_weight_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """Each of them of one GEMM's weights, or of both."""
    if call.experts.fc1_scales is None or call.experts.fc2_scales is None:
        return
    for words, change, cost in _changes():
        for fcs, whose in GEMMS:
            yield Hypothesis(
                "values",
                fcs,
                f"{whose} {words}",
                lambda p, f=fcs, c=change: _on(p, f, c),
                cost + _BOTH * (len(fcs) > 1),
            )
    if call.experts.gated:
        for words, merge in (("largest", torch.maximum), ("smallest", torch.minimum)):
            told = f"GEMM1's scales of up and of gate are each the {words} of both, codes as they were"
            yield Hypothesis(
                "values", ("fc1",), told, lambda p, m=merge: _on(p, ("fc1",), _of_halves(m)), 1.3
            )


def _on(pipeline: Pipeline, fcs: tuple[str, ...], change: Callable[[Tensor, Tensor], _Both]) -> Pipeline:
    changed = {}
    for fc in fcs:
        packed, scales = (getattr(pipeline.call.experts, f"{fc}_{what}") for what in ("weights", "scales"))
        codes, bytes_ = change(unpack_codes(packed), scales.view(torch.uint8).long())
        changed[f"{fc}_weights"] = pack_codes(codes.to(torch.uint8).contiguous())
        changed[f"{fc}_scales"] = bytes_.clamp(0, 255).to(torch.uint8).view(scales.dtype)
    return pipeline.having(**changed)


def _changes() -> Iterator[tuple[str, Callable[[Tensor, Tensor], _Both], float]]:
    for kept, of in _PRUNED:
        words = (
            f"weights are pruned to {kept} of {of}: of every {of} along K the {of - kept} smallest are zero"
        )
        yield words, lambda c, s, k=kept, n=of: (_pruned(c, k, n), s), 1.3
    for reach in _REACHES:
        least = f"scales are cut to 2^{reach} times the least of their row, codes as they were"
        yield least, lambda c, s, r=reach: (c, s.minimum(s.amin(2, keepdim=True) + r)), 1.5
        most = f"scales are raised to 2^-{reach} times the largest of their row, codes as they were"
        yield most, lambda c, s, r=reach: (c, s.maximum(s.amax(2, keepdim=True) - r)), 1.5
    for groups in (2, 4, 8):
        span = f"each {groups * GROUP_SIZE} along K"
        words = f"scales are one for {span}, the largest of its groups'"
        yield f"weights are quantised once more: {words}, codes rounded to it", _rounded_to(groups), 1.3


def _pruned(codes: Tensor, kept: int, of: int) -> Tensor:
    size = (codes & 7).view(*codes.shape[:2], -1, of)
    order = size.argsort(dim=3, descending=True, stable=True).argsort(dim=3, stable=True)
    return torch.where(order.flatten(2) < kept, codes, 0)


def _rounded_to(groups: int) -> Callable[[Tensor, Tensor], _Both]:
    values = torch.tensor(E2M1_VALUES[:8])
    steps = step_tables("floor")[1][SCALE_BIAS].contiguous()  # the least magnitude of each code, ties to even

    def change(codes: Tensor, scales: Tensor) -> _Both:
        if scales.shape[2] % groups:
            raise ValueError("scales: no whole spans")
        merged = largest_of_groups(scales, groups)
        factors = (scales - merged).float().exp2().repeat_interleave(GROUP_SIZE, 2)
        wanted = (values.to(codes.device)[(codes & 7).long()] * factors).view(torch.int32)
        return torch.bucketize(wanted, steps.to(codes.device), right=True).to(torch.uint8) | codes & 8, merged

    return change


def _of_halves(merge: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], _Both]:
    def change(codes: Tensor, scales: Tensor) -> _Both:
        merged = merge(*scales.chunk(2, dim=1))
        return codes, torch.cat((merged, merged), 1)

    return change
