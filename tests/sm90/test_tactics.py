"""Tactics, their ids, and the pair that is a kernel."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from mxfp4ref.formats.generations import BYTEWISE, GENERATIONS, WORDWISE, Generation
from mxfp4ref.sm90.tactics import Sm90Kernel, Tactic, each_kernel, runnable_tactics, tactics_of


def test_ids() -> None:
    """116 tactics a GEMM, four clusters a tile; GEMM2's continue after GEMM1's."""
    assert Sm90Kernel().profile_ids == [0, 116]
    kernel = Sm90Kernel(Tactic((64, 16, 256)), Tactic((64, 32, 128), (2, 2)))
    assert kernel.profile_ids == [4, 116 + 15]
    assert Sm90Kernel(Tactic((256, 256, 128), (2, 2))).profile_ids == [115, 116]
    for generation in GENERATIONS:
        tactics = tactics_of(generation)
        for number, tactic in enumerate(tactics):
            kernel = Sm90Kernel(tactic, tactic, generation)
            assert kernel.profile_ids == [number, len(tactics) + number]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_id_of_either_gemm(generation: Generation) -> None:
    """There and back: each tactic of one GEMM beside the default of the other; ids of the other GEMM are refused."""
    tactics = tactics_of(generation)
    count = len(tactics)
    assert count == {BYTEWISE: 28, WORDWISE: 116}[generation]
    for number, tactic in enumerate(tactics):
        first = Sm90Kernel.of_profile_ids([number, -1], generation)
        assert first == Sm90Kernel(gemm1=tactic, generation=generation)
        assert first.profile_ids == [number, count]
        second = Sm90Kernel.of_profile_ids((-1, count + number), generation)
        assert second == Sm90Kernel(gemm2=tactic, generation=generation)
        assert second.profile_ids == [0, count + number]
        with pytest.raises(
            ValueError, match=rf"^profile_ids\[0\]: .*0 to {count - 1}, got .*, one of GEMM2$"
        ):
            Sm90Kernel.of_profile_ids([count + number, -1], generation)
        with pytest.raises(
            ValueError, match=rf"^profile_ids\[1\]: .*{count} to .*, got {number}, one of GEMM1$"
        ):
            Sm90Kernel.of_profile_ids([-1, number], generation)
    assert Sm90Kernel.of_profile_ids([-1, -1], generation) == Sm90Kernel(generation=generation)


@pytest.mark.parametrize(
    ("profile_ids", "error", "message"),
    [
        (None, TypeError, "profile_ids: expected two ints, one for each GEMM, got None"),
        ("48", TypeError, "profile_ids: expected two ints, one for each GEMM, got '48'"),
        ([4], ValueError, r"profile_ids: expected two ints, one for each GEMM, got 1: \[4\]"),
        ([4, 120, 0], ValueError, r"profile_ids: expected two ints, one for each GEMM, got 3: \[4, 120, 0\]"),
        (
            [4, 232],
            ValueError,
            r"profile_ids\[1\]: expected -1 or a tactic of GEMM2 .*, 116 to 231, got 232$",
        ),
        (
            [232, 120],
            ValueError,
            r"profile_ids\[0\]: expected -1 or a tactic of GEMM1 .*, 0 to 115, got 232$",
        ),
        ([-2, -1], ValueError, r"profile_ids\[0\]: expected an int at least -1, got -2"),
        ([4.0, 120], TypeError, r"profile_ids\[0\]: expected an int, got float 4.0"),
        ([4, True], TypeError, r"profile_ids\[1\]: expected an int, got bool True"),
    ],
)
def test_wrong_profile_ids(profile_ids: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        Sm90Kernel.of_profile_ids(profile_ids)


def test_of_tiles() -> None:
    kernel = Sm90Kernel.of_tiles((256, 128), (64, 16))
    assert kernel == Sm90Kernel(Tactic((64, 64, 256)), Tactic((64, 16, 128)), WORDWISE)
    assert (kernel.tile_k, kernel.tile_n) == ((256, 128), (64, 16))
    assert Sm90Kernel.of_tiles((128, 128), (256, 16)).gemm1.tile == (128, 256, 128)
    assert Sm90Kernel.of_tiles((128, 128), generation=BYTEWISE) == Sm90Kernel(generation=BYTEWISE)
    assert str(kernel) == "64x64x256/1x1, 64x16x128/1x1"
    assert pickle.loads(pickle.dumps(kernel)) == kernel


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"gemm1": (64, 16, 128)}, TypeError, "gemm1: expected Tactic, got tuple"),
        (
            {"gemm2": Tactic((64, 16, 64))},
            ValueError,
            "gemm2: expected a tactic of the wordwise kernel, .* got 64x16x64/1x1",
        ),
        ({"gemm1": Tactic(cluster=(4, 1))}, ValueError, "gemm1: .* got 64x16x128/4x1"),
        ({"gemm1": Tactic((64, 16, 256)), "generation": BYTEWISE}, ValueError, "gemm1: .*bytewise kernel"),
        (
            {"generation": "0.6.17"},
            TypeError,
            "generation: expected BYTEWISE or WORDWISE.* of .*, got '0.6.17'",
        ),
    ],
)
def test_refusals(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        Sm90Kernel(**arguments)


@pytest.mark.parametrize("tile", [None, 5, "64x16x128", (64, 16), [64, 16, 128], (64.0, 16.0, 128.0)])
def test_a_tile_is_three_ints(tile: Any) -> None:
    with pytest.raises(TypeError, match=r"^tile: expected a tuple of 3 ints, got"):
        Tactic(tile)


@pytest.mark.parametrize("cluster", [None, 1, "11", (1,), (True, True), (1, 1.0)])
def test_a_cluster_is_two_ints(cluster: Any) -> None:
    with pytest.raises(TypeError, match=r"^cluster: expected a tuple of 2 ints, got"):
        Tactic(cluster=cluster)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((128,), TypeError, "tile_k: expected a pair, one for each GEMM, got 128"),
        (((128, 128), 16), TypeError, "tile_n: expected a pair"),
        (
            ((128, 64),),
            ValueError,
            "tile_k, tile_n: expected N x K of a tile of the wordwise kernel, .*; got 16x64",
        ),
        (((128, 512), (16, 256)), ValueError, "tile_k, tile_n: .* got 256x512"),
        (
            ((256, 128), (16, 16), BYTEWISE),
            ValueError,
            "tile_k, tile_n: .*bytewise kernel, one of 16x128, .* got 16x256",
        ),
    ],
)
def test_refusals_of_tiles(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        Sm90Kernel.of_tiles(*arguments)


def test_runnable() -> None:
    """Tiles that divide the GEMM and that the kernel does not refuse."""
    assert {t.tile for t in runnable_tactics(64, 128)} == {(64, n, 128) for n in (16, 32, 64, 128)}
    assert not WORDWISE.refused & {t.tile for t in runnable_tactics(256, 512)}
    kernels = list(each_kernel(((256, 256), (256, 128))))
    assert len(kernels) == len(runnable_tactics(256, 256)) + len(runnable_tactics(256, 128))
    assert all(Tactic() in kernel.tactics for kernel in kernels)
    assert {kernel.generation for kernel in each_kernel(((256, 256), (256, 128)), BYTEWISE)} == {BYTEWISE}
