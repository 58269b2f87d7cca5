"""Pieces of work on several threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mxfp4ref.sm90.threads import in_parallel

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
