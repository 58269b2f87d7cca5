"""The tensor-core step against exact fractions (`docs/arithmetic.md`, section 3)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from mxfp4ref.sm90 import tensor_core
from tests.helpers import bits, exact

Block = tuple[list[int], list[int], int]


def check(blocks: list[Block]) -> None:
    a, b = (bits.bf16([block[i] for block in blocks]) for i in range(2))
    c = bits.fp32([block[2] for block in blocks])
    expected = bits.fp32([exact.tensor_core_step(*block) for block in blocks])
    bits.assert_same(tensor_core.step(a, b, c), expected)


@st.composite
def block(draw: st.DrawFn) -> Block:
    """16 pairs and an addend whose exponents share a range that is drawn too."""
    centre = draw(st.integers(-126, 120))
    width = draw(st.sampled_from([0, 2, 6, 14, 30, 200]))
    seed = draw(st.integers(0, 2**32 - 1))
    special = draw(st.sampled_from([0.0, 0.0, 0.0, 0.3]))
    rng = np.random.default_rng(seed)

    def bf16_bits(middle: int) -> np.ndarray:
        exponent = np.clip(middle + rng.integers(-width, width + 1, 16) + 127, 0, 254)
        value = rng.integers(0, 2, 16) << 15 | exponent << 7 | rng.integers(0, 128, 16)
        chosen = rng.choice([0x0000, 0x8000, 0x0001, 0x807F, 0x0080, 0x7F7F, 0x7F80, 0xFF80, 0x7FC1], 16)
        return np.where(rng.random(16) < special / 4, chosen, value)

    other = draw(st.integers(-10, 10))
    a, b = bf16_bits(centre), bf16_bits(other)
    if draw(st.booleans()):  # the second half cancels the first but for one bit
        order = rng.permutation(8)
        a[8:], b[8:] = a[:8][order] ^ 0x8000, b[:8][order]
        a[8] ^= int(rng.integers(0, 2))
    c_exponent = int(np.clip(centre + other + 127 + rng.integers(-30, 31), 0, 254))
    c = int(rng.integers(0, 2)) << 31 | c_exponent << 23 | int(rng.integers(0, 1 << 23))
    c = draw(
        st.sampled_from([c, c, c, 0, 0x80000000, 0x00000001, 0x807FFFFF, 0x7F7FFFFF, 0x7F800000, 0xFF800000])
    )
    return a.tolist(), b.tolist(), c


@given(st.lists(block(), min_size=1, max_size=6))
def test_step(blocks: list[Block]) -> None:
    check(blocks)


def pad(values: list[int]) -> list[int]:
    return values + [0] * (16 - len(values))


ONE, TWO_127, HALF_LEAST = 0x3F80, 0x7F00, 0x0040


@pytest.mark.parametrize(
    ("a", "b", "c", "expected"),
    [
        ([], [], 0x80000000, 0x00000000),  # -0 becomes +0
        ([], [], 0x00000001, 0x00000001),  # subnormals are kept
        ([0x8001], [ONE], 0x00010000, 0x00000000),  # exact cancellation of a bf16 subnormal: +0
        ([], [], 0x7F800001, 0x7FFFFFFF),
        ([TWO_127, TWO_127], [ONE, ONE], 0, 0x7F800000),  # 2^128
        ([0xFF00, 0xFF00], [ONE, ONE], 0, 0xFF800000),
        ([TWO_127, 0x7F00, 0xFF00], [ONE, ONE, ONE], 0, 0x7F000000),  # the sum does not overflow on the way
        ([0x7F80, 0xFF80], [ONE, ONE], 0, 0x7FFFFFFF),  # Inf - Inf
        ([0x7F80], [ONE], 0xFF800000, 0x7FFFFFFF),
        ([0x7F80], [0x8000], 0, 0x7FFFFFFF),  # Inf * -0
        ([0xFF80], [0x8001], 0, 0x7F800000),  # Inf times a subnormal
        ([TWO_127], [TWO_127], 0xFF800000, 0xFF800000),  # a finite overflow does not meet Inf
        # 2^-25 beside 1 is the last bit that survives; RZ to 24 bits drops it unless it borrows.
        ([ONE, 0xB300], [ONE, ONE], 0, 0x3F7FFFFF),  # 1 - 2^-25
        ([ONE, 0xB280], [ONE, ONE], 0, 0x3F800000),  # 1 - 2^-26: truncated to nothing
        # 1.5 * 1.5 is 2.25 with exponent 0, not 1.125 with exponent 1: 2^-25 is kept.
        ([0x3FC0, 0xB300], [0x3FC0, ONE], 0, 0x400FFFFF),
        # A zero product takes no part, whatever the exponent of its other factor.
        ([0x0000, 0x2F80], [0x7F00, ONE], 0x2F800001, 0x30000000),
        # Subnormals have exponent -126 and a small significand: 2^-133 beside 2^-127 (exponent -126).
        ([0x0001, HALF_LEAST], [ONE, ONE], 0, 0x00410000),
    ],
)
def test_rules(a: list[int], b: list[int], c: int, expected: int) -> None:
    block = (pad(a), pad(b), c)
    assert exact.tensor_core_step(*block) == expected
    check([block])


@given(
    position=st.integers(0, 15),
    c_exponent=st.integers(-30, 30),
    fraction=st.integers(0, (1 << 23) - 1),
    signs=st.tuples(st.booleans(), st.booleans()),
)
@example(position=0, c_exponent=25, fraction=1, signs=(False, True))
def test_addend_is_truncated_like_a_product(
    position: int, c_exponent: int, fraction: int, signs: tuple[bool, bool]
) -> None:
    a, b = [0] * 16, [0] * 16
    a[position], b[position] = 0x3FFF | signs[0] << 15, 0x3FFF
    check([(a, b, signs[1] << 31 | c_exponent + 127 << 23 | fraction)])


def test_order_does_not_matter() -> None:
    rng = np.random.default_rng(2)
    a, b = (bits.bf16(rng.integers(0x3000, 0x4800, (500, 16))) for _ in range(2))
    c = bits.fp32(rng.integers(0x3F000000, 0x40000000, 500))
    order = torch.from_numpy(rng.permutation(16))
    bits.assert_same(tensor_core.step(a[:, order], b[:, order], c), tensor_core.step(a, b, c))


def test_leading_dimensions_broadcast() -> None:
    rng = np.random.default_rng(3)
    a = bits.bf16(rng.integers(0x3F00, 0x4100, (3, 1, 16)))
    b = bits.bf16(rng.integers(0x3F00, 0x4100, (5, 16)))
    c = bits.fp32(rng.integers(0x3F000000, 0x40000000, 5))
    got = tensor_core.step(a, b, c)
    assert got.shape == (3, 5)
    for i in range(3):
        for j in range(5):
            bits.assert_same(got[i, j], tensor_core.step(a[i, 0], b[j], c[j]))


def test_fewer_fraction_bits_truncate_earlier() -> None:
    block = (bits.bf16(pad([ONE, 0xB300])), bits.bf16(pad([ONE, ONE])), bits.fp32([0])[0])
    assert bits.bits_of(tensor_core.step(*block)) == 0x3F7FFFFF
    assert bits.bits_of(tensor_core.step(*block, fraction_bits=24)) == 0x3F800000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_bits() -> None:
    rng = np.random.default_rng(4)
    a, b = (bits.bf16(rng.integers(0, 1 << 16, (1 << 14, 16))) for _ in range(2))
    c = bits.fp32(rng.integers(0, 1 << 32, 1 << 14))
    bits.assert_same(tensor_core.step(a.cuda(), b.cuda(), c.cuda()).cpu(), tensor_core.step(a, b, c))
