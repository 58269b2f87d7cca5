"""What the rows of an output prove of GEMM2 and of the activation that it got: linear equations, solved.

An output row is the right one plus what another activation, or other K groups, add to it. There are as many equations
as output columns, so that a few slots' activations, a few of their columns, or factors of K groups can be told, as
far as the roundings to bf16 allow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mxfp4ref._words import shortened
from mxfp4ref.conformance.families.distances import solvable
from mxfp4ref.conformance.families.hypothesis import Pipeline
from mxfp4ref.conformance.families.places import suspected_experts
from mxfp4ref.conformance.families.solved.known_factors import factor_in_words
from mxfp4ref.conformance.families.solved.solved_weights import unsure_of
from mxfp4ref.conformance.findings.finding import Evidence
from mxfp4ref.conformance.findings.reach import passes_factors
from mxfp4ref.formats.mxfp4 import GROUP_SIZE, dequantize
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import trace
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.activation import up_and_gate

__all__ = ["second_gemm"]

_SIZE = 1 << 22  # elements of a system of equations
_ROUNDING = 2.0**-9  # of bf16, relative, of each slot's row and of the sum
_ZERO = 2.0**-5  # times that a K group counts
_ALIKE = 2.0**-5  # of a factor, that slots may differ by
_MARGIN = 1.6  # over the expected length of the rounding errors
_MOVED = 8  # times, that numbers in other places are further from the right ones than sorted numbers are
_SIGMAS = 6.0  # of a solved number's standard deviation: more is no chance
_THOSE_ROWS = (
    "it is in those rows of GEMM1 (weights, scales, bias), in the activation, or GEMM2 reads those of K wrongly (a "
    "stale tile, or another row's)"
)
_FEWEST, _TOGETHER = 5, 0.5  # wrong columns of one row; the part of any row's that each has
_SMOOTH, _ROUGH = 0.6, 0.85  # of neighbours' differences, as a share of any two's
_NEAR = 0.25  # standard deviations of up and gate, up to which the nearest number of a row is a neighbour


@dataclass(frozen=True)
class _System:
    """One token's equations, `H` of them.

    Attributes:
        columns: `[h, n, I] float64`, GEMM2's weights times the routing weight, for n suspected slots, of the h output
            columns of which they are not all zero.
        rest: `[h]`, the kernel's row less the right one.
        noise: `[h]`, the standard deviation of the roundings in it.
        right, up, gate: `[n, I]`, the right activation and GEMM1's output.
        slots: the n slots.
    """

    columns: Tensor
    rest: Tensor
    noise: Tensor
    right: Tensor
    up: Tensor
    gate: Tensor
    slots: tuple[int, ...]

    def explained(self, chosen: Tensor) -> tuple[bool, Tensor]:
        """Whether a sum of the columns of `chosen [H, m]` is the rest up to roundings, and the factors."""
        weighted = chosen / self.noise[:, None]
        lengths = weighted.norm(dim=0).clamp(min=1e-300)
        solution = torch.linalg.lstsq(
            weighted / lengths, (self.rest / self.noise)[:, None], driver="gelsd"
        ).solution
        left = self.rest / self.noise - (weighted / lengths) @ solution[:, 0]
        free = max(len(self.rest) - chosen.shape[1], 1)
        return float(left.norm()) <= _MARGIN * free**0.5, solution[:, 0] / lengths


def second_gemm(
    pipeline: Pipeline, got: Tensor, wrong: Tensor, local: Tensor, tokens: list[int]
) -> Iterator[Evidence]:
    """What follows, if anything does.

    Args:
        pipeline: the right one.
        got, wrong: `[M, H]`, the output and where it differs.
        local: `[M, k]`, the local experts.
        tokens: wrong ones, whose numbers are finite.
    """
    if not pipeline.call.experts.tactics_show:
        return
    suspects = suspected_experts(pipeline.call, local, wrong.any(1))
    only = None if suspects is None else suspects.among(pipeline.call, local)
    systems = [s for t in tokens if (s := _system(pipeline, got, local, t, only)) is not None]
    systems = [s for s in systems if float((s.rest / s.noise).norm()) > 3 * len(s.rest) ** 0.5]
    if not systems:
        return
    of_expert = "" if suspects is None else f" of {suspects.words}"
    if (found := _groups(pipeline.call, systems, of_expert)) is not None:
        yield found
        return
    small = [s for s in systems if s.columns[0].numel() * 4 <= 3 * len(s.rest)]
    if small:
        solved = [s.explained(s.columns.flatten(1)) for s in small]
        if all(fits for fits, _ in solved):
            if (found := _of_activation(small, [delta for _, delta in solved], of_expert)) is not None:
                yield found
        elif not any(fits for fits, _ in solved):
            yield Evidence(
                (),
                f"no activation{of_expert} gives this output by the right GEMM2: foreign slots, GEMM2's weights or "
                "scales, what comes after, or noise",
                1,
            )
        return
    if (block := _block(systems)) is not None:
        part = slice(block[0], block[1] + 1)
        inside = [s.explained(s.columns[:, :, part].flatten(1))[1].view(len(s.slots), -1) for s in systems]
        right = torch.cat([s.right[:, part] for s in systems])
        where = f" in its columns {block[0]} to {block[1]}"
        unsure = torch.cat([_unsure(s, part) for s in systems])
        change = torch.cat(inside)
        if not _alike_by_column(change.abs() > 5 * unsure + 0.02 * right.abs()):
            return  # single numbers, of which these columns have the largest
        if (moved := _rearranged(right, right + change, unsure, of_expert, where)) is not None:
            yield moved
            return
        kind = f"GEMM2 used an activation{of_expert} that is wrong{where}"
        yield replace(Evidence.of_kind(("fc1", "activation"), kind, _THOSE_ROWS, 3, block), hedged=True)


def _rearranged(
    right: Tensor, found: Tensor, unsure: Tensor, of_expert: str, where: str = ""
) -> Evidence | None:
    """Where GEMM2 got the right numbers in other places, each of them, or zeros, which its own K gives too."""
    size = float(right.square().mean().sqrt())
    zero = float(found.square().mean().sqrt()) < 0.05 * size
    if not zero and not _permuted(right, found, unsure):
        return None
    what = "zeros" if zero else "the right numbers in other places"
    stages = ("fc2", "activation") if zero else ()
    kind = f"the activation that GEMM2 got{of_expert} has {what}{where}"
    return Evidence.of_kind(stages, kind, "K of GEMM2, the activation's columns, or rows of GEMM1", 2)


def _alike_by_column(off: Tensor) -> bool:
    """Whether rows `[n, m]` are wrong in the same columns, or the only one in several."""
    rows, columns = off[off.any(1)], off.any(0)
    if len(rows) < 2:
        return int(columns.sum()) >= _FEWEST
    return float(rows[:, columns].double().mean()) > _TOGETHER


def _permuted(right: Tensor, found: Tensor, unsure: Tensor) -> bool:
    """Whether each row has the right one's numbers, as exactly as they are solved, in other places.

    Not where too few are distinct, or what is wrong is so little that they lie where they should about as well.
    """
    one, (other, order) = right.sort(1).values, found.sort(1)
    if float(unsure.square().mean().sqrt()) * _SIGMAS > float(right.square().mean().sqrt()) / 2:
        return False
    if any(len(row.unique()) <= len(row) // 2 for row in right):
        return False
    if bool(((found - right).abs().sum(1) < _MOVED * (one - other).abs().sum(1)).any()):
        return False
    return bool(((one - other).abs() <= _SIGMAS * unsure.gather(1, order) + 2.0**-7 * other.abs()).all())


def _system(
    pipeline: Pipeline, got: Tensor, local: Tensor, token: int, only: Tensor | None
) -> _System | None:
    call, experts = pipeline.call, pipeline.call.experts
    suspected = local[token] >= 0 if only is None else only[token]
    slots = suspected.nonzero().flatten()
    if not len(slots) or len(slots) * experts.intermediate_size * experts.hidden_size > 4 * _SIZE:
        return None
    chosen = experts.select(local[token, slots])
    assert chosen.fc2_scales is not None
    weights = call.token_final_scales[token].to(torch.float64)
    dense = dequantize(chosen.fc2_weights, chosen.fc2_scales, convention="sm90", dtype=torch.float32)
    columns = (dense.to(torch.float64) * weights[slots][:, None, None]).permute(1, 0, 2)
    one = trace(call.select(torch.tensor([token], device=got.device)))
    place = {int(slot): row for row, slot in enumerate(one.slot.tolist())}
    y = fp32.widen(one.fc2_output).to(torch.float64)
    if experts.fc2_biases is not None and call.tp_rank == 0:
        y = y + fp32.widen(experts.fc2_biases[one.expert]).to(torch.float64)
    parts = y * weights[one.slot][:, None]
    target = fp32.widen(got[token].contiguous()).to(torch.float64)
    largest = torch.maximum(parts.square().sum(0), target.square())
    noise = 0.8 * _ROUNDING * (largest + target.square()).sqrt()
    noise = noise + 2.0**-3 * noise.mean()
    rows = [place[int(slot)] for slot in slots]
    fc1 = fp32.widen(one.fc1_output[rows]).to(torch.float64)
    if chosen.fc1_biases is not None:
        fc1 = fc1 + fp32.widen(chosen.fc1_biases).to(torch.float64)
    up, gate = up_and_gate(fc1, gated=chosen.gated)
    right = fp32.widen(one.activation[rows]).to(torch.float64)
    if not all(bool(t.isfinite().all()) for t in (columns, target, parts, right, up, gate)):
        return None
    if not solvable(target):
        return None
    rest, said = target - parts.sum(0), columns.flatten(1).any(1)  # a row of zeros is no equation
    if float((rest / noise)[~said].norm()) > _MARGIN * float((~said).sum()) ** 0.5:
        return None
    return _System(columns[said], rest[said], noise[said], right, up, gate, tuple(slots.tolist()))


def _groups(call: MoeCall, systems: list[_System], of_expert: str) -> Evidence | None:
    """Whether K groups of the right activation count otherwise than once: each alike in all slots."""
    factors, unsures = [], []
    for system in systems:
        by_group = (system.columns * system.right).reshape(*system.columns.shape[:2], -1, GROUP_SIZE).sum(3)
        groups = by_group.shape[2]
        if by_group[0].numel() * 3 > len(system.rest):
            return None
        fits, solution = system.explained(by_group.flatten(1))
        if not fits:
            return None
        unsure = unsure_of(by_group.flatten(1).T, system.noise.square()).view(-1, groups)
        factors.append((1 + solution.view(-1, groups)).where(unsure < 0.05, torch.nan))
        unsures.append(unsure)
    factor, unsure = torch.cat(factors), torch.cat(unsures)
    mean = factor.nanmedian(0).values
    if bool(
        ((factor - mean).abs() > 2 * unsure + _ALIKE * mean.abs()).any()
    ):  # slots have factors of their own
        return None
    off = ((factor - 1).abs() > 0.1).sum(0) > 0.5 * (~factor.isnan()).sum(0)
    if not bool(off.any()):  # or not determined, as where experts cancel
        return None
    determined = mean[~mean.isnan()]
    if float(determined.abs().max()) < _ZERO:
        biased = call.experts.fc2_biases is not None and call.tp_rank == 0
        added = ", but for the fc2 bias" * biased
        whence = "or of an activation of zeros"
        whence += ", or slots left out of the sum" * (not biased)
        nothing = f"most slots{of_expert} of the tokens that were looked at add nothing{added}"
        rows = f"as if GEMM2's rows are zero: rows that are not computed, not written, {whence}"
        found = Evidence(("fc2", "activation") if biased else (), f"{nothing}, {rows}", 2)
        return replace(found, hedged=biased)
    if float(determined.max() - determined.min()) < 2.0**-5 * float(determined.abs().max()):
        known = "" if of_expert else factor_in_words(float(determined.mean()), [call], unsure=_ROUNDING)
        return Evidence.of_kind(
            ("fc2", "finalize"),
            f"everything{of_expert} counts {float(determined.mean()):.4g} times, as far as bf16 shows",
            "one factor on GEMM2's scales or result, on the routing weights, or in the "
            f"sum{'; ' * bool(known)}{known}",
            2,
        )
    chosen = off.nonzero().flatten().tolist()
    lost = all(abs(float(mean[g])) < _ZERO for g in chosen)
    told = (
        f"{g} (K {g * GROUP_SIZE} to {g * GROUP_SIZE + GROUP_SIZE - 1}) "
        + ("not at all" if abs(float(mean[g])) < _ZERO else f"{float(mean[g]):.3g} times")
        for g in chosen
    )
    kind = f"in GEMM2{of_expert} these K groups do not count once"
    if lost or passes_factors(call):
        what = "GEMM1 gives zeros" if lost else "GEMM1 gives so many times as much"
        whence = f"K of GEMM2, or columns of the activation, or {what} for them"
        return Evidence.of_kind((), kind, f"{shortened(told, 4)}; {whence}", 2)
    return Evidence.of_kind(("fc2", "activation"), kind, f"{shortened(told, 4)}; GEMM1 is right", 3)


def _block(systems: list[_System]) -> tuple[int, int] | None:
    """The smallest aligned block of the activation's columns whose change explains the output; as first, last."""
    inner = systems[0].columns.shape[2]
    for size in (8, 16, 32, 64):
        if size >= inner or len(systems[0].slots) * size * 3 > len(systems[0].rest):
            break
        for start in range(0, inner, size):
            parts = [s.columns[:, :, start : start + size].flatten(1) for s in systems]
            if any(
                int(part.any(1).sum()) < 3 * part.shape[1] for part in parts
            ):  # of which any error is a sum
                continue
            if all(s.explained(part)[0] for s, part in zip(systems, parts, strict=True)):
                return start, start + size - 1
    return None


