"""Layouts against the recordings and against a transcription of `docs/arithmetic.md`."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxfp4ref.formats import layout, wordwise
from mxfp4ref.formats.generations import BYTEWISE, GENERATIONS, PLAIN, WORDWISE, Generation

SETS = ("a", "b", "c")


def recording(name: str) -> dict[str, Tensor]:
    with np.load(Path(__file__).parents[1] / "recordings" / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays}


RECORDED = recording("layout")


def random_bytes(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


# --- `docs/arithmetic.md`, section 2, word by word ---------------------------------------------------------------

P = [6, 7, 8, 15, 22, 23, 24, 31, 3, 4, 5, 12, 19, 20, 21, 28]
P += [0, 1, 2, 9, 16, 17, 18, 25, 13, 10, 11, 14, 29, 26, 27, 30]


def slow_interleave(weights: Tensor) -> Tensor:
    out = np.empty(weights.shape, dtype=np.uint8)
    for expert, rows in enumerate(weights.tolist()):
        for block in range(0, len(rows), 16):
            for r in range(8):
                low, high = rows[block + r], rows[block + r + 8]
                for p in range(len(low) // 32):
                    for q in range(4):
                        for c in range(4):
                            k = 32 * p + 8 * q + c
                            word = int.from_bytes(bytes([low[k], high[k], low[k + 4], high[k + 4]]), "little")
                            moved = sum((word >> i & 1) << P[i] for i in range(32))
                            column = 32 * p + 16 * (q // 2) + 4 * c
                            target = out[expert, block + r + 8 * (q % 2), column : column + 4]
                            target[:] = list(moved.to_bytes(4, "little"))
    return torch.from_numpy(out)


def slow_fold(scales: Tensor, generation: Generation) -> Tensor:
    e, r, g = scales.shape
    if generation is BYTEWISE:
        return scales.reshape(e, r, g // 4, 4).permute(0, 2, 1, 3).reshape(e, g // 4, r * 4)
    folded = torch.empty(e, r // 64, g // 4, 16, 16, dtype=torch.uint8)
    for row in range(r):
        for group in range(g):
            inner = row % 64
            folded[:, row // 64, group // 4, inner % 16, 4 * (inner // 16) + group % 4] = scales[
                :, row, group
            ]
    return folded


# --- SM90 weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETS)
def test_recorded_weights(name: str) -> None:
    logical, stored = RECORDED[f"{name}_w"], RECORDED[f"{name}_w_il"]
    assert not torch.equal(logical, stored)
    assert torch.equal(layout.interleave_weights_sm90(logical), stored)
    assert torch.equal(layout.deinterleave_weights_sm90(stored), logical)


@pytest.mark.parametrize("shape", [(1, 16, 32), (2, 32, 96), (3, 48, 64)])
def test_weights_like_the_specification(shape: tuple[int, int, int]) -> None:
    weights = random_bytes(*shape)
    assert torch.equal(layout.interleave_weights_sm90(weights), slow_interleave(weights))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 3), st.integers(0, 5), st.integers(0, 7), st.integers(0, 2**31))
def test_weights_inverse(experts: int, blocks: int, partitions: int, seed: int) -> None:
    weights = random_bytes(experts, 16 * blocks, 32 * partitions, seed=seed)
    stored = layout.interleave_weights_sm90(weights)
    assert stored.shape == weights.shape
    assert torch.equal(layout.deinterleave_weights_sm90(stored), weights)
    assert torch.equal(layout.interleave_weights_sm90(layout.deinterleave_weights_sm90(weights)), weights)


def test_weights_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random_bytes(3, 80, 96)
    whole = layout.interleave_weights_sm90(weights)
    for size in (1, 16 * 96, 32 * 96, 7000):
        monkeypatch.setattr(wordwise, "_CHUNK_BYTES", size)
        assert torch.equal(layout.interleave_weights_sm90(weights), whole)
        assert torch.equal(layout.deinterleave_weights_sm90(whole), weights)


def test_weights_of_any_name_and_stride() -> None:
    weights = random_bytes(4, 32, 64)
    expected = layout.interleave_weights_sm90(weights)
    odd_offset = torch.cat((torch.zeros(3, dtype=torch.uint8), weights.flatten()))[3:].view(weights.shape)
    variants = (
        weights.view(torch.int8),
        weights.view(torch.float4_e2m1fn_x2),
        weights.transpose(1, 2).contiguous().transpose(1, 2),
        weights.repeat(1, 1, 2)[..., :64],
        odd_offset,
    )
    for variant in variants:
        before = variant.clone()
        assert torch.equal(layout.interleave_weights_sm90(variant), expected)
        assert torch.equal(variant.view(torch.uint8), before.view(torch.uint8)), "the input was written to"
    assert torch.equal(layout.deinterleave_weights_sm90(expected.view(torch.int8)), weights)


def test_bit_targets() -> None:
    """A permutation, in which even nibbles stay in the low half of a word and odd ones 16 bits above them."""
    assert tuple(P) == wordwise._BIT_TARGETS
    assert sorted(P) == list(range(32))
    for i in range(32):
        if i // 4 % 2 == 0:
            assert P[i] < 16
            assert P[i + 4] == P[i] + 16


# --- SM90 scales ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETS)
def test_recorded_scales(name: str) -> None:
    logical, folded = RECORDED[f"{name}_s"], RECORDED[f"{name}_s_il"]
    assert torch.equal(layout.fold_scales_sm90(logical), folded)
    assert torch.equal(layout.unfold_scales_sm90(folded), logical)
    assert torch.equal(layout.unfold_scales_sm90(folded.view(torch.int32)), logical)


@pytest.mark.parametrize("generation", GENERATIONS)
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**31))
def test_scales(generation: Generation, experts: int, blocks: int, quads: int, seed: int) -> None:
    scales = random_bytes(experts, 64 * blocks, 4 * quads, seed=seed)
    folded = layout.fold_scales_sm90(scales, generation)
    assert folded.is_contiguous()
    assert torch.equal(folded, slow_fold(scales, generation))
    for given_generation in (None, generation):
        assert torch.equal(layout.unfold_scales_sm90(folded, given_generation), scales)
        assert torch.equal(layout.unfold_scales_sm90(folded.view(torch.int32), given_generation), scales)
    as_e8m0 = layout.fold_scales_sm90(scales.view(torch.float8_e8m0fnu), generation)
    assert torch.equal(as_e8m0, folded)


@pytest.mark.parametrize("generation", [*GENERATIONS, PLAIN])
@pytest.mark.parametrize("empty", [(0, 64, 4), (2, 0, 4), (2, 64, 0), (0, 0, 0)])
def test_nothing_is_folded_into_nothing(generation: Generation, empty: tuple[int, int, int]) -> None:
    folded = layout.fold_scales_sm90(torch.zeros(empty, dtype=torch.uint8), generation)
    assert folded.shape == generation.layout.folded_shape(*empty)
    assert layout.unfold_scales_sm90(folded, generation).shape == empty
    packed = torch.zeros(*empty[:2], empty[2] * 16, dtype=torch.uint8)
    assert layout.interleave_weights_sm90(packed, generation).shape == packed.shape


def test_older_scales_of_few_rows() -> None:
    scales = random_bytes(2, 5, 8)
    folded = layout.fold_scales_sm90(scales, BYTEWISE)
    assert folded.shape == (2, 2, 20)
    assert folded[1, 1, 4:8].tolist() == scales[1, 1, 4:8].tolist()
    assert torch.equal(layout.unfold_scales_sm90(folded), scales)


def test_the_fold_does_not_depend_on_strides() -> None:
    scales = random_bytes(2, 64, 8)
    strided = scales.transpose(1, 2).contiguous().transpose(1, 2)
    for generation in GENERATIONS:
        folded = layout.fold_scales_sm90(scales, generation)
        assert torch.equal(layout.fold_scales_sm90(strided, generation), folded)
        spread = folded.repeat_interleave(2, dim=0)[::2]
        assert torch.equal(layout.unfold_scales_sm90(spread), scales)


# --- Order of the rows ----------------------------------------------------------------------------------------


def test_swap_gate_up() -> None:
    rows = torch.tensor([[10, 11, 12, 20, 21, 22]])
    assert layout.swap_gate_up(rows).tolist() == [[20, 21, 22, 10, 11, 12]]


def test_interleaved_to_halves() -> None:
    gate_up = torch.tensor([[[10], [20], [11], [21], [12], [22]]])  # gate0, up0, gate1, up1, ...
    halves = torch.tensor([[[20], [21], [22], [10], [11], [12]]])  # [up; gate]
    assert torch.equal(layout.interleaved_to_halves(gate_up), halves)
    assert torch.equal(layout.halves_to_interleaved(halves), gate_up)


def test_pad_halves() -> None:
    rows = torch.tensor([[1, 2, 3, 4, 5, 6]], dtype=torch.uint8)
    padded = layout.pad_halves(rows, multiple=4)
    assert padded.tolist() == [[1, 2, 3, 0, 4, 5, 6, 0]]
    assert layout.unpad_halves(padded, 3).tolist() == rows.tolist()
    assert layout.pad_halves(rows, multiple=3).tolist() == rows.tolist()
    gpt_oss = layout.pad_halves(torch.ones(1, 2 * 2880, 1))
    assert gpt_oss.shape == (1, 2 * 2944, 1)
    assert gpt_oss[0, :, 0].tolist() == ([1.0] * 2880 + [0.0] * 64) * 2


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    dim=st.integers(-4, 3),
    half=st.integers(0, 9),
    multiple=st.integers(1, 7),
    dtype=st.sampled_from([torch.uint8, torch.int8, torch.bfloat16, torch.float32, torch.float8_e8m0fnu]),
)
def test_rows_inverse(shape: list[int], dim: int, half: int, multiple: int, dtype: torch.dtype) -> None:
    dim = max(-len(shape), min(dim, len(shape) - 1))
    shape[dim] = 2 * half
    width = torch.empty(0, dtype=dtype).element_size()
    t = random_bytes(*shape, width).view(dtype).squeeze(-1)

    def check(got: Tensor) -> None:
        assert got.dtype == dtype
        assert got.shape == t.shape
        assert torch.equal(got.contiguous().view(torch.uint8), t.contiguous().view(torch.uint8))

    check(layout.swap_gate_up(layout.swap_gate_up(t, dim), dim))
    check(layout.halves_to_interleaved(layout.interleaved_to_halves(t, dim), dim))
    check(layout.interleaved_to_halves(layout.halves_to_interleaved(t, dim), dim))
    padded = layout.pad_halves(t, multiple, dim)
    assert padded.shape[dim] % (2 * multiple) == 0
    assert 0 <= padded.shape[dim] - 2 * half < 2 * multiple
    check(layout.unpad_halves(padded, half, dim))
    first, second = t.split(half, dim) if half else (t, t)
    check(torch.cat([first, second], dim) if half else t)
    swapped = layout.swap_gate_up(t, dim)
    assert torch.equal(
        swapped.narrow(dim, 0, half).contiguous().view(torch.uint8), second.contiguous().view(torch.uint8)
    )


# --- Refusals -------------------------------------------------------------------------------------------------


def zeros(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: layout.interleave_weights_sm90(zeros(1, 24, 32)),
            ValueError,
            r"packed: .*R % 16 == 0.*R = 24",
        ),
        (
            lambda: layout.interleave_weights_sm90(zeros(1, 16, 48)),
            ValueError,
            r"packed: .*K % 64 == 0.*K = 96",
        ),
        (lambda: layout.interleave_weights_sm90(zeros(16, 32)), ValueError, "packed: "),
        (lambda: layout.interleave_weights_sm90(zeros(1, 16, 32).int()), TypeError, "packed: .*got int32"),
        (lambda: layout.deinterleave_weights_sm90(zeros(1, 24, 32)), ValueError, "interleaved: .*R = 24"),
        (lambda: layout.deinterleave_weights_sm90([1]), TypeError, "interleaved: .*got list"),
        (lambda: layout.fold_scales_sm90(zeros(1, 96, 4)), ValueError, r"scales: .*R % 64 == 0.*R = 96"),
        (lambda: layout.fold_scales_sm90(zeros(1, 64, 6)), ValueError, r"scales: .*K % 128 == 0.*K = 192"),
        (lambda: layout.fold_scales_sm90(zeros(1, 64, 6), BYTEWISE), ValueError, "scales: .*K = 192"),
        (
            lambda: layout.fold_scales_sm90(zeros(1, 64, 4), "0.7"),
            TypeError,
            "generation: expected BYTEWISE",
        ),
        (lambda: layout.fold_scales_sm90(zeros(64, 4)), ValueError, "scales: "),
        (lambda: layout.fold_scales_sm90(zeros(1, 64, 4).float()), TypeError, "scales: .*got float32"),
        (
            lambda: layout.unfold_scales_sm90(zeros(1, 1, 1, 16, 4)),
            ValueError,
            r"folded: .*\[1, 1, 1, 16, 4\]",
        ),
        (lambda: layout.unfold_scales_sm90(zeros(1, 1, 1, 16, 16).int()), ValueError, "folded: "),
        (lambda: layout.unfold_scales_sm90(zeros(1, 1, 1, 4, 16)), ValueError, "folded: "),
        (lambda: layout.unfold_scales_sm90(zeros(1, 1, 30)), ValueError, r"folded: .*\[1, 1, 30\]"),
        (lambda: layout.unfold_scales_sm90(zeros(4, 4)), ValueError, "folded: "),
        (
            lambda: layout.unfold_scales_sm90(zeros(1, 1, 64), WORDWISE),
            ValueError,
            r"expected .*\(wordwise\) in bytes",
        ),
        (
            lambda: layout.unfold_scales_sm90(zeros(1, 1, 1, 16, 16), BYTEWISE),
            ValueError,
            r"\(bytewise\) in bytes",
        ),
        (
            lambda: layout.unfold_scales_sm90(zeros(1, 1, 64), "new"),
            TypeError,
            "generation: expected BYTEWISE",
        ),
        (lambda: layout.unfold_scales_sm90(zeros(1, 1, 64).short()), TypeError, "folded: .*got int16"),
        (lambda: layout.swap_gate_up(zeros(2, 3)), ValueError, r"t: .*dim 1, got \[2, 3\]"),
        (
            lambda: layout.swap_gate_up(zeros(2, 4), dim=2),
            ValueError,
            "dim: expected an int from -2 to 1, got 2",
        ),
        (lambda: layout.swap_gate_up(zeros(2, 4), dim=1.0), TypeError, "dim: "),
        (lambda: layout.swap_gate_up([1, 2]), TypeError, "t: expected a tensor of shape"),
        (lambda: layout.interleaved_to_halves(zeros(2, 3)), ValueError, "t: "),
        (lambda: layout.halves_to_interleaved(zeros(2, 3)), ValueError, "t: "),
        (lambda: layout.pad_halves(zeros(2, 3)), ValueError, "t: "),
        (lambda: layout.pad_halves(zeros(2, 4), multiple=0), ValueError, "multiple: "),
        (lambda: layout.unpad_halves(zeros(2, 4), 3), ValueError, "size: expected an int from 0 to 2, got 3"),
    ],
)
def test_refusals(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def old_interleave(weights: torch.Tensor) -> torch.Tensor:
    """The helper of flashinfer 0.6.15.post1, byte by byte."""
    out = torch.zeros_like(weights)
    experts, rows, columns = weights.shape
    for expert, pair, column in itertools.product(range(experts), range(rows // 2), range(columns)):
        row, lane, start = pair // 8 * 16 + pair % 8, column % 32, column // 32 * 32
        upper, lower = int(weights[expert, row, column]), int(weights[expert, row + 8, column])
        target = row + (lane // 8 % 2) * 8
        byte = start + lane // 16 * 16 + lane % 4 * 4 + lane % 8 // 4 * 2
        out[expert, target, byte] = (upper & 0x0F) | ((lower & 0x0F) << 4)
        out[expert, target, byte + 1] = (lower & 0xF0) | (upper >> 4)
    return out


def test_weights_of_the_older_generation() -> None:
    weights = torch.randint(
        0, 256, (2, 48, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    stored = layout.interleave_weights_sm90(weights, BYTEWISE)
    assert torch.equal(stored, old_interleave(weights))
    assert not torch.equal(stored, layout.interleave_weights_sm90(weights))
    assert torch.equal(layout.deinterleave_weights_sm90(stored, BYTEWISE), weights)
    with pytest.raises(TypeError, match=r"generation: expected BYTEWISE or WORDWISE.* of .*, got '0.6.10'"):
        layout.interleave_weights_sm90(weights, "0.6.10")
