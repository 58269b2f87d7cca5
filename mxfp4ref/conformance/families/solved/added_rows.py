"""Rows that have another token's row added to them, as where accumulators or the output are not cleared: solved."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref.conformance.families.distances import last_place
from mxfp4ref.conformance.findings.finding import Evidence
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90.fp32 import bf16_to_fp64

__all__ = ["added_rows"]

_FEWEST, _MOST = 2, 256  # rows that are looked at
_COLUMNS, _ROWS = 16, 8192
_ALIKE = 0.999  # the cosine of the angle between the error and a row
_OFF = 4.0  # units in the last place, of which the rest may be on average
_NEARLY_ALL = 0.9
_ONE = 2.0**-6  # that a factor is off 1 for


def added_rows(call: MoeCall, got: Tensor, want: Tensor, wrong: Tensor) -> Evidence | None:
    """What follows, if what is off in each row is another token's row: the right one, or the kernel's.

    Args:
        call: the call.
        got, want: `[M, H] bf16`.
        wrong: `[M, H] bool`.
    """
    tokens = wrong.any(1).nonzero().flatten()
    finite = (got.isfinite() & want.isfinite()).all(1)
    if not len(tokens) >= _FEWEST or got.shape[1] < _COLUMNS or len(got) > _ROWS or not finite[tokens].all():
        return None
    tokens = tokens[:: -(-len(tokens) // _MOST)]
    kernels, right = bf16_to_fp64(got.contiguous()), bf16_to_fp64(want.contiguous())
    error = kernels[tokens] - right[tokens]
    scale = (last_place(kernels) + last_place(right))[tokens]
    for rows, whose in ((right, "the right row of"), (kernels, "the row that the kernel gave for")):
        source = _sources(error, scale, rows, tokens)
        if source is None:
            continue
        chosen = source >= 0
        factors = (error * rows[source]).sum(1)[chosen] / rows[source].square().sum(1)[chosen]
        factor = float(factors.median())
        if float(((factors / factor - 1).abs() <= _ONE).double().mean()) < _NEARLY_ALL:
            continue
        times = "" if abs(factor - 1) <= _ONE else f"{factor:.4g} times "
        which = _in_words(tokens[chosen], source[chosen], whose, times)
        return Evidence.of_kind(
            ("finalize", "slots"),
            "rows of the output have another token's whole row added to their own",
            f"{which}; as where accumulators, or the output's memory, are not cleared and begin with an earlier sum",
            3,
        )
    return None


def _sources(error: Tensor, scale: Tensor, rows: Tensor, tokens: Tensor) -> Tensor | None:
    """For each token whose row its error is, `[T]`, -1 for few; None if not for nearly all."""
    alike = (_unit(error) @ _unit(rows).T).abs() > _ALIKE
    alike[torch.arange(len(tokens)), tokens] = (
        False  # which is a factor on its own row, or where nothing was right
    )
    if not bool(alike.any(1).double().mean() >= _NEARLY_ALL):
        return None
    # Of several rows that are alike, the one at the distance that most tokens have.
    distances = tokens[:, None] - torch.arange(len(rows))
    values, counts = torch.unique(distances[alike], return_counts=True)
    frequency = torch.zeros(2 * len(rows) + 1, dtype=torch.int64)
    frequency[values + len(rows)] = counts
    source: Tensor = torch.where(alike, frequency[distances + len(rows)], -1).argmax(1)
    fitted = (
        rows[source]
        * ((error * rows[source]).sum(1) / rows[source].square().sum(1).clamp(min=1e-300))[:, None]
    )
    units = last_place(rows)[source] + scale
    rest = ((error - fitted).abs() / units).mean(1)
    known = alike.any(1) & (rest <= _OFF)
    return torch.where(known, source, -1) if float(known.double().mean()) >= _NEARLY_ALL else None


def _unit(rows: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / length.clamp(min=1e-300)


def _in_words(tokens: Tensor, source: Tensor, whose: str, times: str) -> str:
    """Which row each token has: of a distance, one for all, or the first of them."""
    distance = torch.unique(tokens - source)
    first = f"token {int(tokens[0])} has token {int(source[0])}'s"
    if len(distance) == 1:
        n = int(distance)
        where = f"{abs(n)} {'before' if n > 0 else 'after'} it"
        return f"each of them, from token {int(tokens[0])} on, begins with {times}{whose} the token {where} ({first})"
    if len(torch.unique(source)) == 1:
        return f"each of them begins with {times}{whose} token {int(source[0])}"
    some = ", ".join(
        f"token {t} with token {s}'s" for t, s in zip(tokens[:4].tolist(), source[:4].tolist(), strict=True)
    )
    return f"they begin with {times}{whose} another token: {some}"
