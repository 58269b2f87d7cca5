"""Hypotheses on codes widened by words: signs, magnitudes or whole codes of others nearby; and on scales as
another format holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import permutations, product

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypotheses.tensors import mapped, of_gemms
from mxfp4ref.conformance.families.hypothesis import Hypothesis, Pipeline
from mxfp4ref.conformance.families.solved.tensor_groups import GEMMS
from mxfp4ref.conformance.findings.reduction import is_heavy
from mxfp4ref.defects.variants.gemm import GemmVariant
from mxfp4ref.defects.weights import nibble_order, nibble_split
from mxfp4ref.formats.mxfp4 import E2M1_VALUES, GROUP_SIZE, decode_ue8m0, pack_codes, unpack_codes
from mxfp4ref.model.call import MoeCall

__all__ = ["code_part_hypotheses", "scale_format_hypotheses", "small_weight_hypotheses"]

_BOTH = 0.2  # cost more than of one GEMM
_PARTS = (("signs", 8), ("magnitudes", 7), ("codes", 15))
_NTHS = {2: "second", 4: "fourth", 8: "eighth"}
_KNOWN = {
    (0, 2, 4, 6, 1, 3, 5, 7): " (even ones, then odd ones, as AWQ and Marlin pack them)",
    (0, 4, 1, 5, 2, 6, 3, 7): " (both halves in turn, which undoes the order of AWQ and Marlin)",
    (0, 2, 1, 3): " (even ones, then odd ones)",
}
_SCALES = 8  # the smallest ones, up to which weights may be lost
_Places = Callable[[Tensor], Tensor]  # the number of a code in its row, to that of the one whose part it gets


def code_part_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """The sign, magnitude or all of each code taken from another of its byte or word, or lost in every n-th."""
    yield from _in_another_order()
    for fcs, whose in GEMMS:
        for words, change, cost in _changes():
            both = _BOTH * (len(fcs) > 1)
            yield of_gemms("values", fcs, f"{whose} weights have {words}", "weights", change, cost + both)


def _in_another_order() -> Iterator[Hypothesis]:
    """Codes of one GEMM in an order that a named defect has in both; so may be what they are multiplied with."""
    for fc, operand, stage in (("fc1", "the input's", "input"), ("fc2", "the activation's", "activation")):
        for words, change, also in (
            ("exchanged in each byte (nibbles swapped)", nibble_order, "in pairs (2i and 2i+1)"),
            (
                "split by nibbles in each K group (gguf's order)",
                nibble_split,
                "in each 32 (0, 16, 1, 17, ...)",
            ),
        ):
            told = f"GEMM{fc[-1]}'s codes are {words}, or {operand} columns are in another order {also}"
            yield Hypothesis(
                "K groups", (fc, stage), told, mapped((f"{fc}_weights",), lambda _, t, c=change: c(t)), 0.95
            )


def _changes() -> Iterator[tuple[str, Callable[[Tensor], Tensor], float]]:
    for part, bits in _PARTS:
        for words, places, cost in _places():
            if part != "codes" or "byte" not in words:  # whole codes within a byte are tried elsewhere
                yield f"the {part} of {words}", _taken(bits, places), cost
    for places, order, known in _orders():
        for part, bits in _PARTS:
            if known or part == "codes":
                yield f"the {part} of each word of {order}{known}", _taken(bits, places), 1.5
    for step, nth in _NTHS.items():
        for at in range(step):
            where = f"in every {nth} code, from {at} on"
            if step == 2:
                where += f" (the {('low', 'high')[at]} one of each byte)"
            yield f"no sign {where}", _every(step, at, lambda codes: codes & 7), 1.4 + step / 40
            yield f"the opposite sign {where}", _every(step, at, lambda codes: codes ^ 8), 1.5 + step / 40
            yield f"zero {where}", _every(step, at, torch.zeros_like), 1.45 + step / 40


def _places() -> Iterator[tuple[str, _Places, float]]:
    yield "the other code of the byte (nibbles exchanged)", lambda i: i ^ 1, 1.4
    yield "the low code of the byte for both", lambda i: i & ~1, 1.4
    yield "the high code of the byte for both", lambda i: i | 1, 1.4
    for size in (4, 8):
        yield (
            f"the code at the other end of each word of {size} (reversed)",
            lambda i, s=size: i // s * s + s - 1 - i % s,
            1.5,
        )
        yield f"the first code of each word of {size} for all", lambda i, s=size: i // s * s, 1.5
        yield f"the code in the other half of each word of {size}", lambda i, s=size: i ^ (s // 2), 1.5
        for by, which in ((1, "the next code"), (-1, "the code before")):
            yield (
                f"{which} in each word of {size} (rotated)",
                lambda i, s=size, by=by: i // s * s + (i + by) % s,
                1.5,
            )
    yield "the code two before or after (bytes exchanged in pairs)", lambda i: i ^ 2, 1.5


def _orders() -> Iterator[tuple[_Places, str, str]]:
    """Codes of a word in other orders, by the bits of their places, and what is known of each order."""
    told = {tuple(places(torch.arange(16)).tolist()) for _, places, _ in _places()}
    for size in (8, 4, 16):
        bits = range(size.bit_length() - 1)
        ways = permutations(bits) if size < 16 else ((*bits[n:], *bits[:n]) for n in bits)
        for way, flipped in product(list(ways), range(size if size < 16 else 2)):
            order = [flipped ^ sum((i >> bit & 1) << to for bit, to in enumerate(way)) for i in range(size)]
            every = tuple(i // size * size + order[i % size] for i in range(16))
            if every in told or every == tuple(range(16)):
                continue
            told.add(every)
            known = _KNOWN.get(tuple(order), "")
            words = f"{size} in the order {' '.join(map(str, order))}"
            yield (
                (lambda i, o=order, n=size: i // n * n + torch.tensor(o, device=i.device)[i % n]),
                words,
                known,
            )


def _taken(bits: int, places: _Places) -> Callable[[Tensor], Tensor]:
    """With these bits of each code those of the code at another place."""

    def change(packed: Tensor) -> Tensor:
        codes = unpack_codes(packed)
        other = codes[..., places(torch.arange(codes.shape[2], device=codes.device))]
        return pack_codes((codes & (15 ^ bits) | other & bits).contiguous())

    return change


def _every(step: int, at: int, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """With every n-th code changed."""

    def on(packed: Tensor) -> Tensor:
        codes = unpack_codes(packed).clone()
        codes[..., at::step] = change(codes[..., at::step])
        return pack_codes(codes)

    return on


# Format, least and largest exponent of a power of two in it, and how much is rounded up to the least one.
_FORMATS = (
    ("float16", -24, 15),
    ("float16 without its subnormal numbers", -14, 15),
    ("FP8 (float8_e4m3fn)", -9, 8),
    ("FP8 (float8_e5m2)", -16, 15),
)
_BEYOND = (("infinite", 255), ("zero", 0), ("the largest power of two", None), ("left as they are", -1))


def scale_format_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """Scales kept in a format of a smaller range: those below it are zero, or its least; those above it infinite."""
    yield from _infinite_scales(call)
    for fcs, whose in GEMMS:
        for words, least, largest in _FORMATS:
            for above, high in _BEYOND:
                low = least - 1  # which a tie to even rounds to zero
                yield of_gemms(
                    "values",
                    fcs,
                    f"{whose} scales are kept in {words}: those below 2^{least} are zero, those above "
                    f"2^{largest} {above}",
                    "scales",
                    lambda s, a=low + 127, b=largest + 127, h=high: _limited(s, a, b, h),
                    1.3 + _BOTH * (len(fcs) > 1) + 0.02 * (high != 255),
                )


def _infinite_scales(call: MoeCall) -> Iterator[Hypothesis]:
    """Where a scale is infinite much gives NaN: this says no more than that."""
    gemm = GemmVariant(
        decode_scales=lambda s: torch.where(s == 255, torch.nan, decode_ue8m0(s, convention="sm90"))
    )
    for fcs, whose in GEMMS:
        scales = [getattr(call.experts, f"{fc}_scales") for fc in fcs]
        if any(t is not None and bool((t.view(torch.uint8) == 255).any()) for t in scales):
            yield Hypothesis(
                "values",
                fcs,
                f"{whose} sums are NaN wherever a scale in them is infinite (byte 255), as of 0 x Inf",
                lambda p, fcs=fcs: p.staging(**{f"{fc}_gemm": gemm for fc in fcs}),
                0.9 + _BOTH * (len(fcs) > 1),
            )


def _limited(scales: Tensor, zero: int, largest: int, above: int | None) -> Tensor:
    high = scales if above == -1 else torch.full_like(scales, largest if above is None else above)
    return torch.where(scales > largest, high, torch.where(scales <= zero, 0, scales))


def small_weight_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """Weights that are lost below a size, or codes in groups of small scales: as in a format of a smaller range."""
    magnitudes = torch.tensor(E2M1_VALUES[:8], dtype=torch.float64)
    exponents = torch.arange(256) - 127
    for fcs, whose in GEMMS:
        scales = [getattr(call.experts, f"{fc}_scales") for fc in fcs]
        if any(t is None for t in scales) or is_heavy(call):
            continue
        present = torch.unique(torch.cat([t.view(torch.uint8).flatten() for t in scales])).long() - 127
        few = present.tolist()[: _SCALES + 1]
        sizes = torch.unique(magnitudes[1:] * present[: _SCALES + 1, None].double().exp2()).tolist()
        for size in sizes[1 : 4 * _SCALES]:
            lost = (magnitudes * exponents[:, None].double().exp2() < size).sum(1) - 1
            words = f"below {size:.4g} are zero, as in float16 or FP8 of too small a range"
            yield _losing(f"{whose} weights {words}", fcs, lost, 1.4)
        for exponent in few[:-1]:
            for code in range(1, 6):
                lost = torch.where(exponents <= exponent, code, 0)
                words = f"up to {magnitudes[code]:g} times their scale are zero where that is 2^{exponent} or less"
                yield _losing(f"{whose} small weights are lost: those {words}", fcs, lost, 1.5)


def _losing(words: str, fcs: tuple[str, ...], lost: Tensor, cost: float) -> Hypothesis:
    """Without the magnitudes up to that code which is `lost`, `[256] int64` by scale byte."""
    codes = unpack_codes(torch.arange(256, dtype=torch.uint8)[:, None]).long()
    kept = torch.where(codes & 7 > lost[:, None, None], codes, codes & 8)
    table = pack_codes(kept.view(-1, 2).to(torch.uint8)).view(256, 256)

    def on(p: Pipeline) -> Pipeline:
        experts, changed = p.call.experts, {}
        for fc in fcs:
            packed, scales = getattr(experts, f"{fc}_weights"), getattr(experts, f"{fc}_scales")
            rows = scales.view(torch.uint8).long().repeat_interleave(GROUP_SIZE // 2, -1)
            changed[f"{fc}_weights"] = table.to(packed.device)[rows, packed.long()]
        return p.having(**changed)

    return Hypothesis("values", fcs, words, on, cost + _BOTH * (len(fcs) > 1))
