"""Hypotheses on roundings between the stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypothesis import Hypothesis, of_sum
from mxfp4ref.conformance.families.solved.slot_sums import slot_sum_hypotheses
from mxfp4ref.conformance.number_formats import nearest
from mxfp4ref.defects.variants.finalize import FinalizeVariant
from mxfp4ref.defects.variants.gemm import GemmVariant
from mxfp4ref.defects.variants.rounding import bf16, half
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90 import fp32

__all__ = ["PLACES", "rounding_hypotheses"]

_Round = Callable[[Tensor], Tensor]


def _upper(x: Tensor, added: int) -> Tensor:
    bits = torch.where(x.isnan(), fp32.BF16_NAN, (x.view(torch.int32) + added) >> 16)
    return bits.to(torch.int16).view(torch.bfloat16)


def _through(dtype: torch.dtype) -> _Round:
    return lambda x: fp32.to_bf16(x.to(dtype).to(torch.float32))


def _roundings() -> Iterator[tuple[str, _Round, float]]:
    """Of float32 to bf16."""
    yield "cut to bf16 instead of rounded", lambda x: _upper(x, 0), 1
    yield "rounded to bf16 with ties away from zero", lambda x: _upper(x, 0x8000), 1
    yield "rounded to float16 on the way", _through(torch.float16), 1
    yield (
        "cast to float16 and back once it is bf16: below 2^-17 bits are lost, below 2^-25 all, above 65504 it is Inf",
        lambda x: fp32.to_bf16(half(bf16(x))),
        1.1,
    )
    yield "rounded to float8 e4m3 on the way", _through(torch.float8_e4m3fn), 1.1
    yield (
        "cast to float8 e4m3 and back once it is bf16",
        lambda x: _through(torch.float8_e4m3fn)(bf16(x)),
        1.2,
    )
    yield "rounded to float8 e5m2 on the way", _through(torch.float8_e5m2), 1.2
    yield "cut to tf32 (10 bits of mantissa) on the way", lambda x: fp32.to_bf16(_cut(x, 13)), 1.2
    for bits in (10, 8, 9, 11, 12):
        name, cost = (
            ("tf32 (10 bits of mantissa", 1.1) if bits == 10 else (f"some type ({bits} bits of mantissa", 1.3)
        )
        for ties, way, more in (("away from zero", _away, 0.0), ("to even", nearest, 0.1)):
            yield (
                f"rounded to {name}, ties {ties}) on the way, and so rounded twice",
                lambda x, way=way, dropped=23 - bits: fp32.to_bf16(way(x, dropped)),
                cost + more,
            )
    yield "rounded away from zero", lambda x: _upper(x, 0xFFFF), 1.4
    yield "rounded down", lambda x: torch.where(x < 0, _upper(x, 0xFFFF), _upper(x, 0)), 1.4
    yield "rounded up", lambda x: torch.where(x < 0, _upper(x, 0), _upper(x, 0xFFFF)), 1.4
    yield "rounded to 7 bits (one bit of bf16 lost)", lambda x: fp32.to_bf16(nearest(x, 17)), 1.3
    yield (
        "with subnormal numbers as zeros",
        lambda x: fp32.to_bf16(torch.where(x.abs() < 2.0**-126, x * 0, x)),
        1.2,
    )
    yield "with infinities as the largest numbers", lambda x: _finite(x), 1.2
    for bits in (6, 5, 4, 3):
        yield f"cut to {bits} bits of mantissa", lambda x, n=bits: fp32.to_bf16(_cut(x, 23 - n)), 1.4


def _kept() -> Iterator[tuple[str, _Round, float]]:
    """Of float32 to a type that holds more than bf16 does, with which the next stage goes on."""
    yield "float16", half, 1.05
    yield "tf32 (10 bits of mantissa, cut)", lambda x: _cut(x, 13), 1.15
    for bits in (10, 8, 9, 11, 12):
        name = "tf32 (10 bits of mantissa" if bits == 10 else f"some type ({bits} bits of mantissa"
        for ties, way in (("to even", nearest), ("away from zero", _away)):
            yield f"{name}, ties {ties})", lambda x, way=way, dropped=23 - bits: way(x, dropped), 1.25


def _cut(x: Tensor, dropped: int) -> Tensor:
    bits = x.contiguous().view(torch.int32)
    return torch.where(x.isfinite(), bits >> dropped << dropped, bits).view(torch.float32)


def _away(x: Tensor, dropped: int) -> Tensor:
    """Rounded with ties away from zero, as cvt.rna does."""
    bits = x.contiguous().view(torch.int32)
    return _cut(torch.where(x.isfinite(), bits + (1 << (dropped - 1)), bits).view(torch.float32), dropped)


def _finite(x: Tensor) -> Tensor:
    y = fp32.to_bf16(x)
    return torch.where(y.isinf(), torch.nan_to_num(y), y)


PLACES = (
    ("round_fc1", "GEMM1's output is", ("fc1", "activation")),
    ("round_activation", "the activation is", ("activation", "fc2")),
    ("round_fc2", "GEMM2's output is", ("fc2", "finalize")),
    ("round_output", "the output is", ("finalize",)),
)


def rounding_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """Other roundings at each place where there is one, one more, or none."""
    for stage, words, stages in PLACES:
        for how, change, cost in _roundings():
            yield Hypothesis(
                "rounding",
                stages[:1],
                f"{words} {how}",
                lambda p, s=stage, c=change: p.staging(**{s: c}),
                cost,
            )
    for stage, words, stages in PLACES[:-1]:
        more = (
            {"fc2_gemm": GemmVariant()} if stage == "round_activation" else {}
        )  # the kernel's takes bf16 only
        for how, change, cost in _kept():
            yield Hypothesis(
                "rounding",
                stages[:1],
                f"{words} kept in {how}, not rounded to bf16",
                lambda p, more=more | {stage: change}: p.staging(**more),
                cost,
            )
    if call.experts.gated:
        yield from _of_halves()
    for how, change, cost in _roundings():
        yield Hypothesis(
            "rounding",
            ("input",),
            f"the input is {how}",
            lambda p, c=change: p.calling(input=c(fp32.widen(p.call.input))),
            cost + 0.2,
        )
    for how, change, cost in _roundings():

        def each_product(a: Tensor, w: Tensor, y: Tensor, b: Tensor, change: _Round = change) -> Tensor:
            return fp32.add(a, fp32.widen(change(fp32.mul(w, fp32.add(y, b)))))

        def each_sum(a: Tensor, w: Tensor, y: Tensor, b: Tensor, change: _Round = change) -> Tensor:
            return fp32.widen(change(fp32.fma(w, fp32.add(y, b), a)))

        yield _sum(f"each weighted row is {how}", each_product, cost + 0.2)
        yield _sum(f"the sum over the slots is {how} after each slot", each_sum, cost + 0.2)
    yield from slot_sum_hypotheses(call.experts.num_experts)


def _of_halves() -> Iterator[Hypothesis]:
    """Another rounding of up, or of gate, alone: as where one of them goes on from the accumulators."""
    kept = [(f"kept in {how}, not rounded to bf16", change, cost) for how, change, cost in _kept()]
    kept.append(("kept in float32, not rounded to bf16", lambda x: x, 1.0))
    for half_of, what in enumerate(("up", "gate")):
        for how, change, cost in (*kept, *_roundings()):

            def of_half(x: Tensor, change: _Round = change, half_of: int = half_of) -> Tensor:
                parts = list(x.chunk(2, -1))
                parts = [change(p) if i == half_of else fp32.to_bf16(p) for i, p in enumerate(parts)]
                return torch.cat([p if p.dtype == torch.float32 else fp32.widen(p) for p in parts], -1)

            yield Hypothesis(
                "rounding",
                ("fc1", "activation"),
                f"the {what} half of GEMM1's output alone is {how}",
                lambda p, c=of_half: p.staging(round_fc1=c),
                cost + 0.2,
            )


def _sum(words: str, step: Callable[..., Tensor], cost: float) -> Hypothesis:
    return of_sum("rounding", ("finalize",), words, FinalizeVariant(step), cost)
