"""Where an output shows what GEMM2 gets: a weight of zero hides it, one in a row shows it in one element.

Elements that could not have differed are no evidence for a place; nor are right ones for the stages before GEMM2
where its weights do not lead to them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref.conformance.comparison import ulp_distance
from mxfp4ref.conformance.families.distances import last_place
from mxfp4ref.conformance.findings.reduction import local_experts
from mxfp4ref.formats.mxfp4 import dequantize
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90 import fp32

__all__ = ["is_spread", "passes_factors", "reached"]

_FIRST = 64  # bytes of a row of weights, of which hardly any is zero in all
_SIZES = 0x77  # the bits of two E2M1 codes without their signs
_COLUMNS = 512  # that are looked at for what an activation leads to
_OTHERS = 8  # columns in which a wrong activation has to show
VISIBLE = 4.0  # ulp
_SHARE = 0.9  # of the wrong elements
_RIGHT = (
    0.95  # of the others of their rows, nearly: in mode bounded these may be anything within their bounds
)


def reached(call: MoeCall, want: Tensor, mask: Tensor) -> Tensor:
    """The elements that could have differed, `[M, H] bool`: those that do, and those that depend on an activation.

    Args:
        call: the call.
        want: `[M, H] bf16`; no right NaN is counted, since nearly all that is wrong leaves it one.
        mask: `[M, H] bool`, where the output differs.
    """
    experts, local = call.experts, local_experts(call)
    used = (local >= 0) & (call.token_final_scales != 0)
    found = mask.clone()
    for expert in torch.unique(local[used]).tolist():
        tokens = (used & (local == expert)).any(1)
        if bool(found[tokens].all()):
            continue
        if not experts.tactics_show:
            found |= tokens[:, None]
            continue
        rows = experts.weights("fc2", expert)[0][0]
        some = (rows[:, :_FIRST] & _SIZES).ne(0).any(1)
        some[~some] = (rows[~some] & _SIZES).ne(0).any(1)
        found |= tokens[:, None] & some
    return mask | (found & ~want.isnan())


def is_spread(
    call: MoeCall, got: Tensor, want: Tensor, mask: Tensor, tokens: list[int], *, visible: float = VISIBLE
) -> bool:
    """Whether an activation that makes such errors in some tokens would show in more columns than those that differ.

    Only then is it no activation that is wrong. It is asked of each that a wrong element depends on.

    Args:
        call: the call, with MXFP4 weights.
        got, want: `[M, H] bf16`.
        mask: `[M, H] bool`, where they differ.
        tokens: those to look at.
        visible: so many ulp it has to move other columns by; 0 for any number.
    """
    local = local_experts(call)
    told: list[Tensor] = []
    for token in tokens:
        right = (~mask[token] & want[token].isfinite()).nonzero().flatten()
        right = right[:: -(-len(right) // _COLUMNS) or 1]
        near = ulp_distance(got[token][right], want[token][right]) <= VISIBLE
        if len(right) < _OTHERS or float(near.double().mean()) < _RIGHT:
            return False
        wrong = mask[token].nonzero().flatten()[:_COLUMNS]
        one, other = (fp32.widen(t[token].contiguous()).double() for t in (got, want))
        error, unit = (one - other).abs().nan_to_num(torch.inf)[wrong], last_place(other)[right]
        shows = torch.ones(len(wrong), dtype=torch.bool, device=mask.device)
        for expert in local[token][local[token] >= 0].tolist():
            codes, scales = call.experts.weights("fc2", expert)
            assert scales is not None
            parts = ((codes[:, some], scales[:, some]) for some in (wrong, right))
            from_wrong, from_right = (
                dequantize(*part, convention="sm90", dtype=torch.float32)[0].abs().double() for part in parts
            )
            # Of an activation, how far a change by 1 moves the columns that it moves most, in ulp.
            loud = (from_right / unit[:, None]).topk(_OTHERS, dim=0).values[-1]
            shows &= ((from_wrong == 0) | (error[:, None] * loud > visible * from_wrong)).all(1)
        told.append(shows)
    return bool(told) and float(torch.cat(told).double().mean()) >= _SHARE


def passes_factors(call: MoeCall) -> bool:
    """Whether a factor on rows of GEMM1, of its up half where it has two, is one on columns of the activation."""
    experts = call.experts
    between = (experts.fc1_biases, experts.swiglu_beta, experts.swiglu_limit)
    return all(t is None for t in between)
