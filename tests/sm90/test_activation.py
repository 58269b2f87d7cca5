"""Geglu, SwigluStep and Situ against exact fractions and the recorded EX2 and RCP, and their table."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxfp4ref.formats.experts import PARAMETERS
from mxfp4ref.sm90.activation import (
    ACTIVATIONS,
    GEGLU,
    GELU,
    IDENTITY,
    RELU,
    RELU2,
    SILU,
    SITU,
    SWIGLU,
    SWIGLU_BIAS,
    SWIGLU_STEP,
    activate,
    activation_of,
    erf,
    gelu,
    tanh,
)
from tests.helpers import bits, exact
from tests.sm90.test_swiglu import random_values

EXACT = {
    GEGLU: exact.geglu,
    SWIGLU_STEP: exact.swiglu_step,
    SITU: exact.situ,
    GELU: exact.gelu,
    RELU: exact.relu,
    SILU: exact.silu,
    RELU2: exact.relu2,
    IDENTITY: exact.identity,
}
CHOICES = {
    "swiglu_limit": [
        0x40E00000,
        0x41200000,
        0x3DCCCCCD,
        0x00000000,
        0x00000001,
        0xBF800000,
        0x7FC00000,
        0x7F800000,
    ],
    "situ_beta": [
        0x40800000,
        0x3FD9DB23,
        0xC0400000,
        0x00000000,
        0x7F800000,
        0x7FC00000,
        0x7F000001,
        0x00800000,
    ],
    "situ_linear_beta": [0x41C80000, 0x3F333333, 0xBF800000, 0x80000000, 0xFF800000, 0x00000001, 0x7F7FFFFF],
}
TINY = bits.fp32([0x00000001]).item()  # subnormal


def expected_of(which: int, fc1: np.ndarray, bias: np.ndarray | None, given: list[int | None]) -> Tensor:
    """One row: fc1 and bias bf16 bits [2I], the parameters float32 bits."""
    values = [value << 16 for value in fc1.tolist()]
    if bias is not None:
        values = [exact.add(value, b << 16) for value, b in zip(values, bias.tolist(), strict=True)]
    if not ACTIVATIONS[which].gated:
        return bits.fp32([EXACT[which](value) for value in values])
    half = len(values) // 2
    pairs = zip(values[half:], values[:half], strict=True)
    return bits.fp32([EXACT[which](gate, up, *given) for gate, up in pairs])


def assert_exact(which: int, fc1: np.ndarray, bias: np.ndarray | None, given: list[int | None]) -> None:
    parameters = [None if pattern is None else bits.fp32([pattern]) for pattern in given]
    got = activate(ACTIVATIONS[which], bits.bf16(fc1), None if bias is None else bits.bf16(bias), parameters)
    bits.assert_same(got, expected_of(which, fc1, bias, given))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("which", EXACT)
def test_against_fractions(which: int, with_bias: bool) -> None:
    """With every subset of the parameters, among them zeros, subnormals, Inf, NaN and negative ones."""
    rng = np.random.default_rng(which + with_bias)
    names = list(ACTIVATIONS[which].defaults)
    for present in itertools.product((False, True), repeat=len(names)):
        for index in range(8):
            values = [CHOICES[name][index % len(CHOICES[name])] for name in names]
            given = [value if here else None for value, here in zip(values, present, strict=True)]
            fc1, bias = random_values(rng, 60), random_values(rng, 60) if with_bias else None
            assert_exact(which, fc1, bias, given)


@pytest.mark.parametrize("which", EXACT)
@settings(max_examples=50)
@given(seed=st.integers(0, 2**32 - 1))
def test_random_parameters(which: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    given = rng.integers(0x3E000000, 0x42000000, len(ACTIVATIONS[which].defaults)).tolist()
    assert_exact(which, random_values(rng, 16), random_values(rng, 16), given)


@pytest.mark.parametrize("half", ["gate", "up"])
@pytest.mark.parametrize("which", EXACT)
def test_every_bf16_in_its_range(which: int, half: str) -> None:
    """Every gate, and every up, in whose range the activation is neither linear nor flat."""
    magnitude = np.arange(0x3E00, 0x4300, 3)
    varied = np.concatenate([magnitude, magnitude | 0x8000])
    other = np.full_like(varied, 0x3FAB)
    fc1 = np.concatenate([other, varied] if half == "gate" else [varied, other])
    assert_exact(which, fc1, None, [None] * len(ACTIVATIONS[which].defaults))


@given(st.lists(st.integers(0, 0xFFFFFFFF), min_size=1, max_size=64))
def test_tanh(patterns: list[int]) -> None:
    bits.assert_same(tanh(bits.fp32(patterns)), bits.fp32([exact.tanh(p) for p in patterns]))


@given(st.lists(st.integers(0, 0xFFFFFFFF), min_size=1, max_size=64))
def test_erf(patterns: list[int]) -> None:
    bits.assert_same(erf(bits.fp32(patterns)), bits.fp32([exact.erf(p) for p in patterns]))


def test_erf_and_gelu_are_what_they_are_called() -> None:
    x = torch.linspace(-7, 7, 40001)
    assert float((erf(x).double() - torch.erf(x.double())).abs().max()) < 2.0**-22
    assert float((gelu(x).double() - torch.nn.functional.gelu(x.double())).abs().max()) < 2.0**-20


def one(which: int, up: float, gate: float, *parameters: float | None) -> float:
    row = torch.tensor([up, gate]).to(torch.bfloat16)
    given = [None if value is None else torch.tensor([value]) for value in parameters]
    return activate(ACTIVATIONS[which], row, None, given).item()


def test_swiglu_step_by_hand() -> None:
    assert one(SWIGLU_STEP, 100, 100, None) == 49
    assert one(SWIGLU_STEP, -100, 100, None) == -49
    assert one(SWIGLU_STEP, 3, 100, 2.0) == 4
    assert one(SWIGLU_STEP, 100, 100, torch.inf) == 10000
    # The limit is on silu(gate), not on the gate: silu(7.0) is below 7.
    assert one(SWIGLU_STEP, 1, 7, None) == pytest.approx(6.9936, abs=1e-3)
    # and from above only
    assert one(SWIGLU_STEP, 1, -1, 0.1) == pytest.approx(-0.0269, abs=1e-3)
    assert one(SWIGLU_STEP, torch.nan, torch.nan, None) == 49
    assert np.isnan(one(SWIGLU, torch.nan, 1))


def test_without_a_gate_by_hand() -> None:
    values = torch.tensor([-0.0, 2.0**-130, -(2.0**-130), torch.nan, -torch.inf, torch.inf, -3.0, 3.0])
    zero, minus_zero, infinity = 0x00000000, 1 << 31, 0x7F800000
    expected = {
        RELU: [zero, zero, zero, 0x7FFFFFFF, zero, infinity, zero, 0x40400000],
        RELU2: [zero, zero, zero, 0x7FFFFFFF, zero, infinity, zero, 0x41100000],
        IDENTITY: [
            minus_zero,
            zero,
            minus_zero,
            0x7FFFFFFF,
            minus_zero | infinity,
            infinity,
            0xC0400000,
            0x40400000,
        ],
    }
    for which, patterns in expected.items():
        bits.assert_same(activate(ACTIVATIONS[which], values, None, []), bits.fp32(patterns))


def test_situ_by_hand() -> None:
    assert one(SITU, 1000, 1000, None, None) == 100
    assert one(SITU, -1000, 1000, 2.0, 3.0) == -6
    assert one(SITU, 1000, -1000, None, None) == 0
    assert one(SITU, 1, 1, None, None) == pytest.approx(0.979674 * 0.731059 * 0.999467, rel=1e-5)
    # 0 * (1 / 0) is NaN, and the kernel does not look for it
    assert np.isnan(one(SITU, 1, 0, 0.0, None))


# --- the table --------------------------------------------------------------------------------------------


def test_the_table_reads_what_experts_have() -> None:
    read = {name for activation in ACTIVATIONS.values() for name in activation.defaults}
    assert read == set(PARAMETERS)
    for id, activation in ACTIVATIONS.items():
        assert activation.id == id
        assert activation.becomes is None or activation.becomes in ACTIVATIONS


def test_ids_and_defaults_are_flashinfers() -> None:
    """`common.h` and the adaptors of `cutlass_fused_moe_kernels.cuh` of 0.7.2.post1."""
    assert {a.name: a.id for a in ACTIVATIONS.values()} == {
        "Gelu": 0,
        "Relu": 1,
        "Silu": 2,
        "Swiglu": 3,
        "Geglu": 4,
        "SwigluBias": 5,
        "Relu2": 6,
        "SwigluStep": 7,
        "GegluTanh": 8,
        "Identity": 9,
        "Situ": 10,
    }
    assert [a.name for a in ACTIVATIONS.values() if not a.gated] == [
        "Gelu",
        "Relu",
        "Silu",
        "Relu2",
        "Identity",
    ]
    defaults = [list(a.defaults.values()) for a in ACTIVATIONS.values() if a.gated]
    assert defaults == [[], [], [1.0, 0.0, torch.inf], [7.0], [], [4.0, 25.0]]


@pytest.mark.parametrize(
    ("activation_type", "given", "expected"),
    [
        (SWIGLU, (), SWIGLU),
        (SWIGLU, ("situ_beta",), SWIGLU),
        *((SWIGLU, (name,), SWIGLU_BIAS) for name in ("swiglu_alpha", "swiglu_beta", "swiglu_limit")),
        (SWIGLU_BIAS, (), SWIGLU_BIAS),
        (SWIGLU_STEP, PARAMETERS, SWIGLU_STEP),
        (SITU, PARAMETERS, SITU),
    ],
)
def test_what_the_kernel_runs(activation_type: int, given: tuple[str, ...], expected: int) -> None:
    assert activation_of(activation_type, given) is ACTIVATIONS[expected]


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=lambda activation: activation.name)
def test_what_is_not_given_is_the_default(activation: Any) -> None:
    rng = np.random.default_rng(activation.id)
    fc1 = bits.bf16(random_values(rng, 4096).reshape(8, 512))
    given = [torch.tensor([default]) for default in activation.defaults.values()]
    without = activate(activation, fc1, None, [None] * len(given))
    bits.assert_same(activate(activation, fc1, None, given), without)
