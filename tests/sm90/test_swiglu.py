"""The activation against exact fractions and the recorded EX2 and RCP (`docs/arithmetic.md`, section 4)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mxfp4ref.sm90 import swiglu as module
from mxfp4ref.sm90.activation import sigmoid
from mxfp4ref.sm90.swiglu import swiglu
from tests.helpers import bits, exact

PARAMETERS = ("alpha", "beta", "limit")
SPECIAL16 = np.array([0x0000, 0x0001, 0x007F, 0x0080, 0x3F80, 0x7F7F, 0x7F80, 0x7F81, 0x7FFF])


def random_values(rng: np.random.Generator, count: int) -> np.ndarray:
    """bf16 bits: mostly where a sigmoid is neither 0 nor 1, some of any size, some special."""
    kind = rng.random(count)
    ordinary = rng.integers(0x3C00, 0x4300, count)
    magnitude = np.where(kind < 0.6, ordinary, rng.integers(0, 1 << 15, count))
    magnitude = np.where(kind > 0.9, rng.choice(SPECIAL16, count), magnitude)
    return magnitude | rng.integers(0, 2, count) << 15


def expected_of(
    fc1: np.ndarray, bias: np.ndarray | None, alpha: int | None, beta: int | None, limit: int | None
) -> Tensor:
    """One row: fc1 and bias bf16 bits [2I], the parameters float32 bits."""
    values = [value << 16 for value in fc1.tolist()]
    if bias is not None:
        values = [exact.add(value, b << 16) for value, b in zip(values, bias.tolist(), strict=True)]
    half = len(values) // 2
    pairs = zip(values[half:], values[:half], strict=True)
    return bits.fp32([exact.activation(gate, up, alpha, beta, limit) for gate, up in pairs])


@pytest.mark.parametrize("given_names", [c for n in range(4) for c in itertools.combinations(PARAMETERS, n)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_against_fractions(given_names: tuple[str, ...], with_bias: bool) -> None:
    rng = np.random.default_rng(len(given_names) + 10 * with_bias)
    choices = {
        "alpha": [0x3FD9DB23, 0x3F800000, 0xBF000000, 0x00000001, 0x7F800000, 0x7F800001],
        "beta": [0x3F800000, 0xC0000000, 0x80000001, 0x00000000, 0x80000000, 0x7F7FFFFF],
        "limit": [0x40E00000, 0x41200000, 0x3C000000, 0x00000000, 0x00000001, 0xBF800000, 0x7FC00000],
    }
    for index in range(7):
        values = {name: choices[name][index % len(choices[name])] for name in given_names}
        parameters = {name: bits.fp32([pattern]) for name, pattern in values.items()}
        fc1, bias = random_values(rng, 160), random_values(rng, 160) if with_bias else None
        got = swiglu(bits.bf16(fc1), None if bias is None else bits.bf16(bias), **parameters)
        expected = expected_of(fc1, bias, *(values.get(name) for name in PARAMETERS))
        bits.assert_same(got, expected)


@given(st.integers(0, 2**32 - 1))
def test_random_parameters(seed: int) -> None:
    rng = np.random.default_rng(seed)
    alpha, beta, limit = (
        int(p)
        for p in rng.integers(0x3E000000, 0x42000000, 3)
        | rng.integers(0, 2, 3) * np.array([1 << 31, 1 << 31, 0])
    )
    fc1, bias = random_values(rng, 16), random_values(rng, 16)
    got = swiglu(bits.bf16(fc1), bits.bf16(bias), bits.fp32([alpha]), bits.fp32([beta]), bits.fp32([limit]))
    bits.assert_same(got, expected_of(fc1, bias, alpha, beta, limit))


@given(st.lists(st.integers(0, 0xFFFFFFFF), min_size=1, max_size=64))
def test_sigmoid(patterns: list[int]) -> None:
    bits.assert_same(sigmoid(bits.fp32(patterns)), bits.fp32([exact.sigmoid(p) for p in patterns]))


def test_sigmoid_of_every_bf16_in_its_range() -> None:
    magnitude = np.arange(0x3A00, 0x4300)
    patterns = np.concatenate([magnitude, magnitude | 0x8000]) << 16
    bits.assert_same(sigmoid(bits.fp32(patterns)), bits.fp32([exact.sigmoid(p) for p in patterns.tolist()]))


def one(up: float, gate: float, **parameters: float) -> float:
    row = torch.tensor([up, gate]).to(torch.bfloat16)
    return swiglu(row, **{name: torch.tensor([value]) for name, value in parameters.items()}).item()


def test_up_is_the_first_half() -> None:
    assert one(up=0.0, gate=3.0) == 0
    assert one(up=3.0, gate=-200.0) == 0
    assert one(up=3.0, gate=200.0) == 600


def test_clamps() -> None:
    assert one(up=100.0, gate=100.0, limit=7.0) == pytest.approx(49, rel=1e-2)
    assert one(up=-100.0, gate=100.0, limit=7.0) == pytest.approx(-49, rel=1e-2)
    # no lower clamp of the gate: -8 sigmoid(-8), not -7 sigmoid(-7)
    assert one(up=1.0, gate=-8.0, limit=7.0) == one(up=1.0, gate=-8.0)


def test_nan_becomes_the_limit_only_if_there_is_one() -> None:
    assert one(up=torch.nan, gate=10.0, limit=7.0) == one(up=7.0, gate=7.0, limit=7.0)
    assert one(up=1.0, gate=torch.nan, limit=7.0) == one(up=1.0, gate=7.0, limit=7.0)
    row = bits.bf16([0x7FC1, 0x3F80])
    assert bits.bits_of(swiglu(row)).tolist() == [exact.NAN32]
    # Without a limit the kernel's is +Inf, and that is what a NaN becomes there.
    assert exact.activation(0x3F800000, exact.NAN32, None, 0, None) == exact.INF32


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_nan_without_a_limit_beside_another_parameter(name: str) -> None:
    """The missing limit counts as +Inf, and min(NaN, +Inf) is +Inf."""
    row = np.array([0x7FC1, 0x3F80, 0x3F80, 0x7FC1])  # up NaN, up 1; gate 1, gate NaN
    values = {name: 0x3F800000}
    got = swiglu(bits.bf16(row), **{name: bits.fp32([0x3F800000])})
    bits.assert_same(got, expected_of(row, None, values.get("alpha"), values.get("beta"), None))


def test_leading_dimensions_and_broadcast_parameters() -> None:
    rng = np.random.default_rng(9)
    fc1 = random_values(rng, 2 * 3 * 8).reshape(2, 3, 8)
    bias = random_values(rng, 2 * 8).reshape(2, 1, 8)
    alpha, beta, limit = (rng.integers(0x3F000000, 0x41000000, 2) for _ in range(3))
    got = swiglu(
        bits.bf16(fc1),
        bits.bf16(bias),
        *(bits.fp32(values)[:, None, None] for values in (alpha, beta, limit)),
    )
    for expert, row in np.ndindex(2, 3):
        parameters = (int(values[expert]) for values in (alpha, beta, limit))
        bits.assert_same(got[expert, row], expected_of(fc1[expert, row], bias[expert, 0], *parameters))


def test_float32_input_is_taken_as_it_is() -> None:
    row = torch.tensor([1.0, 1 + 2.0**-20])
    assert swiglu(row).item() != swiglu(row.to(torch.bfloat16)).item()


def test_machine_modes_do_not_matter() -> None:
    rng = np.random.default_rng(11)
    fc1, bias = bits.bf16(random_values(rng, 4096)), bits.bf16(random_values(rng, 4096))
    parameters = [bits.fp32([pattern]) for pattern in (0x3FD9DB23, 0x3F800000, 0x40E00000)]
    before = swiglu(fc1, bias, *parameters)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        torch.set_default_dtype(torch.float64)
        with torch.inference_mode(), torch.device("meta"):
            after = swiglu(fc1, bias, *parameters)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_flush_denormal(False)
    bits.assert_same(after, before)


def test_public_names() -> None:
    assert module.__all__ == ["swiglu"]
