"""Rows that are zero and should not be: what may have made them so."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mxfp4ref.conformance.bounds.call_bounds import bound
from mxfp4ref.conformance.families.hypothesis import Pipeline, local_of
from mxfp4ref.conformance.findings.finding import Evidence
from mxfp4ref.conformance.findings.reduction import is_heavy, reduce_call
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90 import fp32

__all__ = ["zero_rows"]

_COUNTS = 2.0**-4  # of a row's largest weight, from which a slot's term shows in the row
_MOST = 0.5  # of the rows
_SMALL = (
    2.0**-100
)  # numbers that a factor such as a weight, applied once more or earlier, takes below the least ones


def zero_rows(pipeline: Pipeline, got: Tensor, want: Tensor, rows: Tensor) -> Iterator[Evidence]:
    """What follows if these rows, `[M] bool`, are zero and should not be; other arguments as of `evidence.gather`."""
    if not _all_zero(got, want, rows):
        return
    count = int(rows.sum())
    what = "the token that differs" if count == 1 else f"the {count} tokens that differ"
    what = "all tokens" if count == len(rows) > 1 else what
    them = "it" if count == 1 else "them"
    sentence = f"the rows of {what} are zero: nothing was added up for {them}, or nothing written"
    if bool((fp32.widen(want[rows].contiguous()).abs() < _SMALL).all()):
        sentence += ", or its products underflowed: " if count == 1 else ", or their products underflowed: "
        sentence += "all that is expected lies below 2^-100"
    if pipeline.call.ep_rank > 0:  # whose own experts have other local numbers
        sentence += ", as where global ids are mapped to local ones twice (ep_double_mapping)"
    if _cancels(pipeline.call, got, want, rows):
        less = "as the rest of a sum may that cancels but for its roundings, or nothing was written"
        yield Evidence((), f"{what} came out as zeros, {less}", 1, zeros=True, rounding=True)
    elif _biased(pipeline, rows):
        less = f"{sentence}; not even the fc2 bias was added"
        yield Evidence(("slots", "finalize"), less, 2, zeros=True)
    elif _by_token(pipeline, want, rows):
        kind = "rows are zero, and their experts' weights are used as they should be in other rows"
        biases = pipeline.call.experts.fc1_biases
        from_input = (
            "" if biases is not None and bool(biases.any()) else ", or its row of the input taken as zeros"
        )
        more = f"{sentence}; by the token, not by its experts: all its slots were left out{from_input}"
        yield Evidence(("slots", "finalize"), more, 1, zeros=True, kind=kind, hedged=True)
    else:
        yield Evidence((), sentence, 1, zeros=True)


def _all_zero(got: Tensor, want: Tensor, rows: Tensor) -> bool:
    """Whether these rows are zero, and should not be."""
    one, other = (fp32.widen(t[rows].contiguous()) for t in (got, want))
    return bool(other.any()) and not bool(one.any())


def _cancels(call: MoeCall, got: Tensor, want: Tensor, rows: Tensor) -> bool:
    """Whether rows of zeros may be the rest of sums that cancel but for roundings."""
    if is_heavy(call) or not call.experts.tactics_show:
        return False
    amount = fp32.widen(want.contiguous()).abs().sum(1).nan_to_num(0, 0, 0)
    token = torch.where(rows, amount, -1).argmax().view(1)
    return bool(bound(reduce_call(call, token)).contains(got[token], want[token]).all())


def _biased(pipeline: Pipeline, rows: Tensor) -> bool:
    """Whether each of these tokens would get an fc2 bias in its sum, whatever was computed for it."""
    call, biases = pipeline.call, pipeline.call.experts.fc2_biases
    if biases is None or call.tp_rank:
        return False
    local = local_of(pipeline)[rows]
    given = biases.ne(0).any(1)[local.clamp(min=0)] & (local >= 0) & (call.token_final_scales[rows] != 0)
    return bool(given.any(1).all())


def _by_token(pipeline: Pipeline, want: Tensor, rows: Tensor) -> bool:
    """Whether it is the tokens that are wrong: no expert, no rows of experts, nothing that underflows or overflows.

    For that their experts have to show in right rows, most of them must have lost several experts' terms at once, and
    their numbers may neither be the smallest nor the largest.
    """
    sizes = fp32.widen(want.contiguous()).abs().amax(1)
    right = ~rows & (sizes > 0) & sizes.isfinite()
    lost, kept = sizes[rows], sizes[right]
    if not len(kept) or not bool((lost.max() > kept.min()) & (lost.min() < kept.max())):
        return False
    local = local_of(pipeline)
    used = torch.where(local >= 0, pipeline.call.token_final_scales.abs(), 0.0)
    shows = (used > 0) & (used >= _COUNTS * used.amax(1, keepdim=True))
    several = float((shows[rows].sum(1) > 1).float().mean()) > _MOST
    asked = (used > 0) & rows[:, None]
    return several and bool(torch.isin(local[asked], local[shows & right[:, None]]).all())
