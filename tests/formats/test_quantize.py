"""Quantising to MXFP4 against an exact derivation with fractions."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxfp4ref._choices import CONVENTIONS
from mxfp4ref.formats import mxfp4, quantize
from tests.helpers.bits import fp32
from tests.helpers.exact import E2M1, floor_log2, two_to, value_of
from tests.helpers.float_formats import round_to_bits
from tests.helpers.modes import MODES, forget_constants

CODES = range(16)


def ceil_log2(value: Fraction) -> int:
    exponent = floor_log2(value)
    return exponent if two_to(exponent) == value else exponent + 1


def scale_exponent(a: Fraction, rule: str) -> int:
    """The rules as their docstring puts them."""
    if a == 0:
        return -127
    if rule == "floor":
        exponent = floor_log2(a) - 2
    elif rule == "ceil":
        exponent = ceil_log2(a / 6)
    elif rule == "rceil":
        sixth = value_of(round_to_bits(Fraction(1, 6), torch.float32))
        quotient = value_of(round_to_bits(a * sixth, torch.float32))
        exponent = ceil_log2(quotient) if quotient else -127
    else:
        half = two_to(floor_log2(a) - 1)
        exponent = floor_log2((a / half + Fraction(1, 2)) // 1 * half) - 2
    return max(exponent, -127)


HALFWAY = [(low + high) / 2 for low, high in pairwise(E2M1)]


def nearest_code(magnitude: Fraction) -> int:
    """RN even; the parity of a code is that of its significand."""
    code = bisect_left(HALFWAY, magnitude)
    return code + (magnitude in HALFWAY and code % 2)


def quantized_row(bits: list[int], rule: str) -> tuple[int, list[int]]:
    magnitudes = [b & 0x7FFFFFFF for b in bits]
    if max(magnitudes) >= 0x7F800000:
        return 255, [0] * 32
    exponent = scale_exponent(value_of(max(magnitudes)), rule)
    codes = [nearest_code(value_of(m) / two_to(exponent)) for m in magnitudes]
    return exponent + 127, [code | (b >> 28 & 8) for code, b in zip(codes, bits, strict=True)]


def assert_quantized_row(bits: list[int], rule: str, packed: Tensor, scale: Tensor) -> None:
    byte, codes = quantized_row(bits, rule)
    assert scale.tolist() == [byte]
    assert mxfp4.unpack_codes(packed).tolist() == codes


MAGNITUDES = st.one_of(
    st.integers(0, 0x7F7FFFFF),
    st.integers(0, 0x01FFFFFF),  # around and below the least normal
    # Next to the half-way points and the steps of the scale rules, in every binade.
    st.builds(
        lambda exponent, eighths, offset: min(
            max((exponent << 23) + (eighths << 20) + offset, 0), 0x7F7FFFFF
        ),
        st.integers(0, 254),
        st.integers(0, 7),
        st.integers(-2, 2),
    ),
)


@st.composite
def rows_of_bits(draw: st.DrawFn) -> list[int]:
    """32 float32, half of them within reach of the group's largest."""
    largest = draw(MAGNITUDES)
    reach = st.integers(max(largest - (5 << 23), 0), largest)
    near = reach.map(lambda bits: bits & ~0xFFFFF) | reach  # often exactly half-way
    magnitudes = draw(st.lists(near | MAGNITUDES, min_size=32, max_size=32))
    return [magnitude | draw(st.booleans()) << 31 for magnitude in magnitudes]


@settings(max_examples=200)
@given(bits=rows_of_bits())
def test_quantize_against_fractions(bits: list[int]) -> None:
    for rule in quantize.SCALE_RULES:
        packed, scales = quantize.quantize(fp32(bits), rule=rule)
        assert_quantized_row(bits, rule, packed, scales)


@pytest.mark.parametrize("rule", quantize.SCALE_RULES)
def test_scale_of_every_step(rule: str) -> None:
    """The least and the next float32 on either side of every place where a rule could change its mind."""
    steps = [
        (exponent << 23) + fraction for exponent in range(255) for fraction in (0, 3 << 21, 1 << 22, 3 << 20)
    ]
    tiny = [3 << 21, 3 << 22, 1 << 20, 1 << 21, 1 << 22, 7 << 20]  # their like among the subnormals
    bits = sorted({min(max(s + offset, 0), 0x7F7FFFFF) for s in steps + tiny for offset in range(-3, 4)})
    values = torch.zeros(len(bits), 32)
    values[:, 5] = fp32(bits)
    _, scales = quantize.quantize(values, rule=rule)
    assert scales[:, 0].tolist() == [scale_exponent(value_of(b), rule) + 127 for b in bits]


