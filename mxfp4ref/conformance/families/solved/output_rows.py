"""Rows of the output that are other tokens' rows, bit for bit: which, and by what rule."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.families.hypotheses.memory_readings import lying_at, sought_at
from mxfp4ref.conformance.findings.finding import Evidence
from mxfp4ref.conformance.findings.index_words import map_words

__all__ = ["another_stride", "rows_of_others"]

_STAGES = ("finalize", "input")
_KIND = "rows of the output are other tokens' rows"
_SHOWN = 4
_PADDINGS = range(8, 257, 8)  # elements between two rows in memory


def rows_of_others(got: Tensor, want: Tensor, rows: Tensor) -> Evidence | None:
    """What follows, if each of these rows, `[M] bool`, is another token's; `got` and `want` are `[M, H] bf16`.

    Rows of zeros or NaN are no evidence, as many tokens may have them; but a rule that gives all others has to give
    them.
    """
    place = {_bytes(row): token for token, row in enumerate(want)}
    telling = rows & (got.isfinite() & (got != 0)).any(1)
    tokens = telling.nonzero().flatten().tolist()
    pairs = [(token, place[key]) for token in tokens if (key := _bytes(got[token])) in place]
    if not pairs or len(pairs) < len(tokens):
        return None
    source = torch.tensor([other for _, other in pairs])
    rule = map_words(source, "token", len(want), of=torch.tensor(tokens)) if len(pairs) > 1 else ""
    others = rows & ~telling
    if bool(others.any()):
        by = {(other - token) % len(want) for token, other in pairs}
        if len(by) > 1 or bool(differing(got, want.roll(-by.pop(), 0)).any()):
            return None
    shown = ", ".join(f"token {t} has token {s}'s row" for t, s in pairs[:_SHOWN])
    return Evidence.of_kind(_STAGES, _KIND, f"{rule}{'; ' * bool(rule)}{shown}{_empty(want, tokens)}", 3)


def another_stride(got: Tensor, want: Tensor) -> Evidence | None:
    """Whether the output was written with one distance between its rows and read with another; both `[M, H] bf16`."""
    for padding in _PADDINGS:
        stride = want.shape[1] + padding
        for read, words in (
            (
                lying_at,
                f"lie {padding} elements further apart in memory than they are long, and are read as if dense",
            ),
            (sought_at, f"lie densely in memory, and are read as if {padding} elements further apart"),
        ):
            known = read(torch.ones_like(want), stride) != 0  # the rest is what memory held
            if not bool((differing(got, read(want, stride)) & known).any()):
                kind = "the output is read with another stride than it was written with"
                return Evidence.of_kind(("finalize",), kind, f"its rows {words}", 3)
    return None


def _empty(want: Tensor, tokens: list[int]) -> str:
    """That these are all tokens whose rows should be zero, as of those without an expert of this rank."""
    empty = (~want.any(1)).nonzero().flatten().tolist()
    if tokens != empty:
        return ""
    return "; they are the tokens whose rows should be zeros: not cleared, or what memory held before"


def _bytes(row: Tensor) -> bytes:
    return bytes(row.cpu().contiguous().view(torch.uint8).numpy())
