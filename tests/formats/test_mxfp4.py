"""MXFP4 bytes against an exact derivation with fractions, against ml_dtypes, and against torch's own E8M0."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from fractions import Fraction
from functools import cache

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxfp4ref.formats import mxfp4, quantize

CODES = range(16)
BYTES = range(256)
# Significand bits with the leading one, largest exponent, integer type of the same width.
FORMATS = {
    torch.bfloat16: (8, 127, torch.int16),
    torch.float32: (24, 127, torch.int32),
    torch.float64: (53, 1023, torch.int64),
}
DTYPES = sorted(FORMATS, key=str)
# OCP MX 1.0, table 5, written out once more.
E2M1 = [Fraction(n, 2) for n in (0, 1, 2, 3, 4, 6, 8, 12)]


# --- An independent derivation, in fractions ------------------------------------------------------------------


def fraction_of(bits: int) -> Fraction:
    """The magnitude of finite float32 bits."""
    exponent, fraction = bits >> 23 & 0xFF, bits & 0x7FFFFF
    if exponent == 0:
        return Fraction(fraction, 1 << 149)
    return Fraction(fraction + (1 << 23)) * Fraction(2) ** (exponent - 150)


def floor_log2(value: Fraction) -> int:
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= value else exponent - 1


def round_to_bits(value: Fraction, dtype: torch.dtype) -> int:
    """RN even of a non-negative fraction."""
    digits, largest, _ = FORMATS[dtype]
    exponent = max(floor_log2(value), 1 - largest) if value else 1 - largest
    unit = Fraction(2) ** (exponent - digits + 1)
    steps = value // unit
    rest = value - steps * unit
    if 2 * rest > unit or (2 * rest == unit and steps % 2):
        steps += 1
    if steps * unit >= Fraction(2) ** (largest + 1):
        return 2 * largest + 1 << digits - 1
    if steps == 1 << digits:
        steps, exponent = steps // 2, exponent + 1
    if steps < 1 << digits - 1:
        return int(steps)
    return (exponent + largest << digits - 1) + int(steps) - (1 << digits - 1)


@cache
def expected_bits(byte: int, code: int, convention: str, dtype: torch.dtype) -> int:
    digits, largest, integer = FORMATS[dtype]
    infinity = 2 * largest + 1 << digits - 1
    magnitude = E2M1[code & 7]
    sign = (code >> 3) << (torch.iinfo(integer).bits - 1)
    if byte == 255:
        if convention == "ocp" or magnitude == 0:
            return infinity | (1 << digits - 1) - 1
        return sign | infinity
    scale = Fraction(0) if (byte, convention) == (0, "sm90") else Fraction(2) ** (byte - 127)
    return sign | round_to_bits(magnitude * scale, dtype)


def unsigned_bits(values: Tensor) -> list[int]:
    integer = FORMATS[values.dtype][2]
    mask = (1 << torch.iinfo(integer).bits) - 1
    return [bits & mask for bits in values.flatten().view(integer).tolist()]


@cache
def all_products(convention: str, dtype: torch.dtype) -> Tensor:
    """[256, 16]: each scale byte with each code, all 256 code bytes being used."""
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)  # a group of 16 bytes for each high nibble
    packed = codes.repeat(256, 1, 1)
    scales = torch.arange(256, dtype=torch.uint8)[:, None, None].expand(256, 16, 1)
    values = mxfp4.dequantize(packed, scales, convention=convention, dtype=dtype)
    assert values.shape == (256, 16, 32)
    integer = FORMATS[dtype][2]
    low, high = values.view(integer)[..., 0::2], values.view(integer)[..., 1::2]
    assert (low == low[:, :1]).all()  # the even element depends on the low nibble alone
    assert (high == high[..., :1]).all()
    assert torch.equal(low[:, 0], high[..., 0])
    return values[:, 0, 0::2].contiguous()


# --- Decoding -------------------------------------------------------------------------------------------------


def test_e2m1_values() -> None:
    assert [abs(Fraction(value)) for value in mxfp4.E2M1_VALUES] == E2M1 * 2
    assert np.signbit(mxfp4.E2M1_VALUES).tolist() == [False] * 8 + [True] * 8
    theirs = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    assert theirs.tobytes() == np.array(mxfp4.E2M1_VALUES).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("convention", ["ocp", "sm90"])
def test_dequantize_all(convention: str, dtype: torch.dtype) -> None:
    got = unsigned_bits(all_products(convention, dtype))
    expected = [
        expected_bits(byte, code, convention, dtype) for byte, code in itertools.product(BYTES, CODES)
    ]
    assert got == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("convention", ["ocp", "sm90"])
def test_decode_ue8m0_all(convention: str, dtype: torch.dtype) -> None:
    scales = torch.arange(256, dtype=torch.uint8)
    got = mxfp4.decode_ue8m0(scales, convention, dtype)
    code_of_one = 2
    assert unsigned_bits(got) == [expected_bits(byte, code_of_one, convention, dtype) for byte in BYTES]
    again = mxfp4.decode_ue8m0(scales.view(torch.float8_e8m0fnu).view(16, 16), convention, dtype)
    assert torch.equal(again.view(torch.uint8), got.view(16, 16).view(torch.uint8))


def test_ends_by_hand() -> None:
    """The few values that people get wrong, as literals."""
    ocp, sm90 = (all_products(convention, torch.bfloat16).view(torch.int16) for convention in ("ocp", "sm90"))
    assert ocp[0, 1] == 0x0020  # 2^-128 is a bf16 subnormal, and stays
    assert ocp[0, 2] == 0x0040
    assert ocp[0, 4] == 0x0080  # 2^-126, the least normal
    assert ocp[254, 3] == 0x7F40  # 1.5 * 2^127
    assert ocp[254, 4] == 0x7F80  # 2^128 is Inf
    assert ocp[252, 7] == 0x7F40
    assert (ocp[255] == 0x7FFF).all()
    assert (ocp[1:255] == sm90[1:255]).all()
    assert sm90[0].tolist() == [0] * 8 + [-0x8000] * 8
    assert sm90[255].tolist() == [0x7FFF] + [0x7F80] * 7 + [0x7FFF] + [0xFF80 - 0x10000] * 7


def test_against_ml_dtypes() -> None:
    """float8_e8m0fnu and float4_e2m1fn follow the standard, and float64 holds all products."""
    scales = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    codes = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    exact = scales[:, None] * codes
    got = all_products("ocp", torch.float64).numpy()
    assert np.isnan(got[255]).all()
    assert np.isnan(exact[255]).all()
    assert got[:255].tobytes() == exact[:255].tobytes()
    with np.errstate(over="ignore"):
        rounded = exact.astype(ml_dtypes.bfloat16)
    got_bf16 = all_products("ocp", torch.bfloat16).view(torch.int16).numpy()
    assert (got_bf16[:255] == rounded.view(np.int16)[:255]).all()


def test_against_torch_e8m0() -> None:
    scales = torch.arange(256, dtype=torch.uint8)
    theirs = scales.view(torch.float8_e8m0fnu).to(torch.float32)
    got = mxfp4.decode_ue8m0(scales)
    assert theirs[255].isnan()
    assert got[255].isnan()
    assert torch.equal(got[:255].view(torch.int32), theirs[:255].view(torch.int32))


def test_even_element_is_the_low_nibble() -> None:
    packed = torch.tensor([[0x21, 0xF0]], dtype=torch.uint8)
    assert mxfp4.unpack_codes(packed).tolist() == [[1, 2, 0, 15]]
    assert mxfp4.pack_codes(torch.tensor([1, 2, 0, 15], dtype=torch.uint8)).tolist() == [0x21, 0xF0]


def test_pack_is_the_inverse_of_unpack() -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(2, 4, 32)
    codes = mxfp4.unpack_codes(packed)
    assert codes.shape == (2, 4, 64)
    assert torch.equal(mxfp4.pack_codes(codes), packed)
    assert torch.equal(mxfp4.unpack_codes(packed.view(torch.int8)), codes)
    assert torch.equal(mxfp4.unpack_codes(packed.view(torch.float4_e2m1fn_x2)), codes)


# --- Dequantise as a function of tensors ----------------------------------------------------------------------


def random_blocks(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 256, (*shape[:-1], shape[-1] // 32), dtype=torch.uint8, generator=generator)
    return packed, scales


def slow_dequantize(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Element by element from the table of all products (itself tested exhaustively above)."""
    codes = mxfp4.unpack_codes(packed).to(torch.int64)
    byte = scales.to(torch.int64).repeat_interleave(32, dim=-1)
    return all_products("sm90", dtype)[byte, codes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(32,), (3, 96), (2, 5, 64), (7, 32 * 13), (1, 32 * (mxfp4.CHUNK_GROUPS + 1)), (3, 32 * 65533)]
)
def test_dequantize_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if dtype != torch.bfloat16 and shape[-1] > 1000:
        shape = (*shape[:-1], 32 * 65)
    packed, scales = random_blocks(*shape)
    expected = slow_dequantize(packed, scales, dtype).view(torch.uint8)
    got = mxfp4.dequantize(packed, scales, convention="sm90", dtype=dtype)
    assert got.dtype == dtype
    assert got.shape == shape
    assert torch.equal(got.view(torch.uint8), expected)
    out = torch.full(shape, 7.0, dtype=dtype)
    assert mxfp4.dequantize(packed, scales, convention="sm90", dtype=dtype, out=out) is out
    assert torch.equal(out.view(torch.uint8), expected)


