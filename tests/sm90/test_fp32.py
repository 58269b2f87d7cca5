"""Single float32 operations against exact fractions (`docs/arithmetic.md`, section 4)."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from mxfp4ref.sm90 import fp32
from tests.helpers import bits, exact

OPERATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., int], int]] = {
    "add": (fp32.add, exact.add, 2),
    "mul": (fp32.mul, exact.mul, 2),
    "fma": (fp32.fma, exact.fma, 3),
    "minimum": (fp32.minimum, exact.minimum, 2),
    "maximum": (fp32.maximum, exact.maximum, 2),
}

SPECIAL = (
    0x00000000, 0x00000001, 0x00400000, 0x007FFFFF,  # zero, subnormals
    0x00800000, 0x00800001, 0x00FFFFFF, 0x01000000,  # the smallest normals
    0x1F800000, 0x1FFFFFFF, 0x20000000, 0x20000001,  # around 2^-64 and 2^-63: squares at the lower end
    0x33000000, 0x33800000, 0x33800001, 0x34000000,  # around 2^-24: half a unit of 1
    0x3F000000, 0x3F7FFFFF, 0x3F800000, 0x3F800001, 0x3FC00000,  # around 1
    0x4B000000, 0x4B7FFFFF, 0x4B800000, 0x4B800001,  # around 2^24
    0x5F000000, 0x5F7FFFFF, 0x5F800000,  # around 2^64: squares at the upper end
    0x7F000000, 0x7F7FFFFE, 0x7F7FFFFF,  # the largest
    0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF,  # Inf, NaN
)  # fmt: skip

any_bits = st.integers(0, 0xFFFFFFFF)
# Few significant bits make ties, nearby exponents make sums whose operands overlap in part.
few_bits = st.builds(
    lambda sign, exponent, fraction, shift: sign << 31 | exponent << 23 | fraction << shift & 0x7FFFFF,
    st.integers(0, 1),
    st.one_of(st.integers(0, 255), st.integers(100, 154), st.integers(0, 30)),
    st.integers(0, 255),
    st.integers(0, 22),
)
special = st.builds(
    lambda sign, magnitude: sign << 31 | magnitude, st.integers(0, 1), st.sampled_from(SPECIAL)
)
operand = st.one_of(any_bits, few_bits, special)


def check(name: str, operands: list[tuple[int, ...]]) -> None:
    operation, transcription, arity = OPERATIONS[name]
    columns = [bits.fp32([row[i] for row in operands]) for i in range(arity)]
    expected = bits.fp32([transcription(*row[:arity]) for row in operands])
    bits.assert_same(operation(*columns), expected)


@pytest.mark.parametrize("name", OPERATIONS)
@given(rows=st.lists(st.tuples(operand, operand, operand), min_size=1, max_size=24))
def test_operation(name: str, rows: list[tuple[int, int, int]]) -> None:
    check(name, rows)


@pytest.mark.parametrize("name", ["add", "mul", "minimum", "maximum"])
def test_special_pairs(name: str) -> None:
    signed = [sign | magnitude for magnitude in SPECIAL for sign in (0, exact.SIGN32)]
    check(name, [(a, b) for a in signed for b in signed])


def test_special_triples() -> None:
    signed = [sign | magnitude for magnitude in SPECIAL[::3] for sign in (0, exact.SIGN32)]
    check("fma", [(a, b, c) for a in signed for b in signed for c in signed])


def of_value(value: Fraction) -> int:
    result = exact.rounded(value)
    assert exact.value_of(result) == value
    return result


def test_double_rounding_witness() -> None:
    """The float64 sum of these is a tie of float32; the exact sum is not."""
    a, b, c = 16519105 * exact.two_to(-23), 130 * exact.two_to(-7), Fraction(1 << 25)
    twice = float(np.float32(np.float64(float(a)) * np.float64(float(b)) + np.float64(float(c))))
    operands = tuple(of_value(value) for value in (a, b, c))
    once = exact.value_of(exact.fma(*operands))
    assert Fraction(twice) != once
    check("fma", [operands, (operands[0] ^ exact.SIGN32, operands[1], operands[2] ^ exact.SIGN32)])


@given(
    high=st.integers(1 << 23, (1 << 24) - 1),
    exponent=st.integers(-60, 60),
    distance=st.integers(24, 60),
    factors=st.tuples(st.integers(1, 255), st.integers(1, (1 << 24) - 1)),
    signs=st.tuples(st.booleans(), st.booleans()),
)
@example(high=1 << 23, exponent=0, distance=60, factors=(1, 1), signs=(False, True))
def test_fma_a_hair_beside_a_tie(
    high: int, exponent: int, distance: int, factors: tuple[int, int], signs: tuple[bool, bool]
) -> None:
    """c is large, the product is half a unit of c, more or less a far smaller part of its own."""
    c = high * exact.two_to(exponent)
    half = exact.two_to(exponent - 1)
    for a in (half * (1 + exact.two_to(-23)), half, half * (1 - exact.two_to(-24))):
        for b in (Fraction(1), 1 + exact.two_to(-23), 1 - exact.two_to(-24)):
            row = [of_value(-a if signs[0] else a), of_value(b), of_value(-c if signs[1] else c)]
            check("fma", [tuple(row)])
    # The same with all 48 bits of a product: 2^46 + 1 and 2^46 - 1 are products of two 24-bit numbers.
    root = 1 << 23
    for first, second in ((root + 1 - (1 << 12), root + 1 + (1 << 12)), (root - 1, root + 1)):
        factors_of_half = first * half / root, Fraction(second, root)
        rows = [tuple(of_value(v) for v in (*factors_of_half, addend)) for addend in (c, c - 2 * half, -c)]
        check("fma", [*rows, *((a ^ exact.SIGN32, b, c_bits) for a, b, c_bits in rows)])
    # And a product of many bits far below c.
    small = factors[0] * exact.two_to(exponent - distance - 8)
    row = [of_value(-small if signs[0] else small), of_value(Fraction(factors[1])), of_value(c)]
    check("fma", [tuple(row)])


def test_flush_is_decided_after_rounding_with_unlimited_exponent() -> None:
    """2^-126 (1 - 2^-24) becomes 0, 2^-126 (1 - 2^-25) and above 2^-126."""
    zero, least = 0, 0x00800000
    # (1 - 2^-24) * 2^-126, (1 - 2^-24)(1 + 2^-23) > 1, and (1 - 2^-12)^2 ...
    below = 0x3F7FFFFF  # 1 - 2^-24
    bits.assert_same(fp32.mul(bits.fp32([below]), bits.fp32([least])), bits.fp32([zero]))
    bits.assert_same(fp32.mul(bits.fp32([below]), bits.fp32([least + 1])), bits.fp32([least]))
    # 2^-126 (1 - 2^-25) as an FMA: 2^-126 - 2^-75 * 2^-76
    row = (of_value(-exact.two_to(-75)), of_value(exact.two_to(-76)), least)
    assert exact.fma(*row) == least
    row_above = (of_value(-exact.two_to(-74)), of_value(exact.two_to(-76)), least)
    assert exact.fma(*row_above) == zero
    check("fma", [row, row_above])


fraction_bits = st.one_of(st.integers(0, 16), st.integers(0x7FFFF0, 0x7FFFFF), st.integers(0, 0x7FFFFF))
sign_bit = st.sampled_from([0, exact.SIGN32])


@pytest.mark.parametrize("name", ["add", "mul", "fma"])
@given(
    rows=st.lists(
        st.tuples(
            st.tuples(sign_bit, sign_bit, sign_bit),
            st.tuples(fraction_bits, fraction_bits, fraction_bits),
            st.tuples(st.integers(-129, -123), st.integers(-126, -101), st.integers(0, 100)),
        ),
        min_size=4,
        max_size=8,
    )
)
def test_lower_end(name: str, rows: list[tuple[tuple[int, ...], ...]]) -> None:
    """Results around 2^-126, where rounding and flushing meet."""
    operands = []
    for signs, fractions, (exponent, of_addend, split) in rows:
        exponents = (exponent, of_addend) if name == "add" else (-split, exponent + split, of_addend)
        operands.append(
            tuple(
                sign | max(e + 127, 0) << 23 | fraction
                for sign, e, fraction in zip(signs, exponents, fractions, strict=False)
            )
        )
    check(name, operands)


@given(values=st.lists(st.tuples(st.integers(-(1 << 60), 1 << 60), st.integers(-330, 140)), min_size=1))
def test_round_fp64(values: list[tuple[int, int]]) -> None:
    numbers = [Fraction(float(value)) * exact.two_to(exponent) for value, exponent in values]
    total = torch.tensor([float(number) for number in numbers], dtype=torch.float64)
    expected = [exact.rounded(number) for number in numbers]
    bits.assert_same(fp32.round_fp64(total), bits.fp32(expected))


def test_flush() -> None:
    magnitudes = np.array(SPECIAL)
    patterns = np.concatenate([magnitudes, magnitudes | exact.SIGN32])
    expected = [exact.NAN32 if exact.is_nan(p) else exact.flushed(p) for p in patterns.tolist()]
    bits.assert_same(fp32.flush(bits.fp32(patterns)), bits.fp32(expected))


@pytest.mark.parametrize("lower", [0x0000, 0x0001, 0x4000, 0x7FFF, 0x8000, 0x8001, 0xC000, 0xFFFF])
def test_to_bf16_of_every_upper_half(lower: int) -> None:
    upper = np.arange(1 << 16)
    patterns = upper << 16 | lower
    magnitude = patterns & 0x7FFFFFFF
    # Patterns count in units of the last place; rint is to nearest, ties to even, and 2^-16 is exact.
    expected = np.rint(magnitude / 65536).astype(np.int64) | upper & 0x8000
    expected[magnitude > exact.INF32] = exact.NAN16
    bits.assert_same(fp32.to_bf16(bits.fp32(patterns)), bits.bf16(expected))


@given(st.lists(operand, min_size=1, max_size=64))
def test_to_bf16(patterns: list[int]) -> None:
    expected = bits.bf16([exact.to_bf16(p) for p in patterns])
    bits.assert_same(fp32.to_bf16(bits.fp32(patterns)), expected)


def test_fp16_there_and_back() -> None:
    """Every fp16 number is widened exactly; float32 numbers around each and halfway to the next are rounded right."""
    half = torch.arange(1 << 16).to(torch.int16).view(torch.float16)
    numbers = ~half.isnan()
    wide = fp32.widen(half)
    bits.assert_same(wide[numbers], half.float()[numbers])
    assert bool(wide[~numbers].isnan().all())
    assert bool((fp32.to_fp16(wide[~numbers]).view(torch.int16) == fp32.FP16_NAN).all())
    around = wide[numbers].view(torch.int32)[:, None] + torch.tensor([-1, 0, 1, 0xFFF, 0x1000, 0x1001])
    around = torch.cat(
        (around.flatten(), torch.tensor([0, 1, 0x007FFFFF, 0x477FEFFF, 0x477FF000, 0x7F7FFFFF]))
    )
    x = torch.cat((around, around ^ -(1 << 31))).to(torch.int32).view(torch.float32)
    x = x[~x.isnan()]
    bits.assert_same(fp32.to_fp16(x), x.to(torch.float16))


ALL_BF16 = bits.bf16(np.arange(1 << 16))


def test_widen_every_bf16() -> None:
    assert np.array_equal(bits.bits_of(fp32.widen(ALL_BF16)), np.arange(1 << 16) << 16)


def test_widen_leaves_float32_alone() -> None:
    x = bits.fp32(SPECIAL)
    assert fp32.widen(x) is x


def test_bf16_to_fp64_of_every_bf16() -> None:
    wide = fp32.bf16_to_fp64(ALL_BF16)
    assert wide.dtype == torch.float64
    assert wide.isnan().sum() == 2 * 127
    for pattern, value in enumerate(wide.tolist()):
        as_fp32 = pattern << 16
        if exact.is_nan(as_fp32):
            assert value != value
        elif exact.is_inf(as_fp32):
            assert value == (-np.inf if exact.is_negative(as_fp32) else np.inf)
        else:
            assert Fraction(value) == exact.value_of(as_fp32)
            assert np.signbit(value) == exact.is_negative(as_fp32)


def test_machine_modes_do_not_matter() -> None:
    """Flushing of subnormals by the CPU, the default dtype and inference mode change no bit."""
    rng = np.random.default_rng(5)
    a, b, c = (bits.fp32(np.concatenate([rng.integers(0, 1 << 32, 4096), SPECIAL * 8])) for _ in range(3))
    a = a[torch.randperm(len(a), generator=torch.Generator().manual_seed(6))]
    tiny = bits.fp32(rng.integers(0, 1 << 24, len(a)))
    bf16 = bits.bf16(rng.integers(0, 1 << 16, 4096))

    def results() -> list[Tensor]:
        return [
            fp32.add(a, b),
            fp32.add(a, tiny),
            fp32.mul(a, b),
            fp32.mul(tiny, c),
            fp32.fma(a, b, c),
            fp32.minimum(a, tiny),
            fp32.maximum(tiny, b),
            fp32.flush(tiny),
            fp32.to_bf16(tiny),
            fp32.widen(bf16),
            fp32.bf16_to_fp64(bf16),
        ]

    before = results()
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        torch.set_default_dtype(torch.float64)
        with torch.inference_mode(), torch.device("meta"):
            after = results()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_flush_denormal(False)
    for got, expected in zip(after, before, strict=True):
        bits.assert_same(got, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_bits() -> None:
    rng = np.random.default_rng(7)
    a, b, c = (bits.fp32(rng.integers(0, 1 << 32, 1 << 18)) for _ in range(3))
    for operation, _, arity in OPERATIONS.values():
        operands = (a, b, c)[:arity]
        bits.assert_same(operation(*(x.cuda() for x in operands)).cpu(), operation(*operands))
    bits.assert_same(fp32.to_bf16(a.cuda()).cpu(), fp32.to_bf16(a))
    bits.assert_same(fp32.bf16_to_fp64(ALL_BF16.cuda()).cpu(), fp32.bf16_to_fp64(ALL_BF16))
