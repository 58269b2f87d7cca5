"""The GEMM's transcription against exact fractions, and single elements by hand (`docs/arithmetic.md`, 3)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mxfp4ref.formats.generations import BYTEWISE, PLAIN
from mxfp4ref.formats.mxfp4 import pack_codes
from mxfp4ref.sm90.gemm.cpu import group_scaled_gemm
from mxfp4ref.sm90.gemm.reference import group_scaled_gemm_reference
from mxfp4ref.sm90.tactics import Tactic
from tests.helpers import bits, exact
from tests.helpers.gemm_inputs import SWAPPING, assert_fast_is_slow, problem


@pytest.mark.parametrize(
    ("x_kind", "scale_kind"),
    [("mirrored", "ordinary"), ("wide", "spread"), ("raw", "any"), ("tiny", "low"), ("huge", "high")],
)
@pytest.mark.parametrize(("tile_k", "tile_n", "groups"), [(128, 16, 12), (256, 16, 8), (128, 64, 4)])
def test_against_fractions(x_kind: str, scale_kind: str, tile_k: int, tile_n: int, groups: int) -> None:
    x, packed, scales = problem(7, x_kind, scale_kind, rows=3, columns=4, groups=groups)
    order = exact.group_order(groups, tile_k)
    positions = torch.tensor([[6, 7, 8 + tile_n]])
    expected = np.zeros((1, 3, 4), dtype=np.int64)
    x_bits, packed_bytes, scale_bytes = bits.bits_of(x)[0], packed[0].tolist(), scales[0].tolist()
    for row, column in np.ndindex(3, 4):
        codes = [code for byte in packed_bytes[column] for code in (byte & 15, byte >> 4)]
        swapped = (tile_n, tile_k) in SWAPPING and int(positions[0, row]) % tile_n in (0, 2, 4, 6)
        expected[0, row, column] = exact.gemm_element(
            x_bits[row].tolist(), codes, scale_bytes[column], order, swapped=swapped
        )
    for gemm in (group_scaled_gemm, group_scaled_gemm_reference):
        got = gemm(x, packed, scales, tactic=Tactic((64, tile_n, tile_k)), positions=positions)
        bits.assert_same(got, bits.fp32(expected))


@pytest.mark.parametrize("scale_kind", ["ordinary", "spread"])
def test_the_oldest_kernel_against_fractions(scale_kind: str) -> None:
    """Groups in ascending order throughout, and the second product of the first pair rounded alone in every row."""
    x, packed, scales = problem(7, "wide", scale_kind, rows=3, columns=4, groups=16)
    expected = np.zeros((1, 3, 4), dtype=np.int64)
    x_bits, packed_bytes, scale_bytes = bits.bits_of(x)[0], packed[0].tolist(), scales[0].tolist()
    for row, column in np.ndindex(3, 4):
        codes = [code for byte in packed_bytes[column] for code in (byte & 15, byte >> 4)]
        expected[0, row, column] = exact.gemm_element(
            x_bits[row].tolist(), codes, scale_bytes[column], range(16), swapped=True
        )
    for gemm in (group_scaled_gemm, group_scaled_gemm_reference):
        bits.assert_same(gemm(x, packed, scales, generation=PLAIN), bits.fp32(expected))
        same_as_later = torch.equal(gemm(x, packed, scales, generation=BYTEWISE), bits.fp32(expected))
        assert same_as_later == (scale_kind == "spread")  # where one group dwarfs the others, no order shows


def first_pair(values: tuple[float, float], scale_bytes: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """16 rows whose first two groups are one product each, x times weight 1."""
    x = torch.zeros(1, 16, 256)
    x[..., 0], x[..., 32] = values
    codes = torch.full((1, 1, 256), 2, dtype=torch.uint8)
    scales = torch.full((1, 1, 8), 127, dtype=torch.uint8)
    scales[0, 0, :2] = torch.tensor(scale_bytes)
    return x.to(torch.bfloat16), pack_codes(codes), scales


@pytest.mark.parametrize(
    ("values", "scale_bytes", "late", "early"),
    [
        # 1.5 * 2^-127 alone is flushed, fused it is kept.
        ((1.5 * 2.0**-64, 2.0**-126), (64, 127), 2.0**-126, 1.75 * 2.0**-126),
        ((2.0**-126, 1.5 * 2.0**-64), (127, 64), 1.75 * 2.0**-126, 2.0**-126),
        # 2^128 alone is Inf, fused with -2^127 it is 2^127.
        ((2.0**64, -(2.0**127)), (191, 127), torch.inf, 2.0**127),
        ((-(2.0**127), 2.0**64), (127, 191), 2.0**127, torch.inf),
    ],
)
def test_first_pair_by_position(
    values: tuple[float, float], scale_bytes: tuple[int, int], late: float, early: float
) -> None:
    x, packed, scales = first_pair(values, scale_bytes)
    for tile_k, tile_n in ((256, 16), (128, 16)):
        got = assert_fast_is_slow(x, packed, scales, tactic=Tactic((64, tile_n, tile_k)))[0, :, 0].tolist()
        swaps = (tile_n, tile_k) in SWAPPING
        assert got == [early if swaps and row in (0, 2, 4, 6) else late for row in range(16)]
        got = assert_fast_is_slow(x, packed, scales, tactic=Tactic((64, tile_n, tile_k)), generation=BYTEWISE)
        assert got[0, :, 0].tolist() == [early] * 16
    positions = torch.arange(3, 19)[None]
    got = assert_fast_is_slow(x, packed, scales, tactic=Tactic((64, 16, 256)), positions=positions)[
        0, :, 0
    ].tolist()
    assert got == [early if row % 16 in (0, 2, 4, 6) else late for row in range(3, 19)]


@pytest.mark.parametrize(
    ("exponent", "expected"),
    [
        (-149, 0.0),
        (-150, 0.0),  # 2^-126 (1 - 2^-24) stays below 2^-126 when rounded to 24 bits
        (-151, 2.0**-126),  # 2^-126 (1 - 2^-25) is a tie, and goes up
        (-152, 2.0**-126),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_sum_is_flushed_after_rounding(exponent: int, expected: float, sign: int) -> None:
    x = torch.zeros(1, 1, 128)
    x[..., 0], x[..., 64] = sign * 2.0**-126, -sign * 2.0**-100
    packed = pack_codes(torch.full((1, 1, 128), 2, dtype=torch.uint8))
    scales = torch.tensor([[[127, 127, exponent + 100 + 127, 127]]], dtype=torch.uint8)
    assert assert_fast_is_slow(x.to(torch.bfloat16), packed, scales).item() == sign * expected


@pytest.mark.parametrize("group", [0, 1, 3])
def test_a_subnormal_sum_of_the_tensor_core_is_flushed(group: int) -> None:
    x = torch.zeros(1, 2, 128)
    x[0, :, 32 * group] = torch.tensor([2.0**-127, 2.0**-126])
    packed = pack_codes(torch.full((1, 1, 128), 2, dtype=torch.uint8))
    scales = torch.full((1, 1, 4), 227, dtype=torch.uint8)
    got = assert_fast_is_slow(x.to(torch.bfloat16), packed, scales)
    assert got.flatten().tolist() == [0.0, 2.0**-26]


def test_never_minus_zero() -> None:
    x = bits.bf16(np.full((1, 2, 128), 0x8000))
    codes = torch.full((1, 3, 128), 2, dtype=torch.uint8)
    scales = torch.full((1, 3, 4), 127, dtype=torch.uint8)
    assert not bits.bits_of(assert_fast_is_slow(x, pack_codes(codes), scales)).any()


def test_scale_bytes_0_and_255() -> None:
    """0 is zero, not 2^-127; 255 is Inf, not NaN; 0 * Inf is NaN."""
    x = torch.zeros(1, 3, 128, dtype=torch.bfloat16)
    x[0, :, 0] = torch.tensor([1.0, -1.0, 0.0])
    packed = pack_codes(torch.full((1, 2, 128), 2, dtype=torch.uint8))
    scales = torch.tensor([[[0, 127, 127, 127], [255, 127, 127, 127]]], dtype=torch.uint8)
    got = bits.bits_of(assert_fast_is_slow(x, packed, scales))
    assert got.tolist() == [[[0, 0x7F800000], [0, 0xFF800000], [0, 0x7FFFFFFF]]]


def test_no_rows() -> None:
    x, packed, scales = problem(0, "ordinary", "ordinary", rows=3, groups=4)
    assert group_scaled_gemm(x[:, :0], packed, scales).shape == (1, 0, 7)
