"""Hypotheses on whose weights a GEMM takes for its rows: a tile's first row's, a map that was kept, others'."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypothesis import (
    Hypothesis,
    Pipeline,
    SlotRows,
    local_of,
    of_slots,
)
from mxfp4ref.conformance.families.places import concerns_what_is_wrong
from mxfp4ref.conformance.families.row_offsets import by_two_experts, sorted_rows
from mxfp4ref.model.call import MoeCall

__all__ = ["row_expert_hypotheses"]

_GEMMS = (
    (("fc1",), "GEMM1 multiplies"),
    (("fc2",), "GEMM2 multiplies"),
    (("fc1", "fc2"), "both GEMMs multiply"),
)
_NAMES = ("weights", "scales")
_Whose = Callable[[Tensor], Tensor]  # from each sorted row's expert to that whose weights it gets, `[R]`


def row_expert_hypotheses(call: MoeCall, wrong: Tensor) -> Iterator[Hypothesis]:
    """Those that concern the tokens that are wrong, `wrong [M] bool`, and hardly any others."""
    local = local_of(Pipeline(call))
    order, _, _ = sorted_rows(local, call.experts.num_experts)
    if not len(order):
        return
    own, weighs = local.flatten()[order], call.token_final_scales.flatten()[order] != 0
    for words, whose, cost in _ways():
        other = (whose(own) != own) & weighs
        concerned = torch.zeros_like(wrong)
        concerned[(order // local.shape[1])[other]] = True
        if not concerns_what_is_wrong(concerned, wrong):
            continue
        for fcs, multiplies in _GEMMS:
            yield replace(
                of_slots(
                    "another expert's",
                    fcs,
                    f"{multiplies} {words}",
                    lambda rows, f=fcs, w=whose: _with_others(rows, f, w),
                    cost + 0.1 * len(fcs),
                ),
                across_tokens=True,
            )


def _ways() -> Iterator[tuple[str, _Whose, float]]:
    """Words behind "GEMM1 multiplies", whose weights, cost."""
    for size in (8, 16, 32, 64, 128):
        tile = f"each tile of {size} sorted rows, which may hold rows of several experts, with the weights of its"
        yield f"{tile} first row's expert", lambda e, s=size: e[torch.arange(len(e)) // s * s], 1.3
        yield (
            f"{tile} last row's expert",
            lambda e, s=size: e[(torch.arange(len(e)) // s * s + s - 1).clamp(max=len(e) - 1)],
            1.3,
        )
    for by in (1, -1, 2, -2, 4, -4, 8, -8):
        rows = f"the {'first' if by < 0 else 'last'} {abs(by)} row{'s' * (abs(by) > 1)} of each expert"
        yield (
            f"{rows} with the weights of the expert {'before' if by < 0 else 'after'} (boundaries between the "
            f"experts' rows are {abs(by)} off)",
            lambda e, b=by: e[(torch.arange(len(e)) + b).clamp(0, len(e) - 1)],
            1.4,
        )
    yield (
        "the rows of an expert that has as many rows as the one with rows before it with that one's weights (kept "
        "from before where the problem's shape, the number of rows, is the same)",
        _kept,
        1.4,
    )
    yield (
        "the rows of each expert with the weights of the one with rows before it (another expert's, idle ones left "
        "out)",
        lambda e: _numbered(e, -1),
        1.4,
    )
    yield (
        "the rows of each expert with the weights of the one with rows after it (another expert's, idle ones left "
        "out)",
        lambda e: _numbered(e, 1),
        1.4,
    )
    yield (
        "the rows of the n-th expert that has any with the weights of expert n (another expert's, since idle ones "
        "are not counted)",
        lambda e: torch.searchsorted(torch.unique(e), e),
        1.3,
    )


def _kept(expert: Tensor) -> Tensor:
    with_rows, inverse, counts = torch.unique(expert, return_inverse=True, return_counts=True)
    whose = with_rows.clone()
    for i in range(1, len(whose)):
        if counts[i] == counts[i - 1]:
            whose[i] = whose[i - 1]
    found: Tensor = whose[inverse]
    return found


def _numbered(expert: Tensor, by: int) -> Tensor:
    with_rows, inverse = torch.unique(expert, return_inverse=True)
    found: Tensor = with_rows[(inverse + by).clamp(0, len(with_rows) - 1)]
    return found


def _with_others(rows: SlotRows, fcs: tuple[str, ...], whose: _Whose) -> SlotRows:
    """Each row by an expert of its own and the other one's weights."""
    order, _, _ = sorted_rows(rows.local, rows.call.experts.num_experts)
    own = rows.local.flatten()[order]
    return by_two_experts(
        rows, order, own, whose(own), lambda name: name.startswith(fcs) and name.endswith(_NAMES)
    )
