"""Rows of fc1 at other places, solved as a table that follows any rule or none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward
from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.families.engine import prepared
from mxfp4ref.conformance.families.hypothesis import local_of
from mxfp4ref.conformance.families.sampled import samples
from mxfp4ref.conformance.families.solved.fc1_rows import fc1_rows
from mxfp4ref.conformance.findings.finding import Evidence
from tests.held_out_kernels.by_hand import with_experts
from tests.held_out_kernels.calls import captured

ROWS = torch.arange(256)


def found(call: MoeCall, **tensors: Tensor) -> Evidence | None:
    got, pipeline = forward(with_experts(call, **tensors)), prepared(call)
    return fc1_rows(pipeline, samples(pipeline, got, differing(got, forward(call)), local_of(pipeline)))


def in_order(call: MoeCall, order: Tensor, *names: str) -> Evidence | None:
    return found(call, **{f"fc1_{name}": getattr(call.experts, f"fc1_{name}")[:, order] for name in names})


@pytest.mark.parametrize(
    ("order", "words"),
    [
        (ROWS.view(2, 2, -1).transpose(0, 1).flatten(), "shard by shard [up; gate; up; gate; ...], of 2 shards"),
        (ROWS.view(2, -1, 8).transpose(0, 1).flatten(), "of 16 shards"),
        (torch.where(ROWS < 128, ROWS, 128 + (ROWS - 112) % 128), "rows 128 to 239 are rows 144 to 255"),
        (torch.where((ROWS >= 64) & (ROWS < 96), ROWS + 64, ROWS), "rows 64 to 95 are rows 128 to 159"),
        (ROWS.view(8, 32)[[0, 6, 2, 1, 4, 5, 3, 7]].flatten(), "rows 32 to 63 are rows 192 to 223"),
    ],
)  # fmt: skip
def test_rows_in_another_order(order: Tensor, words: str) -> None:
    evidence = in_order(captured("odd_tokens"), order, "weights", "scales")
    assert evidence is not None
    assert evidence.stages == ("fc1",)
    assert words in evidence.sentence


@pytest.mark.parametrize("biases", [True, False])
def test_whether_biases_move_with_their_rows(biases: bool) -> None:
    names = ("weights", "scales", "biases")[: 2 + biases]
    evidence = in_order(captured("expert_rank_2_of_4"), torch.where(ROWS < 128, ROWS ^ 32, ROWS), *names)
    assert evidence is not None
    assert ("the biases stay" in evidence.sentence) == (not biases)


def test_columns_of_the_activation_are_told_elsewhere() -> None:
    assert in_order(captured("expert_rank_2_of_4"), ROWS ^ 32, "weights", "scales", "biases") is None
    assert in_order(captured("expert_rank_2_of_4"), ROWS ^ 32, "weights", "scales") is not None


def test_other_scales_are_no_other_rows() -> None:
    call = captured("odd_tokens")
    assert in_order(call, ROWS ^ 32, "scales") is None
    assert found(call, fc1_scales=call.experts.fc1_scales.roll(1, 0)) is None  # type: ignore[union-attr]
