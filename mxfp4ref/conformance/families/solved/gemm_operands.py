"""The two GEMMs of a layer as sums over K groups of products, of which each may have other operands.

What a GEMM adds up is known: weights, their scales, and its input. Of each change of a K group's operands it is told
what the sums become, and, which takes far less time, how much it would mend of an error, by the derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypotheses.index_maps import shifted
from mxfp4ref.conformance.families.hypothesis import Pipeline
from mxfp4ref.conformance.families.places import stage_before_gemm2
from mxfp4ref.formats.mxfp4 import GROUP_SIZE, dequantize
from mxfp4ref.model.forward import activate_rows, trace
from mxfp4ref.sm90 import fp32

__all__ = ["LOST", "TWICE", "Change", "Gemm", "Source", "block_of", "gained_by", "gemms"]

_STEPS = (1, 2, 4, 8, 16, 32, 64, 128)
_BLOCK = 64  # rows of the weights that may be concerned alone


@dataclass(frozen=True)
class Source:
    """What a K group may have instead of its own operands.

    Attributes:
        what: "weights", their "scales", the "input", or all "operands"; or that it is "left out", or counts "twice".
        along: what `by` counts: "K" groups, "rows" of the weights or of the sorted input, "tokens", or "experts"; or
            "expert", whose number it is.
        by: how far further on.
    """

    what: str
    along: str = ""
    by: int = 0


@dataclass(frozen=True)
class Change:
    """K groups, from the first to the last, of some of the GEMM's columns that have another operand."""

    source: Source
    first: int
    last: int
    part: str


LOST, TWICE = Source("left out"), Source("twice")


@dataclass(frozen=True)
class Gemm:
    """One of the GEMMs of R rows, which are sorted by expert.

    Attributes:
        name: "GEMM1" or "GEMM2".
        reads: what its input is.
        stages: of a change of its weights, and of its input.
        weights, codes: `[E, N, G, 32] float32`, with and without scales.
        scales: `[E, N, G]`.
        x: `[R, G, 32]`, its input.
        of_tokens: `[M, G, 32]`, that of all tokens, where it is theirs; else without any.
        token, slot, weight: `[R]`, and the routing weights, float64.
        expert: `[R]`.
        output: of the numbers of rows and their accumulators `[r, N]` what they add to the output, `[r, H] float64`.
        slope: of these and of a derivative by that `[r, H]` the one by the accumulators.
        parts: columns in words, `[N] bool`; "" for all.
        first: the id of the rank's first expert.
    """

    name: str
    reads: str
    stages: tuple[tuple[str, ...], tuple[str, ...]]
    weights: Tensor
    codes: Tensor
    scales: Tensor
    x: Tensor
    of_tokens: Tensor
    token: Tensor
    slot: Tensor
    weight: Tensor
    expert: Tensor
    output: Callable[[Tensor, Tensor], Tensor]
    slope: Callable[[Tensor, Tensor, Tensor], Tensor]
    parts: dict[str, Tensor]
    first: int

    def right(self, rows: Tensor) -> Tensor:
        """What each K group adds to the accumulators, `[r, G, N]`."""
        return torch.einsum("rngs,rgs->rgn", self.weights[self.expert[rows]], self.x[rows])

    def products(self, rows: Tensor, source: Source, group: int, columns: slice) -> tuple[Tensor, Tensor]:
        """What a group adds to `n` columns with another operand, `[r, n]`, and of which rows there is one."""
        expert, at = self.expert[rows], group + source.by * (source.along == "K")
        other, there = expert, torch.ones(len(rows), dtype=torch.bool)
        x, of_weights = self.x[rows, group], source.what in ("weights", "operands")
        if source.what in ("input", "operands"):
            inputs, there = self.others(rows, source)
            x = inputs[:, at]
        if of_weights or source.what == "scales":
            other, there_too = self.experts(rows, source)
            there = there & there_too
        number = torch.arange(self.weights.shape[1])
        at_row = (
            number if source.what == "input" or source.along != "rows" else shifted(len(number), source.by)
        )
        at_row = at_row[columns]
        if source.what == "scales":
            codes = self.codes[expert, columns, group]
            weights = codes * self.scales[other[:, None], at_row, at][..., None]
        else:
            weights = self.weights[other[:, None], at_row, at if of_weights else group]
        factor = {"left out": 0, "twice": 2}.get(source.what, 1)
        return factor * torch.einsum("rns,rs->rn", weights, x), there

    def others(self, rows: Tensor, source: Source) -> tuple[Tensor, Tensor]:
        """The input that rows have instead, `[r, G, 32]`, and which do."""
        table = self.of_tokens if source.along == "tokens" else self.x
        at = (self.token[rows] if source.along == "tokens" else rows) + source.by * (source.along != "K")
        there = (at >= 0) & (at < len(table))
        return table[at.clamp(0, len(table) - 1)], there

    def experts(self, rows: Tensor, source: Source) -> tuple[Tensor, Tensor]:
        """Whose weights or scales rows have, `[r] int64`, and which there are."""
        own, last = self.expert[rows], len(self.weights) - 1
        if source.along not in ("expert", "experts"):
            return own, torch.ones(len(rows), dtype=torch.bool)
        other = own + source.by if source.along == "experts" else torch.full_like(own, source.by)
        return other.clamp(0, last), (other >= 0) & (other <= last) & (other != own)

    def sources(self) -> Iterator[Source]:
        groups, count = self.x.shape[1], len(self.weights)
        yield from (LOST, TWICE)
        for by in (by for by in range(1 - groups, groups) if by):
            yield from (Source(what, "K", by) for what in ("input", "weights", "scales", "operands"))
        for by in (sign * step for step in _STEPS for sign in (1, -1)):
            yield Source("input", "rows", by)
            if abs(by) < len(self.of_tokens):
                yield Source("input", "tokens", by)
            if abs(by) < self.weights.shape[1]:
                yield from (Source(what, "rows", by) for what in ("weights", "scales"))
        for what in ("weights", "scales"):
            yield from (Source(what, "expert", number) for number in range(count))
            yield from (Source(what, "experts", by) for by in range(1 - count, count) if by)


