"""Hypotheses on the weighted sum, the routing weights, the fc2 bias, and what becomes of the output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypotheses.recurrences import recurrences
from mxfp4ref.conformance.families.hypothesis import (
    Change,
    Hypothesis,
    Pipeline,
    SlotRows,
    of_slots,
    of_sum,
)
from mxfp4ref.conformance.number_formats import NUMBER_FORMATS
from mxfp4ref.defects.finalize import activation_weighted
from mxfp4ref.defects.variants.finalize import FinalizeVariant
from mxfp4ref.defects.variants.rounding import bf16, keep
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90 import fp32

__all__ = ["mul", "weighing", "weight_hypotheses"]

_F = ("finalize",)
_Weigh = Callable[[Tensor, Tensor], Tensor]  # weights [M, k] and local experts to other weights


def mul(a: Tensor, b: Tensor) -> Tensor:
    # Not by `torch.broadcast_shapes`, which imports sympy: that takes a second in each process.
    return fp32.mul(*torch.broadcast_tensors(a, b))  # type: ignore[no-untyped-call]


def _total(weights: Tensor, local: Tensor) -> Tensor:
    total = torch.zeros_like(weights[:, :1])
    for slot in range(weights.shape[1]):
        total = fp32.add(total, weights[:, slot : slot + 1].contiguous())
    return total


def _plain_total(weights: Tensor) -> Tensor:
    """What each token's weights add up to; the factor they were multiplied by, if near."""
    total = weights.sum(1, keepdim=True)
    factor = total.round(decimals=4)
    return torch.where((factor - total).abs() <= 2.0**-20 * total, factor, total)


def _weights() -> Iterator[tuple[str, _Weigh, float]]:
    yield "not applied (all taken as 1)", lambda w, _: torch.ones_like(w), 1
    yield "applied twice (squared)", lambda w, _: mul(w, w), 1
    yield "applied as their square roots", lambda w, _: w.sqrt(), 1.4
    yield "divided by their sum", lambda w, e: w / _total(w, e), 1.1
    yield (
        "divided by their sum over this rank's slots",
        lambda w, e: w / torch.where(e >= 0, w, 0.0).sum(1, keepdim=True),
        1.2,
    )
    yield (
        "normalised over this rank's slots instead of all of a token's",
        lambda w, e: w / torch.where(e >= 0, w, 0.0).sum(1, keepdim=True) * _plain_total(w),
        1.2,
    )
    yield "put through a softmax again", lambda w, _: torch.softmax(w, 1), 1.2
    yield "taken as 1 / k", lambda w, _: torch.full_like(w, 1 / w.shape[1]), 1.1
    yield "their mean", lambda w, _: w.mean(1, keepdim=True).expand_as(w).contiguous(), 1.3
    yield "multiplied by k", lambda w, _: w * w.shape[1], 1.2
    yield "divided by k", lambda w, _: w / w.shape[1], 1.2
    yield "replaced by their reciprocals", lambda w, _: 1 / w, 1.5
    yield "put through a sigmoid", lambda w, _: torch.sigmoid(w), 1.5
    yield "taken without sign", lambda w, _: w.abs(), 1.2
    yield "of the opposite sign", lambda w, _: -w, 1.2
    yield "cut off at 1", lambda w, _: w.clamp(max=1), 1.3
    for number, (words, rounded) in enumerate(NUMBER_FORMATS.items()):
        yield words, lambda w, _, rounded=rounded: rounded(w), 1.05 + 0.05 * number
    yield (
        "indexed by the expert's number instead of the slot's",
        lambda w, e: w.gather(1, e.clamp(min=0) % w.shape[1]),
        1.3,
    )


def weighing(words: str, change: _Weigh, cost: float, family: str = "routing weights") -> Hypothesis:
    def on(rows: SlotRows) -> SlotRows:
        return replace(rows, weights=change(rows.weights, rows.local).to(torch.float32))

    return of_slots(family, _F, words, on, cost)


def _bias_use() -> Iterator[tuple[str, Callable[..., Tensor], float]]:
    """What becomes of a slot: words, (sum, weight, y, bias) to the next sum."""
    add, fma, mul = fp32.add, fp32.fma, fp32.mul
    yield "the fc2 bias is added twice", lambda a, w, y, b: fma(w, add(add(y, b), b), a), 1
    yield "the fc2 bias is subtracted", lambda a, w, y, b: fma(w, add(y, -b), a), 1.2
    yield "the fc2 bias is added without the routing weight", lambda a, w, y, b: add(fma(w, y, a), b), 1
    yield "the fc2 bias gets the routing weight twice", lambda a, w, y, b: fma(w, add(y, mul(w, b)), a), 1.3
    yield "the fc2 bias alone gets the routing weight", lambda a, w, y, b: add(a, fma(w, b, y)), 1.3


def _row_weight(again: bool) -> Change:
    """The routing weight multiplied into the input, and 1 or itself afterwards."""

    def on(pipeline: Pipeline) -> Pipeline:
        def run(inside: Pipeline) -> Tensor:
            call, weights = inside.call, inside.call.token_final_scales
            x = fp32.widen(call.input)[:, None].expand(-1, call.top_k, -1)
            rows = SlotRows.of(inside, fp32.to_bf16(mul(x, weights[..., None]).contiguous()))
            rows = rows if again else replace(rows, weights=torch.ones_like(weights))
            return rows.output(inside)

        return pipeline.computing(run)

    return on


