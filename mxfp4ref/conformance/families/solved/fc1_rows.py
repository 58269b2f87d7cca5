"""Which rows of fc1 stand where, solved block by block: of up and of gate each, the same for all experts.

What GEMM1 gives with each row is known, and so is what any two blocks of them give as up and gate. For every pair it
is known how like the kernel's output that is where GEMM2 has some block of K; the likeliest pairs are taken, what
they give is subtracted, and so again. What is found has to give the output of every token up to roundings.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mxfp4ref._words import shortened
from mxfp4ref.conformance.families.hypothesis import Pipeline
from mxfp4ref.conformance.families.sampled import Sample
from mxfp4ref.conformance.findings.finding import Evidence
from mxfp4ref.conformance.findings.index_words import map_words, moved_runs
from mxfp4ref.sm90 import fp32

__all__ = ["fc1_rows"]

_LOUD, _QUIET = 4.0, 1.6  # times the roundings: before, and when explained
_FEWEST, _MOST = 4, 16  # tokens
_BLOCKS = (16, 8, 4)  # rows that stay together
_SWEEPS = 6
_BETTER = 0.85  # of what is left, that one sweep may leave
_NUMBERS = 1 << 22  # that all pairs of blocks may give
_LISTED = 6


def fc1_rows(pipeline: Pipeline, some: Sequence[Sample]) -> Evidence | None:
    """What follows, if rows of fc1 stand at other places, with their scales and with or without their bias.

    Args:
        pipeline: the right one.
        some: tokens that are wrong.
    """
    call = pipeline.call
    loud = [s for s in some if s.loudness > _LOUD]
    loud = loud[:: max(len(loud) // _MOST, 1)][:_MOST]
    if len(loud) < _FEWEST or not call.experts.gated:
        return None
    inner = call.experts.intermediate_size
    rows = _Rows(pipeline, loud)
    for size in _BLOCKS:
        numbers = (2 * inner // size) ** 2 * size * len(rows.expert)
        fewer = loud[:: -(-numbers // _NUMBERS)]  # all have to be explained by what these give
        if inner % size or inner == size or len(fewer) < _FEWEST:
            continue
        found = _Rows(pipeline, fewer).solved(size)
        up, gate = found.chunk(2)
        columns = torch.equal(
            gate, up + inner // size
        )  # with the biases, columns of the activation are moved
        for biases in (True, False) if call.experts.fc1_biases is not None else (True,):
            if not (biases and columns) and rows.left(_each(found, size), biases=biases) <= _QUIET:
                whole = (
                    ", scales and biases" if biases and call.experts.fc1_biases is not None else " and scales"
                )
                unmoved = ", the biases stay" * (not biases)
                return Evidence.of_kind(
                    ("fc1",),
                    f"rows of fc1 (weights{whole}) stand at other places{unmoved}, the same in all experts",
                    f"{_in_words(found, size)}, of {2 * inner} rows [up; gate]; or GEMM1's columns are stored so; "
                    "GEMM2 and the sum are right",
                    4,
                )
    return None


def _each(found: Tensor, size: int) -> Tensor:
    """For each row the one that is there."""
    return (found[:, None] * size + torch.arange(size)).flatten()


def _in_words(found: Tensor, size: int) -> str:
    rows = _each(found, size)
    for shards in (2, 4, 8, 16):
        if len(rows) % (2 * shards) == 0:
            joined = torch.arange(len(rows)).view(2, shards, -1).transpose(0, 1).flatten()
            if torch.equal(rows, joined):
                return f"joined shard by shard [up; gate; up; gate; ...], of {shards} shards"
    if rule := map_words(found, f"block of {size} rows", len(found)):
        return rule
    told = (
        f"{_span(first, last, size)} are {_span(other, other + last - first, size)}"
        for first, last, other in moved_runs(found.tolist())
    )
    return shortened(told, _LISTED)


def _span(first: int, last: int, size: int) -> str:
    return f"rows {first * size} to {(last + 1) * size - 1}"


class _Rows:
    """The routed rows of some tokens, `[R, ...]`; numbers are in units of the roundings."""

    def __init__(self, pipeline: Pipeline, loud: Sequence[Sample]) -> None:
        self.pipeline = pipeline
        self.expert = torch.cat([s.experts for s in loud])
        self.sample = torch.arange(len(loud)).repeat_interleave(torch.tensor([len(s.experts) for s in loud]))
        self.fc1 = torch.cat([torch.cat((s.up, s.gate), 1) for s in loud]).float()
        units = torch.stack([s.roundings.sqrt() for s in loud])
        self.second = torch.cat([s.second * s.weights[:, None, None] for s in loud])
        self.second = (self.second / units[self.sample][..., None]).float()  # [R, H, I]
        right = torch.cat([s.activation for s in loud]).float()
        self.target = (torch.stack([s.error for s in loud]) / units).float() + self._output(right)

    def _output(self, activation: Tensor) -> Tensor:
        """Of each token, `[S, H]`, for activations `[R, I]`."""
        of_rows = torch.einsum("rhi,ri->rh", self.second, activation)
        return of_rows.new_zeros(int(self.sample[-1]) + 1, of_rows.shape[1]).index_add_(
            0, self.sample, of_rows
        )

    def _activated(self, fc1: Tensor) -> Tensor:
        """For `[R, 2n]` with their bias `[R, n]`, as GEMM2 gets them."""
        call, stages = self.pipeline.call, self.pipeline.stages
        given = [getattr(call.experts, name) for name in call.activation.defaults]
        parameters = [None if p is None else p[self.expert][:, None] for p in given]
        return fp32.widen(stages.round_activation(stages.activate(call.activation, fc1, None, parameters)))

    def left(self, rows: Tensor, *, biases: bool) -> float:
        """What is left of the most wrong token where fc1 has these rows, with their biases or without."""
        fc1 = self.fc1[:, rows]
        if not biases:
            own = fp32.widen(self.pipeline.call.experts.fc1_biases[self.expert])  # type: ignore[index]
            fc1 = fc1 - own[:, rows] + own
        rest = self.target - self._output(self._activated(fc1.contiguous()))
        return float(rest.square().mean(1).sqrt().max())

    def solved(self, size: int) -> Tensor:
        """For each block of rows the one that seems to be there, `[2 I / size]`."""
        blocks = self.fc1.unflatten(1, (-1, size))  # type: ignore[no-untyped-call]
        count, half = blocks.shape[1], blocks.shape[1] // 2
        one, other = torch.arange(count).repeat_interleave(count), torch.arange(count).repeat(count)
        pairs = torch.cat((blocks[:, one].flatten(1), blocks[:, other].flatten(1)), 1)
        given = self._activated(pairs).view(len(pairs), -1, size)  # [R, pairs, size]
        parted = self.second.unflatten(2, (-1, size))  # type: ignore[no-untyped-call]
        weight = parted.square().sum(1)
        powers = torch.einsum("rbs,rps->bp", weight, given.square())
        own = torch.arange(half) * count + torch.arange(half) + half
        found, before = own, torch.inf
        for _ in range(_SWEEPS):
            taken = given[:, found]
            rest = self.target - self._output(taken.flatten(1))
            left = float(rest.square().mean())
            back = torch.einsum("rhbs,rh->rbs", parted, rest[self.sample])
            likeness = torch.einsum("rbs,rps->bp", back, given)
            # What the pair that is there gives is in the rest no more.
            likeness += torch.einsum("rbs,rbs,rps->bp", weight, taken, given)
            best = (2 * likeness - powers).argmax(1)
            if torch.equal(best, found) or left > before / _BETTER:
                break
            found, before = best, left
        return torch.cat((found // count, found % count))
