"""Hypotheses on rows, columns and values of what lies between the stages, and on one factor on all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypotheses.index_maps import (
    block_maps,
    expert_maps,
    neighbour_maps,
    padded_maps,
    taken,
)
from mxfp4ref.conformance.families.hypotheses.weighting import mul, weighing
from mxfp4ref.conformance.families.hypothesis import Change, Hypothesis, of_output
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90 import fp32

__all__ = ["factor_hypotheses", "inner_hypotheses", "input_factor_hypotheses", "output_hypotheses"]

_F = ("finalize",)


def factor_hypotheses(factor: float) -> Iterator[Hypothesis]:
    """One factor on everything, at each place where it could be."""
    of = f"a factor of {factor:.9g} too many on"

    def scaled(t: Tensor) -> Tensor:
        return mul(fp32.widen(t), torch.tensor(factor, dtype=torch.float32, device=t.device))

    def after(t: Tensor) -> Tensor:
        return fp32.to_bf16(scaled(t))

    yield replace(weighing(f"{of} the routing weights", lambda w, _: scaled(w), 1.1, "factor"), factor=factor)
    places: tuple[tuple[str, tuple[str, ...], Change, float], ...] = (
        # Another rounding may follow.
        ("the sum, before its rounding to bf16", _F, lambda p: p.behind("finalize", scaled), 1.2),
        ("the bf16 output", _F, lambda p: p.then(after), 1.2),
        (
            "GEMM2's result, before its rounding to bf16",
            ("fc2", "finalize"),
            lambda p: p.before("round_fc2", scaled),
            1.3,
        ),
        ("GEMM2's bf16 result", ("fc2", "finalize"), lambda p: p.behind("round_fc2", after), 1.4),
        (
            "the activation, before its rounding to bf16",
            ("activation", "fc2"),
            lambda p: p.before("round_activation", scaled),
            1.4,
        ),
        ("the bf16 activation", ("activation", "fc2"), lambda p: p.behind("round_activation", after), 1.5),
    )
    for place, stages, change, cost in places:
        of_output = after if place == "the bf16 output" else None
        yield Hypothesis("factor", stages, f"{of} {place}", change, cost, of_output=of_output, factor=factor)


def input_factor_hypotheses() -> Iterator[Hypothesis]:
    """A factor on the input, or on GEMM1's result, which the activation bends."""
    for factor in (2.0, 0.5, 4.0, 0.25, 8.0, 0.125, -1.0, 3.0, 1 / 3, 6.0, 1 / 6, 10.0, 0.1):

        def scaled(t: Tensor, f: float = factor) -> Tensor:
            return mul(fp32.widen(t), torch.tensor(f, dtype=torch.float32, device=t.device))

        of = f"a factor of {factor:.6g}"
        yield Hypothesis(
            "factor",
            ("input", "fc1"),
            f"{of} too many on the input",
            lambda p, s=scaled: p.calling(input=fp32.to_bf16(s(p.call.input))),
            1.3,
            factor=factor,
        )
        yield Hypothesis(
            "factor",
            ("fc1",),
            f"{of} too many on GEMM1's result",
            lambda p, s=scaled: p.before("round_fc1", s),
            1.4,
            factor=factor,
        )


