"""The compiled activation, weighted sum and rounding against their transcriptions."""

from __future__ import annotations

import itertools
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxfp4ref import _compiled
from mxfp4ref.sm90 import activation as transcribed_activation
from mxfp4ref.sm90 import elementwise, fp32, mufu
from mxfp4ref.sm90 import finalize as transcribed_finalize
from mxfp4ref.sm90.activation import ACTIVATIONS, SWIGLU_BIAS, Activation
from tests.helpers import bits, modes
from tests.sm90.test_finalize import random_call
from tests.sm90.test_swiglu import random_values

elementwise_loops = pytest.importorskip("mxfp4ref.sm90.elementwise_loops")
SPECIAL32 = [0, 1, 0x007FFFFF, 0x00800000, 0x3F800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FFFFFFF]


def random_fp32(rng: np.random.Generator, *shape: int) -> Tensor:
    """Near one, of any size, and special."""
    kind = rng.random(shape)
    patterns = np.where(
        kind < 0.6, rng.integers(0x3D000000, 0x42000000, shape), rng.integers(0, 1 << 31, shape)
    )
    patterns = np.where(kind > 0.85, rng.choice(SPECIAL32, shape), patterns)
    return bits.fp32(patterns | rng.integers(0, 2, shape) << 31)


def activation(seed: int, kind: Activation, given: tuple[bool, ...], with_bias: bool) -> tuple[Any, ...]:
    rng = np.random.default_rng(seed)
    x, bias = (bits.bf16(random_values(rng, 24 * 60).reshape(24, 60)) for _ in range(2))
    parameters = tuple(random_fp32(rng, 24, 1) if here else None for here in given)
    return kind, x, bias if with_bias else None, parameters


def assert_as_transcribed(*arguments: Any) -> None:
    bits.assert_same(elementwise.activate(*arguments), transcribed_activation.activate(*arguments))


BIAS = ACTIVATIONS[SWIGLU_BIAS]
GIVEN = [
    (kind, given)
    for kind in ACTIVATIONS.values()
    for given in itertools.product((False, True), repeat=len(kind.defaults))
]


def test_every_activation_has_a_loop() -> None:
    assert set(elementwise_loops.ACTIVATIONS) == set(ACTIVATIONS)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), with_bias=st.booleans())
@pytest.mark.parametrize(("kind", "given"), GIVEN, ids=lambda value: getattr(value, "name", None))
def test_activate(kind: Activation, given: tuple[bool, ...], seed: int, with_bias: bool) -> None:
    assert_as_transcribed(*activation(seed, kind, given, with_bias))


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_finalize(seed: int, with_bias: bool) -> None:
    y, local, scales, bias = random_call(seed, tokens=19, top_k=4, hidden=20)
    arguments = (y, local, scales, bias if with_bias else None)
    bits.assert_same(elementwise.finalize(*arguments), transcribed_finalize.finalize(*arguments))


