"""Hostile arguments: valid calls of every public function, and what may be put in the place of an argument."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from mxfp4ref._validate import no_storage
from mxfp4ref.formats.experts import Experts
from mxfp4ref.formats.generations import GENERATIONS
from mxfp4ref.formats.resize import to_sm90

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
    "text": lambda: "wordwise",
    "empty text": lambda: "",
    "NUL": lambda: "a\0b",
    "not ASCII": lambda: "\u00fc\ud800",
    "bytes": lambda: b"\x80\x00",
    "zero": lambda: 0,
    "one": lambda: 1,
    "minus one": lambda: -1,
    "three": lambda: 3,
    "2^31": lambda: 1 << 31,
    "2^63": lambda: 1 << 63,
    "2^2000": lambda: 1 << 2000,
    "2^20000": lambda: 1 << 20000,  # refuses to be printed
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
    "numpy bool": lambda: np.bool_(True),
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


def _odd_strides(t: Tensor) -> Tensor:
    """Where there is one element only, contiguous all the same."""
    t = t.contiguous()
    return t.as_strided(
        t.shape, [7 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True)]
    )


# Changes that leave shape, dtype and values alone: the result has to have the same bits.
HARMLESS: dict[str, Callable[[Tensor], Tensor]] = {
    "shifted": _shifted,
    "strided": _strided,
    "column major": _column_major,
    "odd strides": _odd_strides,
    "inference tensor": lambda t: _inference(t),
}


def _freed(t: Tensor) -> Tensor:
    """As FSDP leaves a weight between its uses."""
    t = t.clone()
    t.untyped_storage().resize_(t.nbytes // 2)
    return t


def _inference(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


def _negated(t: Tensor) -> Tensor:
    if t.dtype not in (torch.float32, torch.float64):
        return t
    return torch.complex(torch.zeros_like(t), -t).conj().imag


def _extreme(t: Tensor, value: float) -> Tensor:
    if t.dtype.is_floating_point:
        return torch.full(t.shape, value).to(t.dtype)
    return t


def _minimum(t: Tensor) -> Tensor:
    return (
        t if t.dtype.is_floating_point or t.dtype == torch.bool else t.clone().fill_(torch.iinfo(t.dtype).min)
    )


HARMFUL: dict[str, Callable[[Tensor], Any]] = {
    "meta": lambda t: torch.empty_like(t, device="meta"),
    "negated when read": _negated,
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "quantized": lambda t: torch.quantize_per_tensor(t.to(torch.float32), 1.0, 0, torch.qint8),
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
    "rows that overlap": lambda t: t.contiguous().as_strided(t.shape, (1,) * t.dim()),
    "half freed": lambda t: _freed(t),
    "huge": lambda t: t.new_zeros(1).expand(HUGE // max(t[0].numel(), 1), *t.shape[1:]),
    "huge last": lambda t: t.new_zeros(1).expand(*t.shape[:-1], HUGE // max(t[..., 0].numel(), 1)),
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
    "minimum": _minimum,
    "gradients": lambda t: t.clone().requires_grad_() if t.dtype.is_floating_point else t,
    "parameter": lambda t: torch.nn.Parameter(t.clone(), requires_grad=False),
    **{f"as {dtype}": lambda t, dtype=dtype: t.to(torch.float32).to(dtype) for dtype in DTYPES},  # type: ignore[misc]
}


def _dense_experts() -> Experts:
    fc1, fc2 = torch.ones(4, 256, 128, dtype=torch.bfloat16), torch.ones(4, 128, 128, dtype=torch.bfloat16)
    return Experts(fc1, None, fc2, None)


def changes(value: Any) -> dict[str, Callable[[], Any]]:
    """Everything that is put in the place of a valid argument; for a tensor every shape of its own dtype."""
    found = dict(JUNK)
    dtypes = [torch.float32, torch.uint8, torch.int32, torch.bfloat16]
    if isinstance(value, Tensor):
        dtypes = list(dict.fromkeys((torch.float32, value.dtype)))
    if isinstance(value, Tensor) and value.dim():
        found |= {f"tensor, {name}": lambda f=f: f(value) for name, f in HARMFUL.items()}  # type: ignore[misc]
        found |= {f"same, {name}": lambda f=f: f(value) for name, f in HARMLESS.items()}  # type: ignore[misc]
    if type(value) is Experts:
        found |= {f"experts, {g}": lambda g=g: to_sm90(value, g) for g in GENERATIONS}  # type: ignore[misc]
        found["experts, bf16"] = _dense_experts
    found |= {
        f"{dtype} {list(shape)}": lambda shape=shape, dtype=dtype: make_tensor(shape, dtype)  # type: ignore[misc]
        for dtype in dtypes
        for shape in SHAPES
    }
    return found


@dataclass(frozen=True)
class Target:
    """A public function with arguments that it takes, made anew for each call.

    Attributes:
        names: words by which messages may call arguments, besides their names.
        generic: takes tensors of any dtype, and gives such back.
        written: arguments that the function writes into.
        ignored: arguments without effect: whatever they are, the result has the same bits.
        only: the arguments that are changed, if not all.
        without: changes of an argument that are left out.
    """

    function: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]
    names: tuple[str, ...] = ()
    generic: bool = False
    written: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    without: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @cached_property
    def annotations(self) -> dict[str, Any]:
        return get_type_hints(self.function)

    @cached_property
    def fingerprints(self) -> dict[str, Any]:
        """Of the valid arguments."""
        return {name: fingerprints(value) for name, value in self.arguments().items()}

    def choices(self, argument: str, value: Any) -> list[str]:
        """The names of the changes of an argument that has this value."""
        names = [change for change in changes(value) if change not in self.without.get(argument, ())]
        return names[::6] if argument in self.ignored else names


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
        return [t for item in value if type(item) is not float for t in tensors(item)]
    if is_dataclass(value) and not isinstance(value, type):
        return [t for field in fields(value) for t in tensors(getattr(value, field.name))]
    return []


def problem(target: Target, valid: Any, changed: Mapping[str, str]) -> str:
    """What is wrong with the outcome of a call whose arguments are changed as named; "" if nothing is."""
    arguments = target.arguments()
    for name, change in changed.items():
        arguments[name] = changes(arguments[name])[change]()
    read_only = {name: value for name, value in arguments.items() if name not in target.written}
    known = target.fingerprints
    before = {
        name: fingerprints(value) if name in changed else known[name] for name, value in read_only.items()
    }
    try:
        with time_limit(SECONDS):
            result = target.function(**arguments)
    except (TypeError, ValueError, NotImplementedError) as error:
        return wrong_refusal(target, changed, arguments, error)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        if out_of_memory(error) and any("huge" in change for change in changed.values()):
            return ""
        return f"{type(error).__name__}: {str(error)[:300]}"
    return wrong_result(target, changed, arguments, result, valid) or (
        ""
        if {name: fingerprints(value) for name, value in read_only.items()} == before
        else "an argument was written into"
    )


def wrong_refusal(
    target: Target, changed: Mapping[str, str], arguments: Mapping[str, Any], error: Exception
) -> str:
    message = str(error)
    same = [name for name, change in changed.items() if change.startswith("same")]
    if same == list(changed) and not set(same) & set(target.written) and "contiguous" not in message:
        return f"refused for its strides: {message}"
    blamed = re.findall(r"\w+", message.split(": ")[0])
    if not set(blamed) & {*arguments, *target.names}:
        return f"{type(error).__name__} that does not name an argument: {message}"
    if not re.search(r"expected .*got ", message, re.DOTALL):
        return f"{type(error).__name__} that does not say what was expected and what came: {message}"
    return ""


def wrong_result(
    target: Target, changed: Mapping[str, str], arguments: Mapping[str, Any], result: Any, valid: Any
) -> str:
    for name in set(changed) - set(target.ignored):
        annotation = target.annotations.get(name, Any)
        if not fits(arguments[name], annotation):
            return f"took {type(arguments[name]).__name__} for {annotation}"
    if not isinstance(result, type(valid)):
        return f"gave {type(result).__name__}, not {type(valid).__name__}"
    if any(t.is_meta for t in tensors(result)):
        return "gave a meta tensor"
    others = any(change.startswith(("dtype", "tensor, as")) for change in changed.values())
    if isinstance(valid, Tensor) and not target.generic and not others and result.dtype != valid.dtype:
        return f"gave {result.dtype}, not {valid.dtype}"
    same = all(name in target.ignored or change.startswith("same") for name, change in changed.items())
    if same and fingerprints(result) != fingerprints(valid):
        return "gave other bits for the same values"
    return ""


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value is of an annotated type; a bool is no int, an int is a float (PEP 484)."""
    kind = get_origin(annotation) or annotation
    if kind in (Union, UnionType):
        return any(fits(value, option) for option in get_args(annotation))
    if kind is Any or value is None:
        return kind in (Any, None, NoneType)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def fingerprints(value: Any) -> list[tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Dtype, shape and bits of all tensors in `value` that can be read at once."""
    return [
        (
            t.dtype,
            tuple(t.shape),
            t.detach().resolve_neg().contiguous().flatten().view(torch.uint8).numpy().tobytes(),
        )
        for t in tensors(value)
        if not no_storage(t) and t.device.type == "cpu" and t.numel() < 1 << 20
    ]
