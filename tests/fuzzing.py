"""Hostile arguments: valid calls of every public function, and what may be put in the place of an argument."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

HUGE = 1 << 50  # elements: beyond any address space, so that an allocation fails at once
SECONDS = 20

DTYPES = (
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
    *(torch.float8_e8m0fnu, torch.float8_e4m3fn, torch.uint16),
)
SHAPES = (
    (),
    (0,),
    (1,),
    (3,),
    (0, 0),
    (3, 0),
    (0, 128),
    (1, 1),
    (3, 2),
    (4, 256, 64),
    (0, 256, 64),
    (1, 2, 3, 4),
)

# What is no tensor at all; functions, so that nothing is shared between inputs.
JUNK: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "text": lambda: "0.6.16",
    "empty text": lambda: "",
    "NUL": lambda: "a\0b",
    "bytes": lambda: b"\x80\x00",
    "zero": lambda: 0,
    "one": lambda: 1,
    "minus one": lambda: -1,
    "three": lambda: 3,
    "2^31": lambda: 1 << 31,
    "2^63": lambda: 1 << 63,
    "2^2000": lambda: 1 << 2000,
    "-2^63": lambda: -(1 << 63),
    "0.5": lambda: 0.5,
    "NaN": lambda: float("nan"),
    "Inf": lambda: float("inf"),
    "1e300": lambda: 1e300,
    "True": lambda: True,
    "complex": lambda: 1j,
    "list": lambda: [1, 2],
    "empty list": lambda: [],
    "nested list": lambda: [[1.0, None]],
    "tuple": lambda: (128, 128),
    "odd tuple": lambda: (128, "128"),
    "tuple of one": lambda: (0,),
    "dict": lambda: {"a": 1},
    "array": lambda: np.zeros((4, 256, 64), dtype=np.uint8),
    "array of objects": lambda: np.array([None, "x"], dtype=object),
    "numpy integer": lambda: np.int64(2),
    "numpy float": lambda: np.float32(2.0),
    "class": lambda: Tensor,
    "function": lambda: len,
    "object": object,
    "dtype": lambda: torch.float16,
    "device": lambda: torch.device("meta"),
    "path": lambda: Path("no/such/place"),
}


def make_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    count = int(np.prod(shape, dtype=np.int64))
    return (torch.arange(count) % 7).to(torch.float32).to(dtype).reshape(shape)


def _shifted(t: Tensor) -> Tensor:
    """The same tensor in the middle of a storage, at an odd offset in bytes where elements are bytes."""
    flat = torch.cat([t.new_zeros(3), t.contiguous().flatten(), t.new_zeros(1)])
    return flat[3 : 3 + t.numel()].view(t.shape)


def _strided(t: Tensor) -> Tensor:
    return torch.stack([t, torch.zeros_like(t)], -1)[..., 0]


def _column_major(t: Tensor) -> Tensor:
    return t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))


# Changes that leave shape, dtype and values alone: the result has to have the same bits.
HARMLESS: dict[str, Callable[[Tensor], Tensor]] = {
    "shifted": _shifted,
    "strided": _strided,
    "column major": _column_major,
    "inference tensor": lambda t: _inference(t),
}


def _inference(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


def _extreme(t: Tensor, value: float) -> Tensor:
    if t.dtype.is_floating_point:
        return torch.full(t.shape, value).to(t.dtype)
    return t


HARMFUL: dict[str, Callable[[Tensor], Any]] = {
    "meta": lambda t: torch.empty_like(t, device="meta"),
    "sparse": lambda t: torch.zeros(t.shape, dtype=torch.float32).to_sparse(),
    "numpy": lambda t: t.to(torch.float32).numpy(),
    "list": lambda t: t.to(torch.float32).tolist(),
    "0-dim": lambda t: t.new_zeros(()),
    "no rows": lambda t: t[:0],
    "no columns": lambda t: t[..., :0],
    "one row": lambda t: t[:1],
    "one column more": lambda t: torch.cat([t, t[..., :1]], -1),
    "one row more": lambda t: torch.cat([t, t[:1]], 0),
    "one dimension more": lambda t: t[None],
    "one dimension less": lambda t: t[0],
    "flat": lambda t: t.flatten(),
    "transposed": lambda t: t.transpose(0, -1),
    "expanded": lambda t: t[:1].expand(t.shape),
    "huge": lambda t: t.new_zeros(1).expand(HUGE, *t.shape[1:]),
    "huge last": lambda t: t.new_zeros(1).expand(*t.shape[:-1], HUGE),
    "huge and empty": lambda t: t.new_zeros(1).expand(HUGE, 1)[:, :0],
    "bytes": lambda t: t.contiguous().view(torch.uint8),
    "NaN": lambda t: _extreme(t, float("nan")),
    "Inf": lambda t: _extreme(t, float("inf")),
    "-Inf": lambda t: _extreme(t, float("-inf")),
    "subnormal": lambda t: _extreme(t, 1e-40),
    "largest": lambda t: _extreme(t, 3e38),
    "zeros": lambda t: torch.zeros_like(t),
    "ones": lambda t: t.new_ones(1).expand(t.shape).clone(),
    "all bits set": lambda t: torch.full_like(t.contiguous().view(torch.uint8), 255).view(t.dtype),
    "minimum": lambda t: t if t.dtype.is_floating_point else torch.full_like(t, torch.iinfo(t.dtype).min),
    "gradients": lambda t: t.clone().requires_grad_() if t.dtype.is_floating_point else t,
    "parameter": lambda t: torch.nn.Parameter(t.clone(), requires_grad=False),
    **{f"as {dtype}": lambda t, dtype=dtype: t.to(torch.float32).to(dtype) for dtype in DTYPES},  # type: ignore[misc]
}


def changes(value: Any) -> dict[str, Callable[[], Any]]:
    """Everything that is put in the place of a valid argument."""
    found = dict(JUNK)
    if isinstance(value, Tensor) and value.dim():
        found |= {f"tensor, {name}": lambda f=f: f(value) for name, f in HARMFUL.items()}  # type: ignore[misc]
        found |= {f"same, {name}": lambda f=f: f(value) for name, f in HARMLESS.items()}  # type: ignore[misc]
    found |= {
        f"{dtype} {list(shape)}": lambda shape=shape, dtype=dtype: make_tensor(shape, dtype)  # type: ignore[misc]
        for dtype in (torch.uint8, torch.int32, torch.float32, torch.bfloat16)
        for shape in SHAPES
    }
    return found


@dataclass(frozen=True)
class Target:
    """A public function with arguments that it takes, made anew for each call.

    Attributes:
        names: words by which messages may call arguments, besides their names.
        generic: takes tensors of any dtype, and gives such back.
    """

    function: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]
    names: tuple[str, ...] = ()
    generic: bool = False


class Hang(Exception):
    pass


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang(f"no result within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def out_of_memory(error: BaseException) -> bool:
    """Whether torch could not allocate a result: the honest answer to an input of 2^50 elements."""
    return isinstance(error, RuntimeError) and bool(
        re.search(r"can't allocate memory|not enough memory|Storage size calculation overflowed", str(error))
    )


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for item in value.values() for t in tensors(item)]
    if isinstance(value, tuple | list):
        return [t for item in value for t in tensors(item)]
    if is_dataclass(value) and not isinstance(value, type):
        return [t for field in fields(value) for t in tensors(getattr(value, field.name))]
    return []


def problem(target: Target, valid: Any, changed: Mapping[str, str]) -> str:
    """What is wrong with the outcome of a call whose arguments are changed as named; "" if nothing is."""
    arguments = target.arguments()
    for name, change in changed.items():
        arguments[name] = changes(arguments[name])[change]()
    before = [
        t.clone() for t in tensors(arguments) if t.numel() < 1 << 20 and t.device.type == "cpu" and t.is_leaf
    ]
    try:
        with time_limit(SECONDS):
            result = target.function(**arguments)
    except (TypeError, ValueError, NotImplementedError) as error:
        same = len(changed) == 1 and next(iter(changed.values())).startswith("same")
        if same and "contiguous" not in str(error):
            return f"refused for its strides: {error}"
        named = any(
            re.search(rf"(?<![a-z]){re.escape(name)}(?![a-z])", str(error))
            for name in (*arguments, *target.names)
        )
        if not named or not re.search(r"expected|not modelled|cannot|no such|not ", str(error)):
            return f"{type(error).__name__} that does not name an argument: {error}"
        return ""
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        if out_of_memory(error) and any("huge" in change for change in changed.values()):
            return ""
        return f"{type(error).__name__}: {str(error)[:300]}"
    after = [t for t in tensors(arguments) if t.numel() < 1 << 20 and t.device.type == "cpu" and t.is_leaf]
    if not all(same_bits(a, b) for a, b in zip(after, before, strict=True)):
        return "an argument was written into"
    if type(result) is not type(valid):
        return f"gave {type(result).__name__}, not {type(valid).__name__}"
    got, wanted = tensors(result), tensors(valid)
    if any(t.is_meta for t in got):
        return "gave a meta tensor"
    others = any(change.startswith(("dtype", "tensor, as")) for change in changed.values())
    if isinstance(valid, Tensor) and not target.generic and not others and result.dtype != valid.dtype:
        return f"gave {result.dtype}, not {valid.dtype}"
    if all(change.startswith("same") for change in changed.values()) and not (
        len(got) == len(wanted) and all(map(same_bits, got, wanted))
    ):
        return "gave other bits for the same values"
    return ""


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.layout != torch.strided:
        return True
    raw = [t.detach().resolve_conj().contiguous().flatten().view(torch.uint8) for t in (a, b)]
    return bool(torch.equal(*raw))
