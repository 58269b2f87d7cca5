"""Which row's scales or codes each row of fc2 has, solved row by row: the activations and all bytes are known."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mxfp4ref._words import shortened
from mxfp4ref.conformance.families.sampled import Sample
from mxfp4ref.conformance.findings.finding import Evidence
from mxfp4ref.conformance.findings.index_words import moved_runs
from mxfp4ref.formats.mxfp4 import GROUP_SIZE
from mxfp4ref.model.call import MoeCall

__all__ = ["row_maps"]

_FEWEST, _MOST = 6, 12  # tokens
_LOUD = 4.0  # times the roundings
_ROWS = 512  # that are tried for each
_FITS, _OTHERS = (
    3.0,
    4.0,
)  # mean square of what a row leaves, in roundings, and times more that all others leave
_EXPLAINED = 0.97  # of the rows
_FEWEST_MOVED = 8
_NAMED = 6


def row_maps(call: MoeCall, some: Sequence[Sample]) -> Evidence | None:
    """What follows, if each row of fc2 has some row's scales, or codes, and not all of them their own.

    Args:
        call: the right one.
        some: tokens that are wrong.
    """
    loud = [s for s in some if s.loudness > _LOUD]
    loud = loud[:: max(len(loud) // _MOST, 1)][:_MOST]
    rows = call.experts.hidden_size
    if len(loud) < _FEWEST or rows > _ROWS or len(loud[0].error) != rows or call.experts.fc2_scales is None:
        return None
    left = {kind: torch.zeros(rows, rows, dtype=torch.float64) for kind in ("scales", "weights (codes only)")}
    for sample in loud:
        scales, codes = (torch.zeros(rows, rows, dtype=torch.float64) for _ in range(2))
        for slot, expert in enumerate(sample.experts.tolist()):
            factors = (call.experts.fc2_scales[expert].view(torch.uint8).double() - 127).exp2()
            products = sample.weights[slot] * sample.second[slot] * sample.activation[slot]
            unscaled = products.view(rows, -1, GROUP_SIZE).sum(2) / factors
            scales += unscaled @ factors.T
            codes += factors @ unscaled.T
        target = sample.error + scales.diagonal()
        for kind, predicted in zip(left, (scales, codes), strict=True):
            left[kind] += (target[:, None] - predicted).square() / sample.roundings[:, None] / len(loud)
    for kind, rest in left.items():
        if (source := _sources(rest)) is not None:
            return Evidence.of_kind(
                ("fc2",),
                f"GEMM2's {kind} are in each row those of one row, but not of its own: rows are in another order, or "
                "some are read for others",
                f"{_in_words(source)}; what GEMM2 gets is right",
                3,
            )
    return None


def _sources(rest: Tensor) -> Tensor | None:
    """The row `[H]` that each row has, -1 where none is known; None where that does not explain nearly all."""
    best, source = rest.min(1)
    others = rest.scatter(1, source[:, None], torch.inf).amin(1)
    own = rest.diagonal() <= _FITS
    source = torch.where(own, torch.arange(len(rest)), source)
    known = own | ((best <= _FITS) & (others > _OTHERS * best.clamp(min=1)))
    if float(known.double().mean()) < _EXPLAINED or int((known & ~own).sum()) < _FEWEST_MOVED:
        return None
    return torch.where(known, source, -1)


def _in_words(source: Tensor) -> str:
    """The first blocks of rows that are moved."""
    return shortened((_run(*run) for run in moved_runs(source.tolist())), _NAMED)


def _run(first: int, last: int, other: int) -> str:
    if first == last:
        return f"row {first} has row {other}'s"
    return f"rows {first} to {last} have those of rows {other} to {other + last - first}"