def _of_activation(systems: list[_System], deltas: list[Tensor], of_expert: str) -> Evidence | None:
    """What the solved activation says: a few columns, another function of the same GEMM1, or another GEMM1.

    None where it is the right one, as far as it is known, or a multiple of it in each slot, as other routing weights
    give too.
    """
    found = torch.cat([(s.right + d.view_as(s.right)) for s, d in zip(systems, deltas, strict=True)])
    right = torch.cat([s.right for s in systems])
    unsure = torch.cat([_unsure(s) for s in systems])
    factors = (found * right).sum(1, keepdim=True) / right.square().sum(1, keepdim=True).clamp(min=1e-300)
    if bool(((found - factors * right).abs() <= _SIGMAS * unsure + 2.0**-7 * found.abs()).all()):
        return None
    if (moved := _rearranged(right, found, unsure, of_expert)) is not None:
        return moved
    off = (found - right).abs() > 5 * unsure + 0.02 * right.abs()
    columns = off.any(0).nonzero().flatten()
    inner = right.shape[1]
    if 0 < len(columns) <= inner // 2 and _alike_by_column(off):
        first, last = int(columns[0]), int(columns[-1])
        said = (right != 0).any(0)  # columns in which a mistake would show
        others = int(said.sum() - said[first : last + 1].sum())
        near = last - first + 1 <= max(1.5 * len(columns), 8) or len(columns) <= 4
        if near and others > len(columns) // 2:
            where = f"in its columns {first} to {last} of {inner}"
            kind = f"GEMM2 used an activation{of_expert} that is wrong {where}"
            there = Evidence.of_kind(("fc1", "activation"), kind, _THOSE_ROWS, 3, (first, last))
            return replace(there, hedged=True)
    points = torch.stack([torch.cat([getattr(s, n) for s in systems]).flatten() for n in ("up", "gate")], 1)
    points = (points - points.mean(0)) / (points.std(0) + 1e-30)
    row = torch.arange(right.numel()) // right.shape[1]  # each slot's expert has parameters of its own
    points = torch.cat((points, 1e6 * row[:, None].to(points)), 1)[:2048]
    nearest = (torch.cdist(points, points) + torch.eye(len(points), dtype=points.dtype) * 1e9).argmin(1)

    change = torch.where(off, found - right, 0.0).flatten()[:2048]
    shuffled = change[torch.randperm(len(change), generator=torch.Generator().manual_seed(0))]
    roughness = float((change - change[nearest]).abs().sum() / ((change - shuffled).abs().sum() + 1e-300))
    if roughness < _SMOOTH:
        return Evidence.of_kind(
            ("activation", "fc1"),
            f"GEMM2 is right, and the activation that it got{of_expert} is another function of the right GEMM1's "
            "output",
            "the formula, its parameters, the fc1 bias, or which of GEMM1's rows are gate and which up",
            3,
        )
    apart = (points - points[nearest]).norm(dim=1)
    if (
        roughness < _ROUGH
        or float((apart * change.abs()).sum() / change.abs().sum().clamp(min=1e-300)) > _NEAR
    ):
        kind = f"GEMM2 is right, and got another activation{of_expert}"
        return Evidence.of_kind(("activation", "fc1"), kind, "GEMM1 or the activation is wrong", 2)
    kind = f"GEMM2 used an activation{of_expert} that is no function of the right GEMM1's output"
    why = "GEMM1 (its weights' codes, scales or order) or its input is wrong, or GEMM2 reads other rows of it"
    known = 2 * unsure < 2.0**-9 * right.abs()
    kept = known & ((found - right).abs() <= 2.0**-8 * right.abs())
    if 4 * int(kept.sum()) > int(known.sum()):  # of another input all would be wrong
        why = "GEMM1, or single elements of the activation, which may read or overwrite others"
        return replace(Evidence.of_kind(("fc1", "activation"), kind, why, 2), hedged=True)
    return replace(Evidence.of_kind(("fc1", "input"), kind, why, 2), hedged=True)


def _unsure(system: _System, part: slice = slice(None)) -> Tensor:
    """Standard deviations of the solved activation, or of its part, `[n, I]`."""
    weighted = system.columns[:, :, part].flatten(1) / system.noise[:, None]
    covariance = torch.linalg.pinv(weighted.T @ weighted, hermitian=True)
    result: Tensor = covariance.diagonal().clamp(min=0).sqrt().view_as(system.right[:, part])
    return result
