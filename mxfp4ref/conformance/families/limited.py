"""A hypothesis that holds in a part: of the tokens, the columns or the slots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypothesis import (
    Hypothesis,
    Pipeline,
    finalized,
    local_of,
    slot_outputs,
)
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import KERNEL

__all__ = ["in_columns", "in_rows", "in_slots"]


def in_rows(hypothesis: Hypothesis, words: str, tokens: Tensor, count: int) -> Hypothesis:
    def change(pipeline: Pipeline) -> Pipeline:
        def run(call: MoeCall) -> Tensor:
            right, wrong = (
                replace(pipeline, call=call).run(),
                hypothesis.change(replace(pipeline, call=call)).run(),
            )
            if len(right) != count:
                raise ValueError("tokens: of another call")
            right = right.clone()
            right[tokens] = wrong[tokens]
            return right

        return Pipeline(pipeline.call, KERNEL, run)

    return replace(
        hypothesis, words=f"{hypothesis.words}, {words}", change=change, cost=hypothesis.cost + 1.5, name=""
    )


def in_columns(hypothesis: Hypothesis, words: str, columns: Callable[[int], Tensor]) -> Hypothesis:
    def change(pipeline: Pipeline) -> Pipeline:
        def run(call: MoeCall) -> Tensor:
            right, wrong = (
                replace(pipeline, call=call).run(),
                hypothesis.change(replace(pipeline, call=call)).run(),
            )
            return torch.where(columns(right.shape[1]).to(right.device), wrong, right)

        return Pipeline(pipeline.call, KERNEL, run)

    return replace(
        hypothesis, words=f"{hypothesis.words}, {words}", change=change, cost=hypothesis.cost + 1, name=""
    )


def in_slots(hypothesis: Hypothesis, words: str, mask_of: Callable[[MoeCall, Tensor], Tensor]) -> Hypothesis:
    def change(pipeline: Pipeline) -> Pipeline:
        def run(call: MoeCall) -> Tensor:
            inside = replace(pipeline, call=call)
            local = local_of(inside)
            wrong = slot_outputs(hypothesis.change(inside))
            y = torch.where(mask_of(call, local)[..., None], wrong, slot_outputs(inside))
            return finalized(inside, y, local, call.token_final_scales)

        return Pipeline(pipeline.call, KERNEL, run)

    return replace(
        hypothesis,
        words=f"{hypothesis.words}, for slots {words} only",
        change=change,
        cost=hypothesis.cost + 1,
        name="",
    )
