"""The compiled GEMM against its transcription, and what happens where it cannot be used."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxfp4ref import _compiled
from mxfp4ref.formats.experts import StoredWeights
from mxfp4ref.formats.generations import GENERATIONS, Generation
from mxfp4ref.formats.mxfp4 import dequantize, pack_codes
from mxfp4ref.sm90.gemm import compiled
from mxfp4ref.sm90.gemm.compiled import gemm, grouped_gemm
from mxfp4ref.sm90.gemm.order import first_pair_swapped, group_order
from mxfp4ref.sm90.gemm.reference import gemm_in_order
from mxfp4ref.sm90.gemm.trial import check_gemm
from mxfp4ref.sm90.tactics import TILE_K, TILE_N, Tactic
from tests.helpers import bits, modes
from tests.helpers.forked import BeforeFirstUse
from tests.helpers.gemm_inputs import KINDS, SCALES, problem, random_x

cpu_loops = pytest.importorskip("mxfp4ref.sm90.gemm.cpu_loops")
row_loops = pytest.importorskip("mxfp4ref.sm90.gemm.row_loops")
COLUMNS = cpu_loops.COLUMNS


def assert_right(x: Tensor, packed: Tensor, scales: Tensor, tile_k: int = 128, swapped: Any = None) -> Tensor:
    order = group_order(scales.shape[2], tile_k)
    swapped = torch.zeros(x.shape[:2], dtype=torch.bool) if swapped is None else swapped
    got = gemm(x, packed, scales, order, swapped)
    bits.assert_same(got, gemm_in_order(x, packed, scales, order, swapped))
    return got


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    x_kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    scale_kind=st.sampled_from(SCALES),
    tile_k=st.sampled_from(TILE_K),
    tile_n=st.sampled_from(TILE_N),
    generation=st.sampled_from(GENERATIONS),
    shape=st.tuples(st.integers(1, 3), st.integers(0, 9), st.integers(1, 40), st.integers(1, 24)),
)
def test_hard_inputs(
    seed: int,
    x_kinds: tuple[str, str],
    scale_kind: str,
    tile_k: int,
    tile_n: int,
    generation: Generation,
    shape: tuple[int, int, int, int],
) -> None:
    """Rows of two kinds, so that ways alternate, of any number of groups."""
    sizes = dict(zip(("batch", "rows", "columns", "groups"), shape, strict=True))
    x, packed, scales = problem(seed, x_kinds[0], scale_kind, **sizes)
    x[:, 1::2] = problem(seed, x_kinds[1], scale_kind, **sizes)[0][:, 1::2]
    swapped = first_pair_swapped(x, None, Tactic((64, tile_n, tile_k)), generation)
    assert_right(x, packed, scales, tile_k, swapped)


@pytest.mark.parametrize("columns", [1, 31, 32, 33, COLUMNS - 1, COLUMNS, COLUMNS + 1, 513])
def test_columns_beyond_a_block(columns: int) -> None:
    x, packed, scales = problem(columns, "wider", "any", rows=3, columns=columns, groups=4)
    assert_right(x, packed, scales)


@pytest.mark.parametrize("high", [61, 62, 63])
@pytest.mark.parametrize("low", [-60, -59, -58])
def test_ends_of_the_exponents(low: int, high: int) -> None:
    """Around the ends of what int8 holds, with zeros among factors, so that any product may be the largest."""
    rng = np.random.default_rng([low + 60, high])
    shape = (1, 48, 32)
    exponents = rng.choice([low, low + 1, -1, high - 1, high], shape, p=[0.4, 0.3, 0.1, 0.1, 0.1])
    x = rng.integers(0, 2, shape) << 15 | exponents + 127 << 7 | rng.integers(0, 128, shape)
    x = np.where(rng.random(shape) < rng.choice([0.2, 0.6, 0.9], (1, 48, 1)), 0, x)
    codes = rng.integers(0, 16, (1, 64, 32)).astype(np.uint8)
    codes = np.where(rng.random(codes.shape) < rng.choice([0.2, 0.9], (1, 64, 1)), codes & 8, codes)
    scales = torch.full((1, 64, 1), 127, dtype=torch.uint8)
    assert_right(bits.bf16(x), pack_codes(torch.from_numpy(codes)), scales)


def test_each_way_is_gone() -> None:
    """The kinds of inputs have rows of all three ways, moved or not, and one row has groups of all three."""
    kinds = ("ordinary", "wide", "raw", "lower", "upper")
    x = torch.cat([problem(1, kind, "ordinary", rows=4)[0] for kind in kinds], 1)
    x[0, 0, :32], x[0, 0, 32:64] = 1.0, torch.tensor([1.0, 2.0**-30]).repeat(16)
    x[0, 0, 64:96] = torch.tensor([1.0, 2.0**-125]).repeat(16)
    facts, _ = classified(x)
    for way in (row_loops.PLAIN, row_loops.SPLIT, row_loops.WIDE):
        assert (facts[..., row_loops.WAY] == way).mean() > 0.02
    assert facts[:3, 0, row_loops.WAY].tolist() == [row_loops.PLAIN, row_loops.SPLIT, row_loops.WIDE]
    assert (facts[..., row_loops.MOVED] < -20).any()
    assert (facts[..., row_loops.MOVED] > 20).any()


def classified(x: Tensor) -> tuple[np.ndarray, Tensor]:
    """The facts, and x as the GEMM takes it."""
    by_group = x[0].unflatten(1, (-1, 32)).transpose(0, 1).clone(memory_format=torch.contiguous_format)
    facts = np.empty((*by_group.shape[:2], 5), np.int32)
    cpu_loops.classify(by_group.view(torch.int16).numpy().view(np.uint16), facts)
    return facts, by_group


def test_facts_hold_for_any_weights() -> None:
    """|t| < 2^bound and t is a multiple of 2^unit, tightly, and only what 24 bits do not hold may have to be cut."""
    x = torch.zeros(1, 3, 32, dtype=torch.bfloat16)
    x[0, 0, :3] = torch.tensor([1.0, -0.75, 2.0**-9])  # 6 (1.75 + 2^-9) < 2^4, multiples of 2^-10
    x[0, 1, 0] = 2.0**20
    x[0, 1, 1] = 1.0
    assert classified(x)[0][0].tolist() == [
        [row_loops.PLAIN, 4, -10, 0, 0],
        [row_loops.PLAIN, 23, -1, 0, 0],
        [row_loops.PLAIN, 0, 999, 0, 0],
    ]
    x[0, 1, 1], x[0, 1, 31] = 0.5, 2.0**-40
    assert classified(x)[0][0, 1].tolist() == [row_loops.SPLIT, 23, -41, -(1 << 31) | 2, 0]


def test_a_group_whose_exponents_are_near_an_end_is_moved() -> None:
    """So far as need be, if nothing of it may be subnormal; beside Inf and NaN finite numbers do not matter."""
    split, wide = row_loops.SPLIT, row_loops.WIDE
    cases = [  # x, its way, how far it is moved, x as moved
        ([2.0**127, -(2.0**6)], split, 65, [2.0**62, -(2.0**-59)]),
        ([2.0**127, -(2.0**5)], wide, 0, [2.0**127, -(2.0**5)]),
        ([2.0**-125, 2.0**-20], split, -66, [2.0**-59, 2.0**46]),
        ([2.0**-126, 2.0**-20], wide, 0, [2.0**-126, 2.0**-20]),  # half of it is subnormal
        ([1.0, math.inf, -math.inf], row_loops.PLAIN, 0, [0.0, math.inf, -math.inf]),
        (
            [2.0**125, math.inf],
            wide,
            0,
            [2.0**125, math.inf],
        ),  # six times that is Inf by itself, in its own step
    ]
    for numbers, way, moved, as_moved in cases:
        x = torch.zeros(1, 1, 32, dtype=torch.bfloat16)
        x[0, 0, : len(numbers)] = torch.tensor(numbers)
        facts, left = classified(x)
        assert (facts[0, 0, row_loops.WAY], facts[0, 0, row_loops.MOVED]) == (way, moved)
        assert left[0, 0, : len(numbers)].tolist() == as_moved


def test_exponents_at_the_ends_of_each_way() -> None:
    """Around the exponents where the way changes, alone and beside large and small ones."""
    fields = [127 + e for e in (-62, -61, -60, -59, -40, 0, 40, 79, 80, 81, 82)]
    rows = np.array([[a, b] for a in fields for b in fields])
    x = np.zeros((1, len(rows), 64), dtype=np.int64)
    x[0, :, 0], x[0, :, 20] = rows[:, 0] << 7 | 0x55, rows[:, 1] << 7 | 0x8001
    x[0, :, 33], x[0, :, 50] = rows[:, 1] << 7 | 0x7F, rows[:, 0] << 7
    codes = np.random.default_rng(0).integers(0, 16, (1, 20, 64)).astype(np.uint8)
    for scale in (1, 40, 127, 200, 254):
        scales = torch.full((1, 20, 2), scale, dtype=torch.uint8)
        assert_right(bits.bf16(x), pack_codes(torch.from_numpy(codes)), scales)


def test_cancelling_rows_of_every_way() -> None:
    """A sum of large terms that leaves a small one: carried between steps, then between groups."""
    rng = np.random.default_rng(5)
    for kind in ("ordinary", "wide", "wider", "lower", "upper", "huge", "lonely", "raw"):
        x = random_x(rng, kind, 1, 24, 256)
        codes = rng.integers(0, 16, (1, 40, 256))
        x[..., 16:32], codes[..., 16:32] = x[..., :16] ^ 0x8000, codes[..., :16]
        x[..., 31] = rng.integers(0, 1 << 16, x.shape[:2])
        x[..., 128:], codes[..., 128:] = x[..., :128] ^ 0x8000, codes[..., :128]
        scales = torch.full((1, 40, 8), 127, dtype=torch.uint8)
        assert_right(bits.bf16(x), pack_codes(torch.from_numpy(codes.astype(np.uint8))), scales)


def accumulators(
    x: Tensor, ends: list[int], stored: StoredWeights, order: list[int], swapped: Tensor
) -> Tensor:
    out = grouped_gemm(cpu_loops, _compiled.as_numpy(x, np.int16), ends, stored, order, swapped.numpy())
    return torch.from_numpy(out).view(torch.float32)


@pytest.mark.parametrize("scale_order", [None, *GENERATIONS], ids=repr)
@pytest.mark.parametrize("packed_order", [None, *GENERATIONS], ids=repr)
@pytest.mark.parametrize("num_columns", [64, 192])
def test_all_experts_of_a_layer_in_every_byte_order(
    packed_order: Generation | None, scale_order: Generation | None, num_columns: int
) -> None:
    """Rows by expert, some without any; the last block of columns is not whole."""
    counts, groups = [3, 0, 1, 17, 0], 8
    x, packed, scales = problem(2, "wide", "any", batch=5, rows=1, columns=num_columns, groups=groups)
    x = problem(3, "wide", "any", rows=sum(counts), columns=1, groups=groups)[0][0]
    stored = packed if packed_order is None else packed_order.layout.interleave(packed)
    folded = scales if scale_order is None else scale_order.layout.fold(scales)
    orders = (
        0 if packed_order is None else packed_order.layout.ORDERS[0],
        0 if scale_order is None else scale_order.layout.ORDERS[1],
    )
    order, swapped = group_order(groups, 128), torch.arange(len(x)) % 3 == 0
    ends = np.cumsum(counts).tolist()

    got = accumulators(x, ends, StoredWeights(stored, folded.flatten(1), orders), order, swapped)
    for expert, (count, end) in enumerate(zip(counts, ends, strict=True)):
        rows = slice(end - count, end)
        alone = (packed[expert, None], scales[expert, None], order, swapped[None, rows])
        bits.assert_same(got[rows], gemm_in_order(x[None, rows], *alone)[0])


@pytest.mark.parametrize("generation", GENERATIONS, ids=repr)
def test_every_code_and_scale_at_every_place_of_a_byte_order(generation: Generation) -> None:
    """One-hot rows of x read each weight of a block of 64 columns back, times its scale; another at every place."""
    depth = 128
    codes = torch.randint(1, 8, (1, 64, depth), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    codes |= torch.randint(2, codes.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1)) << 3
    packed, scales = pack_codes(codes), (100 + torch.arange(64 * 4).view(1, 64, 4) % 50).to(torch.uint8)
    one_hot, nothing = torch.eye(depth, dtype=torch.bfloat16), torch.zeros(depth, dtype=torch.bool)
    layout = generation.layout
    stored = StoredWeights(layout.interleave(packed), layout.fold(scales).flatten(1), layout.ORDERS)
    got = accumulators(one_hot, [depth], stored, [0, 1, 2, 3], nothing)
    bits.assert_same(got.T, dequantize(packed[0], scales[0], dtype=torch.float32))


def test_strides_offsets_and_gradients_do_not_matter() -> None:
    x, packed, scales = problem(9, "wide", "any", batch=2, rows=6, columns=5, groups=4)
    order, swapped = group_order(4, 128), torch.zeros(2, 6, dtype=torch.bool)
    expected = gemm_in_order(x, packed, scales, order, swapped)
    copies = [tensor.clone() for tensor in (x, packed, scales)]

    def at_offset_one(tensor: Tensor) -> Tensor:
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)

    strided = [tensor.transpose(0, 2).contiguous().transpose(0, 2) for tensor in (x, packed, scales)]
    narrow = torch.cat([packed, packed], 2)[..., : packed.shape[2]]
    for arguments in (
        strided,
        [at_offset_one(tensor) for tensor in (x, packed, scales)],
        [x.clone().requires_grad_(), narrow, scales],
    ):
        bits.assert_same(gemm(*arguments, order, swapped), expected)
    for tensor, copy in zip((x, packed, scales), copies, strict=True):
        bits.assert_same(tensor, copy)
    # One group of one column, cut out of a larger tensor.
    part = torch.empty_strided((1, 1, 16), (28800, 192, 1), dtype=torch.uint8).fill_(0x22)
    ones = torch.ones(1, 1, 32, dtype=torch.bfloat16)
    scale = torch.full((1, 1, 1), 127, dtype=torch.uint8)
    assert gemm(ones, part, scale, [0], torch.zeros(1, 1, dtype=torch.bool)).item() == 32


@pytest.mark.parametrize("kind", KINDS)
def test_modes_do_not_matter(kind: str) -> None:
    arguments = problem(11, kind, "any", rows=7, columns=140, groups=8)
    order, swapped = group_order(8, 128), torch.tensor([[True, False] * 3 + [True]])
    expected = gemm_in_order(*arguments, order, swapped)
    for mode in modes.MODES.values():
        with mode():
            got = gemm(*arguments, order, swapped)
        bits.assert_same(got, expected)


def test_twelve_threads() -> None:
    arguments = problem(12, "wider", "any", batch=4, rows=9, columns=300, groups=12)
    order, swapped = group_order(12, 128), torch.zeros(4, 9, dtype=torch.bool)
    expected = gemm_in_order(*arguments, order, swapped)
    with ThreadPoolExecutor(12) as pool:
        for got in pool.map(lambda _: gemm(*arguments, order, swapped), range(120)):
            bits.assert_same(got, expected)


# --- first use --------------------------------------------------------------------------------------------

FIRST_USE = """
import sys, threading, torch, warnings
warnings.simplefilter("error")
import mxfp4ref
from mxfp4ref.sm90.gemm.compiled import gemm
assert "numba" not in sys.modules
x, packed = torch.ones(1, 2, 64, dtype=torch.bfloat16), torch.full((1, 3, 32), 0x22, dtype=torch.uint8)
scales, swapped = torch.full((1, 3, 2), 127, dtype=torch.uint8), torch.zeros(1, 2, dtype=torch.bool)
def use():
    assert gemm(x, packed, scales, [0, 1], swapped).eq(64).all()
