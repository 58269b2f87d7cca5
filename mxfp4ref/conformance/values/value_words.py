"""What a dequantisation or a byte order does in some places only, or to some values only, solved from the output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mxfp4ref._choices import Convention
from mxfp4ref._words import shortened
from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.findings.conditions import indices_words
from mxfp4ref.conformance.findings.index_words import map_words, moved_runs
from mxfp4ref.conformance.values.value_tables import value_table
from mxfp4ref.formats.mxfp4 import GROUP_SIZE, dequantize, pack_codes, unpack_codes

__all__ = ["all_scaled", "bit_words", "kinds_of", "region_words", "slice_words", "solved_values"]

_ENOUGH = 16  # elements from which something is told
_LISTED = 6
_FEW = 2  # scale bytes that may be left over where all others follow a map

Words = tuple[str, bool]  # what is wrong, and whether that accounts for all


def solved_values(inputs: Mapping[str, Any], got: Tensor, want: Tensor) -> Words:
    """What a dequantisation did instead, "" where nothing was found.

    Args:
        inputs: of a golden case of kind "dequantize".
        got, want: of one floating-point dtype and shape.
    """
    if bool((got == 0).all()):
        return "all values are 0", True
    if words := _as_numbers(got, want):
        return words, True
    if (found := _byte_words(inputs, got)) is not None:
        return found
    if words := region_words(got, want, ("row", "column"), ()):
        return words, True
    dims = ((0, "row"), (1, "column")) if got.dim() == 2 else ()
    if words := next(filter(None, (slice_words(got, want, dim, name) for dim, name in dims)), ""):
        return words, True
    return value_table(inputs, got, want)


_NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "fp16": lambda x: x.half(),
    "bf16": lambda x: x.bfloat16(),
    "float8 e4m3": lambda x: x.float().to(torch.float8_e4m3fn).float(),
    "float8 e5m2": lambda x: x.float().to(torch.float8_e5m2).float(),
    "fp16, saturating": lambda x: x.clamp(-65504, 65504).half(),
}


def _as_numbers(got: Tensor, want: Tensor) -> str:
    """Whether values went through another format on their way; NaN may have other bits."""
    for name, through in _NUMBERS.items():
        made = through(want).to(want.dtype)
        if not bool((differing(made, got) & ~(made.isnan() & got.isnan())).any()):
            return f"values go through {name}, whose range and precision are smaller"
    return ""


def _byte_words(inputs: Mapping[str, Any], got: Tensor) -> Words | None:
    """Whether each scale byte is taken for another one, the same everywhere."""
    convention: Convention = inputs["convention"]
    codes = unpack_codes(inputs["packed"].cpu()).to(torch.int64).flatten()
    scales = inputs["scales"].cpu().view(torch.uint8).to(torch.int64)
    bytes_ = scales.repeat_interleave(GROUP_SIZE, -1).flatten()
    every = pack_codes(torch.arange(GROUP_SIZE, dtype=torch.uint8).expand(256, GROUP_SIZE) % 16)
    table = dequantize(
        every, torch.arange(256, dtype=torch.uint8)[:, None], convention=convention, dtype=got.dtype
    )
    values = got.flatten()
    taken: dict[int, int] = {}
    asked = sorted(set(bytes_.tolist()))
    for byte in asked:
        here = bytes_ == byte
        fits = ~differing(table[:, codes[here]], values[here].expand(256, -1)).any(1)
        if bool(fits[byte]):
            taken[byte] = byte
        elif bool(fits.any()):
            taken[byte] = int(fits.nonzero()[0])
    left = [byte for byte in asked if byte not in taken]
    changed = {a: b for a, b in taken.items() if a != b}
    if len(left) > _FEW or len(changed) < 2:
        return None
    words = _taken_words(changed, taken)
    rest = f", but for scale byte {' and '.join(map(str, left))}" if left else ""
    return (words + rest, not left) if words else None


def _taken_words(changed: Mapping[int, int], taken: Mapping[int, int]) -> str:
    told: list[str] = []
    for instead in sorted(set(changed.values())):
        ones = [a for a, b in changed.items() if b == instead]
        if len(ones) < 2 or not all(taken[b] == instead for b in taken if ones[0] <= b <= ones[-1]):
            told = []
            break
        told.append(f"{ones[0]} to {ones[-1]} are taken as {instead}")
    if told:
        return f"scale bytes are clamped: {', '.join(told)}"
    one, other = torch.tensor(list(taken.values())), torch.tensor(list(taken))
    words = map_words(one, "scale byte", 256, of=other)
    signed = ", as signed bytes without the bias" * bool((other + 127 & 255 == one).all())
    return f"scale bytes are taken for others{signed}: {words}" if words else ""


def region_words(
    got: Tensor, want: Tensor, names: tuple[str, ...], others: Iterable[tuple[str, Tensor | None]]
) -> str:
    """What some slices along one dimension are instead, if all others are right.

    Args:
        got, want: of one dtype and shape.
        names: of the dimensions.
        others: what could be there instead, in words, and as a tensor of as many elements; zeros and other constants,
            and slices of the right tensor, are tried besides.
    """
    wrong = differing(got, want)
    candidates = [
        (words, made.view_as(got)) for words, made in others if made is not None and _alike(made, got)
    ]
    for dim, name in zip(range(got.dim()), names, strict=False):
        slices = wrong.movedim(dim, 0).flatten(1).any(1)
        if bool(slices.all()) or not bool(slices.any()):
            continue
        here = got.movedim(dim, 0)[slices]
        where = indices_words(slices, name)
        for words, made in candidates:
            if not bool(differing(here, made.movedim(dim, 0)[slices]).any()):
                return f"{words} in some places: in {where} only"
        first = here.flatten()[:1]
        if here.numel() >= _ENOUGH and not bool(differing(here.flatten(), first.expand(here.numel())).any()):
            same = ~differing(got, first.expand(got.shape)).movedim(dim, 0).flatten(1).any(1)
            return f"some places hold {first.item():g} alone: {indices_words(slices | same, name)}"
        right = want.movedim(dim, 0)
        for shift in (1, -1, 2, -2, len(right) // 2):
            if not bool(differing(here, right.roll(shift, 0)[slices]).any()):
                whose = f"those {abs(shift)} {'before' if shift > 0 else 'after'} them"
                return f"some places hold what belongs elsewhere: {where} {whose}"
    return ""


def slice_words(got: Tensor, want: Tensor, dim: int, name: str, *, listed: bool = False) -> str:
    """Whether every slice along `dim` is another one's, by a rule in words, or else a list if `listed`."""
    one, other = (t.movedim(dim, 0).flatten(1) for t in (got, want))
    if len(one) < 2 or one.shape[1] < 2:
        return ""
    same = (one[:, None] == other[None]).all(2) if one.numel() * len(one) < 1 << 26 else None
    if same is None or not bool(same.any(1).all()) or bool(same.diagonal().all()):
        return ""
    source = torch.where(same.diagonal(), torch.arange(len(one)), same.to(torch.uint8).argmax(1))
    words = map_words(source, name, len(one))
    if listed and not words and bool((same.diagonal() | (same.sum(1) == 1)).all()):
        words = _runs_listed(source)
    return _said(words, name)


