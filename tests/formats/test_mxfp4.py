"""MXFP4 bytes against an exact derivation with fractions, against ml_dtypes, and against torch's own E8M0."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction
from functools import cache

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from mxfp4ref._choices import CONVENTIONS
from mxfp4ref.formats import mxfp4
from tests.helpers.exact import E2M1
from tests.helpers.float_formats import DTYPES, FORMATS, round_to_bits, unsigned_bits
from tests.helpers.modes import MODES, forget_constants

CODES = range(16)
BYTES = range(256)


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
    assert [abs(Fraction(value)) for value in mxfp4.E2M1_VALUES] == [*E2M1, *E2M1]
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


@pytest.mark.parametrize(
    "mode", ["flushed subnormals", "default float64", "default device", "inference mode", "one thread"]
)
def test_modes_change_nothing(mode: str) -> None:
    """Tables made in the mode included, and afterwards."""
    forget_constants()
    scales = torch.arange(256, dtype=torch.uint8)[:, None]
    packed = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 16)
    with MODES[mode]():
        for convention, dtype in itertools.product(CONVENTIONS, DTYPES):
            got = mxfp4.dequantize(packed.roll(1, 0), scales, convention=convention, dtype=dtype)
            expected = [
                expected_bits(byte, (byte - 1) % 256 >> 4 * half & 15, convention, dtype)
                for byte in BYTES
                for half in (0, 1)
            ]
            assert unsigned_bits(got[:, :2]) == expected
            decoded = mxfp4.decode_ue8m0(scales, convention, dtype)
            assert unsigned_bits(decoded) == [expected_bits(byte, 2, convention, dtype) for byte in BYTES]
    forget_constants()


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
        (lambda: mxfp4.pack_codes(U8[:, :3]), ValueError, "codes: expected an even"),
        (lambda: mxfp4.pack_codes(U8 + 16), ValueError, "codes: expected values from 0 to 15, got 16"),
    ],
)
def test_refusals(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
