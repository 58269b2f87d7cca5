"""Which columns of the activation GEMM2 got where: solved block by block, as its weights are known.

GEMM2 adds up what each block of its weights gives with a block of the activation. For every pair of blocks it is
known how like the kernel's output that is; the likeliest pairs are taken, what they give is subtracted, and so again.
What is found has to give the output of every token up to roundings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mxfp4ref._words import shortened
from mxfp4ref.conformance.families.places import stage_before_gemm2
from mxfp4ref.conformance.families.sampled import Sample
from mxfp4ref.conformance.findings.finding import Evidence
from mxfp4ref.conformance.findings.index_words import map_words, moved_runs
from mxfp4ref.model.call import MoeCall

__all__ = ["column_map"]

_LOUD, _QUIET = 4.0, 1.6  # times the roundings: before, and when explained
_FEWEST = 4  # tokens
_BLOCKS = (32, 16, 8, 4)  # columns that stay together
_PERIODS = (4, 8, 16, 32, 64)  # columns after which the order repeats
_SWEEPS = 6
_LISTED = 6
_SIZE = 1 << 25  # weights of all rows


@dataclass(frozen=True)
class _Token:
    """In units of the roundings, with the routing weights.

    Attributes:
        second: `[n, H, I]`, GEMM2's weights.
        squares: `[n, I]`, of its columns.
        activation: `[n, I]`, the right one.
        target: `[H]`, the kernel's row.
    """

    second: Tensor
    squares: Tensor
    activation: Tensor
    target: Tensor


def column_map(call: MoeCall, some: Sequence[Sample]) -> Evidence | None:
    """What follows, if GEMM2 has the activation's columns in another order, the same in all rows.

    Args:
        call: the right one.
        some: tokens that are wrong.
    """
    loud = [s for s in some if s.loudness > _LOUD]
    inner = call.experts.intermediate_size
    if len(loud) < _FEWEST or sum(s.second.numel() for s in loud) > _SIZE:
        return None
    units = [s.roundings.sqrt() for s in loud]
    second = [s.second * s.weights[:, None, None] / u[:, None] for s, u in zip(loud, units, strict=True)]
    tokens = [
        _Token(w, w.square().sum(1), s.activation, s.error / u + torch.einsum("nhi,ni->h", w, s.activation))
        for s, u, w in zip(loud, units, second, strict=True)
    ]
    for size, inside in (*((size, False) for size in _BLOCKS), *((size, True) for size in _PERIODS)):
        if inner % size or inner == size or (found := _solved(tokens, size, inside=inside)) is None:
            continue
        words = f"in each {size} {_listed(found, 1)}" if inside else _in_words(found, size)
        return Evidence.of_kind(
            (stage_before_gemm2(call), "fc2"),
            f"the activation that GEMM2 got has its columns {_how(found)}",
            f"{words}; as GEMM1's columns or the activation are stored, or as GEMM2 reads them or its codes along K",
            4,
        )
    return None


def _how(found: Tensor) -> str:
    """Whether each is there once."""
    return (
        "in another order"
        if len(torch.unique(found)) == len(found)
        else "at other places, some of them twice"
    )


def _solved(tokens: Sequence[_Token], size: int, *, inside: bool) -> Tensor | None:
    """For each block of columns the one that is there, `[B] int64`; None if that does not explain all tokens.

    If `inside`, for each column of a block, in all blocks alike.
    """

    def parted(values: Tensor) -> Tensor:
        """`[n, I]` to `[n, B, size]`."""
        blocks: Tensor = values.unflatten(-1, (-1, size))  # type: ignore[no-untyped-call]
        return blocks.transpose(-1, -2) if inside else blocks

    def taken(values: Tensor) -> Tensor:
        """With the columns that were found."""
        blocks = parted(values)[:, found]
        return (blocks.transpose(-1, -2) if inside else blocks).flatten(-2)

    # Columns of the weights are nearly at right angles: what a block gives has the squares of what its columns give.
    powers = torch.stack(
        [torch.einsum("nbs,ncs->bc", parted(t.squares), parted(t.activation.square())) for t in tokens]
    ).sum(0)
    own = torch.arange(len(powers))
    found, before, most = own, torch.full_like(own, -1), torch.inf
    for _ in range(_SWEEPS):
        rests = [t.target - torch.einsum("nhi,ni->h", t.second, taken(t.activation)) for t in tokens]
        left = sum(float(rest.square().sum()) for rest in rests)
        if torch.equal(found, before) or left > most:
            break
        before, most = found, left
        likeness = torch.zeros_like(powers)
        for t, rest in zip(tokens, rests, strict=True):
            back = torch.einsum("nhi,h->ni", t.second, rest)
            back += t.squares * taken(t.activation)  # which is in the rest no more
            likeness += torch.einsum("nbs,ncs->bc", parted(back), parted(t.activation))
        found = (2 * likeness - powers).argmax(1)  # by which the squares of what is left are less
    else:
        return None
    quiet = all(float(rest.square().mean().sqrt()) <= _QUIET for rest in rests)
    return found if quiet and not torch.equal(found, own) else None


def _in_words(found: Tensor, size: int) -> str:
    if rule := map_words(found, f"block of {size}", len(found)):
        return rule
    return _listed(found, size)


def _listed(found: Tensor, size: int) -> str:
    told = (
        f"{_columns(first, last, size)} are those of {_columns(other, other + last - first, size)}"
        for first, last, other in moved_runs(found.tolist())
    )
    return f"columns {shortened(told, _LISTED)}"


def _columns(first: int, last: int, size: int) -> str:
    start, stop = first * size, last * size + size - 1
    return str(start) if start == stop else f"{start} to {stop}"
