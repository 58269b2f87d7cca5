"""Hypotheses on how tensors are read from memory: axes in another order, other strides, another type.

Those are the experts' tensors; of the routing weights and the ids it is the type alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, permutations
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypotheses.tensors import mapped
from mxfp4ref.conformance.families.hypotheses.weighting import weighing
from mxfp4ref.conformance.families.hypothesis import (
    Hypothesis,
    Pipeline,
    SlotRows,
    local_of,
    of_slots,
    slot_outputs,
)
from mxfp4ref.conformance.families.places import concerns_what_is_wrong
from mxfp4ref.conformance.families.solved.tensor_groups import GEMMS
from mxfp4ref.formats.mxfp4 import GROUP_SIZE
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import select_local
from mxfp4ref.sm90.gemm.cpu import group_scaled_gemm

__all__ = ["lying_at", "matrix_readings", "route_readings", "sought_at", "vector_readings"]

_Read = Callable[[Tensor], Tensor]

_FLOATS = {torch.float32: "float32", torch.bfloat16: "bf16", torch.float16: "float16"}
_INTEGERS = {torch.int64: "int64", torch.int32: "int32", torch.int16: "int16", torch.uint8: "uint8"}
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


def vector_readings(call: MoeCall) -> Iterator[Hypothesis]:
    """Of biases and SwiGLU parameters."""
    return _readings(call, matrices=False)


def matrix_readings(call: MoeCall) -> Iterator[Hypothesis]:
    """Of codes and scales."""
    return chain(_readings(call, matrices=True), _scales_of_half_groups())


def _scales_of_half_groups() -> Iterator[Hypothesis]:
    """A scale for each 16 of K, as NVFP4 has one: twice as many as a row has."""
    for fcs, whose in GEMMS:
        for over, where in (
            (True, "the second half of K has those of the next row"),
            (False, "the second half of K has the row's own once more"),
        ):
            gemm = _by_half_groups(beyond=over)
            yield Hypothesis(
                "K groups",
                fcs,
                f"{whose} scales are read as one for each 16 of K, as NVFP4 has them: {where}",
                lambda p, fcs=fcs, gemm=gemm: p.staging(**{f"{fc}_gemm": gemm for fc in fcs}),
                1.2 + 0.2 * len(fcs),
            )


def _by_half_groups(*, beyond: bool) -> Callable[..., Tensor]:
    """A GEMM in which each 16 of K are a group of their own, filled up with zeros."""

    def gemm(x: Tensor, packed: Tensor, scales: Tensor, **how: Any) -> Tensor:
        rows, groups = scales.shape[1:]
        place = torch.arange(2 * groups, device=scales.device)
        place = place if beyond else place % groups
        at = (torch.arange(rows, device=scales.device)[:, None] * groups + place) % (rows * groups)
        half = GROUP_SIZE // 2
        wide, codes = (
            torch.nn.functional.pad(t.reshape(*t.shape[:2], -1, size), (0, size)).flatten(2)
            for t, size in ((x, half), (packed, half // 2))
        )
        return group_scaled_gemm(wide, codes, scales.flatten(1)[:, at], **how)

    return gemm


def _readings(call: MoeCall, *, matrices: bool) -> Iterator[Hypothesis]:
    for name, (what, stages) in _WHOSE.items():
        tensor = getattr(call.experts, name)
        if tensor is None or (tensor.dim() == 3) != matrices:
            continue
        ways = chain(_axes(tensor), _strides(tensor, call), _offsets(tensor), _types(tensor))
        for words, read, cost in ways:
            yield Hypothesis(
                "rows" if matrices else "values",
                stages,
                f"{what} {words}",
                mapped((name,), lambda _, t, r=read: r(t).reshape(t.shape).contiguous()),
                cost,
                across_experts=True,
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


def _strides(tensor: Tensor, call: MoeCall) -> Iterator[tuple[str, _Read, float]]:
    """Experts, or rows of one, that lie densely and are sought at other distances; beyond the end there are zeros."""
    for axis in range(tensor.dim() - 1):
        own, between = tensor.stride(axis), ("experts", "rows")[axis]
        ways = {2 * own: "doubled", own // 2: "halved", own + 1: "one too large", own - 1: "one too small"}
        if tensor.dim() == 2:
            hidden, inner = call.experts.hidden_size, call.experts.intermediate_size
            ways |= {hidden: "H", inner: "I", 2 * inner: "2I"}
        for unit in (512, 256, 128, 64, 32, 16, 8, 4):
            ways[-(-own // unit) * unit] = f"rounded up to a multiple of {unit}"
        for stride, how in ways.items():
            if stride in (0, own):
                continue
            words = f"lie densely and are read with a stride between {between} of {stride} instead of {own} ({how})"
            if axis == 0:
                yield words, lambda t, s=stride: _at(t, [s, *t.stride()[1:]]), 1.2
                continue
            yield (
                f"{words}; each expert begins at its place",
                lambda t, s=stride: _at(t, [t.stride(0), s, 1]),
                1.2,
            )
            in_one = f"{words}, all experts' in one list"
            yield in_one, lambda t, s=stride: _at(t, [s * t.shape[1], s, 1]), 1.25


def _offsets(tensor: Tensor) -> Iterator[tuple[str, _Read, float]]:
    """Vectors of all experts in one list that are read further on or too early."""
    if tensor.dim() != 2:
        return
    for offset in (1, -1, 8, -8, 16, 32, 64, 128, tensor.shape[1] // 2, -(tensor.shape[1] // 2)):
        way = "too far" if offset > 0 else "too early"
        numbers = "one number" if abs(offset) == 1 else f"{abs(offset)} numbers"
        yield (
            f"are read {numbers} {way}, in one list of all experts",
            lambda t, o=offset: _at(t, t.stride(), o),
            1.2,
        )


def _at(tensor: Tensor, strides: Sequence[int], offset: int = 0) -> Tensor:
    """What is read where elements are sought at these distances in memory; zeros beyond its end."""
    index = torch.full((1,), offset, device=tensor.device)
    for size, step in zip(tensor.shape, strides, strict=True):
        index = index[..., None] + torch.arange(size, device=tensor.device) * step
    inside = (index[0] >= 0) & (index[0] < tensor.numel())
    return torch.where(inside, tensor.flatten()[index[0].clamp(0, tensor.numel() - 1)], 0)


def sought_at(tensor: Tensor, stride: int) -> Tensor:
    """A matrix whose rows lie densely, read as if they lay so far apart; zeros after the end."""
    return _at(tensor, (stride, 1))


def lying_at(tensor: Tensor, stride: int) -> Tensor:
    """A matrix whose rows lie so far apart, with zeros between them, read as if they lay densely."""
    wide = torch.nn.functional.pad(tensor, (0, max(stride - tensor.shape[1], 0)))
    return wide.flatten()[: tensor.numel()].view(tensor.shape)


def route_readings(call: MoeCall, wrong: Tensor) -> Iterator[Hypothesis]:
    """Of the routing weights, and of the ids those that concern the tokens that are wrong, `wrong [M] bool`."""
    for words, read, cost in _types(call.token_final_scales):
        told = f"the routing weights {words}: other numbers"
        yield replace(
            weighing(told, lambda w, _, r=read: r(w).view(w.shape), cost - 0.15), across_tokens=True
        )
    local = local_of(Pipeline(call))
    for words, read, cost in _types(call.token_selected_experts.to(torch.int64)):

        def on(rows: SlotRows, read: _Read = read) -> SlotRows:
            other = _reading(rows.pipeline, read)
            return replace(rows, y=slot_outputs(other), local=local_of(other))

        told = f"the expert ids {words}: slots are computed by other experts, or left out"
        hypothesis = of_slots("ids", ("slots",), told, on, cost)
        moved = (local_of(_reading(Pipeline(call), read)) != local).any(1)
        if bool(moved.any()) and concerns_what_is_wrong(moved, wrong):
            yield replace(hypothesis, across_tokens=True)


def _reading(pipeline: Pipeline, read: _Read) -> Pipeline:
    """With the ids read so."""
    call, ids = pipeline.call, pipeline.call.token_selected_experts
    local = select_local(
        read(ids.long()).view(ids.shape), call.experts.num_experts, call.ep_size, call.ep_rank
    )
    return pipeline.staging(select_local=lambda *_: local)


def _types(tensor: Tensor) -> Iterator[tuple[str, _Read, float]]:
    """Vectors that are read as of another type."""
    names = _INTEGERS if tensor.dtype in _INTEGERS else _FLOATS
    if tensor.dim() == 3 or tensor.dtype not in names:
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