"""


def run(code: str) -> None:
    """In a new process, in which warnings are errors."""
    with BeforeFirstUse(
        [sys.executable, "-c", FIRST_USE + code],
        cwd=Path(__file__).parents[3],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error


FORK = """
import os
warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
child = os.fork()
use()
if child == 0: os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_first_use_by_many_threads_in_any_mode_at_once_and_then_after_a_fork() -> None:
    run(
        "torch.set_flush_denormal(True)\n"
        "torch.set_default_dtype(torch.float64)\n"
        "torch.set_deterministic_debug_mode('error')\n"
        "def use_in_any_mode():\n"
        "    with torch.device('meta'), torch.inference_mode(), torch.autocast('cpu', torch.bfloat16):\n"
        "        use()\n"
        "errors = []\n"
        "threading.excepthook = errors.append\n"
        "threads = [threading.Thread(target=use_in_any_mode) for _ in range(12)]\n"
        "[t.start() for t in threads], [t.join() for t in threads]\n"
        "assert not errors, errors\n"
        "assert 'numba' in sys.modules\n" + FORK
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_during_the_first_use() -> None:
    run("threading.Thread(target=use).start()\n" + FORK)


def test_without_a_folder_for_the_cache() -> None:
    """numba raises "no locator available" where neither the package nor the user has a folder to write to."""
    run(  # with the loops of FP8, as these take ten seconds to compile
        "from numba.core import caching, config\n"
        "config.OPT = type(config.OPT)(0)  # compiles in half the time\n"
        "caching.CacheImpl._locator_classes = []\n"
        "from mxfp4ref.sm90.gemm import fp8\n"
        "x, offsets = torch.full((1, 32), 0x38, dtype=torch.uint8), torch.ones(3, 1, dtype=torch.uint8)\n"
        "assert fp8.fp8_gemm(x, packed[0, :, :16], offsets).isfinite().all()\n"
        "from mxfp4ref.sm90.gemm import fp8_loops\n"
        "assert fp8_loops.gemm.__wrapped__.stats.cache_path is None"
    )


@pytest.mark.parametrize(("kind", "content"), [("nbi", b""), ("nbi", b"\x80\x04N."), ("nbc", b"\x80\x04")])
def test_a_damaged_cache_is_begun_anew(
    kind: str, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a disk that was full, or a machine that lost its power."""
    (tmp_path / "small_loops.py").write_text("def doubled(x):\n    return 2 * x\n")

    def made() -> Any:
        found = importlib.util.spec_from_file_location("small_loops", tmp_path / "small_loops.py")
        assert found is not None
        assert found.loader is not None
        module = importlib.util.module_from_spec(found)
        monkeypatch.setitem(sys.modules, "small_loops", module)
        found.loader.exec_module(module)
        function = _compiled.compiled("f8(f8)")(module.doubled)
        assert function(4.0) == 8
        return function

    made()
    (file,) = (tmp_path / "__pycache__").glob(f"*.{kind}")
    file.write_bytes(content)
    assert sum(made().__wrapped__.stats.cache_hits.values()) == 0
    assert sum(made().__wrapped__.stats.cache_hits.values()) == 1


@pytest.mark.parametrize("how", ["missing", "not to compile"])
def test_without_numba_a_warning_and_the_transcription(how: str) -> None:
    run(
        (
            "sys.modules['numba'] = None\n"
            if how == "missing"
            else "import numba; numba.config.DISABLE_JIT = 1\n"
        )
        + "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    use(), use()\n"
        "assert len(caught) == 1, caught\n"
        "assert caught[0].category is RuntimeWarning\n"
        "assert 'the GEMM takes 300 times as long as need be, all else 5 to 20' in str(caught[0].message)"
    )


# --- the trial --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_compiler_that_errs_is_found_out(monkeypatch: pytest.MonkeyPatch, order: int) -> None:
    """One wrong bit in one element is enough, of any byte order; then the transcription is used, after a warning."""

    class Wrong(ModuleType):
        classify = staticmethod(cpu_loops.classify)

        @staticmethod
        def gemm(*arguments: Any) -> None:
            cpu_loops.gemm(*arguments)
            if arguments[5].tolist() == [order, order]:
                arguments[-1][-1, -1] ^= 1

    monkeypatch.setitem(sys.modules, "mxfp4ref.sm90.gemm.cpu_loops", Wrong("wrong"))
    monkeypatch.setattr(_compiled, "_loaded", {})
    arguments = problem(13, "wide", "any", rows=2, columns=3, groups=4)
    swapped = torch.zeros(1, 2, dtype=torch.bool)
    message = "the GEMM takes .* ArithmeticError: 1 of 512 elements of a trial are wrong"
    with pytest.warns(RuntimeWarning, match=message):
        got = gemm(*arguments, [0, 1, 2, 3], swapped)
    bits.assert_same(got, gemm_in_order(*arguments, [0, 1, 2, 3], swapped))
    bits.assert_same(
        gemm(*arguments, [0, 1, 2, 3], swapped), got
    )  # no second warning, which would be an error


def test_the_trial_goes_every_way() -> None:
    """And sees the order of groups, swapped rows and the ends of the scales."""
    seen: list[Tensor] = []

    def right(x: Tensor, *rest: Any) -> Tensor:
        seen.append(x)
        return gemm_in_order(x, *rest)

    check_gemm(right, torch.device("cpu"))
    facts, _ = classified(seen[0])
    ways, moved = facts[..., row_loops.WAY], facts[..., row_loops.MOVED]
    for way in (row_loops.PLAIN, row_loops.SPLIT, row_loops.WIDE):
        assert (ways == way).sum() > 10
        assert way == row_loops.WIDE or ((ways == way) & (moved != 0)).any()
    for wrong in (
        lambda x, packed, scales, order, swapped: right(x, packed, scales.clamp(max=254), order, swapped),
        lambda x, packed, scales, order, swapped: right(x, packed, scales.clamp(min=1), order, swapped),
        lambda x, packed, scales, order, swapped: right(x, packed, scales, sorted(order), swapped),
        lambda x, packed, scales, order, swapped: right(x, packed, scales, order, ~swapped),
    ):
        with pytest.raises(ArithmeticError, match="of 512 elements of a trial are wrong"):
            check_gemm(wrong, torch.device("cpu"))


def test_public_names() -> None:
    assert compiled.__all__ == ["compiled_loops", "gemm", "grouped_gemm"]
