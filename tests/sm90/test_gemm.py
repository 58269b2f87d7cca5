"""The fast group-scaled GEMM against its slow transcription, and that against exact fractions (section 3)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxfp4ref.formats.generations import BYTEWISE, GENERATIONS, WORDWISE, Generation
from mxfp4ref.formats.mxfp4 import pack_codes
from mxfp4ref.sm90.gemm import cpu as fast
from mxfp4ref.sm90.gemm.cpu import group_scaled_gemm
from mxfp4ref.sm90.gemm.order import first_pair_swapped, group_order
from mxfp4ref.sm90.gemm.reference import gemm_in_order, group_scaled_gemm_reference
from mxfp4ref.sm90.gemm.trial import check_gemm
from mxfp4ref.sm90.tactics import TILE_K, TILE_N, Tactic
from tests.helpers import bits, exact
from tests.helpers.gemm_inputs import KINDS, SCALES, problem, random_x

# --- the order of the groups ------------------------------------------------------------------------------

# K = 1024 as `docs/arithmetic.md` writes it: "0 1 2 3 | 4 5 7 6 | 8 9 11 10 | ... | 28 29 30 31".
ORDERS = {
    (4, 128): [0, 1, 2, 3],
    (8, 128): [0, 1, 2, 3, 4, 5, 6, 7],
    (12, 128): [0, 1, 2, 3, 4, 5, 7, 6, 8, 9, 10, 11],
    (32, 128): [
        0, 1, 2, 3, 4, 5, 7, 6, 8, 9, 11, 10, 12, 13, 15, 14,
        16, 17, 19, 18, 20, 21, 23, 22, 24, 25, 27, 26, 28, 29, 30, 31,
    ],
    (8, 256): [0, 1, 2, 3, 4, 5, 6, 7],
    (16, 256): list(range(16)),
    (24, 256): [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 15, 14, 16, 17, 18, 19, 20, 21, 22, 23],
    (32, 512): list(range(32)),
    (48, 512): [*range(30), 31, 30, *range(32, 48)],
}  # fmt: skip


@pytest.mark.parametrize(("num_groups", "tile_k"), ORDERS)
def test_group_order(num_groups: int, tile_k: int) -> None:
    assert group_order(num_groups, tile_k) == ORDERS[num_groups, tile_k]


@pytest.mark.parametrize("tile_k", TILE_K)
def test_group_order_of_any_length(tile_k: int) -> None:
    for tiles in range(13):
        num_groups = tiles * tile_k // 32
        assert group_order(num_groups, tile_k) == exact.group_order(num_groups, tile_k)


SWAPPING = [(16, 256), (32, 512), (64, 128), (64, 256), (64, 512), (128, 128), (128, 256)]


def test_first_pair_swapped() -> None:
    """Rows 0, 2, 4, 6 modulo the tile's N, of the tiles that `docs/arithmetic.md` lists."""
    x, positions = torch.zeros(1, 1024, 32), torch.arange(1024)
    for tile_n in TILE_N:
        for tile_k in TILE_K:
            listed = (tile_n, tile_k) in SWAPPING
            expected = [listed and row % tile_n in (0, 2, 4, 6) for row in range(1024)]
            tactic = Tactic((64, tile_n, tile_k))
            got = first_pair_swapped(x, positions, tactic, WORDWISE)
            assert got.dtype == torch.bool
            assert got.tolist() == expected
            assert first_pair_swapped(x, positions, tactic, BYTEWISE).all()


# --- hard inputs ------------------------------------------------------------------------------------------


def assert_fast_is_slow(x: Tensor, packed: Tensor, scales: Tensor, **tactic: object) -> Tensor:
    got = group_scaled_gemm(x, packed, scales, **tactic)  # type: ignore[arg-type]
    bits.assert_same(got, group_scaled_gemm_reference(x, packed, scales, **tactic))  # type: ignore[arg-type]
    return got


TACTICS = [(tile_k, tile_n) for tile_k in TILE_K for tile_n in TILE_N]


@settings(max_examples=150)
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


