"""The preparation of W4A8's weights (`docs/arithmetic.md`, section 11): against flashinfer's, and exact numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxfp4ref.formats import humming
from mxfp4ref.formats.mxfp4 import E2M1_VALUES, unpack_codes
from tools.hardware import recorded

RECORDED = recorded.load(recorded.RECORDINGS / "humming_preparation.npz")
SETS = sorted(key.removesuffix("_codes") for key in RECORDED if key.endswith("_codes"))
VALUES = torch.tensor(E2M1_VALUES, dtype=torch.float64)


def random_bytes(seed: int, low: int, high: int, *shape: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator, device="cpu").to(torch.uint8)


def values_of(packed: Tensor, exponents: Tensor) -> Tensor:
    """Codes times 2^exponent in float64, exponents `[E, R, G]` or `[E, 1, 1]`."""
    codes = unpack_codes(packed).long().unflatten(2, (-1, 32))
    return torch.ldexp(VALUES[codes], exponents.unsqueeze(-1).long())


@pytest.mark.parametrize("name", SETS)
def test_prepared_as_by_flashinfer(name: str) -> None:
    given = {key: RECORDED[f"{name}_{key}"] for key in ("packed", "scales", "codes", "offsets", "residual")}
    tensors = {
        key: torch.from_numpy(value.view(value.dtype.str.replace("u4", "i4"))) for key, value in given.items()
    }
    got = humming.prepare(tensors["packed"], tensors["scales"], int(RECORDED[f"{name}_max_range"]))
    assert torch.equal(got.packed, tensors["codes"])
    assert torch.equal(got.offsets, tensors["offsets"])
    assert torch.equal(got.residual.view(torch.int32), tensors["residual"])


def test_every_rewritten_code_is_flashinfers() -> None:
    assert torch.equal(humming.rewrite_table(), torch.from_numpy(RECORDED["lut"]))


@pytest.mark.parametrize("offset", range(1, 13))
def test_a_prepared_weight_is_exact_as_e4m3(offset: int) -> None:
    numbers = humming.e4m3_table()[offset].view(torch.float8_e4m3fn).double()
    assert torch.equal(numbers, torch.ldexp(VALUES, torch.tensor(offset - 6)))
    assert torch.equal(numbers.signbit(), VALUES.signbit())


def test_other_offsets_run_over_into_the_next_byte() -> None:
    table = humming.e4m3_table().tolist()
    for offset in range(256):
        words = ((offset * 0x08080800 + 0x0C080000) % 2**32, (offset * 0x08080808 + 0x1C181410) % 2**32)
        magnitudes = [word >> shift & 255 for word in words for shift in (0, 8, 16, 24)]
        assert table[offset] == magnitudes + [byte | 0x80 for byte in magnitudes]


def test_interleaved_as_the_docstring_says() -> None:
    packed = random_bytes(1, 0, 256, 2, 32, 64)
    stored = humming.interleave(packed)
    for r, p, m, t, c in ((0, 0, 0, 0, 0), (3, 1, 1, 0, 2), (7, 0, 1, 1, 3), (5, 1, 0, 1, 1)):
        pair = 2 * (16 * p + 8 * m + 4 * t + c)
        gathered = [int(packed[1, 16 + row, pair + byte]) for row in (r, r + 8) for byte in (0, 1)]
        word = int.from_bytes(gathered, "little")
        expected = word & 0x77777777
        for code in range(8):
            expected |= (word >> (4 * code + 3) & 1) << (8 * code + 7 if code < 4 else 8 * code - 29)
        place = 4 * (8 * p + 4 * m + c)
        got = int.from_bytes(stored[1, 16 + r + 8 * t, place : place + 4].tolist(), "little")
        assert got == expected
    assert torch.equal(humming.deinterleave(stored), packed)


def test_weights_at_any_place_in_memory() -> None:
    storage = random_bytes(2, 0, 256, 16 * 32 + 1)
    odd = storage[1:].view(1, 16, 32)
    assert torch.equal(humming.interleave(odd), humming.interleave(odd.clone()))


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.integers(0, 240), st.integers(1, 60), st.integers(0, 11))
def test_the_loss_is_the_difference_of_the_weights(seed: int, low: int, width: int, max_range: int) -> None:
    packed = random_bytes(seed, 0, 256, 2, 4, 32)
    scales = random_bytes(seed + 1, low, min(low + width, 256), 2, 4, 2)
    loss = humming.preparation_loss(packed, scales, max_range)
    prepared = humming.prepare(packed, scales, max_range)
    highest = scales.flatten(1).amax(1).int()
    lowest = torch.maximum(scales.flatten(1).amin(1).int(), highest - max_range).view(2, 1, 1)
    old = values_of(packed, scales.int() - 127)
    new = values_of(prepared.packed, lowest + prepared.offsets.int() - 1 - 127)
    error = (new - old).abs()
    assert loss.groups == 16
    assert loss.groups_rewritten == int((scales < lowest).sum())
    assert loss.weights_changed == int((error > 0).sum())
    assert loss.weights_zeroed == int(((error > 0) & (new == 0)).sum())
    assert loss.worst_error == float(error.max())
    assert loss.mean_error == pytest.approx(float(error.mean()))
    if width <= max_range + 1:
        assert loss.weights_changed == 0


def test_losses_add_up() -> None:
    packed, scales = random_bytes(3, 0, 256, 2, 8, 32), random_bytes(4, 100, 125, 2, 8, 2)
    parts = [humming.preparation_loss(packed[e : e + 1], scales[e : e + 1]) for e in range(2)]
    whole = humming.preparation_loss(packed, scales)
    total = parts[0] + parts[1]
    assert total.mean_error == pytest.approx(whole.mean_error)
    assert (total.groups, total.weights_changed) == (whole.groups, whole.weights_changed)
    assert total.worst_relative_error == whole.worst_relative_error > 0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"packed": torch.zeros(1, 16, 24, dtype=torch.uint8)},
            ValueError,
            "packed: expected a multiple of 32",
        ),
        ({"packed": torch.zeros(1, 16, 32)}, TypeError, "packed: expected"),
        ({"scales": torch.zeros(1, 16, 1, dtype=torch.uint8)}, ValueError, "scales: expected"),
        ({"max_range": 12}, ValueError, "max_range: expected"),
    ],
)
def test_refusals(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    zeros = torch.zeros(1, 16, 32, dtype=torch.uint8)
    for function in (humming.prepare, humming.preparation_loss):
        with pytest.raises(error, match=message):
            function(**({"packed": zeros, "scales": zeros[..., :2]} | changes))
    with pytest.raises(ValueError, match="R % 16"):
        humming.interleave(zeros[:, :8])
