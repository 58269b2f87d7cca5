"""Whether terms of the weighted sum are missing, or count twice, in blocks of columns: sums that are not atomic.

That a term is missing says no more than that its row is zero there. So blocks are told only of rows of which others
are right, and not where all that is missing is small: GEMM2 or what is before it may have lost that by underflow.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from mxfp4ref.conformance.families.distances import last_place, may_underflow, solvable
from mxfp4ref.conformance.families.hypothesis import Pipeline, slot_outputs
from mxfp4ref.conformance.findings.finding import Evidence
from mxfp4ref.sm90 import fp32

__all__ = ["lost_terms"]

_SIZES = (128, 64, 32, 16, 8)
_LOUD, _QUIET = 4.0, 1.6  # times the roundings: before, and when explained
_FEWEST = 4  # blocks
_MOST = 0.7  # of all blocks
_EXPLAINED = 0.9  # of the loud blocks
_PARTLY = 0.5  # of the rows with missing terms, of which some blocks have theirs


def lost_terms(
    pipeline: Pipeline, got: Tensor, want: Tensor, wrong: Tensor, local: Tensor
) -> Evidence | None:
    """What follows, if nearly all blocks that are off lack a slot's term, or two, or have it twice."""
    call = pipeline.call
    rows = (wrong.any(1) & (got.isfinite() & want.isfinite()).all(1)).nonzero().flatten()
    if len(rows) < 2 or float(wrong[rows].float().mean()) > _MOST:
        return None
    y = fp32.widen(slot_outputs(pipeline)[rows].contiguous()).double()
    if call.experts.fc2_biases is not None and call.tp_rank == 0:
        y = y + fp32.widen(call.experts.fc2_biases[local[rows].clamp(min=0)].contiguous()).double()
    weights = torch.where(local[rows] >= 0, call.token_final_scales[rows], 0.0).double()
    terms = y * weights[..., None]
    right = fp32.widen(want[rows].contiguous()).double()
    error = fp32.widen(got[rows].contiguous()).double() - right
    noise = (((last_place(y) * weights[..., None]).square().sum(1) + last_place(right).square()) / 6).sqrt()
    if not bool(terms.isfinite().all()) or not solvable(right):
        return None
    for size in _SIZES:
        if call.experts.hidden_size % size or size == call.experts.hidden_size:
            continue
        loud = (error / noise).view(len(rows), -1, size).square().mean(2).sqrt() > _LOUD
        count = int(loud.sum())
        if count < _FEWEST or count > _MOST * loud.numel() or int(loud.any(1).sum()) < 2:
            continue
        found = _explained(error, terms, noise, loud, size)
        if found is not None and _by_block(found, y, weights, size) and _by_row(found, local[rows]):
            return _told(pipeline, rows, local, found, count, size)
    return None


_Found = list[tuple[int, int, tuple[int, ...], bool]]  # row, block, slots, whether twice


def _explained(error: Tensor, terms: Tensor, noise: Tensor, loud: Tensor, size: int) -> _Found | None:
    found: _Found = []
    slots = range(terms.shape[1])
    chosen = [c for n in (1, 2) for c in itertools.combinations(slots, n)]
    places = loud.nonzero().tolist()
    for row, block in places:
        part = slice(block * size, (block + 1) * size)
        sums = torch.stack([terms[row, list(c), part].sum(0) for c in chosen])
        both = torch.cat((error[row, part] + sums, error[row, part] - sums)) / noise[row, part]
        loudness = both.square().mean(1).sqrt()
        best = int(loudness.argmin())
        if float(loudness[best]) <= _QUIET:
            found.append((row, block, chosen[best % len(chosen)], best >= len(chosen)))
    return found if len(found) >= _EXPLAINED * len(places) else None


def _by_block(found: _Found, y: Tensor, weights: Tensor, size: int) -> bool:
    """Whether it is blocks that decide which terms are missing, not their rows, nor how small they are."""
    blocks = y.view(*y.shape[:2], -1, size).square().mean(3).sqrt()  # [rows, slots, blocks]
    lost = torch.zeros_like(blocks, dtype=torch.bool)
    for row, block, slots, _ in found:
        lost[row, list(slots), block] = True
    kept = ~lost & (weights != 0)[..., None]
    rows = lost.any(2)
    partly = float((rows & kept.any(2)).sum()) >= _PARTLY * float(rows.sum())
    return partly and (any(twice for *_, twice in found) or not may_underflow(blocks[lost], blocks[kept]))


def _by_row(found: _Found, local: Tensor) -> bool:
    """Whether an expert's terms are missing in a block of some of its rows only: in all, its weights may be it."""
    lost: dict[tuple[int, int], int] = {}
    for row, block, slots, _ in found:
        for slot in slots:
            key = int(local[row, slot]), block
            lost[key] = lost.get(key, 0) + 1
    rows = local.flatten()[local.flatten() >= 0].bincount()
    return 2 * sum(count < int(rows[expert]) for (expert, _), count in lost.items()) > len(lost)


def _told(pipeline: Pipeline, rows: Tensor, local: Tensor, found: _Found, count: int, size: int) -> Evidence:
    first = pipeline.call.ep_rank * pipeline.call.experts.num_experts
    listed = []
    for row, block, slots, twice in found[:3]:
        token = int(rows[row])
        experts = ", ".join(str(int(local[token, slot]) + first) for slot in slots)
        columns = f"columns {block * size} to {block * size + size - 1}"
        listed.append(
            f"token {token} {'has' if twice else 'lacks'} expert {experts}{' twice' * twice} in {columns}"
        )
    kinds = {twice for *_, twice in found}
    how = (
        "are missing or added twice"
        if len(kinds) == 2
        else "are added twice"
        if True in kinds
        else "are missing"
    )
    return Evidence(
        ("slots", "finalize"),
        f"single slots' terms {how} in {count} blocks of {size} columns, and all else is right, as where sums are "
        f"neither atomic nor waited for: {'; '.join(listed)}",
        3,
        kind=f"single slots' terms {how} in blocks of {size} columns",
    )