@pytest.mark.parametrize("rule", quantize.SCALE_RULES)
def test_quantize_every_bf16(rule: str) -> None:
    """Each bf16 as the largest of its group, with a half of it: all 65,536."""
    bits = torch.arange(65536, dtype=torch.int32)
    values = torch.zeros(65536, 32, dtype=torch.bfloat16)
    values[:, 0] = (bits << 16).view(torch.float32).to(torch.bfloat16)
    values[:, 0].view(torch.int16).copy_(bits)
    packed, scales = quantize.quantize(values, rule=rule)
    codes = mxfp4.unpack_codes(packed)
    assert (codes[:, 1:] == 0).all()
    got = zip(scales[:, 0].tolist(), codes[:, 0].tolist(), strict=True)
    for b, (byte, code) in enumerate(got):
        if b & 0x7FFF >= 0x7F80:
            assert (byte, code) == (255, 0)
        elif b < 0x8000:
            value = value_of(b << 16)
            exponent = scale_exponent(value, rule)
            assert (byte, code) == (exponent + 127, nearest_code(value / two_to(exponent)))
    assert torch.equal(scales[:0x8000], scales[0x8000:])
    finite = scales[:0x8000, 0] != 255
    assert torch.equal(codes[0x8000:, 0][finite], codes[:0x8000, 0][finite] | 8)


def test_elements_ties_and_saturation() -> None:
    values = torch.tensor(
        [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.5, 7.75, 0.2500001, 0.7499999, 6.0, -0.0, 0.1]
    )
    group = torch.zeros(32)
    group[: len(values)] = values
    group[14:28] = -values
    packed, scales = quantize.quantize(group)
    assert scales.tolist() == [127]
    codes = [0, 2, 2, 4, 4, 6, 6, 7, 7, 1, 1, 7, 8, 0]
    assert mxfp4.unpack_codes(packed).tolist() == [*codes, *(code ^ 8 for code in codes), 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("largest", "exponents"),
    [  # floor, ceil, rceil, even
        (4.0, (0, 0, 0, 0)),
        (6.0, (0, 0, 0, 0)),
        (6.5, (0, 1, 1, 0)),
        (7.0, (0, 1, 1, 1)),
        (8.0, (1, 1, 1, 1)),
        (1.0, (-2, -2, -2, -2)),
        (0.0, (-127, -127, -127, -127)),
        (2.0**-149, (-127, -127, -127, -127)),
        (6 * 2.0**-127 + 2.0**-148, (-127, -126, -127, -127)),
        (6 * 2.0**-127 + 2.0**-147, (-127, -126, -126, -127)),
        (float(torch.finfo(torch.float32).max), (125, 126, 126, 126)),
    ],
)
def test_rules_by_hand(largest: float, exponents: tuple[int, ...]) -> None:
    values = torch.zeros(32)
    values[7] = -largest
    for rule, exponent in zip(("floor", "ceil", "rceil", "even"), exponents, strict=True):
        assert quantize.quantize(values, rule=rule)[1].item() == exponent + 127, rule


@pytest.mark.parametrize("rule", quantize.SCALE_RULES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_not_finite(bad: float, rule: str, dtype: torch.dtype) -> None:
    values = torch.arange(-48.0, 48.0).view(3, 32).to(dtype)
    expected = quantize.quantize(values, rule=rule)
    values[1, 31] = bad
    packed, scales = quantize.quantize(values, rule=rule)
    assert scales[1] == 255
    assert (packed[1] == 0).all()
    for convention in CONVENTIONS:
        assert mxfp4.dequantize(packed, scales, convention=convention)[1].isnan().all()
    assert torch.equal(packed[::2], expected[0][::2])  # the other groups do not notice
    assert torch.equal(scales[::2], expected[1][::2])


def test_float16_like_float32() -> None:
    values = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16).view(-1, 32)
    for got, expected in zip(
        quantize.quantize(values), quantize.quantize(values.to(torch.float32)), strict=True
    ):
        assert torch.equal(got, expected)


def test_zeros_keep_their_signs() -> None:
    values = torch.zeros(2, 32)
    values[:, ::3] = -0.0
    values[1, 1] = 6.0
    values[1, 2] = -0.01
    packed, scales = quantize.quantize(values)
    assert scales.tolist() == [[0], [127]]
    restored = mxfp4.dequantize(packed, scales)
    assert torch.equal(restored.signbit(), values.signbit())


@given(byte=st.integers(0, 252), codes=st.lists(st.sampled_from(CODES), min_size=32, max_size=32))
def test_round_trip(byte: int, codes: list[int]) -> None:
    """Quantising dequantised values changes no bit of them: no rule takes a scale too small or too large."""
    packed = mxfp4.pack_codes(torch.tensor(codes, dtype=torch.uint8))
    values = mxfp4.dequantize(packed, torch.tensor([byte], dtype=torch.uint8), dtype=torch.float32)
    for rule in quantize.SCALE_RULES:
        again = quantize.quantize(values, rule=rule)
        restored = mxfp4.dequantize(*again, dtype=torch.float32)
        assert torch.equal(restored.view(torch.int32), values.view(torch.int32))
        # Once more changes no byte either.
        for first, second in zip(again, quantize.quantize(restored, rule=rule), strict=True):
            assert torch.equal(first, second)


