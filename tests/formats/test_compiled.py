"""Compiled layouts against those that say where each byte goes."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from mxfp4ref import _compiled
from mxfp4ref.formats import bytewise, compiled, wordwise

layout_loops = pytest.importorskip("mxfp4ref.formats.layout_loops")
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
