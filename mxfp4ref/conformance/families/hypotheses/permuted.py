"""Hypotheses on the permutation that sorts slots by expert: not undone, or applied where its inverse is meant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypothesis import Hypothesis, SlotRows, of_slots, slot_outputs
from mxfp4ref.model.call import MoeCall

__all__ = ["permuted_hypotheses"]


def _order(rows: SlotRows) -> Tensor:
    """`[M k] int64`: the slots in the order of their experts, those that are skipped last."""
    return (
        torch.where(rows.local < 0, rows.call.experts.num_experts, rows.local).flatten().argsort(stable=True)
    )


# Which slot's numbers a slot has, of those that lie in the order of slots: of the order and its inverse.
_WAYS: tuple[tuple[str, Callable[[Tensor, Tensor], Tensor], float], ...] = (
    ("as if they were sorted by expert, which they are not", lambda order, inverse: inverse, 1.4),
    ("as if they were not sorted by expert, which they are", lambda order, inverse: order, 1.4),
    (
        "by the permutation that sorts slots by expert, where its inverse is meant",
        lambda order, inverse: order[order],
        1.5,
    ),
    (
        "by the inverse of the permutation that sorts slots by expert, where that is meant",
        lambda order, inverse: inverse[inverse],
        1.5,
    ),
)


def _rows(rows: SlotRows, source: Tensor) -> SlotRows:
    return replace(rows, y=rows.y.flatten(0, 1)[source].view(rows.y.shape))


def _weights(rows: SlotRows, source: Tensor) -> SlotRows:
    return replace(rows, weights=rows.weights.flatten()[source].view(rows.weights.shape))


def _input(rows: SlotRows, source: Tensor) -> SlotRows:
    token = (source // rows.call.top_k).view(rows.local.shape)
    return replace(rows, y=slot_outputs(rows.pipeline, rows.call.input[token]))


_WHAT: tuple[tuple[str, tuple[str, ...], Callable[[SlotRows, Tensor], SlotRows]], ...] = (
    ("slots have other slots' rows: the sum reads GEMM2's rows", ("slots", "finalize"), _rows),
    ("slots have other slots' routing weights: the sum reads them", ("finalize",), _weights),
    ("slots have other tokens' input rows: they are gathered", ("slots", "input"), _input),
)


def permuted_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """Of GEMM2's rows, the routing weights and the input."""
    if call.experts.num_experts == 1 or call.num_tokens * call.top_k < 3:
        return
    for what, stages, move in _WHAT:
        for how, source, cost in _WAYS:

            def change(
                rows: SlotRows,
                move: Callable[[SlotRows, Tensor], SlotRows] = move,
                source: Callable[[Tensor, Tensor], Tensor] = source,
            ) -> SlotRows:
                order = _order(rows)
                return move(rows, source(order, order.argsort()))

            yield of_slots("permuted slots", stages, f"{what} {how}", change, cost)
