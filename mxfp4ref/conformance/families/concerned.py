"""Which slots a change concerns, where it concerns some of them only: solved from what is wrong, then put in words."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.families.hypothesis import Pipeline, finalized
from mxfp4ref.conformance.families.places import MaskOf, named_experts
from mxfp4ref.conformance.families.slot_kinds import attributes, slots_of_kind
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90 import fp32

__all__ = ["FREE", "kinds_concerned", "slots_concerned"]

FREE = -1  # a slot in which the change shows nothing: whether it is concerned cannot be told
_TINY = 1e-300
_SHOWS = 2.0**-11  # of the output, below which a row's change is lost in the output's rounding


def slots_concerned(
    pipeline: Pipeline, right: Tensor, changed: Tensor, local: Tensor, got: Tensor
) -> Tensor | None:
    """Which slots have the changed row and which the right one; None where these do not give every bit of `got`.

    The output is a sum over slots, so each token gives equations for its slots, one of each column: how much of the
    difference between the two rows, which is all (1) or nothing (0), is in what came out.

    Args:
        pipeline: of the tokens.
        right, changed: `[M, k, H] bf16`, GEMM2's rows.
        local: `[M, k] int64`, -1 where a slot is skipped.
        got: `[M, H] bf16`.

    Returns:
        `[M, k] int64` of 1, 0 and FREE.
    """
    weights = pipeline.call.token_final_scales
    want = finalized(pipeline, right, local, weights)
    wide = [fp32.widen(t.contiguous()).double() for t in (right, changed, want, got)]
    apart = ((wide[1] - wide[0]) * weights[..., None].double()).masked_fill(local[..., None] < 0, 0)
    error = wide[3] - wide[2]
    finite = error.isfinite() & apart.isfinite().all(1)
    apart, error = apart.where(finite[:, None], 0.0), error.where(finite, 0.0)
    size = apart.square().sum(2).sqrt()
    apart, unit = apart / size.clamp(min=_TINY)[..., None], size.clamp(min=_TINY)
    gram, onto = apart @ apart.transpose(1, 2), apart @ error[..., None]
    share = torch.linalg.lstsq(gram, onto, driver="gelsd").solution[..., 0] / unit
    shows = size > _SHOWS * wide[2].where(finite, 0.0).square().sum(1, keepdim=True).sqrt()
    concerned = torch.where(shows, (share > 0.5).long(), FREE)
    rows = torch.where((concerned == 1)[..., None], changed, right)
    return None if bool(differing(finalized(pipeline, rows, local, weights), got).any()) else concerned


def kinds_concerned(call: MoeCall, local: Tensor, concerned: Tensor) -> Iterator[tuple[str, MaskOf]]:
    """Words for the slots that are concerned, as after "slots", and how to find them in any call; likely ones first."""
    known, chosen = concerned != FREE, concerned == 1
    yes, no = (set(local[known & side].tolist()) for side in (chosen, ~chosen))
    if yes and no and not yes & no and (experts := named_experts(call, yes, no)) is not None:
        yield f"of {experts.words}", experts.among
    for kind in attributes(call, local):
        if torch.equal(kind.mask & known, chosen):
            yield kind.words, partial(slots_of_kind, kind.words)
