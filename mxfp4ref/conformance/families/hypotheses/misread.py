"""Hypotheses on routing weights and input rows read with another stride, on fc2 biases of other slots or ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypotheses.memory_readings import lying_at, sought_at
from mxfp4ref.conformance.families.hypotheses.weighting import weighing
from mxfp4ref.conformance.families.hypothesis import (
    Change,
    Hypothesis,
    Pipeline,
    SlotRows,
    of_slots,
    slot_outputs,
)
from mxfp4ref.model.call import MoeCall

__all__ = ["misread_hypotheses"]

_F = ("finalize",)
_PADS, _TOKENS = (8, 16, 32, 64, 128), 256  # elements; the most tokens, each of which is computed again
_CHUNKS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def misread_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """Those that can show on a call."""
    yield from _weights(call)
    yield from _inputs(call)
    if call.experts.fc2_biases is not None:
        yield from _biases(call)


def _weights(call: MoeCall) -> Iterator[Hypothesis]:
    def as_one(count: int) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda w, local: torch.where((local >= 0).sum(1, keepdim=True) == count, 1.0, w)

    for count in range(1, max(min(call.top_k, 9), 2)):  # for all of its slots it is no condition
        slots = "a single slot" if count == 1 else f"{count} slots"
        copied = ", as where a lone row is copied without its weight" * (count == 1)
        yield weighing(
            f"the routing weights are not applied (taken as 1) for tokens with {slots} on this rank{copied}",
            as_one(count),
            1.15 if count == 1 else 1.4,
        )
    for stride, what in _strides(call.top_k):
        apart = f"with {stride} slots a token ({what})"
        for words, read, cost in (
            (f"read {apart} where they lie with {call.top_k}", sought_at, 1.3),
            (f"read with {call.top_k} slots a token where they lie {apart}", lying_at, 1.4),
        ):
            yield replace(
                weighing(
                    f"the routing weights are {words}: those of other slots and tokens",
                    lambda w, _, read=read, what=what: read(w, _stride(w.shape[1], what)),
                    cost,
                ),
                across_tokens=True,
            )
    for size in _CHUNKS:
        if size < len(call.input):
            yield replace(
                weighing(
                    f"the routing weights are read at the token's number modulo {size}: each chunk of {size} tokens "
                    "has those of the first one",
                    lambda w, _, n=size: w[torch.arange(len(w), device=w.device) % n],
                    1.2,
                ),
                across_tokens=True,
            )


def _inputs(call: MoeCall) -> Iterator[Hypothesis]:
    """Rows of the input that lie at another pitch than they are read at."""
    tokens, hidden = call.input.shape
    for more in _PADS if 1 < tokens <= _TOKENS else ():
        for words, read, cost in (
            (
                f"the input is read as if its rows lay {more} elements further apart than they do",
                sought_at,
                1.2,
            ),
            (
                f"the input is read densely where its rows lie {more} elements apart, which are zero",
                lying_at,
                1.3,
            ),
        ):

            def on(
                rows: SlotRows, read: Callable[[Tensor, int], Tensor] = read, pitch: int = hidden + more
            ) -> SlotRows:
                x = read(rows.call.input, pitch)[:, None].expand(-1, rows.call.top_k, -1)
                return replace(rows, y=slot_outputs(rows.pipeline, x))

            yield replace(of_slots("input", ("input",), words, on, cost), across_tokens=True)


def _strides(top_k: int) -> Iterator[tuple[int, str]]:
    """Numbers of slots that a token may be taken to have, and why."""
    ways = (
        (1 << (top_k - 1).bit_length(), "top-k rounded up to a power of two"),
        (-(-top_k // 4) * 4, "top-k rounded up to a multiple of 4"),
        (-(-top_k // 8) * 8, "top-k rounded up to a multiple of 8"),
        (top_k + 1, "one more than top-k"),
        (top_k - 1, "one less than top-k"),
    )
    seen: set[int] = {top_k, 0}
    for stride, words in ways:
        if stride not in seen:
            seen.add(stride)
            yield stride, words


def _stride(top_k: int, what: str) -> int:
    """The one that has these words; top-k itself where that is the same."""
    return next((stride for stride, words in _strides(top_k) if words == what), top_k)


def _biases(call: MoeCall) -> Iterator[Hypothesis]:
    parts: tuple[tuple[str, Callable[[MoeCall], int]], ...] = (
        ("tp_size", lambda c: c.tp_size),
        ("ep_size", lambda c: c.ep_size),
        ("the number of ranks, tp_size * ep_size", lambda c: c.tp_size * c.ep_size),
        ("top-k", lambda c: c.top_k),
    )
    for number, (words, count) in enumerate(parts):
        if count(call) == 1:
            continue
        for ranks in ("every tensor-parallel rank", "rank 0 alone"):
            if ranks == "rank 0 alone" and words == "tp_size":
                continue  # which is tried with the other weights of the bias
            yield Hypothesis(
                "fc2 bias",
                _F,
                f"the fc2 bias, divided by {words}, is added on {ranks}",
                _divided(count, everywhere=ranks != "rank 0 alone"),
                1.15 + 0.1 * number,
            )
    if call.tp_rank == 0:
        yield from _missing()
        words = "the fc2 biases are indexed by the slot's place in its token instead of the expert"
        yield Hypothesis("fc2 bias", ("finalize", "fc2"), words, _by_place, 1.4)


def _divided(count: Callable[[MoeCall], int], *, everywhere: bool) -> Change:
    def on(pipeline: Pipeline) -> Pipeline:
        bias = pipeline.call.experts.fc2_biases
        if bias is None or (pipeline.call.tp_rank and not everywhere):
            return pipeline
        part = (bias.float() / count(pipeline.call)).to(bias.dtype)
        before = pipeline.stages.finalize
        return pipeline.staging(finalize=lambda y, local, w, _: before(y, local, w, part))

    return on


def _by_place(pipeline: Pipeline) -> Pipeline:
    right = pipeline.stages.finalize

    def finalize(y: Tensor, local: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None or not len(bias):
            return right(y, local, scales, bias)
        place = torch.arange(local.shape[1], device=local.device).expand_as(local) % len(bias)
        return right(y, torch.where(local >= 0, place, local), scales, bias)

    return pipeline.staging(finalize=finalize)


def _missing() -> Iterator[Hypothesis]:
    """A bias, times the weight, for slots that have no expert on this rank."""
    kinds: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
        (
            "slots without an expert on this rank (missing ones: padding, or another rank's)",
            lambda ids: torch.ones_like(ids, dtype=torch.bool),
        ),
        ("padded slots (-1), which are missing,", lambda ids: ids < 0),
        ("slots of other ranks' experts, missing here,", lambda ids: ids >= 0),
    )
    whose: tuple[tuple[str, Callable[[Tensor, MoeCall], Tensor]], ...] = (
        ("this rank's first expert", lambda ids, c: torch.zeros_like(ids)),
        ("this rank's last expert", lambda ids, c: torch.full_like(ids, c.experts.num_experts - 1)),
        (
            "the expert with their id modulo the rank's number of experts",
            lambda ids, c: ids % c.experts.num_experts,
        ),
        (
            "the nearest of this rank's experts",
            lambda ids, c: (ids - c.ep_rank * c.experts.num_experts).clamp(0, c.experts.num_experts - 1),
        ),
    )
    for number, (words, chosen) in enumerate(kinds):
        for expert, of in whose:

            def on(
                rows: SlotRows,
                chosen: Callable[[Tensor], Tensor] = chosen,
                of: Callable[[Tensor, MoeCall], Tensor] = of,
            ) -> SlotRows:
                if rows.call.experts.fc2_biases is None or rows.call.tp_rank:
                    return rows
                ids = rows.call.token_selected_experts.to(torch.int64)
                missing = (rows.local < 0) & chosen(ids)
                return replace(rows, local=torch.where(missing, of(ids, rows.call), rows.local))

            yield of_slots(
                "fc2 bias",
                _F,
                f"{words} add the fc2 bias of {expert}, times their routing weight",
                on,
                1.1 + 0.1 * number,
            )