def _tokens() -> Iterator[tuple[str, Callable[[Tensor], Tensor], float]]:
    """Rows of a matrix `[M, H]` that are others: words, the change."""
    for axis in expert_maps():
        yield (
            f"the rows are those of {axis.of('token')}",
            lambda t, a=axis: t[a.index(len(t)).to(t.device)],
            axis.cost,
        )
    yield "the last token's row is zero", lambda t: torch.cat((t[:-1], torch.zeros_like(t[-1:]))), 1.2
    yield "the first token's row is zero", lambda t: torch.cat((torch.zeros_like(t[:1]), t[1:])), 1.3
    yield "the last token's row is that of the one before", lambda t: torch.cat((t[:-1], t[-2:-1])), 1.4
    for count in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096):
        yield (
            f"the rows of tokens from {count} on are zero",
            lambda t, c=count: torch.cat((t[:c], torch.zeros_like(t[c:]))),
            1.5,
        )
        yield (
            f"the rows of the last tokens that fill no block of {count} are zero",
            lambda t, c=count: torch.cat((t[: len(t) // c * c], torch.zeros_like(t[len(t) // c * c :]))),
            1.6,
        )
    yield "the previous token's row is added", lambda t: (t.float() + t.float().roll(1, 0)).to(t.dtype), 1.5
    yield (
        "rows add up over the tokens (accumulators are not cleared)",
        lambda t: t.float().cumsum(0).to(t.dtype),
        1.5,
    )


def _columns() -> Iterator[tuple[str, Callable[[Tensor], Tensor], float]]:
    for axis in (*neighbour_maps(), *block_maps(), *padded_maps()):
        yield (
            f"the columns are those of {axis.of('column')}",
            lambda t, a=axis: taken(t, 1, a.index(t.shape[1])),
            axis.cost,
        )
    for count in (1, 8, 16, 32, 64, 128):
        yield (
            f"the last {count} columns are zero",
            lambda t, c=count: torch.cat((t[:, :-c], torch.zeros_like(t[:, -c:])), 1),
            1.4,
        )
    for size in (16, 32, 64, 128, 256, 512):
        yield (
            f"the columns are rotated, each block of {size} by a Hadamard matrix",
            lambda t, n=size: _rotated(t, n),
            1.3,
        )
    yield (
        "the second half of the columns is zero",
        lambda t: torch.cat((t[:, : t.shape[1] // 2], torch.zeros_like(t[:, t.shape[1] // 2 :])), 1),
        1.3,
    )


def _rotated(t: Tensor, size: int) -> Tensor:
    """Each block of columns times a Hadamard matrix, whose rows have length 1."""
    parts, step = t.double().reshape(len(t), -1, size), 1
    while step < size:
        one, other = parts.reshape(len(t), -1, size // (2 * step), 2, step).unbind(3)
        parts, step = torch.stack((one + other, one - other), 3), 2 * step
    found: Tensor = (parts * size**-0.5).reshape(t.shape).float().to(t.dtype)
    return found


def _values() -> Iterator[tuple[str, Callable[[Tensor], Tensor], float]]:
    yield "everything is zero", torch.zeros_like, 0.9
    yield "NaN is zero", lambda t: torch.where(t.isnan(), 0.0, t), 1.1
    yield "NaN and infinities are zero", lambda t: torch.where(t.isfinite(), t, 0.0), 1.1
    yield "NaN is zero and infinities the largest numbers", lambda t: torch.nan_to_num(t), 1.1
    yield "infinities are the largest numbers", lambda t: torch.where(t.isinf(), torch.nan_to_num(t), t), 1.2
    yield "infinities are NaN", lambda t: torch.where(t.isinf(), torch.nan, t), 1.2
    yield "negative numbers are zero", lambda t: t.clamp(min=0), 1.3
    yield "signs are dropped", torch.abs, 1.3
    yield "everything is cut off at the largest float16 number, 65504", lambda t: t.clamp(-65504, 65504), 1.2
    yield (
        "everything beyond the largest float16 number is infinite",
        lambda t: (
            t.to(torch.float16)
            .isinf()
            .logical_and(t.isfinite())
            .to(t.dtype)
            .mul(torch.inf)
            .nan_to_num(0, torch.inf)
            .copysign(t)
            .where(t.abs() > 65504, t)
        ),
        1.4,
    )
    yield (
        "subnormal numbers are zero",
        lambda t: torch.where((t.view(torch.int16) & 0x7F80) == 0, t * 0, t),
        1.1,
    )
    yield "-0 is +0", lambda t: torch.where(t == 0, 0.0, t), 1.1
    for words, normalised in _normalised():
        yield f"each row is normalised again: divided by {words}", normalised, 1.2
    yield "everything is added to itself (written twice)", lambda t: t + t, 1.1


def _normalised() -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Rows over their size, where they are numbers."""

    def over(size: Callable[[Tensor], Tensor], *, centred: bool = False) -> Callable[[Tensor], Tensor]:
        def on(t: Tensor) -> Tensor:
            x = t.float()
            known = x.nan_to_num(0, 0, 0)
            middle = known.mean(1, keepdim=True) if centred else 0.0
            return torch.where(x.isfinite(), (x - middle) / size(known - middle), x).to(t.dtype)

        return on

    def rms(x: Tensor) -> Tensor:
        return x.square().mean(1, keepdim=True).sqrt() + 1e-6

    yield "its root mean square (RMSNorm)", over(rms)
    yield "its length", over(lambda x: x.norm(dim=1, keepdim=True) + 1e-6)
    yield "its standard deviation, less its mean (LayerNorm)", over(rms, centred=True)
    yield "its largest magnitude", over(lambda x: x.abs().amax(1, keepdim=True) + 1e-6)


def output_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """The output, the input and the rows between them, taken from another place or written over."""
    # GEMM2's rows are the output's columns, GEMM1's K the input's.
    # Rows of other tokens are what other rows of the input give, too, where these are routed alike.
    for changes, stages in ((_tokens, (*_F, "input")), (_columns, ("fc2", "finalize")), (_values, _F)):
        for words, change, cost in changes():
            found = of_output("output", stages, f"in the output {words}", change, cost + 0.2)
            yield replace(found, across_tokens=changes is _tokens)
    for changes, stages in ((_tokens, ("input",)), (_columns, ("input", "fc1")), (_values, ("input",))):
        for words, change, cost in changes():
            left_out = changes is _columns and "zero" in words
            in_gemm1 = words.replace("columns are", "of K are").replace("zero", "left out")
            yield Hypothesis(
                "input",
                stages,
                f"in the input {words}" + f", or in GEMM1 {in_gemm1}" * left_out,
                lambda p, c=change: p.calling(input=c(p.call.input)),
                cost + 0.2,
                across_tokens=changes is _tokens,
            )


def _not_cleared(t: Tensor, size: int, *, every: bool) -> Tensor:
    tiles = [t[:, start : start + size] for start in range(0, t.shape[1], size)]
    if len(tiles) < 2:
        raise ValueError("size: expected one of which there are several tiles")
    made = tiles[:1]
    for before, tile in pairwise(tiles):
        start = (made[-1] if every else before)[:, : tile.shape[1]].contiguous()
        made.append(fp32.add(tile.contiguous(), start))
    return torch.cat(made, 1)


def inner_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """Columns between the stages taken from another place."""
    for words, change, cost in _columns():
        if "zero" in words:
            continue
        for family, where, stage, stages, more in (
            ("GEMM2's input", "the activation", "round_activation", ("fc2", "activation"), 0.8),
            ("GEMM2's output", "GEMM2's output", "round_fc2", ("fc2",), 0.8),
            ("GEMM1's output", "GEMM1's output", "round_fc1", ("fc1", "activation"), 0.9),
        ):
            yield Hypothesis(
                family,
                stages,
                f"in {where} {words}",
                lambda p, s=stage, c=change: p.behind(s, c),
                cost + more,
            )
    for size in (8, 16, 32, 64, 128, 256):
        for every, words, cost in ((False, "the tile before", 1.6), (True, "all tiles before", 1.7)):
            yield Hypothesis(
                "GEMM2's output",
                ("fc2",),
                f"GEMM2's accumulators are not cleared: a tile of {size} columns starts from those of {words}",
                lambda p, s=size, e=every: p.before(
                    "round_fc2", lambda t: _not_cleared(fp32.widen(t), s, every=e)
                ),
                cost,
            )
