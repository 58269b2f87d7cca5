"""K groups of GEMM2 that count otherwise than once in one tile of its output: solved from the tile's errors.

Where an expert's rows are wrong in some block of columns only, what is before GEMM2 is right, as it would show in all
columns. Each K group's contribution to such a tile is known, and the tile has more elements than there are K groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypothesis import Pipeline
from mxfp4ref.conformance.families.sampled import Sample, samples
from mxfp4ref.conformance.families.slot_kinds import position_in_expert
from mxfp4ref.conformance.families.solved.solved_weights import unsure_of
from mxfp4ref.conformance.findings.finding import Evidence
from mxfp4ref.formats.mxfp4 import GROUP_SIZE

__all__ = ["tile_sums"]

_COLUMNS = (16, 32, 64, 128, 256)
_FEWEST = 3  # rows of a tile
_LOUD, _QUIET = 4.0, 1.3  # times the roundings: of the errors before, and of what the K groups leave
_DETERMINED = 0.1  # of a K group's count


def tile_sums(pipeline: Pipeline, got: Tensor, wrong: Tensor, local: Tensor) -> Evidence | None:
    """Which K groups count how often in which tile, if all errors are explained by one tile of one expert.

    Args:
        pipeline: the right one.
        got: `[M, H] bf16`.
        wrong: `[M, H] bool`.
        local: `[M, k]`, the rank's expert of each slot, -1 for none.
    """
    tokens, columns = wrong.any(1), wrong.any(0).nonzero().flatten()
    hidden = wrong.shape[1]
    if int(tokens.sum()) < _FEWEST or 2 * len(columns) > hidden or bool(tokens.all()):
        return None
    size = next((s for s in _COLUMNS if int(columns[0]) // s == int(columns[-1]) // s), hidden)
    if size == hidden:
        return None
    first = int(columns[0]) // size * size
    position, _ = position_in_expert(local)
    for expert in sorted(set(local[tokens].flatten().tolist()) - {-1}):
        mine = local == expert
        if not bool(mine.any(1)[tokens].all()):
            continue
        rows = position[mine & tokens[:, None]]
        low, high = int(rows.min()), int(rows.max())
        if high - low + 1 != len(rows):  # others of its rows are right
            continue
        some = samples(pipeline, got, wrong, local)
        if not some or len(some[0].error) != hidden or len(some) < _FEWEST:
            return None
        counts = _counts(some, expert, slice(first, min(first + size, hidden)))
        if counts is None:
            continue
        number = expert + pipeline.call.ep_rank * pipeline.call.experts.num_experts
        return _told(
            counts, f"rows {low} to {high} of expert {number}", f"columns {first} to {first + size - 1}"
        )
    return None


def _counts(some: list[Sample], expert: int, columns: slice) -> Tensor | None:
    """How often each K group counts in the tile, NaN where that is not determined; None if they do not explain it."""
    parts, errors, noises = [], [], []
    for sample in some:
        slot = int((sample.experts == expert).nonzero()[0])
        products = sample.weights[slot] * sample.second[slot, columns] * sample.activation[slot]
        parts.append(products.reshape(len(products), -1, GROUP_SIZE).sum(2))
        errors.append(sample.error[columns])
        noises.append(sample.noise[columns].sqrt())
    noise = torch.cat(noises)
    groups, error = torch.cat(parts) / noise[:, None], torch.cat(errors) / noise
    if len(error) < 4 * groups.shape[1] or float(error.square().mean().sqrt()) < _LOUD:
        return None
    solution = torch.linalg.lstsq(groups, error[:, None], driver="gelsd").solution[:, 0]
    if float((error - groups @ solution).square().mean().sqrt()) > _QUIET:
        return None
    unsure = unsure_of(groups.T, torch.ones_like(error))
    counts: Tensor = torch.where(unsure < _DETERMINED, 1 + solution, torch.nan)
    return counts


def _told(counts: Tensor, rows: str, columns: str) -> Evidence | None:
    off = ((counts - 1).abs() > _DETERMINED).nonzero().flatten().tolist()  # none where it is NaN
    if not off:
        return None
    groups = [f"group {g} (K {g * GROUP_SIZE} to {g * GROUP_SIZE + GROUP_SIZE - 1})" for g in off]
    values = [float(counts[g]) for g in off]
    if max(values) - min(values) <= _DETERMINED:
        mean = sum(values) / len(values)
        word = {0: "not (zero)", 2: "twice", 3: "three times"}.get(round(mean), "")
        often = word if word and abs(mean - round(mean)) <= _DETERMINED else f"{mean:.3g} times"
        run = off[-1] - off[0] + 1 == len(off) > 2
        which = f"K groups {off[0]} to {off[-1]} of {len(counts)}" if run else f"K {', '.join(groups[:6])}"
        details = f"{which}{', ...' * (not run and len(off) > 6)} count {often}"
    else:
        listed = ", ".join(f"{g} {v:.3g} times" for g, v in zip(groups[:6], values[:6], strict=True))
        details = f"K {listed}{', ...' * (len(off) > 6)}"
    kind = "in a single tile of GEMM2's output some K groups do not count once"
    return Evidence.of_kind(
        ("fc2",),
        kind,
        f"in {rows}, {columns}: {details}; all else is right, as where partial sums are added up",
        3,
    )
