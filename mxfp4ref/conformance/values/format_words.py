"""What is wrong with a quantiser, a dequantisation or a byte order, solved from the bits.

A sentence is only given where it accounts for every byte or value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mxfp4ref._choices import Convention
from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.findings.finding import Finding
from mxfp4ref.conformance.findings.index_words import map_words
from mxfp4ref.conformance.values.code_numberings import NUMBERINGS
from mxfp4ref.conformance.values.layout_words import layout_words
from mxfp4ref.conformance.values.quantizer_groups import MAGNITUDES, nearest_codes
from mxfp4ref.conformance.values.quantizer_words import solved_quantizer
from mxfp4ref.conformance.values.value_words import all_scaled, kinds_of, solved_values
from mxfp4ref.formats.mxfp4 import E2M1_VALUES, GROUP_SIZE, decode_ue8m0, dequantize, pack_codes, unpack_codes
from mxfp4ref.formats.quantize import SCALE_RULES, quantize

__all__ = ["format_finding"]

_NAN = 255
_MOST = 0.9
_SEVERAL = "several scale bytes"


def format_finding(
    kind: str, inputs: Mapping[str, Any], outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> Finding:
    """What a quantiser, dequantisation or layout did instead.

    Args:
        kind: "quantize", "dequantize" or "layout".
        inputs: of a golden case of that kind.
        outputs, expected: by name, of the same dtypes and shapes.
    """
    got, want = ({name: t.cpu() for name, t in tensors.items()} for tensors in (outputs, expected))
    exact = True
    if kind == "quantize":
        values, rule = inputs["values"].cpu(), inputs["rule"]
        words = _quantize_words(values, rule, got, want)
        exact = _SEVERAL not in words
        if not words:
            words, exact = solved_quantizer(values, rule, got, want)
    elif kind == "dequantize":
        words = ""
        if bool(got["values"].any()):  # else every code is 0 instead, which says less
            words = _dequantize_words(inputs, got["values"])
        if not words:
            words, exact = solved_values(inputs, got["values"], want["values"])
    else:
        words = layout_words(inputs, got["after"], want["after"])
    exact = exact and bool(words)
    general = "; ".join(part.partition(": ")[0] for part in words.split("; "))
    if general == words:
        return Finding((kind,), words, exact)
    return Finding((kind,), words, exact, hypotheses=(general,) if exact else (), kind=general)


# Quantisers.


def _quantize_words(values: Tensor, rule: str, got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> str:
    scale_words = _scale_words(values, rule, got["scales"], want["scales"])
    if scale_words is None:
        return ""
    groups = values.to(torch.float64).reshape(-1, GROUP_SIZE)
    codes = unpack_codes(got["packed"]).reshape(-1, GROUP_SIZE)
    scales = got["scales"].flatten()
    code_words = _code_words(groups, scales, codes)
    if code_words is None and scale_words:
        code_words = _code_words(groups, want["scales"].flatten(), codes)
        if code_words is not None:
            code_words = ["codes are those of the right scales", *code_words]
    return "; ".join([*scale_words, *code_words]) if code_words is not None else ""


def _scale_words(values: Tensor, rule: str, got: Tensor, want: Tensor) -> list[str] | None:
    """What explains the scales: nothing to explain, some words, or None."""
    groups = values.to(torch.float64).reshape(-1, GROUP_SIZE)
    classes = {
        "groups of zeros": ~groups.any(1),
        "groups with NaN or Inf": ~groups.isfinite().all(1),
    }
    words, ordinary = [], torch.ones(len(groups), dtype=torch.bool)
    one, other = got.flatten().to(torch.int64), want.flatten().to(torch.int64)
    for chosen in classes.values():
        ordinary &= ~chosen
    for made_words, made in _other_scales(values, rule, got.shape, other):
        if torch.equal(made[ordinary], one[ordinary]):
            words = made_words
            break
    else:
        return None
    for name, chosen in classes.items():
        held = set(one[chosen].tolist())
        if torch.equal(one[chosen], made[chosen]):
            continue
        byte = f"scale byte {min(held)}" if len(held) == 1 else f"{_SEVERAL}, {min(held)} to {max(held)},"
        words = [*words, f"{name} get {byte} instead of {int(other[chosen][0])}"]
    return words


def _other_scales(
    values: Tensor, rule: str, shape: torch.Size, want: Tensor
) -> Iterator[tuple[list[str], Tensor]]:
    """Words and scale bytes, the right ones first."""
    yield [], want
    for shift in range(-8, 9):
        if shift:
            how = f"{abs(shift)} too {'high' if shift > 0 else 'low'} ({2.0**shift:g}x)"
            moved = (want + shift).clamp(0, _NAN - 1)
            yield [f"all scales are {how}"], torch.where(want == _NAN, want, moved)
    for other in SCALE_RULES:
        if other != rule:
            scales = quantize(values, rule=other)[1].flatten().to(torch.int64)
            yield [f"scales follow the rule {other!r} instead of {rule!r}"], scales
    largest = values.to(torch.float64).reshape(-1, GROUP_SIZE).abs().amax(1)
    by_row = largest.view(shape)
    formulas: dict[str, Tensor] = {
        "2^(ceil(log2 amax) - 2)": largest.log2().ceil() - 2,
        "2^floor(log2(amax / 6))": (largest / 6).log2().floor(),
        "2^round(log2(amax / 6))": (largest / 6).log2().round(),
        "2^floor(log2(amax / 4))": (largest / 4).log2().floor(),
        "2^floor(log2 amax) of the whole row": by_row.amax(-1, True).expand(shape).flatten().log2().floor()
        - 2,
        "2^floor(log2 amax) of the whole tensor": largest.amax().log2().floor().expand_as(largest) - 2,
    }
    for words, exponents in formulas.items():
        made = exponents.nan_to_num(128, 128, -127).clamp(-127, 127).to(torch.int64) + 127
        yield [f"scales are {words}"], made
    for words, made in _moved(want.view(shape)):
        yield [f"scales are those of other groups: {words}"], made.flatten()


def _moved(scales: Tensor) -> Iterator[tuple[str, Tensor]]:
    for shift in (1, -1, 2, -2):
        yield f"group g has that of group g {shift:+d} of its row", scales.roll(-shift, -1)
        flat = scales.flatten().roll(-shift).view_as(scales)
        yield f"group g has that of group g {shift:+d}, into the next row", flat
        if scales.dim() > 1:
            yield f"row r has those of row r {shift:+d}", scales.roll(-shift, -2)
    if scales.shape[-1] % 2 == 0:
        yield "neighbours are exchanged", scales.view(*scales.shape[:-1], -1, 2).flip(-1).view_as(scales)
    yield "in reverse", scales.flip(-1)
    if scales.dim() > 1:
        yield "rows in reverse", scales.flip(-2)
        yield "transposed", scales.transpose(-1, -2).reshape(scales.shape)


def _code_words(groups: Tensor, scales: Tensor, got: Tensor) -> list[str] | None:
    """What explains the codes for these scales: nothing to explain, some words, or None."""
    finite = groups.isfinite().all(1, keepdim=True)
    exponent = torch.where(finite.flatten(), 127 - scales.to(torch.float64), 0.0)
    scaled = torch.where(finite, groups.nan_to_num(0, 0, 0) * torch.exp2(exponent)[:, None], 0.0)
    sign = torch.where(finite & torch.signbit(groups), 8, 0)
    rules: list[tuple[list[str], Tensor]] = [
        ([words] if words else [], rounding(scaled)) for words, rounding in _ROUNDINGS.items()
    ]
    for words, magnitude in rules:
        for more, codes in _variants(magnitude, sign, scaled):
            for order, arranged in _arrangements(codes):
                if torch.equal(arranged[finite.flatten()], got[finite.flatten()].to(torch.int64)):
                    said = [*words, *more, *order]
                    odd = ~finite.flatten()
                    if not torch.equal(arranged[odd], got[odd].to(torch.int64)):
                        said.append("groups with NaN or Inf have codes other than 0")
                    return said
    right = _ROUNDINGS[""](scaled) + sign
    for numbering, table in NUMBERINGS.items():
        if torch.equal(torch.tensor(table)[right], got.to(torch.int64)):
            return [f"codes are {numbering}"]
    others = map_words(got.to(torch.int64).flatten(), "code", 16, of=right.flatten())
    return [f"codes are others: {others}"] if others else None


_ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "": nearest_codes,
    "ties are rounded away from zero instead of to even": partial(
        nearest_codes, ties_up=lambda x: torch.ones_like(x, dtype=torch.bool)
    ),
    "ties are rounded toward zero instead of to even": partial(
        nearest_codes, ties_up=lambda x: torch.zeros_like(x, dtype=torch.bool)
    ),
    "ties are rounded up, toward +Inf, instead of to even": partial(nearest_codes, ties_up=lambda x: x > 0),
    "ties are rounded down, toward -Inf, instead of to even": partial(nearest_codes, ties_up=lambda x: x < 0),
    "codes are truncated toward zero instead of rounded": lambda x: (
        x.abs()[..., None] >= MAGNITUDES[1:]
    ).sum(-1),
    "codes are rounded away from zero instead of to nearest": lambda x: (
        x.abs()[..., None] > MAGNITUDES[:-1]
    ).sum(-1),
}


def _variants(magnitude: Tensor, sign: Tensor, scaled: Tensor) -> Iterator[tuple[list[str], Tensor]]:
    """With other signs of zeros, and other codes for what is too large."""
    beyond = scaled.abs() > 6
    large = {
        "": magnitude,
        "what is beyond 6 saturates to 4": torch.where(beyond, 6, magnitude),
        "what is beyond 6 becomes 0": torch.where(beyond, 0, magnitude),
        "everything saturates to 4": magnitude.clamp(max=6),
    }
    signs = {
        "": sign,
        "values of -0 lose their sign": torch.where(scaled == 0, 0, sign),
        "zeros lose their sign": torch.where(magnitude == 0, 0, sign),
        "signs are lost": torch.zeros_like(sign),
        "signs are exchanged": 8 - sign,
    }
    for words, codes in large.items():
        for more, bits in signs.items():
            yield [part for part in (words, more) if part], codes + bits


def _arrangements(codes: Tensor) -> Iterator[tuple[list[str], Tensor]]:
    yield [], codes
    yield (
        ["nibbles are exchanged: the low one is the odd index"],
        codes.view(len(codes), -1, 2).flip(-1).flatten(1),
    )
    halves = codes.view(len(codes), 2, -1).transpose(1, 2).flatten(1)
    yield ["low nibbles hold the first half of a group, high ones the second"], halves


# Dequantisation.


def _dequantize_words(inputs: Mapping[str, Any], got: Tensor) -> str:
    packed, scales = inputs["packed"].cpu(), inputs["scales"].cpu().view(torch.uint8)
    codes = unpack_codes(packed).to(torch.int64)
    best: list[str] | None = None
    for order, arranged in _code_orders(codes):
        for moved, of_groups in (("", scales), *_moved(scales)):
            bytes_ = of_groups.repeat_interleave(GROUP_SIZE, -1).to(torch.int64)
            found = _value_words(arranged, bytes_, inputs["convention"], got)
            if found is not None:
                words = [*order, *([f"scales are those of other groups: {moved}"] if moved else []), *found]
                best = words if best is None or len(words) < len(best) else best
    return "; ".join(best) if best is not None else ""


def _code_orders(codes: Tensor) -> Iterator[tuple[list[str], Tensor]]:
    yield [], codes
    exchanged = codes.view(*codes.shape[:-1], -1, 2).flip(-1).flatten(-2)
    yield ["nibbles are exchanged: the low one is taken for the odd index"], exchanged
    for name, size in (("row", codes.shape[-1]), ("group", GROUP_SIZE)):
        split = codes.view(*codes.shape[:-1], -1, size // 2, 2).transpose(-1, -2).flatten(-3)
        yield [f"low nibbles are taken for the first half of a {name}, high ones for the second"], split


def _value_words(codes: Tensor, bytes_: Tensor, convention: Convention, got: Tensor) -> list[str] | None:
    """What explains values that depend on the code and the scale byte alone, or None if they do not."""
    bits = got.contiguous().view(torch.int16 if got.element_size() == 2 else torch.int32).to(torch.int64)
    pair = codes * 256 + bytes_
    order = pair.flatten().argsort(stable=True)
    keys, held = pair.flatten()[order], bits.flatten()[order]
    starts = torch.ones_like(keys, dtype=torch.bool)
    starts[1:] = keys[1:] != keys[:-1]
    if not torch.equal(held, held[starts][starts.cumsum(0) - 1]):
        return None
    code, byte = keys[starts] // 256, keys[starts] % 256
    value = got.flatten()[order][starts]
    return _function_words(code, byte, value, convention)


def _function_words(code: Tensor, byte: Tensor, value: Tensor, convention: Convention) -> list[str] | None:
    """How a function of code and scale byte is wrong; `value` is in the dtype of the output."""
    words: list[str] = []
    every = pack_codes(torch.arange(32, dtype=torch.uint8).expand(256, 32) % 16)
    table = dequantize(
        every, torch.arange(256, dtype=torch.uint8)[:, None], convention=convention, dtype=value.dtype
    )
    stored = table[byte, code]
    scale = decode_ue8m0(byte.to(torch.uint8), convention, torch.float64)
    right = torch.tensor(E2M1_VALUES, dtype=torch.float64)[code] * scale
    number = value.to(torch.float64)
    ends = (byte == 0) | (byte == _NAN)
    usable = ~ends & (right != 0) & number.isfinite() & (number != 0)
    factors = (number / right)[usable]
    factor = float(factors.median()) if len(factors) else 1.0
    if not bool((factors == factor).float().mean() > _MOST):
        factor = 1.0
    left = differing(value, stored)
    if factor != 1:
        words.append(all_scaled(factor))
        scaled = [(of * factor).to(value.dtype) for of in (right, stored.to(torch.float64))]
        fraction, power = math.frexp(factor)
        if fraction == 0.5:  # scale bytes may have been raised or lowered up to the last number
            scaled.append(table[torch.where(byte == _NAN, byte, (byte + power - 1).clamp(0, _NAN - 1)), code])
        left = torch.stack([differing(value, one) for one in scaled]).all(0)
        left &= ~(right.isnan() & number.isnan())
    for said, chosen in (
        ("NaN has other bits", number.isnan() & stored.isnan()),
        ("-0 comes out as +0", (right == 0) & right.signbit() & (number == 0)),
        ("subnormal values are flushed to zero", (number == 0) & (right.abs() < 2.0**-126) & (right != 0)),
    ):
        if bool((left & chosen).any()):
            words.append(said)
            left = left & ~chosen
    for one in sorted(set(code[left & ~ends].tolist())):
        chosen = (code == one) & ~ends & number.isfinite() & (right.abs() > 2.0**-120)
        held = set((number / scale)[chosen].tolist())
        if len(held) != 1 or E2M1_VALUES[one] == 0:
            return None
        instead = held.pop()
        words.append(f"code {one} is {instead:g} instead of {E2M1_VALUES[one]:g}")
        left &= (code != one) | differing(value, (instead * scale).to(value.dtype))
    for end in (0, _NAN):
        chosen = left & (byte == end)
        kinds = kinds_of(number[chosen]), kinds_of(right[chosen])
        if bool(chosen.any()):
            if kinds[0] == kinds[1]:
                return None
            words.append(f"scale byte {end} gives {kinds[0]} instead of {kinds[1]} (convention {convention})")
    return words if not bool((left & ~ends).any()) else None
