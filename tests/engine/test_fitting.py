"""Which tiles fit an output: all that give it, and no others."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from mxfp4ref.conformance.comparison import differing
from mxfp4ref.engine import fitting
from mxfp4ref.engine.fitting import Fit, closest_kernel, fitting_kernels
from mxfp4ref.formats.generations import BYTEWISE
from mxfp4ref.goldens import open_goldens
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward
from mxfp4ref.sm90.tactics import Sm90Kernel
from tests.helpers import layers
from tests.helpers.drop_in import CALL, DENSE_CALL, EXPECTED
from tests.helpers.forward_calls import underflowing_call

GOLDENS = open_goldens()


def all_kernels(call: MoeCall) -> list[Sm90Kernel]:
    """A kernel for every pair of N x K tiles that divides the call's K and runs."""
    generation = call.kernel.generation
    depths = (call.experts.hidden_size, call.experts.intermediate_size)
    tiles = sorted({tile[1:] for tile in generation.tiles if tile not in generation.refused})
    return [
        Sm90Kernel.of_tiles((k1, k2), (n1, n2), generation)
        for (n1, k1), (n2, k2) in product(tiles, tiles)
        if not depths[0] % k1 and not depths[1] % k2
    ]


def assert_exactly_those(call: MoeCall, fits: tuple[Fit, ...], output: torch.Tensor) -> None:
    """Hold the fits against a forward by every kernel there is."""
    for kernel in all_kernels(call):
        equal = not bool(differing(forward(replace(call, kernel=kernel)), output).any())
        assert any(fit.has(kernel) for fit in fits) == equal, kernel


@pytest.mark.parametrize("tile_k", [(128, 128), (256, 128), (512, 128)])
def test_k_tiles_are_told_apart(tile_k: tuple[int, int]) -> None:
    call = GOLDENS.load("gemm/mirrored_hidden_1536").call()
    output = forward(replace(call, kernel=Sm90Kernel.of_tiles(tile_k)))
    (fit,) = fitting_kernels(call, output)
    assert str(fit) == "{}x{}".format(*tile_k)
    assert fit.all_tile_n
    assert closest_kernel(call, output).tile_k == tile_k


def test_several_fit_where_the_order_does_not_show() -> None:
    fits = fitting_kernels(CALL, EXPECTED)
    assert list(map(str, fits)) == ["128x128", "256x128"]
    assert list(map(str, fitting_kernels(CALL, EXPECTED, first=True))) == ["128x128"]
    assert_exactly_those(replace(CALL.select(slice(0, 2))), fits, EXPECTED[:2])


@pytest.mark.parametrize("tile_n", [16, 32, 64])
def test_n_tiles_are_told_apart_where_they_show(tile_n: int) -> None:
    call = underflowing_call(9)
    kernel = Sm90Kernel.of_tiles((256, 128), (tile_n, 16))
    output = forward(replace(call, kernel=kernel))
    fits = fitting_kernels(call, output)
    assert any(fit.has(kernel) for fit in fits)
    assert not any(fit.all_tile_n for fit in fits)
    assert_exactly_those(call, fits, output)


def test_tiny_numbers_behind_the_first_two_groups_show_no_n_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    x = CALL.input.clone()
    x[0, 64:] = 2.0**-120
    call = replace(CALL, input=x)
    output = forward(call)
    assert_exactly_those(call.select(slice(0, 2)), fitting_kernels(call, output), output[:2])

    def refuse(*arguments: Any) -> bool:
        raise AssertionError("each kernel was tried")

    monkeypatch.setattr(fitting, "_equal", refuse)
    assert fitting_kernels(call, output)


def test_n_tiles_that_show_are_named() -> None:
    call = underflowing_call(9)
    output = forward(replace(call, kernel=Sm90Kernel.of_tiles((256, 128))))
    default, other = map(str, fitting_kernels(call, output))
    assert default.startswith("128x128 with N tiles 64x16 or 64x32")
    assert other.startswith("256x128 with N tiles 16x16 or 16x32")


def test_the_older_generation_has_one_k_tile() -> None:
    call = replace(CALL, kernel=Sm90Kernel(generation=BYTEWISE))
    assert list(map(str, fitting_kernels(call, forward(call)))) == ["128x128"]


def test_none_fits_a_wrong_output_and_the_closest_is_named() -> None:
    call = GOLDENS.load("gemm/mirrored_hidden_1536").call()
    right = Sm90Kernel.of_tiles((512, 128))
    output = forward(replace(call, kernel=right))
    for token in (0, call.num_tokens - 1):
        wrong = output.clone()
        wrong.view(torch.int16)[token, 5] ^= 1
        assert fitting_kernels(call, wrong) == ()
        assert closest_kernel(call, wrong) == right


def test_bf16_weights_have_no_tiles() -> None:
    (fit,) = fitting_kernels(DENSE_CALL, forward(DENSE_CALL))
    assert fit.kernel == DENSE_CALL.kernel


def test_a_call_without_tokens() -> None:
    call = layers.random_call(1, CALL.experts, tokens=0)
    assert len(fitting_kernels(call, forward(call))) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"call": 3}, TypeError, "call: expected MoeCall"),
        ({"output": EXPECTED[:1]}, ValueError, "output: expected"),
        ({"output": EXPECTED.float()}, TypeError, "output: expected"),
        ({"first": 1}, TypeError, "first: expected"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    given: dict[str, Any] = {"call": CALL, "output": EXPECTED} | arguments
    with pytest.raises(error, match=words):
        fitting_kernels(**given)
