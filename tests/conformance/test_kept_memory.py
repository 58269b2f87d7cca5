"""Memory that keeps what an earlier tile or expert left: predicted in every bit, by few that fit the wrong tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from mxfp4ref import MoeCall, forward
from mxfp4ref.conformance import differing
from mxfp4ref.conformance.families.engine import prepared
from mxfp4ref.conformance.families.hypotheses.kept_memory import kept_hypotheses
from mxfp4ref.sm90 import fp32
from tests.held_out_kernels.by_hand import Rows, layer
from tests.held_out_kernels.calls import captured
from tests.held_out_kernels.judge_kernels import accumulators_kept_from_expert_to_expert
from tests.held_out_kernels.warps_and_waves import activation_overlaps_the_input


def tile_before_in_the_expert(call: MoeCall) -> Tensor:
    def fc2(rows: Rows, acc: Tensor) -> Tensor:
        late = (rows.position >= 8).nonzero().flatten()
        out = acc.clone()
        out[late] = fp32.add(acc[late], acc[late - 8])
        return fp32.to_bf16(out)

    return layer(call, fc2=fc2)


@pytest.mark.parametrize(
    ("kernel", "name", "words", "stages"),
    [
        (accumulators_kept_from_expert_to_expert, "equal_weights", "of every expert before", ("fc1",)),
        (tile_before_in_the_expert, "gpt_oss", "of the tile of 8 rows before, within an expert", ("fc2",)),
        (
            activation_overlaps_the_input,
            "prefill",
            "the activation is written over the sorted",
            ("input", "fc1"),
        ),
    ],
)
def test_it_is_predicted(
    kernel: Callable[[MoeCall], Tensor], name: str, words: str, stages: tuple[str, ...]
) -> None:
    call = captured(name)
    got, pipeline = kernel(call), prepared(call)
    outputs = [(h, h.run(pipeline)) for h in kept_hypotheses(call, differing(got, forward(call)).any(1))]
    found = [h for h, out in outputs if out is not None and not differing(out, got).any()]
    assert [h.stages for h in found] == [stages]
    assert words in found[0].words
