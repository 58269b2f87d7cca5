"""Hypotheses on where each expert's rows begin among the sorted rows: prefix sums that are wrong, in several uses.

Rows are sorted by expert, and an offset for each expert says where its rows begin. `_STARTS` are ways to get that
offset wrong, and `_USES` what is done with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypothesis import (
    Hypothesis,
    Pipeline,
    SlotRows,
    local_of,
    of_slots,
    slot_outputs,
)
from mxfp4ref.conformance.families.places import concerns_what_is_wrong
from mxfp4ref.conformance.families.solved.pursuit import Rows
from mxfp4ref.model.call import MoeCall

__all__ = ["by_two_experts", "count_hypotheses", "offset_hypotheses"]

_Starts = Callable[[Tensor], Tensor]  # rows by expert, `[E]`, to where each expert's begin


def _source(rows: Rows, experts: int, starts: _Starts) -> Tensor:
    """For each row the sorted row that is taken for it, `[R]`; one that is none is `R` or more."""
    return starts(rows.per_expert(experts))[rows.expert] + rows.position


def _owner(rows: Rows, experts: int, starts: _Starts) -> Tensor:
    """For each sorted row the expert that takes it, the last of several, `[R]`; -1 where none does."""
    found = torch.full((len(rows) + 1,), -1, device=rows.flat.device)
    source = _source(rows, experts, starts).clamp(max=len(rows))
    found[source] = rows.expert  # in the order of the experts: on a CPU the last one stays
    return found[:-1]


def _offsets(counts: Tensor) -> Tensor:
    return counts.cumsum(0) - counts


def _starts(experts: int, rows: int) -> Iterator[tuple[str, _Starts, float]]:
    """Words behind "the offsets of the experts' rows", from the rows by expert to the offsets, cost."""
    for size in (8, 16, 32, 64, 128, 256):
        yield (
            f"padded: each expert begins at a multiple of {size}, while the rows lie densely",
            lambda n, s=size: _offsets((n + s - 1) // s * s),
            1.2,
        )
    for size in (4, 8, 16, 32, 64, 128, 256):
        if size < experts:
            first = f"summed up for {size} experts at a time (a warp or block of them)"
            yield (
                f"{first} without carry: experts from {size} on begin again at the first row",
                lambda n, s=size: _offsets(n) - torch.where(torch.arange(len(n)) >= s, n[:s].sum(), 0),
                1.3,
            )
            yield (
                f"{first} without any carry: each {size} begin again at the first row",
                lambda n, s=size: _offsets(n) - _offsets(n)[torch.arange(len(n)) // s * s],
                1.35,
            )
    yield "those of the next expert (an inclusive prefix sum)", lambda n: n.cumsum(0), 1.2
    yield (
        "those of the previous expert",
        lambda n: (n.cumsum(0) - n).roll(1).index_fill(0, torch.tensor([0]), 0),
        1.3,
    )
    yield "zero for all experts", lambda n: n * 0, 1.4
    yield "one row too high", lambda n: _offsets(n) + 1, 1.4
    for bits in (6, 7, 8, 10, 12, 16):
        if 2**bits < rows:
            yield f"kept in {bits} bits, modulo {2**bits}", lambda n, b=bits: _offsets(n) % 2**b, 1.4
    yield (
        "counted over idle experts: those of the expert with rows before",
        lambda n: _offsets(n) - torch.where(n.cumsum(0) > n, _before(n), 0),
        1.5,
    )


def _before(counts: Tensor) -> Tensor:
    """Of each expert the rows of the last one before it that has any."""
    index = torch.where(counts > 0, torch.arange(len(counts)), -1).cummax(0).values.roll(1)
    index[0] = -1
    return torch.where(index >= 0, counts[index.clamp(min=0)], 0)


def offset_hypotheses(call: MoeCall, wrong: Tensor) -> Iterator[Hypothesis]:
    """Those that concern the tokens that are wrong, `wrong [M] bool`, and hardly any others."""
    local, experts = local_of(Pipeline(call)), call.experts.num_experts
    rows = Rows.of(local)
    if not len(rows.flat):
        return
    here = torch.arange(len(rows.flat), device=local.device)
    for words, starts, cost in _starts(experts, len(rows)):
        source, owner = _source(rows, experts, starts), _owner(rows, experts, starts)
        for stages, use, change, moved in (
            (
                ("input", "slots"),
                "GEMM1 reads its input rows there, which are other tokens'",
                _reading_input,
                source != here,
            ),
            (
                ("slots", "fc2"),
                "GEMM2's rows are read there, which are other slots' or experts'",
                _reading_output,
                source != here,
            ),
            (
                ("slots", "fc1"),
                "an expert takes the rows there, which are other experts', and rows that no expert takes stay zero",
                _owning,
                owner != rows.expert,
            ),
            (
                ("slots", "fc1"),
                "both GEMMs of an expert take the rows there, which are other experts', whose biases and SwiGLU "
                "parameters they keep, and rows that no expert takes stay zero",
                partial(_owning, parameters=False),
                owner != rows.expert,
            ),
        ):
            if concerns_what_is_wrong(_tokens(rows, moved, wrong), wrong):
                one = of_slots(
                    "rows of an expert",
                    stages,
                    f"the offsets of the experts' rows among all sorted rows are {words}; {use}",
                    change(starts),
                    cost,
                )
                yield replace(one, across_tokens=True, slow=True)


def count_hypotheses(call: MoeCall, wrong: Tensor) -> Iterator[Hypothesis]:
    """As `offset_hypotheses`, of rows that are not computed: those beyond another expert's number of rows."""
    local, experts = local_of(Pipeline(call)), call.experts.num_experts
    rows = Rows.of(local)
    counts: tuple[tuple[str, _Starts, float], ...] = (
        ("the expert with rows before it", lambda n: torch.where(n.cumsum(0) > n, _before(n), n), 1.2),
        ("the expert before it", lambda n: torch.cat((n[:1], n[:-1])), 1.25),
        ("the expert after it", lambda n: torch.cat((n[1:], n[-1:])), 1.3),
        ("the first expert", lambda n: n[:1].expand_as(n), 1.4),
        ("the average expert, rounded down", lambda n: (n.sum() // len(n)).expand_as(n), 1.5),
        ("the average expert, rounded up", lambda n: (-(-n.sum() // len(n))).expand_as(n), 1.5),
    )
    for words, limit, cost in counts:
        moved = rows.position >= limit(rows.per_expert(experts))[rows.expert]
        if not concerns_what_is_wrong(_tokens(rows, moved, wrong), wrong):
            continue

        def on(rows: SlotRows, limit: _Starts = limit) -> SlotRows:
            found, count = Rows.of(rows.local), rows.call.experts.num_experts
            beyond = found.position >= limit(found.per_expert(count))[found.expert]
            return rows.placing(found.flat[beyond], 0)

        one = of_slots(
            "rows of an expert",
            ("fc2", "slots"),
            f"an expert's rows beyond the number of rows of {words} are not computed: GEMM2, or its input, has zeros "
            "for them",
            on,
            cost,
        )
        yield replace(one, across_tokens=True, slow=True)


def _tokens(rows: Rows, moved: Tensor, wrong: Tensor) -> Tensor:
    """Those of some rows, `[M] bool` as `wrong`."""
    return torch.zeros_like(wrong).index_fill(0, rows.token[moved], True)


def _reading_input(starts: _Starts) -> Callable[[SlotRows], SlotRows]:
    def on(rows: SlotRows) -> SlotRows:
        call, found = rows.call, Rows.of(rows.local)
        token = torch.arange(len(call.input), device=call.input.device).repeat_interleave(call.top_k)
        source = _source(found, call.experts.num_experts, starts).clamp(max=len(found.flat) - 1)
        token[found.flat] = token[found.flat][source]
        return replace(rows, y=slot_outputs(rows.pipeline, call.input[token.view(rows.local.shape)]))

    return on


def _reading_output(starts: _Starts) -> Callable[[SlotRows], SlotRows]:
    def on(rows: SlotRows) -> SlotRows:
        found = Rows.of(rows.local)
        y = rows.y.flatten(0, 1)
        taken = torch.cat((y[found.flat], torch.zeros_like(y[:1])))
        source = _source(found, rows.call.experts.num_experts, starts).clamp(max=len(found))
        return rows.placing(found.flat, taken[source])

    return on


def _owning(starts: _Starts, *, parameters: bool = True) -> Callable[[SlotRows], SlotRows]:
    """With `parameters` all of the owner's, else its weights and scales only."""

    def on(rows: SlotRows) -> SlotRows:
        found = Rows.of(rows.local)
        owner = _owner(found, rows.call.experts.num_experts, starts)
        slots = torch.where(owner >= 0, found.flat, -1)
        return by_two_experts(
            rows,
            slots,
            found.expert,
            owner.clamp(min=0),
            lambda name: parameters or name.endswith(("weights", "scales")),
        )

    return on


def by_two_experts(
    rows: SlotRows, slots: Tensor, own: Tensor, other: Tensor, of_other: Callable[[str], bool]
) -> SlotRows:
    """Rows that are computed by an expert of their own with some tensors of another one.

    Args:
        rows: the call's.
        slots: `[R]`, the rows' slots in one list of all, or -1 for a row that nobody computes.
        own, other: `[R]`, the two experts.
        of_other: whether the tensor of a name (`fc1_scales`) is the other's.
    """
    experts = rows.call.experts
    pairs, pair = torch.unique(torch.stack((own, other)), dim=1, return_inverse=True)
    tensors = {
        field.name: tensor[pairs[int(of_other(field.name))]]
        for field in fields(experts)
        if (tensor := getattr(experts, field.name)) is not None
    }
    local = torch.full_like(rows.local, -1).flatten()
    local[slots[slots >= 0]] = pair[slots >= 0]
    ids = local.view(rows.local.shape).to(torch.int32)
    pipeline = rows.pipeline.having(**tensors)
    pipeline = pipeline.calling(token_selected_experts=ids, ep_size=1, ep_rank=0)
    pipeline = pipeline.staging(select_local=lambda ids, *_: ids.to(torch.int64))  # one may come twice
    return replace(rows, y=slot_outputs(pipeline))
