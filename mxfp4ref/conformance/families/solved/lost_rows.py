"""NaN or infinities where there should be numbers: in which rows and columns, and what these tokens share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mxfp4ref._words import shortened
from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.families.places import named_columns
from mxfp4ref.conformance.findings.finding import Evidence, counted
from mxfp4ref.conformance.findings.reach import is_spread
from mxfp4ref.conformance.findings.reduction import is_heavy
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import trace
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.activation import up_and_gate

__all__ = ["lost_rows", "none_right"]

_TOKENS = 6  # that are looked at
_EXP = 88.72  # of which exp is float32's largest number
_FP16 = 65504.0  # fp16's largest number


def lost_rows(call: MoeCall, got: Tensor, want: Tensor, lost: Tensor) -> Iterator[Evidence]:
    """What follows from them, if anything does.

    Args:
        call: the call.
        got, want: `[M, H] bf16`.
        lost: `[M, H] bool`, where numbers are expected and none came; elsewhere nothing differs that tells more.
    """
    rows = lost.any(1)
    kind = "NaN" if bool(got[lost].isnan().all()) else "NaN or infinite"
    tokens = rows.nonzero().flatten().tolist()
    of = f"token{'s' * (len(tokens) > 1)} {shortened(map(str, tokens), 8)}"
    if bool(lost[rows].all()):
        others, right, alone = want[~rows], "", ""
        if bool(rows.all()):
            of, alone = f"all {counted(len(tokens), 'token')}", ", or the output was not written"
        if bool(others.isfinite().any()):
            near = bool(differing(got[~rows], others).any())
            right = f", and all other rows are right{' but for what underflows' * near}"
            alone = ", or the row was not written"
        those = "that row" if len(tokens) == 1 else "these rows"
        why = _beyond(call, rows) or (
            f": whatever went wrong for {those} did so as a whole, as when one number before GEMM2, or a routing "
            f"weight, is no number{alone}"
        )
        kind = f"came out {kind} in every column"
        yield Evidence(
            (), f"{of} {kind}, where numbers are right{right}{why}", 1, kind=f"rows {kind}", lost=True
        )
    elif not bool(lost[rows].all(1).any()) and (
        kind == "NaN" or is_spread(call, got, want, differing(got, want), tokens[:_TOKENS])
    ):
        named = named_columns(lost.any(0))
        words = named[0] if named else ""
        yield Evidence(
            ("fc2", "finalize"),
            f"{of} came out {kind}{' ' + words if words else ' in some columns'} only: a number before GEMM2 that is "
            "none would show in all, so that it is in GEMM2, the fc2 bias, the sum or the writing of the output",
            2,
        )


def none_right(want: Tensor, wrong: Tensor) -> bool:
    """Whether no row is right that should have numbers other than zero: none says what the others have in common."""
    return not bool(fp32.widen(want[~wrong.any(1)]).nan_to_num(0, 0, 0).any())


def _beyond(call: MoeCall, rows: Tensor) -> str:
    """A number that exp or fp16 cannot hold, which each of these tokens has and no other; "" if there is none."""
    if is_heavy(call) or not call.experts.tactics_show or bool(rows.all()):
        return ""
    slots = trace(call)
    fc1 = fp32.widen(slots.fc1_output)
    if call.experts.fc1_biases is not None:
        fc1 = fc1 + fp32.widen(call.experts.fc1_biases[slots.expert])
    _, gate = up_and_gate(fc1, gated=call.experts.gated)
    for values, words in (
        (gate / _EXP, f"a gate above {_EXP}, of which exp overflows float32"),
        (-gate / _EXP, f"a gate below -{_EXP}, of which exp(-gate) overflows float32"),
        (fc1.abs() / _FP16, f"a number above {_FP16:g} in GEMM1's output, fp16's largest"),
    ):
        beyond = torch.zeros_like(rows)
        beyond[slots.token[(values > 1).any(1)]] = True
        if torch.equal(beyond, rows):
            return f"; each of these tokens, and no other, has {words}"
    return ""
