"""Whether what differs is no more than another order of summation may give: then it proves nothing to be wrong."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from mxfp4ref.conformance.bounds.call_bounds import bound
from mxfp4ref.conformance.findings.finding import Evidence
from mxfp4ref.conformance.findings.reduction import is_heavy, reduce_call
from mxfp4ref.conformance.findings.stage_fit import fit_finalize
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward

__all__ = ["unless_in_another_order"]

_TOKENS = 32  # that are looked at, the most wrong ones; of a layer of real size one
_NEED_NOT = "all that differs lies within the interval of all correct evaluations, and need not be wrong"
_NOTHING = Evidence(
    (),
    "what differs lies within the interval of all correct evaluations: a correct kernel that sums in another order "
    "could give this, so that it proves nothing of a formula or a stage",
    2,
    rounding=True,
)


def unless_in_another_order(
    call: MoeCall, got: Tensor, wrong: Tensor, solved: list[Evidence]
) -> list[Evidence]:
    """What was solved of the errors of an output, or that they may be those of another order of summation.

    Where another order makes such errors too, it is still told where they come from. Nothing where other weights for
    right expert outputs explain it too, and all that was solved is of other stages.

    Args:
        call: the right one.
        got: `[M, H] bf16`.
        wrong: `[M, H] bool`.
        solved: what equations say whose errors were taken for those of a mistake.
    """
    if not any(one.stages for one in solved):
        return solved
    order = wrong.sum(1).argsort(descending=True, stable=True)
    order = order[wrong[order].any(1)][: 1 if is_heavy(call) else _TOKENS]
    for tokens in (order[:1], order[1:]):  # one alone shows most mistakes, and takes little time
        if len(tokens):
            part = reduce_call(call, tokens)
            inside = bound(part).contains(got[tokens], forward(part))
            if not bool((inside | ~wrong[tokens]).all()):
                elsewhere = not any({"slots", "finalize"} & set(one.stages) for one in solved)
                return [] if elsewhere and fit_finalize(call, got, wrong) else solved
    return [_in_another_order(one) for one in solved if one.rounding] or [_NOTHING]


def _in_another_order(one: Evidence) -> Evidence:
    words = f"{one.sentence}, or another order of GEMM1's sums; {_NEED_NOT}"
    return replace(one, sentence=words, kind=words, hedged=True)
