from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxfp4ref.routing import scoring
from mxfp4ref.routing.scoring import raw_logits, sigmoid, softmax, softplus, sqrt_softplus
from tests.helpers import mpmath_router as exact


def sqrt_softplus_once(logits: Tensor) -> Tensor:
    return sqrt_softplus(logits, rounding="once")


ELEMENTWISE = [
    (sigmoid, exact.sigmoid),
    (softplus, exact.softplus),
    (sqrt_softplus, exact.sqrt_softplus_each_step),
    (sqrt_softplus_once, exact.sqrt_softplus),
]
elementwise = pytest.mark.parametrize(
    ("function", "formula"), ELEMENTWISE, ids=["sigmoid", "softplus", "each_step", "once"]
)

finite_float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def bits(t: Tensor) -> list[int]:
    return t.view(torch.int32).tolist()


def float32_bits(values: list[np.float32]) -> list[int]:
    return np.array(values, dtype=np.float32).view(np.int32).tolist()


def check(function: Callable[[Tensor], Tensor], formula: Callable[[float], object], x: Tensor) -> None:
    wanted = float32_bits([exact.nearest_float32(formula(v)) for v in x.tolist()])
    got = bits(function(x))
    wrong = [(v, hex(w), hex(g)) for v, w, g in zip(x.tolist(), wanted, got, strict=True) if w != g]
    assert not wrong, f"{len(wrong)} wrong, (x, expected, got): {wrong[:5]}"


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
@elementwise
def test_every_bf16_logit(function, formula, step):
    """Of every sign and exponent every seventh in the usual run."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    accepted = every[every < math.inf]  # -inf too; NaN compares false
    assert len(accepted) == 65536 - 2 * 127 - 1
    check(function, formula, accepted[::step])


@elementwise
def test_random_logits(function, formula):
    generator = torch.Generator().manual_seed(1)
    ordinary = torch.randn(2000, generator=generator) * 4
    wide = torch.randn(1000, generator=generator) * 60
    any_bits = torch.randint(-(1 << 31), 1 << 31, (1000,), generator=generator).to(torch.int32)
    any_bits = any_bits.view(torch.float32)
    check(function, formula, torch.cat([ordinary, wide, any_bits[any_bits < math.inf]]))


@elementwise
def test_logits_whose_scores_lie_next_to_a_rounding_boundary(function, formula):
    """Float32 neighbours of the inverse images of midpoints between float32 scores."""
    mp = exact.mp
    inverse = {
        exact.sigmoid: lambda m: mp.log(m / (1 - m)),
        exact.softplus: lambda m: mp.log(mp.expm1(m)),
        exact.sqrt_softplus: lambda m: mp.log(mp.expm1(m * m)),
        exact.sqrt_softplus_each_step: lambda m: mp.log(mp.expm1(m * m)),
    }[formula]
    random = np.random.default_rng(2)
    hard = []
    for _ in range(1500):
        exponent = int(random.integers(-40, 1 if formula is exact.sigmoid else 3))
        midpoint = mp.mpf(2 * int(random.integers(1 << 23, 1 << 24)) + 1) * mp.mpf(2) ** (exponent - 25)
        x = float(exact.nearest_float32(abs(inverse(midpoint))))
        x = math.copysign(x, float(inverse(midpoint)))
        hard += [x, float(np.nextafter(np.float32(x), np.float32(0)))]
    check(function, formula, torch.tensor(hard, dtype=torch.float32))


@pytest.mark.parametrize("sign", [1, -1])
def test_sigmoid_of_tiny_logits_passes_boundaries_closer_than_float64_sees(sign, monkeypatch):
    """sigmoid(x) = 1/2 + x/4 - x^3/48: only the cubic term of these leaves a midpoint of the float32 grid."""
    decided = []
    decide = scoring._decide
    monkeypatch.setattr(scoring, "_decide", lambda f: decided.append(1) or decide(f))
    spacing = 2.0**-24 if sign > 0 else 2.0**-25  # above and below 1/2
    x = sign * torch.arange(1, 513, 2, dtype=torch.float32) * 2 * spacing
    check(sigmoid, exact.sigmoid, x)
    assert len(decided) >= 100


def test_subnormal_scores_and_the_ends():
    x = torch.tensor([-87.4, -95.0, -103.5, -103.97, -103.98, -104.5, -200.0, -math.inf, 0.0, -0.0, 3e38])
    for function, formula in ELEMENTWISE:
        check(function, formula, x)
    assert bits(sigmoid(torch.tensor([-math.inf, 0.0, 200.0]))) == [0, 0x3F000000, 0x3F800000]
    assert bits(softplus(torch.tensor([20.0, 20.000002, 3e38]))) == bits(
        torch.tensor([20.0, 20.000002, 3e38])
    )


def test_the_two_roundings_of_sqrt_softplus_differ_and_each_step_is_the_default():
    x = torch.randn(4096, generator=torch.Generator().manual_seed(3))
    distance = (sqrt_softplus(x).view(torch.int32) - sqrt_softplus_once(x).view(torch.int32)).abs()
    assert distance.max() == 1
    assert 0.05 < distance.double().mean() < 0.25
    assert bits(sqrt_softplus(x)) == bits(sqrt_softplus(x, rounding="each_step"))


def adversarial_rows(experts: int) -> Tensor:
    generator = torch.Generator().manual_seed(experts)
    rows = [
        torch.randn(experts, generator=generator) * s for s in (1e-30, 1e-7, 1e-3, 1, 3, 10, 50, 1e4, 1e37)
    ]
    rows += [torch.full((experts,), v) for v in (0.0, -0.0, 1.0, -7.25, 3e38, -3e38, 1e-45)]
    two_to_minus_24 = torch.zeros(experts)
    two_to_minus_24[::2] = -(2.0**-24)
    masked = torch.randn(experts, generator=generator)
    masked[1:] = torch.where(masked[1:] > 0.3, -math.inf, masked[1:])
    only_one = torch.full((experts,), -math.inf)
    only_one[-1] = -5.0
    rows += [two_to_minus_24, masked, only_one]
    rows.append(torch.arange(experts, dtype=torch.float32) * -0.75)
    rows.append(torch.cat([torch.zeros(1), torch.full((experts - 1,), -(2.0**-23))]))
    return torch.stack(rows)


@pytest.mark.parametrize("experts", [1, 2, 3, 8, 32, 100])
def test_softmax(experts):
    generator = torch.Generator().manual_seed(4)
    rows = torch.cat([adversarial_rows(experts), torch.randn(40, experts, generator=generator) * 3])
    wanted = [float32_bits(exact.softmax(row)) for row in rows.tolist()]
    assert bits(softmax(rows)) == wanted


@given(st.lists(finite_float32, min_size=1, max_size=6))
def test_softmax_of_any_row(row):
    assert bits(softmax(torch.tensor([row], dtype=torch.float32))) == [float32_bits(exact.softmax(row))]


@given(st.lists(finite_float32, min_size=1, max_size=8))
def test_elementwise_of_any_logits(row):
    for function, formula in ELEMENTWISE:
        check(function, formula, torch.tensor(row, dtype=torch.float32))


def test_error_bounds_of_the_estimates():
    """The bound that certification relies on, 2^-46, has a factor of 16 to spare."""
    mp = exact.mp
    generator = torch.Generator().manual_seed(5)
    x = torch.cat([torch.randn(1500, generator=generator), torch.linspace(-250, 250, 1501)])
    x = torch.cat([x, torch.randn(500, generator=generator) * 1e-6])
    values = x.tolist()

    def largest_error(estimates: Tensor, formula: Callable[[float], object]) -> float:
        return max(float(abs(e / formula(v) - 1)) for e, v in zip(estimates.tolist(), values, strict=True))

    assert largest_error(scoring._exp(x.double()), lambda v: mp.exp(v)) < 2.0**-50
    assert largest_error(1 / (1 + scoring._exp(-x.double())), exact.sigmoid) < 2.0**-50
    assert largest_error(scoring._softplus(x), exact.softplus) < 2.0**-50


def test_no_bit_depends_on_the_estimates(monkeypatch):
    """A machine with another exp, within the bound, gets the same scores."""
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(64, 128, generator=generator) * 3
    x[0] = torch.arange(128) * 2.0**-24
    functions = [sigmoid, softplus, sqrt_softplus, sqrt_softplus_once, softmax]
    before = [bits(f(x)) for f in functions]
    exp = scoring._exp

    def another_exp(t: Tensor) -> Tensor:
        noise = torch.rand(t.shape, generator=generator, dtype=torch.float64) * 2 - 1
        return exp(t) * (1 + noise * 2.0**-48)

    monkeypatch.setattr(scoring, "_exp", another_exp)
    assert [bits(f(x)) for f in functions] == before


def test_decimal_evaluation_agrees_with_certified_estimates(monkeypatch):
    generator = torch.Generator().manual_seed(7)
    x = torch.cat([torch.randn(8, 25, generator=generator) * s for s in (1e-8, 1, 30)])
    functions = [sigmoid, softplus, sqrt_softplus, sqrt_softplus_once, softmax]
    before = [bits(f(x)) for f in functions]
    monkeypatch.setattr(scoring, "_ERROR", 0.5)  # so that nothing can be decided from the estimate
    decided = []
    decide = scoring._decide
    monkeypatch.setattr(scoring, "_decide", lambda f: decided.append(1) or decide(f))
    assert [bits(f(x)) for f in functions] == before
    assert len(decided) > 4 * x.numel()


@settings(max_examples=300)
@given(st.integers(1, 1 << 40), st.integers(-200, 60))
def test_rounding_of_fractions(mantissa, exponent):
    value = scoring.Fraction(mantissa) * scoring.Fraction(2) ** exponent
    assert scoring._to_float32(value) == exact.nearest_float32(
        exact.mp.mpf(mantissa) * exact.mp.mpf(2) ** exponent
    )


def test_above_20_the_root_is_that_of_the_logit(monkeypatch):
    """log(1 + e^x) is x + 2e-9 there: enough to round the root of a few of these otherwise."""
    x = torch.linspace(20.0, 20.1, 4000)[1:]
    roots = x.double().sqrt().float()  # 53 >= 2 * 24 + 2 bits: rounded once
    assert bits(sqrt_softplus_once(x)) == bits(roots)
    exact_log = [exact.nearest_float32(exact.mp.sqrt(exact.mp.log1p(exact.mp.exp(v)))) for v in x.tolist()]
    assert float32_bits(exact_log) != bits(roots)
    monkeypatch.setattr(scoring, "_ERROR", 0.5)
    assert bits(sqrt_softplus_once(x)) == bits(roots)


def test_shapes_dtypes_and_layouts():
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(8))
    for function in (raw_logits, sigmoid, softplus, sqrt_softplus, softmax):
        assert function(x).shape == x.shape
        assert function(x).dtype == torch.float32
        assert bits(function(x.bfloat16())) == bits(function(x.bfloat16().float()))
        assert bits(function(x.transpose(0, 1))) == bits(function(x.transpose(0, 1).contiguous()))
        assert function(x[:0]).shape == (0, 4, 5)
        assert not function(x.clone().requires_grad_()).requires_grad
    assert bits(raw_logits(x)) == bits(x)


@pytest.mark.parametrize("function", [raw_logits, sigmoid, softplus, sqrt_softplus, softmax])
def test_refusals(function):
    for bad in (math.nan, -math.nan, math.inf):
        x = torch.zeros(2, 3)
        x[1, 2] = bad
        with pytest.raises(ValueError, match=r"logits: .*\[1, 2\]"):
            function(x)
    with pytest.raises(ValueError, match="logits: expected at least one expert"):
        function(torch.zeros(2, 0))
    with pytest.raises(TypeError, match="logits: expected a float32 or bfloat16 tensor"):
        function(torch.zeros(2, 3, dtype=torch.float64))
    with pytest.raises(TypeError, match="logits"):
        function([0.0])


def test_further_refusals():
    with pytest.raises(ValueError, match=r"logits: .*row \[1\]"):
        softmax(torch.tensor([[0.0, -math.inf], [-math.inf, -math.inf]]))
    with pytest.raises(ValueError, match="rounding: expected one of 'each_step', 'once'"):
        sqrt_softplus(torch.zeros(1, 1), rounding="twice")
