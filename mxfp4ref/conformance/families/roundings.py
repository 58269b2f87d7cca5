"""Hypotheses on roundings between the stages, and on the order in which a GEMM's K groups are summed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref._spans import spans
from mxfp4ref.conformance.families.hypothesis import Hypothesis, Pipeline, of_sum
from mxfp4ref.conformance.families.slot_sums import slot_sum_hypotheses
from mxfp4ref.defects.variants.finalize import FinalizeVariant
from mxfp4ref.defects.variants.gemm import GemmVariant, Term, accumulate
from mxfp4ref.defects.variants.rounding import bf16
from mxfp4ref.formats.mxfp4 import GROUP_SIZE, dequantize
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90 import fp32

__all__ = ["PLACES", "order_hypotheses", "rounding_hypotheses"]

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
        lambda x: fp32.to_bf16(fp32.widen(fp32.to_bf16(x)).half().float()),
        1.1,
    )
    yield "rounded to float8 e4m3 on the way", _through(torch.float8_e4m3fn), 1.1
    yield "rounded to float8 e5m2 on the way", _through(torch.float8_e5m2), 1.2
    yield "cut to tf32 (10 bits of mantissa) on the way", lambda x: fp32.to_bf16(_cut(x, 13)), 1.2
    for bits in (10, 8, 9, 11, 12):
        name, cost = (
            ("tf32 (10 bits of mantissa", 1.1) if bits == 10 else (f"some type ({bits} bits of mantissa", 1.3)
        )
        for ties, way, more in (("away from zero", _away, 0.0), ("to even", _short, 0.1)):
            yield (
                f"rounded to {name}, ties {ties}) on the way, and so rounded twice",
                lambda x, way=way, dropped=23 - bits: fp32.to_bf16(way(x, dropped)),
                cost + more,
            )
    yield "rounded away from zero", lambda x: _upper(x, 0xFFFF), 1.4
    yield "rounded down", lambda x: torch.where(x < 0, _upper(x, 0xFFFF), _upper(x, 0)), 1.4
    yield "rounded up", lambda x: torch.where(x < 0, _upper(x, 0), _upper(x, 0xFFFF)), 1.4
    yield "rounded to 7 bits (one bit of bf16 lost)", lambda x: fp32.to_bf16(_short(x, 17)), 1.3
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
    yield "float16", _half, 1.05
    yield "tf32 (10 bits of mantissa, cut)", lambda x: _cut(x, 13), 1.15
    for bits in (10, 8, 9, 11, 12):
        name = "tf32 (10 bits of mantissa" if bits == 10 else f"some type ({bits} bits of mantissa"
        for ties, way in (("to even", _short), ("away from zero", _away)):
            yield f"{name}, ties {ties})", lambda x, way=way, dropped=23 - bits: way(x, dropped), 1.25


def _cut(x: Tensor, dropped: int) -> Tensor:
    bits = x.contiguous().view(torch.int32)
    return torch.where(x.isfinite(), bits >> dropped << dropped, bits).view(torch.float32)


def _away(x: Tensor, dropped: int) -> Tensor:
    """Rounded with ties away from zero, as cvt.rna does."""
    bits = x.contiguous().view(torch.int32)
    return _cut(torch.where(x.isfinite(), bits + (1 << (dropped - 1)), bits).view(torch.float32), dropped)


def _short(x: Tensor, dropped: int) -> Tensor:
    bits = x.view(torch.int32)
    half = (1 << (dropped - 1)) - 1 + (bits >> dropped & 1)
    return torch.where(x.isfinite(), (bits + half) >> dropped << dropped, bits).view(torch.float32)


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
    yield from slot_sum_hypotheses()


def _sum(words: str, step: Callable[..., Tensor], cost: float) -> Hypothesis:
    return of_sum("rounding", ("finalize",), words, FinalizeVariant(step), cost)


_Accumulate = Callable[[list[Term]], Tensor]


def _parts(size: Callable[[int], int], *, kernels: bool = False) -> _Accumulate:
    """So many groups at a time from zero, then their sums in order; `kernels` if each part adds +0 as one does."""

    def run(terms: list[Term]) -> Tensor:
        parts = [accumulate(terms[part]) for part in spans(len(terms), max(size(len(terms)), 1))]
        total, *rest = (fp32.add(t, torch.zeros_like(t)) for t in parts) if kernels else parts
        for part in rest:
            total = fp32.add(total, part)
        return total

    return run


def _strided(count: int) -> _Accumulate:
    def run(terms: list[Term]) -> Tensor:
        total, *rest = (accumulate(terms[start::count]) for start in range(min(count, len(terms))))
        for part in rest:
            total = fp32.add(total, part)
        return total

    return run


def _tree(terms: list[Term]) -> Tensor:
    parts = [fp32.mul(term.t, term.scale) for term in terms]
    while len(parts) > 1:
        pairs = [fp32.add(a, b) for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = pairs + parts[2 * len(pairs) :]
    return parts[0]


def _rounded(change: _Round) -> _Accumulate:
    def run(terms: list[Term]) -> Tensor:
        acc = torch.zeros_like(terms[0].t)
        for term in terms:
            acc = change(fp32.fma(term.t, term.scale, acc))
        return acc

    return run


def _partial(rounding: _Round, size: Callable[[int], int]) -> _Accumulate:
    def run(terms: list[Term]) -> Tensor:
        total, *rest = (
            rounding(accumulate(terms[part])) for part in spans(len(terms), max(size(len(terms)), 1))
        )
        for part in rest:
            total = rounding(fp32.add(total, part))
        return total

    return run


def _half(x: Tensor) -> Tensor:
    return x.half().float()


def _orders() -> Iterator[tuple[str, _Accumulate, float]]:
    for count in (2, 3, 4, 8):
        yield (
            f"K is split in {count} parts that are added in float32",
            _parts(lambda n, c=count: -(-n // c)),
            1,
        )
        yield f"K groups are summed in {count} interleaved parts", _strided(count), 1.3
    for size in (1, 2, 4, 8, 16):
        yield (
            f"{size} K groups ({size * GROUP_SIZE} of K) at a time are summed from zero",
            _parts(lambda n, s=size: s),
            1.2,
        )
    yield "K groups are summed in descending order", lambda terms: accumulate(terms[::-1]), 1
    yield "K groups are summed as a tree", _tree, 1.1
    yield "the sum of K groups is kept in bf16", _rounded(bf16), 1
    yield "the sum of K groups is kept in float16", _rounded(_half), 1
    for count in (2, 4):
        yield (
            f"K is split in {count} parts, each rounded to bf16",
            _partial(bf16, lambda n, c=count: -(-n // c)),
            1.2,
        )
        yield (
            f"K is split in {count} parts, each rounded to float16",
            _partial(_half, lambda n, c=count: -(-n // c)),
            1.3,
        )
    for size in (2, 4, 8):
        yield f"the sum of each {size} K groups is rounded to bf16", _partial(bf16, lambda n, s=size: s), 1.3
    yield (
        "K groups' sums are scaled after a rounding to float16",
        lambda ts: accumulate([replace(t, t=_half(t.t)) for t in ts]),
        1.2,
    )
    yield (
        "the first and the second half of K change places",
        lambda ts: accumulate(ts[len(ts) // 2 :] + ts[: len(ts) // 2]),
        1.3,
    )


def _one_by_one(dtype: torch.dtype) -> Callable[..., Tensor]:
    """A GEMM of scaled weights that adds one product after the other, in a type."""

    def gemm(x: Tensor, packed: Tensor, scales: Tensor, **how: object) -> Tensor:
        weights = dequantize(packed, scales, convention="sm90", dtype=torch.float32)
        total = torch.zeros(*x.shape[:2], weights.shape[1], dtype=dtype, device=x.device)
        for k in range(x.shape[2]):
            product = fp32.widen(x[:, :, k].contiguous())[:, :, None] * weights[:, None, :, k]
            total = (total.float() + product).to(dtype)
        return total.float()

    return gemm


def order_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """In one GEMM or in both."""
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "float16"), (torch.float32, "float32")):
        for fc in ("fc1", "fc2"):

            def single(p: Pipeline, fc: str = fc, dtype: torch.dtype = dtype) -> Pipeline:
                return p.staging(**{f"{fc}_gemm": _one_by_one(dtype)})

            words = f"in GEMM{fc[-1]} products are added one by one in {name}"
            yield Hypothesis("order of sums", (fc,), words, single, 1.2, slow=True)
    plain = lambda n, tile: list(range(n))  # noqa: E731
    every = [(words, GemmVariant(accumulate=change), cost) for words, change, cost in _orders()]
    for count in (2, 3, 4, 8):  # it shows in the sign of zero alone
        part = _parts(lambda n, c=count: -(-n // c), kernels=True)
        words = (
            f"K is split in {count} parts, as of split-K, that are added in float32 without the kernel's +0"
        )
        every.append((words, GemmVariant(accumulate=part, add_zero=False), 1.1))
    for words, variant, cost in every:
        for fcs in (("fc1",), ("fc2",), ("fc1", "fc2")):
            where = f"GEMM{fcs[0][-1]}" if len(fcs) == 1 else "both GEMMs"
            for order, extra in ((None, 0.0), (plain, 0.2)):
                gemm = replace(variant, order=order)
                also = ", in ascending order" if order else ""

                def on(p: Pipeline, gemm: GemmVariant = gemm, fcs: tuple[str, ...] = fcs) -> Pipeline:
                    return p.staging(**{f"{fc}_gemm": gemm for fc in fcs})

                yield Hypothesis(
                    "order of sums", fcs, f"in {where} {words}{also}", on, cost + extra, slow=True
                )
