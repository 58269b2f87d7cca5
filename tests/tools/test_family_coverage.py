"""The goldens catch random members of every family of mistakes, and the tool says so where they do not."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from mxfp4ref import forward

PATH = Path(__file__).resolve().parents[2] / "tools" / "tables" / "family_coverage.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("family_coverage", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_two_cases_catch_each_member(tool: ModuleType) -> None:
    cases = tool.cases()
    found = {
        (member.family, member.words): len(tool.catching(member, cases))
        for member in tool.members(seed=20260)
    }
    assert {member for member, count in found.items() if count < tool.ENOUGH} == set()
    assert len({family for family, _ in found}) == len(tool.FAMILIES)


def test_a_right_kernel_is_not_caught(tool: ModuleType) -> None:
    some = [case for case in tool.cases() if case.suite == "parallel"]
    assert tool.catching(tool.Member("none", "right", forward), some) == []


def test_problems_are_an_exit_code(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = next(case for case in tool.cases() if case.suite == "finalize")
    monkeypatch.setattr(tool, "cases", lambda: [one])
    (member, *_) = tool.members(0)
    monkeypatch.setattr(tool, "members", lambda seed: [replace(member, run=forward, words="nothing")])
    assert tool.main(["--members", "1"]) == 1
    assert "nothing: caught by no case" in capsys.readouterr().out