def _split(values: Tensor, axis: int, size: int) -> Tensor:
    """An axis as two, the second of this size."""
    found: Tensor = values.unflatten(axis, (-1, size))  # type: ignore[no-untyped-call]
    return found


def block_of(columns: Tensor) -> int:
    return _BLOCK if len(columns) % _BLOCK == 0 else len(columns)


def gained_by(
    gemm: Gemm, rows: Tensor, now: Tensor, slope: Tensor
) -> Iterator[tuple[Source, Tensor, Tensor]]:
    """For each source by how much a group of each block of columns would mend, `[r, B, G]`, and for which rows.

    As a change that only takes something away or repeats it is smaller than one that does both, it counts for more.
    """
    groups, size = gemm.x.shape[1], block_of(slope[0])

    def blocks(values: Tensor) -> Tensor:
        """`[..., N, G]` to `[..., B, G]`."""
        summed: Tensor = _split(values, -2, size).sum(-2)
        return summed

    expert, x = gemm.expert[rows], gemm.x[rows]
    by_columns = slope[:, :, None]
    current = blocks(by_columns * now.transpose(1, 2))
    everywhere = torch.ones(len(rows), dtype=torch.bool)
    parted = _split(slope, 1, size)
    towards = torch.einsum("rbn,ebngs->rebgs", parted, _split(gemm.weights, 1, size))
    own = towards[torch.arange(len(rows)), expert]
    pairs = torch.einsum("rbcs,rgs->rbcg", own, x)
    unscaled, scales = torch.einsum("rngs,rgs->rng", gemm.codes[expert], x), gemm.scales[expert]
    bare, unsloped = unscaled * by_columns, unscaled * scales
    right = unsloped * by_columns
    of_expert = torch.einsum("rebgs,rgs->rebg", towards, x)
    of_scales = torch.stack([blocks(bare * gemm.scales[e]) for e in range(len(gemm.scales))], 1)
    for source in gemm.sources():
        gained, there = current.clone(), everywhere
        start, length = max(0, -source.by), groups - abs(source.by)
        inside = slice(start, start + length) if source.along == "K" else slice(None)
        if source.what in ("left out", "twice"):
            gained = 2**0.5 * (2 * blocks(right) * (source.what == "twice") - current) + current
        elif source.along == "K" and source.what == "scales":
            gained[..., inside] = blocks(bare[..., inside] * scales[..., start + source.by :][..., :length])
        elif source.along == "K" and source.what == "operands":
            gained[..., inside] = blocks(right)[..., start + source.by :][..., :length]
        elif source.along == "K":
            gained[..., inside] = pairs.diagonal(source.by if source.what == "input" else -source.by, 2, 3)
        elif source.what == "input":
            inputs, there = gemm.others(rows, source)
            gained = torch.einsum("rbgs,rgs->rbg", own, inputs)
        elif source.along == "rows":
            at_row = shifted(scales.shape[1], source.by)
            moved = unsloped[:, at_row] * by_columns if source.what == "weights" else bare * scales[:, at_row]
            gained = blocks(moved)
        else:
            other, there = gemm.experts(rows, source)
            gained = (of_expert if source.what == "weights" else of_scales)[torch.arange(len(rows)), other]
        yield source, gained - current, there


