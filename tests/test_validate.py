"""Refusals: the right type of exception, and a message that names the argument, what was expected, what came."""

from __future__ import annotations

import re

import pytest
import torch

from mxfp4ref._validate import check_choice, check_int, check_same_device, check_tensor

X = torch.zeros(2, 3, dtype=torch.uint8)


def test_check_tensor_returns_what_fits() -> None:
    for shape in ((2, 3), ("M", "K"), ("M", 3), (None, None), ("...",), ("...", "K"), ("...", 2, 3)):
        assert check_tensor("x", X, dtype=torch.uint8, shape=shape) is X
    assert check_tensor("x", X, dtype=(torch.int8, torch.uint8), shape=(2, "K"), sizes={"K": 3}) is X
    assert check_tensor("x", X[0, 0], dtype=torch.uint8, shape=()).shape == ()
    assert check_tensor("x", X, dtype=torch.uint8, shape=(2, 3), contiguous=True) is X


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (None, "NoneType"),
        ([1, 2], "list"),
        (1.5, "float"),
        (X.to(torch.int8), "int8 [2, 3]"),
        (X.to(torch.float32), "float32 [2, 3]"),
        (torch.zeros(2, 3, dtype=torch.uint8, device="meta"), "a meta tensor"),
        (X.to_sparse(), "a torch.sparse_coo tensor"),
    ],
)
def test_check_tensor_type(value: object, got: str) -> None:
    with pytest.raises(TypeError, match=f"^x: expected a uint8 tensor of shape .*, got {re.escape(got)}$"):
        check_tensor("x", value, dtype=torch.uint8, shape=("M", "K"))


def test_check_tensor_lists_the_dtypes() -> None:
    with pytest.raises(
        TypeError, match=r"^x: expected a int8 or bfloat16 tensor of shape \[M\], got uint8 \[2, 3\]$"
    ):
        check_tensor("x", X, dtype=(torch.int8, torch.bfloat16), shape=("M",))


@pytest.mark.parametrize(
    ("shape", "sizes", "expected"),
    [
        ((2,), None, "[2]"),
        ((2, 4), None, "[2, 4]"),
        (("M", "K"), {"K": 4}, "[M, K=4]"),
        (("M", "K"), {"M": 0}, "[M=0, K]"),
        ((None, None, 3), None, "[any, any, 3]"),
        (("...", 2), None, "[..., 2]"),
        (("...", "a", "b", "c"), None, "[..., a, b, c]"),
        ((), None, "[]"),
    ],
)
def test_check_tensor_shape(
    shape: tuple[int | str | None, ...], sizes: dict[str, int] | None, expected: str
) -> None:
    message = f"x: expected a uint8 tensor of shape {expected}, got uint8 [2, 3]"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_tensor("x", X, dtype=torch.uint8, shape=shape, sizes=sizes)


def test_check_tensor_contiguous() -> None:
    check_tensor("x", X.T, dtype=torch.uint8, shape=(3, 2))
    with pytest.raises(ValueError, match=r"^x: .*\[3, 2\], contiguous, got strides \[1, 3\]$"):
        check_tensor("x", X.T, dtype=torch.uint8, shape=(3, 2), contiguous=True)


def test_check_same_device() -> None:
    assert check_same_device({"a": None, "b": X, "c": X}) == torch.device("cpu")
    elsewhere = torch.zeros(1, device="meta")
    with pytest.raises(ValueError, match=r"^c: expected a tensor on cpu like b, got one on meta$"):
        check_same_device({"a": None, "b": X, "c": elsewhere})


def test_check_choice() -> None:
    check_choice("tile", 16, (16, 32))
    for wrong in (8, "16", 16.0, True, None):
        with pytest.raises(ValueError, match=f"^tile: expected one of 16, 32, got {re.escape(repr(wrong))}$"):
            check_choice("tile", wrong, (16, 32))
    with pytest.raises(ValueError, match=r"^flag: expected one of 1, got True$"):
        check_choice("flag", True, (1,))


def test_check_int() -> None:
    assert check_int("rank", 0, minimum=0, maximum=0) == 0
    assert check_int("size", 7, minimum=1) == 7
    with pytest.raises(ValueError, match=r"^rank: expected an int from 0 to 3, got 4$"):
        check_int("rank", 4, minimum=0, maximum=3)
    with pytest.raises(ValueError, match=r"^size: expected an int at least 1, got 0$"):
        check_int("size", 0, minimum=1)
    for wrong in (True, 1.0, "1", None, torch.tensor(1)):
        with pytest.raises(TypeError, match=f"^size: expected an int, got {type(wrong).__name__} "):
            check_int("size", wrong, minimum=1)
