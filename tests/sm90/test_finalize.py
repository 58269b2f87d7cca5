"""The weighted sum over a token's experts against exact fractions (`docs/arithmetic.md`, section 5)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mxfp4ref.sm90 import elementwise
from mxfp4ref.sm90.finalize import finalize
from tests.helpers import bits, exact


def random_call(
    seed: int, *, tokens: int = 4, top_k: int = 3, hidden: int = 6, experts: int = 3
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y bf16 of any bits, local, scales with zeros, subnormals, NaN and Inf, bias."""
    rng = np.random.default_rng(seed)
    y = bits.bf16(
        rng.integers(0x3E00, 0x4200, (tokens, top_k, hidden)) | rng.integers(0, 2, (tokens, top_k, 1)) << 15
    )
    wild = rng.random(tokens) < 0.5
    y[wild] = bits.bf16(rng.integers(0, 1 << 16, y[wild].shape))
    local = torch.from_numpy(rng.integers(-1, experts, (tokens, top_k)))
    scales = bits.fp32(rng.integers(0x3D000000, 0x40000000, (tokens, top_k)))
    special = torch.from_numpy(rng.random((tokens, top_k)) < 0.15)
    wild_scales = bits.fp32(
        rng.choice(
            [0, 1, 0x80000000, 0x807FFFFF, 0x00800000, 0x7F7FFFFF, 0x7F800000, 0xFFC00001], special.shape
        )
    )
    bias = bits.bf16(rng.integers(0, 1 << 16, (experts, hidden)))
    return y, local, torch.where(special, wild_scales, scales), bias


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_against_fractions(seed: int, with_bias: bool) -> None:
    y, local, scales, bias = random_call(seed)
    y_bits, scale_bits, bias_bits = bits.bits_of(y) << 16, bits.bits_of(scales), bits.bits_of(bias) << 16
    expected = np.zeros((y.shape[0], y.shape[2]), dtype=np.int64)
    for token, column in np.ndindex(*expected.shape):
        expected[token, column] = exact.finalize_element(
            (
                int(scale_bits[token, slot]),
                int(y_bits[token, slot, column]),
                int(bias_bits[expert, column]) if with_bias else None,
            )
            for slot, expert in enumerate(local[token].tolist())
            if expert >= 0
        )
    got = finalize(y, local, scales, bias if with_bias else None)
    bits.assert_same(got, bits.fp32(expected))


def test_slots_are_added_in_order() -> None:
    """2^24 + 1 - 2^24 is 0 in this order and 1 in another."""
    y = torch.tensor([[[2.0**24], [1.0], [-(2.0**24)]]]).to(torch.bfloat16)
    local, scales = torch.tensor([[0, 1, 2]]), torch.ones(1, 3)
    assert finalize(y, local, scales).item() == 0
    other = [0, 2, 1]
    assert finalize(y[:, other], local[:, other], scales).item() == 1


def test_product_is_fused() -> None:
    """(1 + 2^-7)(1 + 2^-23) less its float32 rounding is what an FMA keeps."""
    y = torch.tensor([[[1 + 2.0**-7], [1 + 2.0**-7]]]).to(torch.bfloat16)
    scales = torch.tensor([[-1.0, 1 + 2.0**-23]])
    assert finalize(y, torch.tensor([[0, 1]]), scales).item() == (1 + 2.0**-7) * 2.0**-23


def test_skipped_slots_may_hold_anything() -> None:
    y = bits.bf16(np.full((2, 2, 3), 0x7FC1))
    y[0, 1] = 1.5
    local = torch.tensor([[-1, 0], [-1, -1]])
    scales = torch.tensor([[torch.nan, 2.0], [torch.inf, torch.nan]])
    got = finalize(y, local, scales, torch.ones(1, 3, dtype=torch.bfloat16))
    bits.assert_same(got, torch.tensor([[5.0] * 3, [0.0] * 3]))


def test_zero_weight_of_inf_is_nan() -> None:
    got = finalize(bits.bf16(np.full((1, 1, 1), 0x7F80)), torch.tensor([[0]]), torch.zeros(1, 1))
    assert bits.bits_of(got).item() == exact.NAN32


def test_result_is_plus_zero_where_nothing_is_added() -> None:
    y = bits.bf16([[[0x8000]]])
    assert bits.bits_of(finalize(y, torch.tensor([[0]]), torch.ones(1, 1))).item() == 0


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_tokens_or_no_slots(tokens: int) -> None:
    got = finalize(
        torch.zeros(tokens, 0, 4, dtype=torch.bfloat16),
        torch.zeros(tokens, 0, dtype=torch.int64),
        torch.zeros(tokens, 0),
    )
    bits.assert_same(got, torch.zeros(tokens, 4))


@pytest.mark.parametrize("experts", [0, 2])
def test_an_expert_without_a_bias_is_refused(experts: int) -> None:
    """As by the loops, which would read beyond it."""
    rows, local = torch.zeros(1, 1, 64, dtype=torch.bfloat16), torch.full((1, 1), experts)
    for compute in (finalize, elementwise.finalize):
        with pytest.raises(
            ValueError, match=f"local: expected ids from -1 to {experts - 1}, got {experts} at"
        ):
            compute(rows, local, torch.ones(1, 1), torch.zeros(experts, 64, dtype=torch.bfloat16))