def gemms(pipeline: Pipeline) -> Iterator[Gemm]:
    """GEMM2, then GEMM1."""
    call, experts, stages = pipeline.call, pipeline.call.experts, pipeline.stages
    rows = trace(call)
    assert experts.fc1_scales is not None
    assert experts.fc2_scales is not None

    def weights(packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ones = torch.full_like(scales, 127)
        both = (dequantize(packed, by, convention="sm90", dtype=torch.float32) for by in (scales, ones))
        factors = (scales.view(torch.uint8).float() - 127).exp2()
        scaled, codes = (_split(t, 2, GROUP_SIZE) for t in both)
        return scaled, codes, factors

    def grouped(values: Tensor) -> Tensor:
        return _split(fp32.widen(values.contiguous()), 1, GROUP_SIZE)

    def parts(size: int, halves: bool) -> dict[str, Tensor]:
        at = torch.arange(size)
        found = {"": at >= 0}
        if halves:
            found |= {" of up": at < size // 2, " of gate": at >= size // 2}
        if size % _BLOCK == 0 and size > _BLOCK:
            found |= {
                f"rows {n} to {n + _BLOCK - 1}": at // _BLOCK * _BLOCK == n for n in range(0, size, _BLOCK)
            }
        return found

    routed = rows.token, rows.slot, call.token_final_scales[rows.token, rows.slot].double()
    second = weights(experts.fc2_weights, experts.fc2_scales)

    def after_first(at: Tensor, sums: Tensor) -> Tensor:
        rounded = stages.round_fc1(sums.float())
        values = stages.round_activation(activate_rows(call, rounded, rows.expert[at], stages.activate))
        return torch.einsum("rhi,ri->rh", dense[rows.expert[at]], fp32.widen(values).double())

    def slope_of_first(at: Tensor, sums: Tensor, back: Tensor) -> Tensor:
        inner = torch.einsum("rhi,rh->ri", dense[rows.expert[at]], back)
        step = sums.square().mean().sqrt() * 2.0**-4
        found = []
        for half in range(2 if experts.gated else 1):
            ends = []
            here = torch.arange(sums.shape[1]) // inner.shape[1] == half
            for sign in (1, -1):
                moved = sums + sign * step * here
                rounded = stages.round_fc1(moved.float())
                value = activate_rows(call, rounded, rows.expert[at], stages.activate).double()
                ends.append((value, fp32.widen(rounded).double()[:, here]))
            (high, top), (low, bottom) = ends
            found.append(inner * (high - low) / (top - bottom).clamp(min=1e-300))
        return torch.cat(found, 1)

    first = call.ep_rank * experts.num_experts
    yield Gemm(
        "GEMM2",
        "the activation",
        (("fc2",), (stage_before_gemm2(call), "fc2")),
        *second,
        grouped(rows.activation),
        rows.activation.new_zeros(0),
        *routed,
        rows.expert,
        lambda at, sums: sums,
        lambda at, sums, back: back,
        parts(experts.hidden_size, False),
        first,
    )
    dense = second[0].flatten(2).double()
    yield Gemm(
        "GEMM1",
        "the input",
        (("fc1",), ("input", "fc1")),
        *weights(experts.fc1_weights, experts.fc1_scales),
        grouped(call.input[rows.token]),
        grouped(call.input),
        *routed,
        rows.expert,
        after_first,
        slope_of_first,
        parts(experts.gemm_shapes[0][0], experts.gated),
        first,
    )
