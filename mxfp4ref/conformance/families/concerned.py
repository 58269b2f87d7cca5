"""Which slots a change concerns, where it concerns some of them: solved from what is wrong, then put in words."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.families.hypothesis import Pipeline, SlotRows, finalized
from mxfp4ref.conformance.families.places import MaskOf, kinds_of_slots, named_experts
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90 import fp32

__all__ = ["FREE", "kinds_concerned", "slots_concerned"]

FREE = -1  # a slot in which the change shows nothing: whether it is concerned cannot be told
_UNSURE = 0.3  # a share so far from both is neither
_TINY = 1e-300
_SHOWS = 2.0**-11  # of the output, below which a row's change is lost in the output's rounding


def slots_concerned(
    pipeline: Pipeline, given: SlotRows, changed: Tensor, want: Tensor, got: Tensor
) -> tuple[Tensor, Tensor]:
    """Which slots have the changed row and which the right one, and of which tokens these give every bit of `got`.

    The output is a sum over slots, so each token gives equations for its slots, one of each column: how much of the
    difference between the two rows, which is all (1) or nothing (0), is in what came out.

    Args:
        pipeline: whose sum it is.
        given: the right rows of the tokens.
        changed: `[M, k, H] bf16`, what GEMM2 gives otherwise.
        want, got: `[M, H] bf16`.

    Returns:
        `[M, k] int64` of 1, 0 and FREE, and `[M] bool`.
    """
    rows, local, weights = given.y, given.local, given.weights
    right, other, before, after = (fp32.widen(t.contiguous()).double() for t in (rows, changed, want, got))
    apart = ((other - right) * weights[..., None]).masked_fill(local[..., None] < 0, 0)
    error = after - before
    finite = error.isfinite() & apart.isfinite().all(1)
    apart, error = apart.where(finite[:, None], 0.0), error.where(finite, 0.0)
    size = apart.square().sum(2).sqrt()
    shows = size > _SHOWS * before.where(finite, 0.0).square().sum(1, keepdim=True).sqrt()
    unit = size.clamp(min=_TINY)[..., None]
    apart = apart / unit
    gram, onto = apart @ apart.transpose(1, 2), apart @ error[..., None]
    share = (torch.linalg.lstsq(gram, onto, driver="gelsd").solution / unit)[..., 0]
    concerned = torch.where(shows, (share > 0.5).long(), FREE)
    fits = ~(((share - concerned).abs() > _UNSURE) & shows).any(1)
    some = fits.nonzero().flatten()
    if len(some):
        merged = torch.where((concerned[some] == 1)[..., None], changed[some], rows[some])
        found = finalized(pipeline, merged, local[some].contiguous(), weights[some].contiguous())
        fits[some] = ~differing(found, got[some]).any(1)
    return concerned, fits


def kinds_concerned(call: MoeCall, local: Tensor, concerned: Tensor) -> Iterator[tuple[str, MaskOf]]:
    """Words for the slots that are concerned, as after "slots", and how to find them in any call."""
    known, chosen = concerned != FREE, concerned == 1
    yes, no = (set(local[known & side].tolist()) for side in (chosen, ~chosen))
    experts = named_experts(call, yes, no) if yes and no and not yes & no else None
    for kind, mask_of in kinds_of_slots(call, local, experts):
        if torch.equal(kind.mask & known, chosen):
            yield kind.words, mask_of