@given(st.integers(0, 2**32 - 1))
def test_to_bf16(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ties = bits.fp32(rng.integers(0, 1 << 16, 50) << 16 | rng.choice([0x7FFF, 0x8000, 0x8001], 50))
    for x in (random_fp32(rng, 7, 30), ties):
        bits.assert_same(elementwise.to_bf16(x), fp32.to_bf16(x))


@pytest.mark.parametrize("kind", ACTIVATIONS.values(), ids=lambda kind: kind.name)
def test_every_bf16_through_each_unit(kind: Activation) -> None:
    """All gates, so that EX2 and RCP take arguments of every size, with every rounding of the product in between."""
    gate = torch.arange(1 << 16).to(torch.int16).view(torch.bfloat16).view(-1, 1).expand(-1, 3)
    up = bits.bf16(np.array([0x3F80, 0x3FAB, 0x0080])).expand(1 << 16, 3)
    varied = bits.fp32(0x3FD9DB23 + np.arange(1 << 16) % 4096)[:, None]
    none = [None] * len(kind.defaults)
    for halves in ([up, gate], [gate, up]) if kind.name == "Situ" else ([up, gate],):
        x = torch.cat(halves, 1)
        assert_as_transcribed(kind, x, None, none)
        if none:
            assert_as_transcribed(kind, x, None, [varied, *none[1:]])


def test_sums_that_lie_between_two_numbers() -> None:
    """A product far below half an ulp of the accumulator decides which way a tie goes: one rounding, not two."""
    y = torch.ones(4, 2, 1, dtype=torch.bfloat16)
    tie = 1 + 2.0**-23
    scales = torch.tensor([[tie, s * 2.0**-24 * (1 + d * 2.0**-23)] for s in (1, -1) for d in (0, 1)])
    y[:, 1] = 1 + 2.0**-7
    local = torch.zeros(4, 2, dtype=torch.int64)
    scales = torch.cat([scales, scales * 2.0**-40], 0)
    arguments = y.repeat(2, 1, 1), local.repeat(2, 1), scales
    bits.assert_same(elementwise.finalize(*arguments), transcribed_finalize.finalize(*arguments))
    tiny = torch.tensor([[[1.0], [2.0**-60]], [[1.0], [-(2.0**-60)]]]).to(torch.bfloat16)
    first = bits.fp32([0x3F800001])
    for last in (2.0**-24, -(2.0**-24)):
        three = torch.cat([tiny[:, :1], torch.ones(2, 1, 1, dtype=torch.bfloat16), tiny[:, 1:]], 1)
        weights = torch.cat([first.expand(2, 1), torch.full((2, 1), last), torch.ones(2, 1)], 1)
        arguments = three, torch.zeros(2, 3, dtype=torch.int64), weights
        bits.assert_same(elementwise.finalize(*arguments), transcribed_finalize.finalize(*arguments))


def test_an_fma_is_rounded_once() -> None:
    """Of the exact sum 1 + 2^-24 + 2^-70 only the last term says that it goes up."""
    y = torch.tensor([[[1.0], [2.0**-24]]]).to(torch.bfloat16).repeat(2, 1, 1)
    y[:, 1] = (1 + 2.0**-7) * 2.0**-24  # times (1 - 2^-7 + 2^-14 ...) is just off 2^-24
    near = float(np.float32(1 / (1 + 2.0**-7)))
    step = 2.0**-24
    scales = torch.tensor([[1.0, near], [1.0, near + step]])
    arguments = y, torch.zeros(2, 2, dtype=torch.int64), scales
    got = elementwise.finalize(*arguments)
    bits.assert_same(got, transcribed_finalize.finalize(*arguments))
    assert bits.bits_of(got).flatten().tolist() == [0x3F800000, 0x3F800001]


def test_shapes_and_dtypes() -> None:
    rng = np.random.default_rng(9)
    fc1 = bits.bf16(random_values(rng, 2 * 3 * 8).reshape(2, 3, 8))
    bias = bits.bf16(random_values(rng, 16).reshape(2, 1, 8))
    by_expert = random_fp32(rng, 2, 1, 1)
    for x, added, parameters in (
        (fc1, bias, (by_expert, None, by_expert)),
        (fc1[0, 0], None, (None, None, torch.tensor(7.0))),
        (fc1, None, (random_fp32(rng, 4), None, None)),
        (fc1.to(torch.float32), bias, (None, None, None)),
        (fc1[:, :0], None, (None, None, None)),
        (fc1.transpose(0, 1), None, (by_expert.transpose(0, 1), None, None)),
    ):
        assert_as_transcribed(BIAS, x, added, parameters)
    y, local, scales, _ = random_call(1)
    wide = y.to(torch.float32)
    bits.assert_same(
        elementwise.finalize(wide, local, scales), transcribed_finalize.finalize(wide, local, scales)
    )
    none = torch.zeros(2, 0, 4, dtype=torch.bfloat16), torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0)
    bits.assert_same(elementwise.finalize(*none), torch.zeros(2, 4))


def test_modes_and_threads_do_not_matter() -> None:
    arguments = activation(3, BIAS, (True, True, True), True)
    call = random_call(4, tokens=40)
    expected = transcribed_activation.activate(*arguments), transcribed_finalize.finalize(*call)

    def assert_equal(_: object) -> None:
        bits.assert_same(elementwise.activate(*arguments), expected[0])
        bits.assert_same(elementwise.finalize(*call), expected[1])
        bits.assert_same(elementwise.to_bf16(expected[0]), fp32.to_bf16(expected[0]))

    for mode in modes.MODES.values():
        with mode():
            assert_equal(None)
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(assert_equal, range(60)))


def test_squares_fit_into_16_bits() -> None:
    for unit in ("ex2", "rcp"):
        squares = mufu.constants(unit, torch.device("cpu"))[-1]
        assert int(squares.min()) >= 0
        assert int(squares.max()) < 1 << 16


@pytest.mark.parametrize("wrong", ["activate", "finalize", "to_bf16"])
def test_a_compiler_that_errs_is_found_out(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def loop(*arguments: Any) -> None:
        getattr(elementwise_loops, wrong)(*arguments)
        arguments[-1].reshape(-1)[-1] ^= 1

    loops = {name: getattr(elementwise_loops, name) for name in elementwise_loops.__all__} | {wrong: loop}
    monkeypatch.setitem(sys.modules, "mxfp4ref.sm90.elementwise_loops", SimpleNamespace(**loops))
    monkeypatch.setattr(_compiled, "_loaded", {})
    arguments = activation(5, BIAS, (False,) * 3, True)
    with pytest.warns(RuntimeWarning, match="the activation and the weighted sum take 10 times as long"):
        got = elementwise.activate(*arguments)
    bits.assert_same(got, transcribed_activation.activate(*arguments))
    call = random_call(6)
    bits.assert_same(elementwise.finalize(*call), transcribed_finalize.finalize(*call))
    bits.assert_same(elementwise.to_bf16(got), fp32.to_bf16(got))
