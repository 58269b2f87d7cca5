"""The GEMM of bf16 experts against a loop in Python's floats (the rounding points in `mxfp4ref.model.dense`)."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxfp4ref.model.dense import dense_gemm
from mxfp4ref.sm90.tactics import Tactic
from tests.helpers import bits, exact


def by_loop(x: Tensor, weights: Tensor) -> Tensor:
    """Products added one by one in ascending K, each sum rounded to float64; then one rounding to float32."""
    result = np.zeros((x.shape[0], x.shape[1], weights.shape[1]), dtype=np.int64)
    x_values, weight_values = x.to(torch.float64).tolist(), weights.to(torch.float64).tolist()
    for expert, row, column in np.ndindex(*result.shape):
        total = 0.0
        for a, b in zip(x_values[expert][row], weight_values[expert][column], strict=True):
            total += a * b
        if math.isnan(total):
            result[expert, row, column] = exact.NAN32
        elif math.isinf(total):
            result[expert, row, column] = exact.INF32 | (exact.SIGN32 if total < 0 else 0)
        else:
            result[expert, row, column] = exact.rounded(Fraction(total))
    return bits.fp32(result)


def random_factors(seed: int, width: int, depth: int) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)

    def values(*shape: int) -> Tensor:
        exponent = np.clip(127 + rng.integers(-width, width + 1, shape), 0, 254)
        patterns = rng.integers(0, 2, shape) << 15 | exponent << 7 | rng.integers(0, 128, shape)
        special = rng.choice([0x7F80, 0xFF80, 0x7FC0, 0x0001, 0x8000, 0x7F7F], shape)
        return bits.bf16(np.where(rng.random(shape) < 0.1 / depth, special, patterns))

    x, weights = values(2, 3, depth), values(2, 4, depth)
    if seed % 2 and depth % 2 == 0:  # cancellation: what is left is rounding error
        x[..., depth // 2 :] = -x[..., : depth // 2]
        weights[..., depth // 2 :] = weights[..., : depth // 2]
    return x, weights


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 3, 20, 60, 127]), st.sampled_from([1, 16, 31, 64]))
def test_against_a_loop(seed: int, width: int, depth: int) -> None:
    x, weights = random_factors(seed, width, depth)
    bits.assert_same(dense_gemm(x, weights), by_loop(x, weights))


@pytest.mark.parametrize("depth", [255, 256, 257, 600])
def test_depths_beyond_a_chunk(depth: int) -> None:
    x, weights = random_factors(1, 20, depth)
    bits.assert_same(dense_gemm(x, weights), by_loop(x, weights))


def test_order_is_ascending() -> None:
    x = torch.tensor([[[2.0**60, 1.0, -(2.0**60)], [2.0**60, -(2.0**60), 1.0]]], dtype=torch.bfloat16)
    assert dense_gemm(x, torch.ones(1, 1, 3, dtype=torch.bfloat16)).flatten().tolist() == [0, 1]


def test_tactic_has_no_effect() -> None:
    x, weights = random_factors(4, 3, 64)
    got = dense_gemm(x, weights, None, tactic=Tactic((64, 64, 512)), positions=torch.arange(3).expand(2, 3))
    bits.assert_same(got, dense_gemm(x, weights))


def test_strides_do_not_matter() -> None:
    x, weights = random_factors(5, 3, 64)
    strided = [t.transpose(0, 2).contiguous().transpose(0, 2) for t in (x, weights)]
    bits.assert_same(dense_gemm(*strided), dense_gemm(x, weights))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_bits() -> None:
    for width in (3, 60):
        x, weights = random_factors(7, width, 600)
        bits.assert_same(dense_gemm(x.cuda(), weights.cuda()).cpu(), dense_gemm(x, weights))
