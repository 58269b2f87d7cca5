"""Rows as FP8 (`docs/arithmetic.md`, section 11), against exact fractions and the recorded reciprocal."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mxfp4ref.sm90 import fp8, mufu
from mxfp4ref.sm90.row_quantize import quantize_rows, scale_rows
from tests.helpers import bits, exact

LEAST = 0x03E00001  # 448 / FLT_MAX
MAX, ONE = 0x43E00000, 0x3F800000


def rcp(value: int) -> int:
    return int(mufu.rcp(bits.fp32([value])).view(torch.int32)) & 0xFFFFFFFF


def exact_row(row: list[int], residual: int) -> tuple[list[int], int]:
    """Float32 bits in, E4M3 bytes and the factor's float32 bits out; EX2's neighbour RCP is tested elsewhere."""
    magnitudes = [exact.flushed(value & 0x7FFFFFFF) for value in row if not exact.is_nan(value)]
    largest = max([0, *magnitudes])
    quotient = exact.mul(rcp(max(largest, LEAST)), MAX) if largest else ONE
    scaled = bits.fp32([exact.mul(value, quotient) for value in row])
    return fp8.to_e4m3(scaled).tolist(), exact.mul(rcp(quotient), residual)


def rows_of(kind: str) -> np.ndarray:
    rng = np.random.default_rng(5)
    if kind == "any":
        return rng.integers(0, 1 << 32, (40, 16))
    if kind == "bf16":
        return rng.integers(0, 1 << 16, (40, 16)) << 16
    exponents = rng.integers(0, 254, (200, 1)) + rng.integers(-12, 1, (200, 16))
    rows = (
        rng.integers(0, 2, (200, 16)) << 31
        | exponents.clip(0, 254) << 23
        | rng.integers(0, 1 << 23, (200, 16))
    )
    if kind == "special":
        special = np.array([0, 0x80000000, 1, 0x807FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F7FFFFF])
        rows = np.where(rng.random(rows.shape) < 0.1, rng.choice(special, rows.shape), rows)
    return rows


@pytest.mark.parametrize("kind", ["any", "bf16", "ordinary", "special"])
def test_every_kind_of_row(kind: str) -> None:
    rows = rows_of(kind)
    residuals = np.random.default_rng(6).choice(
        [ONE, 0x3C800000, 0x00000001, 0x7F000000, 0x7F800000], len(rows)
    )
    x = bits.fp32(rows.tolist())
    got = quantize_rows(x, bits.fp32(residuals.tolist()))
    expected = [
        exact_row(row, residual) for row, residual in zip(rows.tolist(), residuals.tolist(), strict=True)
    ]
    assert got.values.tolist() == [values for values, _ in expected]
    bits.assert_same(got.factor, bits.fp32([factor for _, factor in expected]))
    if kind == "bf16":
        of_bf16 = quantize_rows(bits.bf16((rows >> 16).tolist()), bits.fp32(residuals.tolist()))
        assert torch.equal(of_bf16.values, got.values)
        bits.assert_same(of_bf16.factor, got.factor)


def test_rows_that_say_what_becomes_of_them() -> None:
    nan, inf = torch.nan, torch.inf
    x = torch.tensor([[0.0, -0.0], [2.0, 1.0], [nan, 1.0], [inf, 1.0], [nan, nan], [1e-40, -1e-40]])
    got = quantize_rows(x, torch.ones(6))
    assert got.values.tolist() == [[0, 128], [0x7E, 0x76], [0x7F, 0x7E], [0x7F, 0x00], [0x7F, 0x7F], [0, 128]]
    assert got.factor[[0, 3, 4, 5]].tolist() == [1, inf, 1, 1]


def test_no_columns_and_no_rows() -> None:
    assert quantize_rows(torch.zeros(2, 0), torch.ones(2)).values.shape == (2, 0)
    assert quantize_rows(torch.zeros(0, 4), torch.ones(0)).values.shape == (0, 4)


def test_the_epilogue_keeps_the_sign_of_a_product_that_is_too_small() -> None:
    got = scale_rows(torch.tensor([[-1.0, 1.0, 3.0]]), torch.tensor([2.0**-130]))
    bits.assert_same(got, torch.tensor([[-0.0, 0.0, 0.0]]))
    bits.assert_same(scale_rows(torch.tensor([[1.5]]), torch.tensor([2.0])), torch.tensor([[3.0]]))
