"""Refusals: the right type of exception, and a message that names the argument, what was expected, what came."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import pytest
import torch

from mxfp4ref._validate import (
    INT32_MAX,
    check_bool,
    check_choice,
    check_float,
    check_ids,
    check_instance,
    check_int,
    check_output,
    check_same_device,
    check_tensor,
    shown,
)

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
        TypeError, match=r"^x: expected an int8 or bfloat16 tensor of shape \[M\], got uint8 \[2, 3\]$"
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


def test_check_int_without_a_maximum() -> None:
    assert check_int("size", INT32_MAX, minimum=1) == INT32_MAX
    with pytest.raises(ValueError, match=r"^size: expected an int from 1 to 2147483647, got 2147483648$"):
        check_int("size", INT32_MAX + 1, minimum=1)
    with pytest.raises(ValueError, match=r"^size: expected an int from 1 to 2147483647, got <int object"):
        check_int("size", 10**5000, minimum=1)
    assert check_int("seed", 1 << 63, minimum=0, maximum=1 << 64) == 1 << 63


def test_check_bool() -> None:
    assert check_bool("strict", True)
    assert not check_bool("strict", False)
    for wrong in (0, 1, "no", None, torch.tensor(True)):
        with pytest.raises(TypeError, match=f"^strict: expected a bool, got {type(wrong).__name__} "):
            check_bool("strict", wrong)


def test_check_float() -> None:
    largest = float(torch.finfo(torch.float32).max)
    for value in (0, -2.5, largest, -largest):
        assert check_float("factor", value) == value
    assert type(check_float("factor", 3)) is float
    for wrong in (float("nan"), float("inf"), -float("inf"), 1e39, 1 << 2000):
        with pytest.raises(ValueError, match=r"^factor: expected a finite float32 number, got "):
            check_float("factor", wrong)
    with pytest.raises(
        ValueError, match=r"^factor: expected a finite float32 number of at least 0.0, got -1$"
    ):
        check_float("factor", -1, minimum=0.0)
    for tiny in (1e-50, -(2.0**-150), 5e-324):
        with pytest.raises(
            ValueError, match=r"^factor: expected 0 or a float32 number, from 2\^-149 up, got "
        ):
            check_float("factor", tiny)
    assert check_float("factor", 2.0**-149) == 2.0**-149
    for not_a_number in (True, "1", None, 1j, torch.tensor(1.0)):
        with pytest.raises(TypeError, match=f"^factor: expected a float, got {type(not_a_number).__name__} "):
            check_float("factor", not_a_number)


def test_check_instance() -> None:
    check_instance("x", True, int)
    for wrong, exact in ((True, True), ("1", False), (int, False)):
        with pytest.raises(TypeError, match=f"^x: expected int, got {type(wrong).__name__}$"):
            check_instance("x", wrong, int, exact=exact)


def test_check_ids() -> None:
    check_ids("ids", torch.tensor([[-1, 3]]), minimum=-1, maximum=3)
    for wrong in (-1, 4):
        with pytest.raises(ValueError, match=rf"^ids: expected ids from 0 to 3, got {wrong} at \[1, 0\]$"):
            check_ids("ids", torch.tensor([[0, 3], [wrong, 9]]), maximum=3)


def test_check_tensor_of_any_dtype() -> None:
    assert check_tensor("x", X, dtype=None, shape=("M", "K")) is X
    with pytest.raises(TypeError, match=r"^x: expected a tensor of shape \[\.\.\.\], got int$"):
        check_tensor("x", 1, dtype=None, shape=("...",))


def test_check_tensor_whose_storage_holds_something_else() -> None:
    for tensor, kind in (
        (torch.complex(torch.ones(2), torch.ones(2)).conj().imag, "lazily negated"),
        (torch.ones(2, device="meta"), "meta"),
    ):
        message = rf"^x: expected a float32 tensor of shape \[2\] with dense storage, got a {kind} tensor$"
        with pytest.raises(TypeError, match=message):
            check_tensor("x", tensor, dtype=torch.float32, shape=(2,))


def output(tensor: torch.Tensor, **inputs: torch.Tensor | None) -> torch.Tensor:
    return check_output("out", tensor, dtype=torch.float32, shape=("M", "N"), inputs=inputs)


def test_check_output() -> None:
    floats = torch.zeros(2, 3)
    for writable in (floats, floats[:, :2], floats[:1].expand(1, 3), floats.t(), floats[:0].expand(0, 3)):
        assert output(writable, other=torch.zeros(6), none=None) is writable
    with torch.inference_mode():
        inferred = torch.zeros(2, 3)
        output(inferred)
    for refused, why in (
        (floats[:1].expand(2, 3), r"whose elements overlap: strides \[0, 1\]"),
        (floats.clone().requires_grad_(), "that requires a gradient"),
        (inferred, "of inference mode"),
    ):
        message = rf"^out: expected a float32 tensor of shape \[M, N\] to be written into, got one {why}$"
        with pytest.raises(ValueError, match=message):
            output(refused)
    with pytest.raises(TypeError, match=r"^out: expected a float32 tensor of shape \[M, N\], got int32"):
        output(torch.zeros(2, 3, dtype=torch.int32))


def test_overlapping_elements_by_counting_places() -> None:
    """Every small tensor of two and three dimensions, held against the set of its places."""
    storage = torch.zeros(64)
    refused = 0
    for sizes in [(m, n) for m in range(4) for n in range(5)]:
        for strides in itertools.product(range(6), repeat=2):
            places = [i * strides[0] + j * strides[1] for i in range(sizes[0]) for j in range(sizes[1])]
            tensor = storage.as_strided(sizes, strides)
            if len(set(places)) == len(places):
                output(tensor)
            else:
                refused += 1
                with pytest.raises(ValueError, match="whose elements overlap"):
                    output(tensor)
    assert refused > 100
    interlocking = storage.as_strided((2, 3, 4), (9, 18, 2))  # 0, 2, 4, 6 and 9, 11, ..., 18, 20, ...
    check_output("out", interlocking, dtype=torch.float32, shape=(2, 3, 4), inputs={})
    with pytest.raises(ValueError, match="overlap"):
        check_output("out", torch.zeros(8).unfold(0, 4, 2), dtype=torch.float32, shape=(3, 4), inputs={})


@pytest.mark.parametrize(
    ("place", "shared"),
    [
        (lambda b: b[8:16], False),  # beside it
        (lambda b: b[7:9], True),  # its last element
        (lambda b: b[0:1], True),
        (lambda b: b[0:0], False),
        (lambda b: b.view(torch.int32)[3:4], True),
        (lambda b: b.view(torch.uint8)[31:32], True),
        (lambda b: b.view(torch.uint8)[32:33], False),
        (lambda b: b[1::2], True),
        (lambda b: b.as_strided((3,), (7,)), True),
        (lambda b: b.clone(), False),
    ],
)
def test_shared_memory(place: Callable[[torch.Tensor], torch.Tensor], shared: bool) -> None:
    buffer = torch.zeros(32)
    other = place(buffer)
    if shared:
        with pytest.raises(ValueError, match=r"got one that shares memory with packed$"):
            output(buffer[:8].view(2, 4), scales=torch.zeros(2), packed=other)
    else:
        output(buffer[:8].view(2, 4), packed=other)
    # Elements in between share nothing.
    output(buffer[0:8:2].view(2, 2), packed=buffer[1:8:2])


def test_shown_is_one_short_line() -> None:
    class Unprintable:
        def __repr__(self) -> str:
            raise RuntimeError

    assert shown("a") == "'a'"
    assert shown(Unprintable()).startswith("<tests.test_validate")
    for long in (10**100, torch.zeros(100, 100), "x" * 1000, [[0]] * 1000):
        assert len(shown(long)) == 80
        assert "\n" not in shown(long)
