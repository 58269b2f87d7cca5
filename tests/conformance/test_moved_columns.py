"""Right numbers at other columns of the output: told as that, and not as something before finalize."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mxfp4ref import forward
from mxfp4ref.conformance import diagnose
from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.families.solved.moved_columns import moved_columns
from mxfp4ref.conformance.findings.stage_fit import reconcile
from mxfp4ref.goldens import open_goldens

CALL = open_goldens().load("gemm/ordinary").call()
RIGHT = forward(CALL)
COLUMNS = torch.arange(RIGHT.shape[1])


def told(got: Tensor) -> str:
    found = moved_columns(got, RIGHT, differing(got, RIGHT))
    return "" if found is None else found.sentence.partition(": ")[2]


def in_some_rows(columns: Tensor) -> Tensor:
    rows = torch.arange(len(RIGHT)) // 2 % 2 == 1
    return torch.where(rows[:, None], RIGHT[:, columns], RIGHT)


BLOCKS = COLUMNS // 8 % 4
EXCHANGED = in_some_rows(COLUMNS + 8 * (BLOCKS == 1).int() - 8 * (BLOCKS == 2).int())


@pytest.mark.slow
def test_blocks_exchanged_in_some_rows() -> None:
    found = diagnose("moe", CALL, {"output": EXCHANGED}, {"output": RIGHT}, diagnosis="quick")
    assert found.finding.sentence.endswith(
        "columns 8 to 23 of each 32 are exchanged: 8 to 15 have those of 16 to 23, 16 to 23 have those of 8 to 15"
    )
    assert found.finding.stages == ("fc2", "finalize")


def test_other_orders() -> None:
    assert told(in_some_rows(COLUMNS ^ 1)) == (
        "columns 0 to 1 of each 2 are exchanged: 0 have those of 1, 1 have those of 0"
    )
    shifted = in_some_rows((COLUMNS - 1).clamp(min=0))
    count = int(differing(shifted, RIGHT).any(0).sum())
    assert told(shifted) == f"{count} of the {count} columns that differ have what belongs 1 column before"
    own = torch.stack([row.roll(-3 * i) for i, row in enumerate(RIGHT)])
    assert told(own) == "each row has its own, in another order"


@pytest.mark.parametrize("factor", [1.5, 1.01, -1.0, 0.0])
def test_other_numbers_are_not_moved(factor: float) -> None:
    assert not told((RIGHT.float() * factor).to(RIGHT.dtype))
    call = replace(CALL, token_final_scales=CALL.token_final_scales.roll(1, 0))
    assert not told(forward(call))


def test_nothing_excludes_what_comes_after_the_sum() -> None:
    stage = reconcile(CALL, {"output": EXCHANGED}, differing(EXCHANGED, RIGHT))
    assert stage.reach == "other than the sum's weights"
    assert stage.words.startswith("other than the sum's weights: ")