def test_dequantize_takes_the_bytes_under_any_name_and_stride() -> None:
    packed, scales = random_blocks(6, 10, 64)
    expected = mxfp4.dequantize(packed, scales).view(torch.int16)
    for p, s in (
        (packed.view(torch.int8), scales.view(torch.float8_e8m0fnu)),
        (packed.view(torch.float4_e2m1fn_x2), scales),
        (
            packed.transpose(0, 1).contiguous().transpose(0, 1),
            scales.transpose(0, 1).contiguous().transpose(0, 1),
        ),
        (packed.repeat_interleave(2, dim=-1)[..., ::2], scales.repeat_interleave(2, dim=-1)[..., ::2]),
    ):
        assert torch.equal(mxfp4.dequantize(p, s).view(torch.int16), expected)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (2, 0, 32)])
def test_dequantize_empty(shape: tuple[int, ...]) -> None:
    packed, scales = random_blocks(*shape)
    assert mxfp4.dequantize(packed, scales).shape == shape
    assert [t.shape[-1] for t in quantize.quantize(torch.zeros(shape))] == [shape[-1] // 2, shape[-1] // 32]


@pytest.fixture(params=["flush_denormal", "default_dtype", "default_device", "inference_mode", "one_thread"])
def hostile_state(request: pytest.FixtureRequest) -> Iterator[None]:
    threads = torch.get_num_threads()
    try:
        if request.param == "flush_denormal":
            assert torch.set_flush_denormal(True)
        elif request.param == "default_dtype":
            torch.set_default_dtype(torch.float64)
        elif request.param == "default_device":
            torch.set_default_device("meta")
        elif request.param == "one_thread":
            torch.set_num_threads(1)
        with torch.inference_mode(request.param == "inference_mode"):
            yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        torch.set_num_threads(threads)


SUBNORMALS = torch.arange(1, 0x01000000, 65537, dtype=torch.int32).repeat(32)[: 32 * 256].view(256, 32)


@pytest.mark.usefixtures("hostile_state")
def test_global_state_changes_nothing() -> None:
    def clear() -> None:
        for table in (mxfp4._patterns, mxfp4._scale_table, mxfp4.pair_table, quantize.step_tables):
            table.cache_clear()

    clear()
    scales = torch.arange(256, dtype=torch.uint8, device="cpu")[:, None]
    packed = torch.arange(256, dtype=torch.uint8, device="cpu")[:, None].expand(256, 16)
    for convention, dtype in itertools.product(mxfp4.CONVENTIONS, DTYPES):
        got = mxfp4.dequantize(packed.roll(1, 0), scales, convention=convention, dtype=dtype)
        expected = [
            expected_bits(byte, (byte - 1) % 256 >> 4 * half & 15, convention, dtype)
            for byte in BYTES
            for half in (0, 1)
        ]
        assert unsigned_bits(got[:, :2]) == expected
        decoded = mxfp4.decode_ue8m0(scales, convention, dtype)
        assert unsigned_bits(decoded) == [expected_bits(byte, 2, convention, dtype) for byte in BYTES]
    for rule in quantize.SCALE_RULES:
        got_packed, got_scales = quantize.quantize(SUBNORMALS.view(torch.float32), rule=rule)
        for row in range(0, 256, 51):
            assert_quantized_row(SUBNORMALS[row].tolist(), rule, got_packed[row], got_scales[row])
    assert quantize.fp32_to_ue8m0(mxfp4.decode_ue8m0(scales[:255])).flatten().tolist() == list(range(255))
    clear()


# --- Quantise -------------------------------------------------------------------------------------------------


def ceil_log2(value: Fraction) -> int:
    exponent = floor_log2(value)
    return exponent if Fraction(2) ** exponent == value else exponent + 1


def scale_exponent(a: Fraction, rule: str) -> int:
    """The rules as their docstring puts them."""
    if a == 0:
        return -127
    if rule == "floor":
        exponent = floor_log2(a) - 2
    elif rule == "ceil":
        exponent = ceil_log2(a / 6)
    elif rule == "rceil":
        sixth = fraction_of(round_to_bits(Fraction(1, 6), torch.float32))
        quotient = fraction_of(round_to_bits(a * sixth, torch.float32))
        exponent = ceil_log2(quotient) if quotient else -127
    else:
        half = Fraction(2) ** (floor_log2(a) - 1)
        exponent = floor_log2((a / half + Fraction(1, 2)) // 1 * half) - 2
    return max(exponent, -127)


def nearest_code(magnitude: Fraction) -> int:
    """RN even by distance; the parity of a code is that of its significand."""
    return min(range(8), key=lambda code: (abs(E2M1[code] - magnitude), code % 2))


def quantized_row(bits: list[int], rule: str) -> tuple[int, list[int]]:
    magnitudes = [b & 0x7FFFFFFF for b in bits]
    if max(magnitudes) >= 0x7F800000:
        return 255, [0] * 32
    exponent = scale_exponent(fraction_of(max(magnitudes)), rule)
    codes = [nearest_code(fraction_of(m) / Fraction(2) ** exponent) for m in magnitudes]
    return exponent + 127, [code | (b >> 28 & 8) for code, b in zip(codes, bits, strict=True)]


def assert_quantized_row(bits: list[int], rule: str, packed: Tensor, scale: Tensor) -> None:
    byte, codes = quantized_row(bits, rule)
    assert scale.tolist() == [byte]
    assert mxfp4.unpack_codes(packed).tolist() == codes


def to_float32(bits: list[int]) -> Tensor:
    return torch.tensor([b - (1 << 32) if b >> 31 else b for b in bits], dtype=torch.int32).view(
        torch.float32
    )


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


@pytest.mark.parametrize("rule", quantize.SCALE_RULES)
@settings(max_examples=150, deadline=None)
@given(bits=rows_of_bits())
def test_quantize_against_fractions(rule: str, bits: list[int]) -> None:
    packed, scales = quantize.quantize(to_float32(bits), rule=rule)
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
    values[:, 5] = to_float32(bits)
    _, scales = quantize.quantize(values, rule=rule)
    assert scales[:, 0].tolist() == [scale_exponent(fraction_of(b), rule) + 127 for b in bits]


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
            value = fraction_of(b << 16)
            exponent = scale_exponent(value, rule)
            assert (byte, code) == (exponent + 127, nearest_code(value / Fraction(2) ** exponent))
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
    for convention in mxfp4.CONVENTIONS:
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


@pytest.mark.parametrize("rule", quantize.SCALE_RULES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_round_trip(rule: str, data: st.DataObject) -> None:
    """Quantising dequantised values changes no bit of them: no rule takes a scale too small or too large."""
    byte = data.draw(st.integers(0, 252))
    codes = torch.tensor(
        data.draw(st.lists(st.sampled_from(CODES), min_size=32, max_size=32)), dtype=torch.uint8
    )
    packed, scale = mxfp4.pack_codes(codes), torch.tensor([byte], dtype=torch.uint8)
    values = mxfp4.dequantize(packed, scale, dtype=torch.float32)
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


# --- float32 scales -------------------------------------------------------------------------------------------


def test_fp32_to_ue8m0_all_powers() -> None:
    bits = [1 << 22, *(exponent << 23 for exponent in range(1, 255))]
    got = quantize.fp32_to_ue8m0(to_float32(bits).view(5, 51))
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
    values[2, 1] = to_float32([bits])[0]
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
    value = to_float32([bits])
    try:
        byte = quantize.fp32_to_ue8m0(value)
    except ValueError:
        with np.errstate(all="ignore"):
            theirs = value.numpy().astype(ml_dtypes.float8_e8m0fnu).astype(np.float32)
        assert theirs[0] != value.item()
    else:
        assert torch.equal(mxfp4.decode_ue8m0(byte).view(torch.int32), value.view(torch.int32))


# --- Refusals -------------------------------------------------------------------------------------------------

U8 = torch.zeros(2, 16, dtype=torch.uint8)
SCALE = torch.zeros(2, 1, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mxfp4.dequantize(U8.to(torch.int32), SCALE), TypeError, "packed: expected a uint8 or int8"),
        (lambda: mxfp4.dequantize(U8.numpy(), SCALE), TypeError, "packed: .* got ndarray"),
        (lambda: mxfp4.dequantize(U8, SCALE.float()), TypeError, "scales: .* got float32"),
        (lambda: mxfp4.dequantize(U8, SCALE[:1]), ValueError, "scales: "),
        (lambda: mxfp4.dequantize(U8, SCALE[0]), ValueError, "scales: "),
        (lambda: mxfp4.dequantize(U8[:, :8], SCALE), ValueError, "scales: "),
        (lambda: mxfp4.dequantize(U8, SCALE, convention="mx"), ValueError, "convention: .* got 'mx'"),
        (lambda: mxfp4.dequantize(U8, SCALE, dtype=torch.float16), ValueError, "dtype: .* got torch.float16"),
        (lambda: mxfp4.dequantize(U8, SCALE, out=torch.zeros(2, 32)), TypeError, "out: .* got float32"),
        (lambda: mxfp4.dequantize(U8, SCALE, out=torch.zeros(2, 16).bfloat16()), ValueError, "out: "),
        (
            lambda: mxfp4.dequantize(U8, SCALE, out=torch.zeros(32, 2).bfloat16().t()),
            ValueError,
            "contiguous",
        ),
        (lambda: mxfp4.dequantize(U8.to("meta"), SCALE), TypeError, "meta"),
        (lambda: mxfp4.decode_ue8m0(SCALE.int()), TypeError, "scales: "),
        (lambda: mxfp4.decode_ue8m0(SCALE, "e8m0"), ValueError, "convention: "),
        (lambda: mxfp4.decode_ue8m0(SCALE, dtype=torch.float16), ValueError, "dtype: "),
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
        (lambda: mxfp4.pack_codes(U8[:, :3]), ValueError, "codes: expected an even"),
        (lambda: mxfp4.pack_codes(U8 + 16), ValueError, "codes: expected values from 0 to 15, got 16"),
        (lambda: quantize.fp32_to_ue8m0(torch.zeros(2).double()), TypeError, "values: .* got float64"),
    ],
)
def test_refusals(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