@pytest.mark.parametrize("x_kind", KINDS)
@pytest.mark.parametrize("scale_kind", SCALES)
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


# --- the transcription itself -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x_kind", "scale_kind"),
    [("mirrored", "ordinary"), ("wide", "spread"), ("raw", "any"), ("tiny", "low"), ("huge", "high")],
)
@pytest.mark.parametrize(("tile_k", "tile_n", "groups"), [(128, 16, 12), (256, 16, 8), (128, 64, 4)])
def test_against_fractions(x_kind: str, scale_kind: str, tile_k: int, tile_n: int, groups: int) -> None:
    x, packed, scales = problem(7, x_kind, scale_kind, rows=3, columns=4, groups=groups)
    order = exact.group_order(groups, tile_k)
    positions = torch.tensor([[6, 7, 8 + tile_n]])
    expected = np.zeros((1, 3, 4), dtype=np.int64)
    x_bits, packed_bytes, scale_bytes = bits.bits_of(x)[0], packed[0].tolist(), scales[0].tolist()
    for row, column in np.ndindex(3, 4):
        codes = [code for byte in packed_bytes[column] for code in (byte & 15, byte >> 4)]
        swapped = (tile_n, tile_k) in SWAPPING and int(positions[0, row]) % tile_n in (0, 2, 4, 6)
        expected[0, row, column] = exact.gemm_element(
            x_bits[row].tolist(), codes, scale_bytes[column], order, swapped=swapped
        )
    for gemm in (group_scaled_gemm, group_scaled_gemm_reference):
        got = gemm(x, packed, scales, tactic=Tactic((64, tile_n, tile_k)), positions=positions)
        bits.assert_same(got, bits.fp32(expected))


