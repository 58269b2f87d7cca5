"""A call cut down so that a hypothesis can be tried on it in a fraction of a second."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.findings.reduction import is_heavy, reduce_call
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward

__all__ = ["probed"]

_TRIED = 8  # tokens, of which some have to give their expected rows alone
_WRONG, _RIGHT = 3, 1


def probed(
    call: MoeCall, got: Tensor, want: Tensor
) -> tuple[MoeCall, Tensor, Tensor, tuple[str, ...]] | None:
    """The call, the kernel's and the expected output; of a large layer those of a few tokens and their experts.

    None where no token gives its expected row alone. The last part says what was left out.
    """
    if not is_heavy(call):
        return call, got, want, ()
    amount = differing(got, want).sum(1).cpu()
    order = amount.argsort(descending=True, stable=True).tolist()
    wrong = [t for t in order if amount[t]][:_TRIED]
    right = [t for t in order if not amount[t]][:_RIGHT]
    chosen = wrong[:_WRONG] + right
    while chosen:
        tokens = torch.tensor(sorted(chosen))
        small = reduce_call(call, tokens.to(call.input.device), neighbours=True)
        off = differing(forward(small), want[tokens]).any(1).tolist()
        if not any(off):
            note = f"hypotheses were tried on tokens {', '.join(map(str, tokens.tolist()))} and their experts"
            return small, got[tokens], want[tokens], (note,)
        chosen = [t for t, bad in zip(tokens.tolist(), off, strict=True) if not bad]
        if not any(amount[t] for t in chosen):
            return None
    return None
