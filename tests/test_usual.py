"""Parameters that only `-m slow` runs are what they are in the usual run."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.usual import first


@pytest.mark.parametrize(
    ("case", "single", "values"),
    [
        ("a", False, ("a",)),
        (("a", 1), False, ("a", 1)),
        (("a", 1), True, (("a", 1),)),
        (("a",), False, (("a",),)),
        ((), False, ((),)),
    ],
)
def test_values_stay_what_they_are(case: Any, single: bool, values: tuple[Any, ...]) -> None:
    usual, slow = first(1, [case, case], single=single)
    assert usual is case
    assert (slow.values, [mark.name for mark in slow.marks]) == (values, ["slow"])


def test_without_what_tests_need_they_are_left_out_and_a_kernel_can_be_tested(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`make demo` brings pytest alone, and `pytest --mxfp4-kernel` in the checkout reads conftest.py."""
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "hypothesis")
        nowhere = SimpleNamespace(find_spec=lambda *arguments: None)
        patch.setattr(sys, "meta_path", [nowhere])  # nothing that was not imported can be
        found = runpy.run_path(str(Path(__file__).with_name("conftest.py")))
        assert found["collect_ignore_glob"] == ["*"]
        said: list[str] = []
        found["pytest_terminal_summary"](SimpleNamespace(write_line=said.append))
        assert "`make test` sets up what they need" in said[0]
        patch.setitem(sys.modules, "torch", None)
        with pytest.raises(pytest.UsageError, match="has no torch: `make test` sets up what they need"):
            runpy.run_path(str(Path(__file__).with_name("conftest.py")))["pytest_configure"]()
