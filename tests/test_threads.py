"""Pieces of work on several threads."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from mxfp4ref import _threads, quantize
from mxfp4ref._threads import in_parallel
from mxfp4ref.formats import bytewise, compiled, mxfp4, wordwise

CPU, LARGE = torch.device("cpu"), 1 << 30


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


def test_results_are_in_order_and_each_thread_works_alone() -> None:
    def square(number: int) -> tuple[int, int, int]:
        return number**2, torch.get_num_threads(), int(torch.is_grad_enabled())

    assert in_parallel(square, range(40), CPU, LARGE) == [(number**2, 1, 0) for number in range(40)]


@pytest.mark.parametrize("wrong", [0, 1, 39])
def test_an_error_of_any_piece_is_the_callers(wrong: int) -> None:
    def fail(number: int) -> None:
        if number == wrong:
            raise ValueError(f"piece {number}")

    with pytest.raises(ValueError, match=f"^piece {wrong}$"):
        in_parallel(fail, range(40), CPU, LARGE)


@pytest.mark.parametrize("layout", [wordwise, bytewise], ids=["wordwise", "bytewise"])
def test_formats_by_pieces_are_the_whole(layout: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of seven groups, the last one smaller."""
    pytest.importorskip("numba")
    packed = torch.randint(256, (3, 80, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    scales = packed[..., :3].contiguous()

    def made() -> tuple[torch.Tensor, ...]:
        values = mxfp4.dequantize(packed, scales)
        stored = compiled.interleave(packed, layout)
        return values, *quantize(values.nan_to_num()), stored, compiled.deinterleave(stored, layout)

    whole = made()
    monkeypatch.setattr(_threads, "_ENOUGH", 0)
    monkeypatch.setattr(compiled, "_GROUPS_AT_ONCE", 7)
    for tensor, expected in zip(made(), whole, strict=True):
        assert torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8))
