"""Hypotheses on parameters that are indexed by a slot's place in its token instead of its expert."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypothesis import Hypothesis, Pipeline, SlotRows, of_slots, slot_outputs
from mxfp4ref.model.call import MoeCall

__all__ = ["by_slot_hypotheses"]

_MOST = 8  # passes
_NAMES = {
    "fc1_biases": ("the fc1 biases are", ("activation", "fc1")),
    "swiglu_alpha": ("the SwiGLU alphas are", ("activation",)),
    "swiglu_beta": ("the SwiGLU betas are", ("activation",)),
    "swiglu_limit": ("the SwiGLU limits are", ("activation",)),
}


def by_slot_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """Of each parameter that the experts have."""
    if call.top_k > _MOST or call.experts.num_experts == 1:
        return
    for name, (words, stages) in _NAMES.items():
        if getattr(call.experts, name) is not None:
            yield of_slots(
                "activation",
                stages,
                f"{words} indexed by the slot's place in its token instead of the expert",
                _by_place(name),
                1.5,
            )
    if call.experts.fc2_biases is not None:
        words = "the fc2 biases are indexed by the slot's place in its token instead of the expert"
        yield Hypothesis("fc2 bias", ("finalize", "fc2"), words, _bias_by_place, 1.4)


def _bias_by_place(pipeline: Pipeline) -> Pipeline:
    right = pipeline.stages.finalize

    def finalize(y: Tensor, local: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None or not len(bias):
            return right(y, local, scales, bias)
        place = torch.arange(local.shape[1], device=local.device).expand_as(local) % len(bias)
        return right(y, torch.where(local >= 0, place, local), scales, bias)

    return pipeline.staging(finalize=finalize)


def _by_place(name: str) -> Callable[[SlotRows], SlotRows]:
    def change(rows: SlotRows) -> SlotRows:
        tensor: Tensor = getattr(rows.call.experts, name)
        y = torch.empty_like(rows.y)
        for place in range(rows.call.top_k):
            same = tensor[place % len(tensor)].expand_as(tensor).contiguous()
            y[:, place] = slot_outputs(Pipeline(rows.call).having(**{name: same}))[:, place]
        return replace(rows, y=y)

    return change