def first_pair(values: tuple[float, float], scale_bytes: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """16 rows whose first two groups are one product each, x times weight 1."""
    x = torch.zeros(1, 16, 256)
    x[..., 0], x[..., 32] = values
    codes = torch.full((1, 1, 256), 2, dtype=torch.uint8)
    scales = torch.full((1, 1, 8), 127, dtype=torch.uint8)
    scales[0, 0, :2] = torch.tensor(scale_bytes)
    return x.to(torch.bfloat16), pack_codes(codes), scales


@pytest.mark.parametrize(
    ("values", "scale_bytes", "late", "early"),
    [
        # 1.5 * 2^-127 alone is flushed, fused it is kept.
        ((1.5 * 2.0**-64, 2.0**-126), (64, 127), 2.0**-126, 1.75 * 2.0**-126),
        ((2.0**-126, 1.5 * 2.0**-64), (127, 64), 1.75 * 2.0**-126, 2.0**-126),
        # 2^128 alone is Inf, fused with -2^127 it is 2^127.
        ((2.0**64, -(2.0**127)), (191, 127), torch.inf, 2.0**127),
        ((-(2.0**127), 2.0**64), (127, 191), 2.0**127, torch.inf),
    ],
)
def test_first_pair_by_position(
    values: tuple[float, float], scale_bytes: tuple[int, int], late: float, early: float
) -> None:
    x, packed, scales = first_pair(values, scale_bytes)
    for tile_k, tile_n in ((256, 16), (128, 16)):
        got = assert_fast_is_slow(x, packed, scales, tactic=Tactic((64, tile_n, tile_k)))[0, :, 0].tolist()
        swaps = (tile_n, tile_k) in SWAPPING
        assert got == [early if swaps and row in (0, 2, 4, 6) else late for row in range(16)]
        got = assert_fast_is_slow(x, packed, scales, tactic=Tactic((64, tile_n, tile_k)), generation=BYTEWISE)
        assert got[0, :, 0].tolist() == [early] * 16
    positions = torch.arange(3, 19)[None]
    got = assert_fast_is_slow(x, packed, scales, tactic=Tactic((64, 16, 256)), positions=positions)[
        0, :, 0
    ].tolist()
    assert got == [early if row % 16 in (0, 2, 4, 6) else late for row in range(3, 19)]


@pytest.mark.parametrize(
    ("exponent", "expected"),
    [
        (-149, 0.0),
        (-150, 0.0),  # 2^-126 (1 - 2^-24) stays below 2^-126 when rounded to 24 bits
        (-151, 2.0**-126),  # 2^-126 (1 - 2^-25) is a tie, and goes up
        (-152, 2.0**-126),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_sum_is_flushed_after_rounding(exponent: int, expected: float, sign: int) -> None:
    x = torch.zeros(1, 1, 128)
    x[..., 0], x[..., 64] = sign * 2.0**-126, -sign * 2.0**-100
    packed = pack_codes(torch.full((1, 1, 128), 2, dtype=torch.uint8))
    scales = torch.tensor([[[127, 127, exponent + 100 + 127, 127]]], dtype=torch.uint8)
    assert assert_fast_is_slow(x.to(torch.bfloat16), packed, scales).item() == sign * expected


@pytest.mark.parametrize("group", [0, 1, 3])
def test_a_subnormal_sum_of_the_tensor_core_is_flushed(group: int) -> None:
    x = torch.zeros(1, 2, 128)
    x[0, :, 32 * group] = torch.tensor([2.0**-127, 2.0**-126])
    packed = pack_codes(torch.full((1, 1, 128), 2, dtype=torch.uint8))
    scales = torch.full((1, 1, 4), 227, dtype=torch.uint8)
    got = assert_fast_is_slow(x.to(torch.bfloat16), packed, scales)
    assert got.flatten().tolist() == [0.0, 2.0**-26]


def test_never_minus_zero() -> None:
    x = bits.bf16(np.full((1, 2, 128), 0x8000))
    codes = torch.full((1, 3, 128), 2, dtype=torch.uint8)
    scales = torch.full((1, 3, 4), 127, dtype=torch.uint8)
    assert not bits.bits_of(assert_fast_is_slow(x, pack_codes(codes), scales)).any()


def test_scale_bytes_0_and_255() -> None:
    """0 is zero, not 2^-127; 255 is Inf, not NaN; 0 * Inf is NaN."""
    x = torch.zeros(1, 3, 128, dtype=torch.bfloat16)
    x[0, :, 0] = torch.tensor([1.0, -1.0, 0.0])
    packed = pack_codes(torch.full((1, 2, 128), 2, dtype=torch.uint8))
    scales = torch.tensor([[[0, 127, 127, 127], [255, 127, 127, 127]]], dtype=torch.uint8)
    got = bits.bits_of(assert_fast_is_slow(x, packed, scales))
    assert got.tolist() == [[[0, 0x7F800000], [0, 0xFF800000], [0, 0x7FFFFFFF]]]


def test_no_rows() -> None:
    x, packed, scales = problem(0, "ordinary", "ordinary", rows=3, groups=4)
    assert group_scaled_gemm(x[:, :0], packed, scales).shape == (1, 0, 7)


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


# --- on a GPU ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Any]:
    """The Triton kernel's module, its kernel run by Triton's interpreter on CPU tensors."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the kernel itself is tested")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.delitem(sys.modules, "mxfp4ref.sm90.gemm.triton_kernel", raising=False)
        yield importlib.import_module("mxfp4ref.sm90.gemm.triton_kernel")
        sys.modules.pop("mxfp4ref.sm90.gemm.triton_kernel")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of overflow and the like
@pytest.mark.parametrize("x_kind", KINDS)
def test_the_triton_kernel_interpreted(interpreted: Any, x_kind: str) -> None:
    x, packed, scales = problem(13, x_kind, "any", batch=1, rows=1, columns=100, groups=12)
    positions = torch.tensor([[list(KINDS).index(x_kind) % 2]])  # even ones swap the first two groups
    expected = group_scaled_gemm(x, packed, scales, tactic=Tactic((64, 64, 128)), positions=positions)
    swapped = first_pair_swapped(x, positions, Tactic((64, 64, 128)), WORDWISE)
    got = interpreted.gemm(x, packed, scales, group_order(12, 128), swapped)
    bits.assert_same(got, expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_triton_kernel_of_one_group_and_of_no_rows(interpreted: Any) -> None:
    x, packed, scales = problem(14, "wide", "any", batch=1, rows=2, columns=3, groups=1)
    none, both = torch.zeros(1, 2, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool)
    for swapped in (none, both):
        got = interpreted.gemm(x, packed, scales, [0], swapped)
        bits.assert_same(got, group_scaled_gemm(x, packed, scales))
    assert interpreted.gemm(x[:, :0], packed, scales, [0], none[:, :0]).shape == (1, 0, 3)


def test_a_gpu_whose_compiler_errs_is_found_out() -> None:
    """A kernel is used only after a trial, in which one wrong bit in one element is enough."""
    cpu = torch.device("cpu")

    def right(x: Tensor, packed: Tensor, scales: Tensor, order: list[int], swapped: Tensor) -> Tensor:
        assert order == group_order(scales.shape[2], 128)
        return group_scaled_gemm(x, packed, scales, tactic=Tactic((64, 64, 128)))

    def wrong(*arguments: Any) -> Tensor:
        result = right(*arguments)
        result.view(torch.int32)[0, 7, 63] ^= 1
        return result

    check_gemm(right, cpu)
    with pytest.raises(ArithmeticError, match="1 of 512 elements of a trial are wrong"):
        check_gemm(wrong, cpu)
    for other in (
        lambda x, packed, scales, *rest: right(x, packed, scales.clamp(max=254), *rest),
        lambda x, packed, scales, *rest: group_scaled_gemm(x, packed, scales, tactic=Tactic((64, 64, 256))),
        lambda x, packed, scales, *rest: group_scaled_gemm(x, packed, scales, tactic=Tactic((64, 16, 128))),
    ):
        with pytest.raises(ArithmeticError, match="elements of a trial"):
            check_gemm(other, cpu)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("x_kind", KINDS)
@pytest.mark.parametrize("scale_kind", SCALES)
def test_cuda_gives_the_same_bits(x_kind: str, scale_kind: str) -> None:
    arguments = problem(11, x_kind, scale_kind, batch=3, rows=70, columns=600, groups=36)
    for tile_k, tile_n in ((128, 16), (128, 64)):
        got = group_scaled_gemm(
            *(tensor.cuda() for tensor in arguments), tactic=Tactic((64, tile_n, tile_k))
        ).cpu()
        bits.assert_same(got, group_scaled_gemm(*arguments, tactic=Tactic((64, tile_n, tile_k))))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_cuda_device_that_is_not_the_current_one() -> None:
    arguments = problem(15, "wide", "any", batch=2, rows=5, columns=300, groups=12)
    assert torch.cuda.current_device() == 0
    got = group_scaled_gemm(*(tensor.to("cuda:1") for tensor in arguments))
    assert got.device == torch.device("cuda:1")
    bits.assert_same(got.cpu(), group_scaled_gemm(*arguments))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("x_kind", KINDS)
def test_cuda_without_triton(x_kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "_gemm_on", lambda device: fast._gemm_by_cpu)
    arguments = problem(11, x_kind, "any", batch=3, rows=20, columns=300, groups=36)
    got = group_scaled_gemm(*(tensor.cuda() for tensor in arguments)).cpu()
    bits.assert_same(got, group_scaled_gemm(*arguments))


def test_without_the_triton_kernel_a_warning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")

    def fail(*arguments: object) -> None:
        raise ArithmeticError("3 of 512 elements of a trial are wrong")

    monkeypatch.setattr(fast, "check_gemm", fail)
    message = "Triton kernel does not run here: ArithmeticError: 3 of 512 elements"
    with pytest.warns(RuntimeWarning, match=message):
        gemm = fast._gemm_on.__wrapped__(torch.device("cuda"))
    arguments = problem(16, "wide", "any", rows=2, groups=4)
    swapped = torch.tensor([[True, False]])
    bits.assert_same(
        gemm(*arguments, [0, 1, 2, 3], swapped), gemm_in_order(*arguments, [0, 1, 2, 3], swapped)
    )
