"""A hypothesis that holds in a part: of the tokens, the columns or the slots."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypothesis import (
    Hypothesis,
    Pipeline,
    SlotRows,
    local_of,
)
from mxfp4ref.conformance.families.places import MaskOf
from mxfp4ref.conformance.families.slot_kinds import SlotKind
from mxfp4ref.model.call import MoeCall

__all__ = ["in_columns", "in_rows", "in_slots", "in_slots_alone"]

_KINDS = 4  # that are tried


def in_rows(hypothesis: Hypothesis, words: str, tokens_of: MaskOf) -> Hypothesis:
    """A hypothesis that holds for some tokens, which `tokens_of` gives as a mask of a call, `[M] bool`."""

    def merge(right: Pipeline, wrong: Pipeline) -> Tensor:
        tokens = tokens_of(right.call, local_of(right))
        return torch.where(tokens[:, None], wrong.run(), right.run())

    limited = _limited(hypothesis, words, 1.5, merge)
    if not hypothesis.cheap and hypothesis.stages[:1] in (("fc1",), ("fc2",)):  # shared by all tokens
        limited = replace(limited, cost=limited.cost + 0.6)
    return limited


def in_columns(
    hypothesis: Hypothesis, words: str, columns: Callable[[int], Tensor], call: MoeCall
) -> Hypothesis:
    def merge(right: Pipeline, wrong: Pipeline) -> Tensor:
        rows = right.run()
        return torch.where(columns(rows.shape[1]).to(rows.device), wrong.run(), rows)

    limited = _limited(hypothesis, words, 1, merge)
    # Slots and tokens are whole rows: what is another's in some columns only became so where there are columns.
    if limited.stages != ("slots",) and not (limited.across_tokens and limited.of_output):
        return limited
    if _passes_columns_through(call):
        of_activation = (
            "or so it is in the activation that GEMM2 reads, each column of which is one of the output's"
        )
        limited = replace(limited, words=f"{limited.words}, {of_activation}")
    return replace(limited, stages=("fc2", "finalize"))


def _passes_columns_through(call: MoeCall) -> bool:
    """Whether each of GEMM2's columns is no more than one of the activation's, as where a case tests this."""
    codes = call.experts.fc2_weights
    if codes.dtype != torch.uint8:
        return False
    count = ((codes & 0x07) != 0).sum(-1) + ((codes & 0x70) != 0).sum(-1)
    return bool((count <= 1).all())


def in_slots(hypothesis: Hypothesis, words: str, mask_of: Callable[[MoeCall, Tensor], Tensor]) -> Hypothesis:
    def merge(right: Pipeline, wrong: Pipeline) -> Tensor:
        rows, other = SlotRows.of(right), SlotRows.of(wrong)
        mask = mask_of(right.call, local_of(right))
        merged = replace(
            rows,
            y=torch.where(mask[..., None], other.y, rows.y),
            local=torch.where(mask, other.local, rows.local),
            weights=torch.where(mask, other.weights, rows.weights),
        )
        return merged.output(right)

    return _limited(hypothesis, f"for slots {words} only", 1, merge)


def in_slots_alone(
    hypothesis: Hypothesis, kinds: Iterable[tuple[SlotKind, MaskOf]], pipeline: Pipeline, got: Tensor
) -> Iterator[Hypothesis]:
    """A hypothesis in the slots of a kind that some tokens have, where that predicts every bit of `got`."""
    for kind, mask_of in islice((pair for pair in kinds if not pair[0].tokens), _KINDS):
        limited = in_slots(hypothesis, kind.words, mask_of)
        if limited.predicts(pipeline, got):
            yield limited


def _limited(
    hypothesis: Hypothesis, words: str, cost: float, merge: Callable[[Pipeline, Pipeline], Tensor]
) -> Hypothesis:
    """With `merge` giving the output of the right pipeline and the changed one, of a call."""

    def change(pipeline: Pipeline) -> Pipeline:
        def run(call: MoeCall) -> Tensor:
            inside = replace(pipeline, call=call)
            return merge(inside, hypothesis.change(inside))

        return Pipeline(pipeline.call, run_call=run)

    return replace(
        hypothesis,
        words=f"{hypothesis.words}, {words}",
        change=change,
        cost=hypothesis.cost + cost,
        name="",
        place=words,
    )
