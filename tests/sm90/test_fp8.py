"""E4M3 and its tensor-core step against exact numbers (`docs/arithmetic.md`, section 10)."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mxfp4ref.sm90 import fp8
from tests.helpers import bits, exact


def number_of(byte: int) -> Fraction:
    """The number of an E4M3 byte that is not NaN."""
    biased, fraction = byte >> 3 & 15, byte & 7
    magnitude = Fraction(fraction, 512) if biased == 0 else (8 + fraction) * Fraction(2) ** (biased - 10)
    return -magnitude if byte & 0x80 else magnitude


NUMBERS = [number_of(byte) for byte in range(0x7F)]  # from 0 to 448


def exact_step(a: list[int], b: list[int], c: int) -> int:
    """Terms and result truncated, in fractions."""
    if any(byte & 0x7F == 0x7F for byte in a + b) or exact.is_nan(c):
        return exact.NAN32
    terms = []
    for x, y in zip(a, b, strict=True):
        if number_of(x) and number_of(y):
            terms.append((max(x >> 3 & 15, 1) + max(y >> 3 & 15, 1) - 14, number_of(x) * number_of(y)))
    if exact.value_of(c):
        terms.append((max(exact.floor_log2(abs(exact.value_of(c))), -126), exact.value_of(c)))
    if not terms:
        return 0
    unit = exact.two_to(max(exponent for exponent, _ in terms) - 13)
    total = sum(math.trunc(term / unit) for _, term in terms)
    if total == 0:
        return 0
    lost = max(abs(total).bit_length() - 14, 0)
    kept = (abs(total) >> lost << lost) * unit
    sign = exact.SIGN32 if total < 0 else 0
    result = exact.rounded(kept)
    return sign | result


def test_every_number_and_every_midpoint_is_rounded_to_even() -> None:
    for byte, number in enumerate(NUMBERS):
        assert int(fp8.to_e4m3(torch.tensor([float(number)]))) == byte
    for byte, (low, high) in enumerate(itertools.pairwise(NUMBERS)):
        middle = float((low + high) / 2)
        around = [np.nextafter(np.float32(middle), np.float32(way)) for way in (-1e9, 1e9)]
        x = torch.tensor([middle, around[0], around[1]])
        even = byte + (byte & 1)
        assert fp8.to_e4m3(x).tolist() == [even, byte, byte + 1]
        assert fp8.to_e4m3(-x).tolist() == [code | 0x80 for code in (even, byte, byte + 1)]


def test_beyond_the_largest_number() -> None:
    x = torch.tensor(
        [448.0, 449.0, 464.0, 480.0, 3e38, math.inf, -math.inf, math.nan, -math.nan, 1e-45, -0.0]
    )
    assert fp8.to_e4m3(x).tolist() == [0x7E] * 6 + [0xFE, 0x7F, 0x7F, 0x00, 0x80]


@st.composite
def block(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    """32 pairs of E4M3 bytes and an addend; the second half may cancel the first."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    highest = draw(st.sampled_from([1, 3, 8, 16]))
    nan = draw(st.sampled_from([0.0, 0.0, 0.0, 0.02]))

    def numbers() -> np.ndarray:
        exponents = (
            rng.integers(max(0, 16 - 2 * highest), 16, 32) if highest < 16 else rng.integers(0, 16, 32)
        )
        value = rng.integers(0, 2, 32) << 7 | exponents << 3 | rng.integers(0, 8, 32)
        value = np.where(value & 0x7F == 0x7F, 0x38, value)
        return np.where(rng.random(32) < nan, 0xFF, value)

    a, b = numbers(), numbers()
    if draw(st.booleans()):
        a[16:], b[16:] = a[:16] ^ 0x80, b[:16]
        a[16] ^= int(rng.integers(0, 2))
    c = int(rng.integers(0, 2)) << 31 | int(rng.integers(90, 150)) << 23 | int(rng.integers(0, 1 << 23))
    return (
        a.tolist(),
        b.tolist(),
        draw(st.sampled_from([c, c & ~0x3FF, 0, 0x80000000, 0x00000001, 0x7FC00000])),
    )


@settings(max_examples=40)
@given(st.lists(block(), min_size=1, max_size=6))
@example([([0x38] * 32, [0x38] * 32, 0), ([0x00] * 32, [0x7E] * 32, 0x80000000)])
@example([([0x7E] + [0x01] * 31, [0x7E] + [0x01] * 31, 0)])  # 31 terms too small to count
@example([([0x7E, 0xFE] + [0x01] * 30, [0x7E, 0x7E] + [0x01] * 30, 0)])  # nothing is left, not even they
def test_step(blocks: list[tuple[list[int], list[int], int]]) -> None:
    a, b = (torch.tensor([block[i] for block in blocks], dtype=torch.uint8) for i in range(2))
    got = fp8.step(a, b, bits.fp32([block[2] for block in blocks]))
    bits.assert_same(got, bits.fp32([exact_step(*block) for block in blocks]))
