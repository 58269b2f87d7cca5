"""Compiled formats and layouts against the tables and the layouts that say where each byte goes."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from mxfp4ref import _compiled
from mxfp4ref._choices import CONVENTIONS
from mxfp4ref.formats import bytewise, compiled, mxfp4, quantize, wordwise
from tests.helpers import bits

layout_loops = pytest.importorskip("mxfp4ref.formats.layout_loops")
mxfp4_loops = pytest.importorskip("mxfp4ref.formats.mxfp4_loops")
LAYOUTS = pytest.mark.parametrize("layout", [wordwise, bytewise], ids=["wordwise", "bytewise"])


@LAYOUTS
@pytest.mark.parametrize("shape", [(1, 16, 32), (3, 48, 96), (2, 16, 1056), (0, 16, 32), (1, 0, 32)])
def test_layouts(layout: ModuleType, shape: tuple[int, ...]) -> None:
    packed = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    stored = layout.interleave(packed)
    assert torch.equal(compiled.interleave(packed, layout), stored)
    assert torch.equal(compiled.deinterleave(stored, layout), packed)


@LAYOUTS
def test_every_bit_of_a_word_moves_alone(layout: ModuleType) -> None:
    """One bit set among 16 x 32 bytes, each in turn."""
    packed = torch.zeros(4096, 16, 32, dtype=torch.uint8)
    packed.view(4096, 512)[torch.arange(4096), torch.arange(4096) // 8] = (1 << torch.arange(4096) % 8).to(
        torch.uint8
    )
    stored = layout.interleave(packed)
    assert torch.equal(compiled.interleave(packed, layout), stored)
    assert torch.equal(compiled.deinterleave(stored, layout), packed)


@LAYOUTS
def test_at_any_offset_and_left_alone(layout: ModuleType) -> None:
    buffer = torch.randint(256, (1 + 2 * 16 * 32,), dtype=torch.uint8)
    packed, before = buffer[1:].view(2, 16, 32), buffer.clone()
    assert torch.equal(compiled.interleave(packed, layout), layout.interleave(packed.clone()))
    assert torch.equal(buffer, before)


@pytest.mark.parametrize("wrong", ["interleave", "deinterleave"])
def test_a_compiler_that_errs_is_found_out(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def loop(source: object, target: object, is_wordwise: bool) -> None:
        getattr(layout_loops, wrong)(source, target, True)

    loops = {"interleave": layout_loops.interleave, "deinterleave": layout_loops.deinterleave, wrong: loop}
    monkeypatch.setitem(sys.modules, "mxfp4ref.formats.layout_loops", SimpleNamespace(**loops))
    monkeypatch.setattr(_compiled, "_loaded", {})
    packed = torch.randint(256, (1, 16, 32), dtype=torch.uint8)
    with pytest.warns(RuntimeWarning, match="weights change their layout 3 to 12 times more slowly, for"):
        assert torch.equal(compiled.interleave(packed, bytewise), bytewise.interleave(packed))


# --- MXFP4 ------------------------------------------------------------------------------------------------

EVERY_PAIR = torch.arange(256).to(torch.uint8).view(16, 16).expand(256, 16, 16)


def looked_up(
    packed: torch.Tensor, scales: torch.Tensor, convention: str, dtype: torch.dtype
) -> torch.Tensor:
    """What the compiled loops have to give, by torch."""
    out = torch.empty(*packed.shape[:-1], 2 * packed.shape[-1], dtype=dtype)
    pairs = mxfp4.pair_table(convention, dtype, out.device)
    mxfp4.look_up(packed.reshape(-1, 16), scales.flatten(), pairs, out)
    return out


def by_steps(values: torch.Tensor, rule: str) -> tuple[torch.Tensor, torch.Tensor]:
    packed = torch.empty(len(values), 16, dtype=torch.uint8)
    scales = torch.empty(len(values), dtype=torch.uint8)
    quantize.by_steps(values, rule, packed, scales)
    return packed, scales.unsqueeze(1)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dequantize_every_byte_of_every_scale(convention: str, dtype: torch.dtype) -> None:
    scales = torch.arange(256).to(torch.uint8).view(256, 1, 1).expand(256, 16, 1)
    expected = looked_up(EVERY_PAIR, scales, convention, dtype)
    got = mxfp4.dequantize(EVERY_PAIR, scales, convention=convention, dtype=dtype)
    bits.assert_same(got, expected)
    for offset in (1, 2):
        out = torch.empty(offset + expected.numel(), dtype=dtype)[offset:].view(expected.shape)
        got = mxfp4.dequantize(EVERY_PAIR, scales, convention=convention, dtype=dtype, out=out)
        assert got is out
        bits.assert_same(out, expected)


@pytest.mark.parametrize("rule", quantize.SCALE_RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_quantize(rule: str, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(1)
    width = 16 if dtype != torch.float32 else 32
    exponent_bits = 5 if dtype == torch.float16 else 8
    fraction_bits = width - 1 - exponent_bits
    top = rng.integers(0, 1 << exponent_bits, (4000, 1))  # the largest exponent of each group
    exponent = np.clip(top - rng.integers(0, 6, (4000, 32)), 0, None)
    coarse = np.where(
        rng.random((4000, 1)) < 0.5, -(1 << max(fraction_bits - 3, 0)), -1
    )  # so that ties occur
    fraction = rng.integers(0, 1 << fraction_bits, (4000, 32)) & coarse
    patterns = exponent << fraction_bits | fraction | rng.integers(0, 2, (4000, 32)) << (width - 1)
    patterns += rng.integers(-1, 2, (4000, 32)) * (rng.random((4000, 32)) < 0.1) * (patterns % 2 == 0)
    patterns[:5] = np.array([[0], [1], [1 << (width - 1)], [2], [3]])
    integers = torch.from_numpy(patterns).to({16: torch.int16, 32: torch.int32}[width])
    values = integers.view(dtype)
    for got, expected in zip(quantize.quantize(values, rule=rule), by_steps(values, rule), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("rule", quantize.SCALE_RULES)
def test_quantize_around_every_step_of_the_scale(rule: str) -> None:
    steps, codes = quantize.step_tables(rule)
    around = (
        torch.cat([steps, codes.flatten()])[:, None] + torch.tensor([-1, 0, 1], dtype=torch.int32)
    ).flatten()
    values = torch.zeros(len(around), 32, dtype=torch.int32)
    values[:, 17] = around.clamp(min=0)
    values[:, 3] = values[:, 17] // 2
    for got, expected in zip(
        quantize.quantize(values.view(torch.float32), rule=rule),
        by_steps(values.view(torch.float32), rule),
        strict=True,
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("wrong", ["dequantize", "quantize"])
def test_a_compiler_that_errs_in_mxfp4_is_found_out(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def loop(*arguments: np.ndarray) -> None:
        getattr(mxfp4_loops, wrong)(*arguments)
        arguments[-1].reshape(-1)[-1] ^= 1

    loops = {"dequantize": mxfp4_loops.dequantize, "quantize": mxfp4_loops.quantize, wrong: loop}
    monkeypatch.setitem(sys.modules, "mxfp4ref.formats.mxfp4_loops", SimpleNamespace(**loops))
    monkeypatch.setattr(_compiled, "_loaded", {})
    packed, scales = EVERY_PAIR[0], torch.full((16, 1), 120, dtype=torch.uint8)
    with pytest.warns(RuntimeWarning, match="MXFP4 is read and written 5 to 20 times more slowly"):
        values = mxfp4.dequantize(packed, scales)
    bits.assert_same(values, looked_up(packed, scales, "ocp", torch.bfloat16))
    assert torch.equal(quantize.quantize(values)[0], by_steps(values, "floor")[0])


@pytest.mark.parametrize(
    ("terminal", "tested", "told"), [(True, False, 1), (False, False, 1), (True, True, 0)]
)
def test_who_waits_for_the_compiler_is_told_once(
    terminal: bool,
    tested: bool,
    told: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In a pipe too, but not in tests; nothing is said where nothing is compiled."""
    numba = importlib.import_module("numba")
    monkeypatch.setattr(_compiled, "_told", [])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    if not tested:
        monkeypatch.delitem(sys.modules, "pytest")
    with _compiled._told_of_compiling():
        pass
    assert capsys.readouterr().err == ""
    with _compiled._told_of_compiling():
        for number in range(2 if told else 1):
            numba.njit(["int64(int64)"])(eval(f"lambda x: x + {number}"))
    assert capsys.readouterr().err.count("are compiled for this CPU, once") == told
