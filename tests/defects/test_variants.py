"""The parts that defects change one of: unchanged they are the kernel's, and changed what they say."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch

from mxfp4ref.defects import activation
from mxfp4ref.defects.variants import gemm
from mxfp4ref.defects.variants.finalize import FinalizeVariant
from mxfp4ref.defects.variants.gemm import GemmVariant, tensor_core_sum
from mxfp4ref.defects.variants.router import rerouted
from mxfp4ref.defects.variants.swiglu import SwigluVariant
from mxfp4ref.formats.generations import GENERATIONS, Generation
from mxfp4ref.model.forward import Stages, forward
from mxfp4ref.sm90 import tensor_core
from mxfp4ref.sm90.activation import ACTIVATIONS, SWIGLU, SWIGLU_BIAS
from mxfp4ref.sm90.swiglu import swiglu
from mxfp4ref.sm90.tactics import Sm90Kernel
from tests.helpers import defect_calls
from tests.helpers.defect_outputs import as_bytes, build, reference_bytes
from tests.helpers.usual import first

# Unchanged they are the kernel, so that a defect is the one thing that its definition changes.


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("call_name", first(8, defect_calls.MOE_CALLS))
def test_unchanged_stages_are_the_kernel(call_name: str, generation: Generation) -> None:
    call = replace(build("moe", call_name), kernel=Sm90Kernel(generation=generation))
    variant = GemmVariant()
    stages = Stages(fc1_gemm=variant, fc2_gemm=variant, activate=SwigluVariant(), finalize=FinalizeVariant())
    assert as_bytes(forward(call, stages)) == as_bytes(forward(call))


@pytest.mark.parametrize("names", [names for n in range(4) for names in combinations("abl", n)])
def test_unchanged_swiglu_is_the_kernels(names: tuple[str, ...]) -> None:
    """With any of alpha, beta and limit, for NaN, Inf and zeros as well."""
    values = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -5.0, 90.0, 2.0**-126, 2.0**127])
    pairs = torch.cartesian_prod(values, values).to(torch.bfloat16)
    given = {"a": torch.tensor([1.702]), "b": torch.tensor([0.3]), "l": torch.tensor([7.0])}
    parameters = [given[name] if name in names else None for name in "abl"]
    activation = ACTIVATIONS[SWIGLU_BIAS if names else SWIGLU]
    bias = torch.tensor([0.25, -0.0]).to(torch.bfloat16)
    for added in (None, bias):
        got = SwigluVariant()(activation, pairs, added, parameters if names else ())
        assert as_bytes(got) == as_bytes(swiglu(pairs, added, *parameters))


@pytest.mark.parametrize("tile_k", [(128, 128), (256, 512)])
@pytest.mark.parametrize("tile_n", [16, 64])
def test_unchanged_gemm_follows_the_tactic(tile_k: tuple[int, int], tile_n: int) -> None:
    for call_name in ("cancelling_gemm2", "underflow"):
        call = build("moe", call_name)
        fitting = tuple(
            tile if depth % tile == 0 else 128
            for tile, depth in zip(
                tile_k, (call.experts.hidden_size, call.experts.intermediate_size), strict=True
            )
        )
        call = replace(call, kernel=Sm90Kernel.of_tiles(fitting, (tile_n, tile_n)))
        variant = GemmVariant()
        assert as_bytes(forward(call, Stages(fc1_gemm=variant, fc2_gemm=variant))) == as_bytes(forward(call))


@pytest.mark.parametrize("call_name", defect_calls.ROUTING_CALLS)
def test_unchanged_router_is_the_preset(call_name: str) -> None:
    call = build("routing", call_name)
    assert as_bytes(rerouted(call)) == reference_bytes("routing", call_name)


@pytest.mark.parametrize("fraction_bits", [23, 24, 25, 26, 27])
def test_tensor_core_sum_is_the_obvious_step(fraction_bits: int) -> None:
    generator = torch.Generator().manual_seed(fraction_bits)
    exponents = torch.randint(-12, 13, (1, 40, 32), generator=generator)
    x = (torch.randn(1, 40, 32, generator=generator) * 2.0**exponents).to(torch.bfloat16)
    weights = torch.randint(-6, 7, (1, 24, 32), generator=generator).to(torch.bfloat16)
    expected = torch.zeros(1, 40, 24)
    for half in (slice(0, 16), slice(16, 32)):
        factors = x[:, :, None, half], weights[:, None, :, half]
        expected = tensor_core.step(*factors, expected, fraction_bits=fraction_bits)
    got = tensor_core_sum(x.double(), weights.double(), fraction_bits=fraction_bits).to(torch.float32)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("step_size", [8, 16, 20, 32, 64])
@pytest.mark.parametrize("toward_zero", [True, False])
def test_compiled_steps_are_the_written_ones(step_size: int, toward_zero: bool) -> None:
    """For every exponent, zeros, subnormals, NaN, Inf and sums that overflow, in all bits but those of a NaN."""
    compiled = gemm._compiled_steps()
    assert compiled is not None
    generator = torch.Generator().manual_seed(step_size)
    bits = torch.randint(-(1 << 15), 1 << 15, (6, 40, 64), generator=generator).to(torch.int16)
    x = bits.view(torch.bfloat16).double()
    x[1] = torch.randn(40, 64, generator=generator).bfloat16().double()
    x[2] = torch.randn(40, 64, generator=generator).bfloat16().double() * 2.0**124
    x[3] *= x[3].abs() < 2.0**-120
    x[4] = torch.where(torch.rand(40, 64, generator=generator) < 0.01, x[4], x[1])
    x[5] = -0.0
    weights = torch.randint(-12, 13, (6, 24, 64), generator=generator).double() / 2
    for fraction_bits in (24, 25, 46):
        how = step_size, fraction_bits, toward_zero
        expected = gemm._by_steps(x, weights, *how)
        got = gemm._by_loops(compiled, x, weights, *how)
        assert torch.equal(got.isnan(), expected.isnan())
        number = ~expected.isnan()
        assert torch.equal(got[number].view(torch.int64), expected[number].view(torch.int64))
    assert bool(expected.isnan().any() & expected.isinf().any() & (expected[1] != 0).all())


def test_sigmoids_approximate_the_sigmoid() -> None:
    z = torch.linspace(-30, 30, 4001)
    expected = torch.sigmoid(z.double())
    for sigmoid in (
        activation.sigmoid_exact,
        activation.sigmoid_libm,
        activation.ex2_exact,
        activation.rcp_exact,
    ):
        got = sigmoid(z).double()
        # The argument of EX2 is rounded to 24 bits: up to 2^-19 of 43 there, a little less in the result.
        assert ((got - expected).abs() <= 2.0**-17 * expected).all(), sigmoid
    # Near 0 the tanh form has an absolute error only.
    assert ((activation.sigmoid_tanh(z).double() - expected).abs() <= 2.0**-23).all()
