"""The fast group-scaled GEMM against its transcription on hard inputs, and what may not matter to it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxfp4ref.formats.generations import BYTEWISE, GENERATIONS, WORDWISE, Generation
from mxfp4ref.formats.mxfp4 import pack_codes
from mxfp4ref.sm90.gemm.cpu import group_scaled_gemm
from mxfp4ref.sm90.gemm.reference import group_scaled_gemm_reference
from mxfp4ref.sm90.tactics import TILE_K, TILE_N, Tactic
from tests.helpers import bits
from tests.helpers.gemm_inputs import KINDS, SCALES, assert_fast_is_slow, problem, random_x

TACTICS = [(tile_k, tile_n) for tile_k in TILE_K for tile_n in TILE_N]


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    x_kind=st.sampled_from(KINDS),
    scale_kind=st.sampled_from(SCALES),
    tactic=st.sampled_from(TACTICS),
    tiles=st.integers(1, 3),
    batch=st.integers(1, 3),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    offset=st.sampled_from([None, 0, 1, 6, 1000]),
    generation=st.sampled_from(GENERATIONS),
)
@example(1, "wider", "any", (128, 16), 3, 2, (9, 9), None, WORDWISE)
@example(2, "raw", "ends", (256, 16), 2, 2, (9, 9), 0, BYTEWISE)
def test_fast_is_slow(
    seed: int,
    x_kind: str,
    scale_kind: str,
    tactic: tuple[int, int],
    tiles: int,
    batch: int,
    shape: tuple[int, int],
    offset: int | None,
    generation: Generation,
) -> None:
    tile_k, tile_n = tactic
    tiles = min(tiles, 3 * 256 // tile_k) or 1
    groups = tiles * tile_k // 32
    x, packed, scales = problem(
        seed, x_kind, scale_kind, batch=batch, rows=shape[0], columns=shape[1], groups=groups
    )
    positions = None
    if offset is not None:
        first = np.random.default_rng(seed).integers(0, 8, (batch, 1))
        positions = torch.from_numpy(first + offset + np.arange(shape[0]))
    options = {"tactic": Tactic((64, tile_n, tile_k)), "positions": positions, "generation": generation}
    assert_fast_is_slow(x, packed, scales, **options)


@pytest.mark.parametrize(
    ("x_kind", "scale_kind"),
    [
        pytest.param(x, scale, marks=() if (n - m) % len(SCALES) == 0 else pytest.mark.slow)
        for n, x in enumerate(KINDS)
        for m, scale in enumerate(SCALES)
    ],
)  # each of either in the usual run
def test_every_kind_at_a_larger_size(x_kind: str, scale_kind: str) -> None:
    x, packed, scales = problem(100, x_kind, scale_kind, batch=2, rows=11, columns=24)
    assert_fast_is_slow(x, packed, scales)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (65, 3), (130, 2), (2, 513), (3, 1030)])
def test_sizes_beyond_a_tile(rows: int, columns: int) -> None:
    """Rows and columns are worked on in tiles: their borders may not show, nor may careful rows get mixed up."""
    x, packed, scales = problem(3, "wide", "ordinary", rows=rows, columns=columns, groups=4)
    x[:, ::3] = bits.bf16(random_x(np.random.default_rng(4), "tiny", 1, len(range(0, rows, 3)), 128))
    scales[:, ::5] = 1
    positions = torch.arange(7, 7 + rows)[None]
    assert_fast_is_slow(x, packed, scales, positions=positions)


def test_more_groups_than_are_summed_at_once() -> None:
    for tile_k, groups in ((128, 36), (256, 40), (512, 48)):
        for seed, kind in enumerate(("mirrored", "wide", "raw")):
            x, packed, scales = problem(seed, kind, "ordinary", rows=4, columns=6, groups=groups)
            assert_fast_is_slow(x, packed, scales, tactic=Tactic((64, 16, tile_k)))


@pytest.mark.parametrize("second_at", [1, 16], ids=["same step", "next step"])
def test_truncation_sets_in_where_it_should(second_at: int) -> None:
    """Two terms whose exponents lie ever farther apart, in one step or in two, either one first."""
    significands = np.array([0x80, 0x81, 0xFF]) & 0x7F
    rows = [
        (sign << 15 | 127 + first << 7 | fraction, 127 + second << 7 | other)
        for distance in range(14, 36)
        for first, second in ((distance, 0), (0, distance))
        for sign in (0, 1)
        for fraction in significands.tolist()
        for other in significands.tolist()
    ]
    columns = [(a, b) for a in (1, 3, 6, 7) for b in (1, 3, 6, 7)]  # 0.5, 1.5, 4, 6
    x = np.zeros((1, len(rows), 32), dtype=np.int64)
    codes = np.zeros((1, len(columns), 32), dtype=np.uint8)
    x[0][:, [0, second_at]], codes[0][:, [0, second_at]] = rows, columns
    scales = torch.full((1, len(columns), 1), 127, dtype=torch.uint8)
    assert_fast_is_slow(bits.bf16(x), pack_codes(torch.from_numpy(codes)), scales)


# --- what may not matter ----------------------------------------------------------------------------------


def test_rows_and_columns_do_not_influence_each_other() -> None:
    x, packed, scales = problem(8, "wide", "spread", batch=2, rows=6, columns=5)
    x[0, 2, 40] = torch.nan
    x[1, 3] = x[1, 3] * 2.0**-120
    scales[0, 1, 3] = 255
    whole = group_scaled_gemm(x, packed, scales, tactic=Tactic((64, 64, 128)))
    for expert, row, column in np.ndindex(2, 6, 5):
        alone = group_scaled_gemm(
            x[expert, None, row, None],
            packed[expert, None, column, None],
            scales[expert, None, column, None],
            tactic=Tactic((64, 64, 128)),
            positions=torch.tensor([[row]]),
        )
        bits.assert_same(alone[0, 0, 0], whole[expert, row, column])


def test_strides_do_not_matter() -> None:
    x, packed, scales = problem(9, "wide", "any", batch=2, rows=6, columns=5, groups=4)
    strided_x = x.transpose(0, 2).contiguous().transpose(0, 2)
    strided_packed = torch.stack([packed, packed], -1)[..., 0]
    strided_scales = scales.transpose(1, 2).contiguous().transpose(1, 2)
    assert not any(t.is_contiguous() for t in (strided_x, strided_packed, strided_scales))
    got = group_scaled_gemm(strided_x, strided_packed, strided_scales)
    bits.assert_same(got, group_scaled_gemm(x, packed, scales))


def test_storage_offsets_do_not_matter() -> None:
    """A view into a larger buffer may start at any byte."""
    x, packed, scales = problem(12, "wide", "any", batch=1, rows=3, columns=5, groups=4)

    def at_offset_one(tensor: Tensor) -> Tensor:
        buffer = torch.cat([tensor.new_zeros(1), tensor.flatten()])
        return buffer[1:].view(tensor.shape)

    got = group_scaled_gemm(at_offset_one(x), at_offset_one(packed), at_offset_one(scales))
    bits.assert_same(got, group_scaled_gemm(x, packed, scales))


def test_arguments_are_left_alone() -> None:
    arguments = problem(10, "raw", "any", groups=4)
    copies = [tensor.clone() for tensor in arguments]
    group_scaled_gemm(*arguments)
    for tensor, copy in zip(arguments, copies, strict=True):
        bits.assert_same(tensor, copy)


@pytest.mark.parametrize("gemm", [group_scaled_gemm, group_scaled_gemm_reference])
def test_refuses_a_k_of_zero(gemm: Callable[..., Tensor]) -> None:
    x, weights = torch.zeros(1, 2, 0, dtype=torch.bfloat16), torch.zeros(1, 8, 0, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"^K/32: expected at least one group of 32 along K, got 0$"):
        gemm(x, weights, weights)
