"""Hypotheses on how the experts' tensors are read from memory: axes in another order, other strides, another type."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import permutations

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypothesis import Hypothesis
from mxfp4ref.conformance.families.tensors import mapped
from mxfp4ref.model.call import MoeCall

__all__ = ["memory_hypotheses"]

_Read = Callable[[Tensor], Tensor]

_AXES = ("experts", "rows", "K")
_WHOSE = {
    "fc1_weights": ("GEMM1's weights (codes without the scales)", ("fc1",)),
    "fc1_scales": ("GEMM1's scales", ("fc1",)),
    "fc2_weights": ("GEMM2's weights (codes without the scales)", ("fc2",)),
    "fc2_scales": ("GEMM2's scales", ("fc2",)),
    "fc1_biases": ("the fc1 biases", ("fc1", "activation")),
    "fc2_biases": ("the fc2 biases", ("finalize", "fc2")),
    "swiglu_alpha": ("the SwiGLU alphas", ("activation",)),
    "swiglu_beta": ("the SwiGLU betas", ("activation",)),
    "swiglu_limit": ("the SwiGLU limits", ("activation",)),
}


def memory_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """Those that can show on a call."""
    for name, (what, stages) in _WHOSE.items():
        tensor = getattr(call.experts, name)
        if tensor is None:
            continue
        for words, read, cost in (*_axes(tensor), *_strides(tensor), *_types(tensor)):
            yield Hypothesis(
                "rows" if "weights" in name or "scales" in name else "values",
                stages,
                f"{what} {words}",
                mapped((name,), lambda _, t, r=read: r(t).reshape(t.shape).contiguous()),
                cost,
            )


def _axes(tensor: Tensor) -> Iterator[tuple[str, _Read, float]]:
    named = f"[{', '.join(_AXES[: tensor.dim()])}]"
    for order in list(permutations(range(tensor.dim())))[1:]:
        other = f"[{', '.join(_AXES[axis] for axis in order)}]"
        back = torch.tensor(order).argsort().tolist()

        def lies(t: Tensor, order: tuple[int, ...] = order) -> Tensor:
            return t.permute(order).contiguous()

        def read(t: Tensor, order: tuple[int, ...] = order, back: list[int] = back) -> Tensor:
            return t.reshape([t.shape[axis] for axis in order]).permute(back)

        yield f"lie as {other} where {named} is expected (transposed)", lies, 1.3
        yield f"are read as {other} where they lie as {named} (transposed)", read, 1.3


def _strides(tensor: Tensor) -> Iterator[tuple[str, _Read, float]]:
    """Experts, or rows of one, that are sought at other distances; what lies beyond the end is zero."""
    for axis in range(tensor.dim() - 1):
        own = tensor.stride(axis)
        ways = {2 * own: "doubled", own // 2: "halved", own + 1: "one too large", own - 1: "one too small"}
        for unit in (512, 256, 128, 64, 32, 16, 8, 4):
            ways[-(-own // unit) * unit] = f"rounded up to a multiple of {unit}"
        for stride, how in ways.items():
            if stride not in (0, own):
                between = ("experts", "rows")[axis]
                yield (
                    f"are read with a stride between {between} of {stride} instead of {own} ({how})",
                    lambda t, a=axis, s=stride: _at(t, a, s),
                    1.4,
                )


def _at(tensor: Tensor, axis: int, stride: int) -> Tensor:
    strides = [stride if a == axis else tensor.contiguous().stride(a) for a in range(tensor.dim())]
    index = torch.zeros(1, dtype=torch.int64)
    for size, step in zip(tensor.shape, strides, strict=True):
        index = index[..., None] + torch.arange(size) * step
    flat = torch.cat((tensor.flatten(), tensor.new_zeros(1)))
    return flat[index[0].clamp(max=tensor.numel())]


def _types(tensor: Tensor) -> Iterator[tuple[str, _Read, float]]:
    """Biases and parameters that are read as of another type."""
    names = {torch.float32: "float32", torch.bfloat16: "bf16", torch.float16: "float16"}
    if tensor.dtype not in names:
        return
    for stored, of in names.items():
        for taken, as_ in names.items():
            if stored is taken:
                continue

            def read(t: Tensor, stored: torch.dtype = stored, taken: torch.dtype = taken) -> Tensor:
                memory = t.to(stored).contiguous().flatten().view(torch.uint8)
                wanted = t.numel() * taken.itemsize
                memory = torch.nn.functional.pad(memory, (0, max(wanted - len(memory), 0)))[:wanted]
                return memory.view(taken).to(t.dtype)

            yield f"are {of} in memory and read as {as_}", read, 1.3