def _activation_weight(pipeline: Pipeline) -> Pipeline:
    """The routing weight multiplied into the activation before its rounding, and again in the sum."""

    return pipeline.computing(lambda inside: inside.staging(activate=activation_weighted(inside.call)).run())


def _twice() -> Iterator[tuple[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]]]:
    """Where GEMM2's result may get the weight that it gets again: words, steps of the sum of what is not rounded."""
    add, fma, mul = fp32.add, fp32.fma, fp32.mul
    yield "before its rounding", lambda a, w, y, b: fma(w, add(bf16(mul(w, y)), b), a)
    yield (
        "after its rounding, and rounded once more",
        lambda a, w, y, b: fma(w, add(bf16(mul(w, bf16(y))), b), a),
    )
    yield "with its bias before its rounding", lambda a, w, y, b: fma(w, bf16(mul(w, add(y, b))), a)


def _sums() -> Iterator[tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor], float]]:
    """Other ways to make one row of a token's: words, (y [M, k, H], local, weights) to float32."""

    def products(y: Tensor, local: Tensor, w: Tensor) -> Tensor:
        product = mul(fp32.widen(y), w[..., None])
        return torch.where((local >= 0)[..., None], product, 0.0)

    def last(y: Tensor, local: Tensor, w: Tensor) -> Tensor:
        total = torch.zeros_like(fp32.widen(y[:, 0].contiguous()))
        for slot in range(local.shape[1]):
            total = torch.where(local[:, slot, None] >= 0, products(y, local, w)[:, slot], total)
        return total

    def first(y: Tensor, local: Tensor, w: Tensor) -> Tensor:
        return last(y.flip(1), local.flip(1), w.flip(1))

    yield "each slot overwrites the sum, so that only a token's last one counts", last, 1
    yield "only a token's first slot counts", first, 1.1
    yield (
        "the largest of the weighted rows is taken instead of their sum",
        lambda *a: products(*a).amax(1),
        1.5,
    )


def weight_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """Routing weights, the fc2 bias, and the sum."""
    for words, change, cost in _weights():
        yield weighing(f"the routing weights are {words}", change, cost)
    for again in (False, True):
        more = " and again in the sum" * again
        words = f"the routing weight is multiplied into GEMM1's input{more}"
        yield Hypothesis("routing weights", ("input", "finalize"), words, _row_weight(again), 1.1)
    for where, step in _twice():
        words = f"the routing weights are applied twice (squared): to GEMM2's result {where}, and again in the sum"
        stages = {"round_fc2": keep, "finalize": FinalizeVariant(step)}
        yield Hypothesis(
            "routing weights", ("fc2", "finalize"), words, lambda p, s=stages: p.staging(**s), 1.1
        )
    words = "the routing weights are applied twice (squared): to the activation and again in the sum"
    yield Hypothesis("routing weights", ("activation", "finalize"), words, _activation_weight, 1.15)
    if call.experts.fc2_biases is not None and call.tp_rank == 0:
        for words, step, cost in _bias_use():
            yield of_sum("fc2 bias", _F, words, FinalizeVariant(step), cost)
        words = "the fc2 bias is added for a token's first slot only"
        yield of_sum("fc2 bias", _F, words, _with_bias_once, 1.3)
    if call.experts.fc2_biases is not None and call.tp_rank > 0:
        yield Hypothesis(
            "fc2 bias",
            _F,
            "the fc2 bias is added on every tensor-parallel rank",
            lambda p: p.calling(tp_rank=0),
            1,
        )
    if call.experts.fc2_biases is not None and call.tp_size > 1:
        for words, change in (
            ("divided by tp_size", lambda b, n: (b.float() / n).to(b.dtype)),
            ("added on another rank than 0", lambda b, n: torch.zeros_like(b)),
        ):
            yield Hypothesis(
                "fc2 bias",
                _F,
                f"the fc2 bias is {words}",
                lambda p, c=change: p.having(fc2_biases=c(p.call.experts.fc2_biases, p.call.tp_size)),
                1.2,
            )
    if call.experts.fc2_biases is not None and call.tp_rank == 0:
        top_k = call.top_k
        for words, factor in (
            (("divided by top-k", 1 / top_k), ("multiplied by top-k", top_k)) if top_k > 1 else ()
        ):
            yield Hypothesis(
                "fc2 bias",
                _F,
                f"the fc2 bias is {words}, {top_k}",
                lambda p, f=factor: p.having(
                    fc2_biases=(p.call.experts.fc2_biases.float() * f).to(torch.bfloat16)
                ),
                1.2,
            )
    yield from recurrences()
    for words, total, cost in _sums():
        yield of_sum("sum of slots", _F, words, lambda y, e, w, b, t=total: t(_biased(y, e, b), e, w), cost)


def _biased(y: Tensor, local: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else fp32.add(fp32.widen(y), fp32.widen(bias[local.clamp(min=0)]))


def _with_bias_once(y: Tensor, local: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    first = (local >= 0).to(torch.int8).argmax(1, keepdim=True)
    acc = torch.zeros_like(fp32.widen(y[:, 0].contiguous()))
    both = _biased(y, local, bias)
    for slot in range(local.shape[1]):
        row = torch.where(first == slot, both[:, slot], fp32.widen(y[:, slot].contiguous()))
        acc = torch.where(local[:, slot, None] >= 0, fp32.fma(w[:, slot, None].expand_as(row), row, acc), acc)
    return acc
