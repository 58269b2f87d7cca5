"""Hypotheses on what goes from stage to stage as FP8, int8 or FP4: with a scale for each block, row or tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mxfp4ref.conformance.families.decodings import TYPES
from mxfp4ref.conformance.families.hypothesis import Hypothesis, Pipeline
from mxfp4ref.conformance.families.roundings import PLACES
from mxfp4ref.conformance.reduction import is_heavy
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import trace
from mxfp4ref.sm90 import fp32

__all__ = ["quantised_hypotheses"]

_BLOCKS = (128, 32, 64, 16)
_Change = Callable[
    [Tensor, Tensor], Tensor
]  # of float32 numbers, and the largest magnitude of what shares a scale
_SCALES: tuple[tuple[str, Callable[[Tensor, float], Tensor]], ...] = (
    ("that is their largest magnitude divided by {most:g}", lambda largest, most: largest / most),
    ("that is a power of two, rounded up", lambda largest, most: _power(largest / most, up=True)),
    (
        "that is a power of two, as MX formats have it",
        lambda largest, most: _power(largest, up=False) / 2.0 ** int(math.log2(most)),
    ),
)


def _power(values: Tensor, *, up: bool) -> Tensor:
    fraction, exponent = torch.frexp(values)
    return torch.ldexp(torch.ones_like(values), exponent - ((fraction == 0.5).int() if up else 1))


def _changes(span: str) -> Iterator[tuple[str, _Change, float]]:
    for name, most, rounded in TYPES:
        for rank, (scaled, scale) in enumerate(_SCALES):

            def change(
                x: Tensor,
                largest: Tensor,
                most: float = most,
                rounded: Callable[[Tensor], Tensor] = rounded,
                scale: Callable[[Tensor, float], Tensor] = scale,
            ) -> Tensor:
                step = scale(largest, most)
                step = torch.where((step > 0) & step.isfinite(), step, 1.0)
                codes = x / step
                return rounded(torch.where(codes.isfinite(), codes.clamp(-most, most), codes)) * step

            yield (
                f"quantised to {name} and back, with one scale for {span} {scaled.format(most=most)}",
                change,
                1.25 + 0.05 * rank,
            )


def quantised_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """The input, a GEMM's output, the activation or the output, quantised and dequantised to bf16."""
    for span, size in (*((f"each {n}", n) for n in _BLOCKS), ("each row", 0)):
        for how, change, cost in _changes(span):

            def by_block(x: Tensor, n: int = size, change: _Change = change) -> Tensor:
                blocks = x.view(*x.shape[:-1], -1, n or x.shape[-1])
                return change(blocks, blocks.abs().amax(-1, keepdim=True)).view_as(x)

            yield _of_input(how, lambda p, c=by_block: c, cost)
            for stage, whose, stages in PLACES:
                yield _of_stage(stage, stages[:1], f"{whose} {how}", lambda p, c=by_block: c, cost)
    if is_heavy(call):
        return
    whole = _Whole(call)
    for how, change, cost in _changes("the whole tensor"):
        for which, of in enumerate((_of_input, _of_activation)):

            def by_tensor(
                p: Pipeline, change: _Change = change, which: int = which
            ) -> Callable[[Tensor], Tensor]:
                largest = whole.largest(p.call)[which]
                return lambda x: change(x, largest)

            yield of(how, by_tensor, cost)


def _of_input(how: str, change: Callable[[Pipeline], Callable[[Tensor], Tensor]], cost: float) -> Hypothesis:
    def on(p: Pipeline) -> Pipeline:
        return p.calling(input=fp32.to_bf16(change(p)(fp32.widen(p.call.input))))

    return Hypothesis("rounding", ("input",), f"the input is {how}", on, cost)


def _of_activation(
    how: str, change: Callable[[Pipeline], Callable[[Tensor], Tensor]], cost: float
) -> Hypothesis:
    return _of_stage("round_activation", ("activation",), f"the activation is {how}", change, cost)


def _of_stage(
    stage: str,
    stages: tuple[str, ...],
    words: str,
    change: Callable[[Pipeline], Callable[[Tensor], Tensor]],
    cost: float,
) -> Hypothesis:
    def on(p: Pipeline) -> Pipeline:
        way = change(p)
        return p.staging(**{stage: lambda x: fp32.to_bf16(way(x))})

    return Hypothesis("rounding", stages, words, on, cost)


class _Whole:
    """The largest numbers of a call's input and activation, for those of its tokens too that are taken alone."""

    def __init__(self, call: MoeCall) -> None:
        self.call = call
        self.known: tuple[Tensor, ...] = ()

    def largest(self, call: MoeCall) -> tuple[Tensor, ...]:
        if not bool((call.input[:, None] == self.call.input).all(2).any(1).all()):
            return _largest(call)
        self.known = self.known or _largest(self.call)
        return self.known


def _largest(call: MoeCall) -> tuple[Tensor, ...]:
    return tuple(fp32.widen(t.contiguous()).abs().max() for t in (call.input, trace(call).activation))
