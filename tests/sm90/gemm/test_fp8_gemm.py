"""The FP8 GEMM by compiled loops against the transcription, which `test_fp8.py` holds against exact fractions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mxfp4ref import _compiled
from mxfp4ref.formats.humming import e4m3_weights
from mxfp4ref.sm90 import fp8
from mxfp4ref.sm90.gemm import fp8 as gemms
from mxfp4ref.sm90.gemm.fp8 import fp8_gemm, fp8_gemm_in_order
from tests.helpers import bits


def random_bytes(generator: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=generator, device="cpu").to(torch.uint8)


def problem(seed: int, rows: int, columns: int, depth: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cpu").manual_seed(seed)
    normal = torch.randn(rows, depth, generator=generator, device="cpu") * 100
    if kind == "wide":
        normal = torch.ldexp(normal, torch.randint(-12, 1, normal.shape, generator=generator, device="cpu"))
    packed = random_bytes(generator, 0, 256, columns, depth // 2)
    offsets = random_bytes(generator, 1, 13, columns, depth // 32)
    if kind == "cancelling":
        normal[:, depth // 2 :] = -normal[:, : depth // 2]
        packed[:, depth // 4 :], offsets[:, depth // 64 :] = (
            packed[:, : depth // 4],
            offsets[:, : depth // 64],
        )
    x = fp8.to_e4m3(normal)
    if kind == "any":
        x, offsets = (
            random_bytes(generator, 0, 256, rows, depth),
            random_bytes(generator, 0, 256, *offsets.shape),
        )
        x[: rows // 2] = x[: rows // 2].masked_fill(x[: rows // 2] & 0x7F == 0x7F, 0)
    return x, packed, offsets


@pytest.mark.parametrize("kind", ["ordinary", "wide", "cancelling", "any"])
@pytest.mark.parametrize(("rows", "columns", "depth"), [(5, 40, 256), (1, 33, 64), (3, 2, 1024), (0, 16, 64)])
def test_as_transcribed(kind: str, rows: int, columns: int, depth: int) -> None:
    x, packed, offsets = problem(rows, rows, columns, depth, kind)
    bits.assert_same(fp8_gemm(x, packed, offsets), fp8_gemm_in_order(x, packed, offsets))


def test_a_step_after_the_other() -> None:
    """K ascends, one accumulator all along: what is small beside it is lost."""
    one, tiny = 0x38, 0x08  # 1 and 2^-6
    x = torch.zeros(1, 128, dtype=torch.uint8)
    x[0, 0], x[0, 32], x[0, 64] = one, tiny, one | 0x80
    packed = torch.full((1, 64), 0x22, dtype=torch.uint8)  # ones
    offsets = torch.tensor([[12, 3, 12, 6]], dtype=torch.uint8)
    weights = e4m3_weights(packed, offsets).view(torch.float8_e4m3fn).float()
    assert float((x.view(torch.float8_e4m3fn).float() * weights).sum()) == 2.0**-9
    assert float(fp8_gemm(x, packed, offsets)) == 0.0
    moved = x.clone()
    moved[0, 32], moved[0, 96] = 0, tiny
    assert float(fp8_gemm(moved, packed, offsets)) == 2.0**-6


def test_without_numba_the_transcription(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_compiled._loaded, "mxfp4ref.sm90.gemm.fp8_loops", None)
    assert gemms._loops(torch.zeros(1)) is None
    x, packed, offsets = problem(7, 2, 8, 64, "wide")
    bits.assert_same(fp8_gemm(x, packed, offsets), fp8_gemm_in_order(x, packed, offsets))


def test_a_compiler_that_errs_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    loops = gemms._loops(torch.zeros(1))
    assert loops is not None

    class Wrong:
        @staticmethod
        def gemm(*arguments: object) -> None:
            loops.gemm(*arguments)
            arguments[-1][0, 0] += 1.0  # type: ignore[index]

    with pytest.raises(ArithmeticError, match="of 320 elements of a trial are wrong"):
        gemms._try_out(Wrong)