def _runs_listed(source: Tensor) -> str:
    told = (
        f"{first} is {place}" if first == last else f"{first} to {last} are {place} to {place + last - first}"
        for first, last, place in moved_runs(source.tolist())
    )
    return shortened(told, _LISTED)


def _said(words: str, name: str) -> str:
    return f"{name}s are those of others: {words}" if words else ""


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.numel() == other.numel() and one.dtype == other.dtype


def bit_words(got: Tensor, want: Tensor) -> str:
    """Bits of every byte that are lost, set or exchanged, the same in all bytes."""
    one, other = got.flatten().to(torch.int64), want.flatten().to(torch.int64)
    if len(one) < _ENOUGH:
        return ""
    always, ever = 255, 0
    for bit in range(8):
        values = one >> bit & 1
        if bool(values.all()):
            ever |= 1 << bit
        if not bool(values.any()):
            always &= ~(1 << bit)
    for words, made in (
        (f"bits are lost: every byte is and-ed with {always:#04x}", other & always),
        (f"bits are set: every byte is or-ed with {ever:#04x}", other | ever),
        (
            f"bits are exchanged: every byte is xor-ed with {int(one[0] ^ other[0]):#04x}",
            other ^ (one[0] ^ other[0]),
        ),
    ):
        if torch.equal(made, one):
            return words
    shift = int(one[0] - other[0]) % 256
    return f"every byte is {shift} larger, modulo 256" if torch.equal((other + shift) % 256, one) else ""


def all_scaled(factor: float) -> str:
    """A factor of all values in words."""
    fraction, power = math.frexp(abs(factor))
    if factor > 0 and fraction == 0.5:
        how = "high" if power > 1 else "low"
        return f"all values are {factor:g}x the right ones: scales are taken {abs(power - 1)} too {how}"
    return "all values have the other sign" if factor == -1 else f"all values are {factor:g}x the right ones"


def kinds_of(values: Tensor) -> str:
    """Of some values, whether all are NaN, Inf or 0."""
    if bool(values.isnan().all()):
        return "NaN"
    if bool(values.isinf().all()):
        return "Inf"
    if bool((values == 0).all()):
        return "0"
    return "numbers"
