"""The tool that writes docs/confusion.md, on a few cases."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from mxfp4ref.defects import DEFECTS
from tests.helpers.tools import load_tool

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("tables/confusion_table.py")


@pytest.mark.slow
def test_names_and_problems(tool: ModuleType) -> None:
    columns = [tool.column(name) for name in ("finalize/cancelling_experts", "gemm/mirrored_hidden_384")]
    assert tool.names_of("gate_up_swapped", columns) == (2, ("gate_up_swapped",))
    assert tool.names_of("limit_ignored", columns) == (0, ())
    text, problems = tool.table(columns)
    assert "limit_ignored: 0 cases fail, named nothing" in problems
    assert not any(problem.startswith("gate_up_swapped") for problem in problems)
    assert "| last_slot_dropped | defect | 2 | itself | 1 | 1 | 1 |" in text


def test_stages_and_whole_layers_are_left_out(tool: ModuleType) -> None:
    assert tool.column("tensor_core/subnormals") is None
    assert tool.column("models/gpt_oss_20b") is None


def test_the_stored_table_is_of_these_defects_and_names_all_of_them() -> None:
    rows = [line.split(" | ") for line in (ROOT / "docs" / "confusion.md").read_text().splitlines()[20:]]
    named = {cells[0].removeprefix("| "): cells[3] for cells in rows if len(cells) > 3}
    assert {name: named[name] for name in DEFECTS} == dict.fromkeys(DEFECTS, "itself")