def test_quantize_many_groups() -> None:
    """More than one chunk, and any stride: like group by group."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(mxfp4.CHUNK_GROUPS + 5, 32, generator=generator)
    packed, scales = quantize.quantize(values)
    for row in (0, 1, mxfp4.CHUNK_GROUPS - 1, mxfp4.CHUNK_GROUPS, mxfp4.CHUNK_GROUPS + 4):
        alone = quantize.quantize(values[row])
        assert torch.equal(packed[row], alone[0])
        assert torch.equal(scales[row], alone[1])
    strided = values[:8].t().contiguous().t()
    assert torch.equal(quantize.quantize(strided)[0], packed[:8])


SUBNORMALS = torch.arange(1, 0x01000000, 65537, dtype=torch.int32).repeat(32)[: 32 * 256].view(256, 32)


@pytest.mark.parametrize(
    "mode", ["flushed subnormals", "default float64", "default device", "inference mode", "one thread"]
)
def test_modes_change_nothing(mode: str) -> None:
    """Tables made in the mode included, and afterwards."""
    forget_constants()
    scales = torch.arange(255, dtype=torch.uint8)[:, None]
    with MODES[mode]():
        quantized = {
            rule: quantize.quantize(SUBNORMALS.view(torch.float32), rule=rule)
            for rule in quantize.SCALE_RULES
        }
        powers = quantize.fp32_to_ue8m0(mxfp4.decode_ue8m0(scales))
    for rule, (got_packed, got_scales) in quantized.items():
        for row in range(0, 256, 51):
            assert_quantized_row(SUBNORMALS[row].tolist(), rule, got_packed[row], got_scales[row])
    assert powers.flatten().tolist() == list(range(255))
    forget_constants()


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (2, 0, 32)])
def test_quantize_empty(shape: tuple[int, ...]) -> None:
    assert [t.shape[-1] for t in quantize.quantize(torch.zeros(shape))] == [shape[-1] // 2, shape[-1] // 32]


# --- float32 scales -------------------------------------------------------------------------------------------


def test_fp32_to_ue8m0_all_powers() -> None:
    bits = [1 << 22, *(exponent << 23 for exponent in range(1, 255))]
    got = quantize.fp32_to_ue8m0(fp32(bits).view(5, 51))
    assert got.dtype == torch.uint8
    assert got.flatten().tolist() == list(range(255))
    assert quantize.fp32_to_ue8m0(torch.tensor(0.5)).item() == 126
    assert quantize.fp32_to_ue8m0(torch.empty(0, 3)).shape == (0, 3)


@pytest.mark.parametrize(
    "bits",
    [
        0,
        0x80000000,
        0x7F800000,
        0xFF800000,
        0x7FC00000,
        0xBF800000,
        0x3F800001,
        0x3FFFFFFF,
        1,
        1 << 21,
        3 << 21,
    ],
)
def test_fp32_to_ue8m0_refuses(bits: int) -> None:
    values = torch.ones(3, 4)
    values[2, 1] = fp32([bits])[0]
    with pytest.raises(ValueError, match=rf"values: .* got 1 of 12 .*\[2, 1\] = .*0x{bits:08X}"):
        quantize.fp32_to_ue8m0(values)


def test_fp32_to_ue8m0_counts() -> None:
    with pytest.raises(
        ValueError,
        match=r"got 100 of 100 .*\[0\] = 0\.300000012 .*\[7\] = 0\.300000012 \(0x3E99999A\), \.\.\.$",
    ):
        quantize.fp32_to_ue8m0(torch.full((100,), 0.3))


@given(st.integers(0, 0xFFFFFFFF))
def test_fp32_to_ue8m0_is_lossless_or_refuses(bits: int) -> None:
    value = fp32([bits])
    try:
        byte = quantize.fp32_to_ue8m0(value)
    except ValueError:
        with np.errstate(all="ignore"):
            theirs = value.numpy().astype(ml_dtypes.float8_e8m0fnu).astype(np.float32)
        assert theirs[0] != value.item()
    else:
        assert torch.equal(mxfp4.decode_ue8m0(byte).view(torch.int32), value.view(torch.int32))


# --- Refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: quantize.quantize(torch.zeros(2, 33)),
            ValueError,
            r"values: .* divisible by 32, got \[2, 33\]",
        ),
        (lambda: quantize.quantize(torch.tensor(1.0)), ValueError, "values: "),
        (
            lambda: quantize.quantize(torch.zeros(32, dtype=torch.float64)),
            TypeError,
            "values: .* got float64",
        ),
        (lambda: quantize.quantize(torch.zeros(32), rule="round"), ValueError, "rule: .* got 'round'"),
        (lambda: quantize.fp32_to_ue8m0(torch.zeros(2).double()), TypeError, "values: .* got float64"),
    ],
)
def test_refusals(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
