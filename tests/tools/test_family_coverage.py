"""The goldens catch random members of every family of mistakes, and the tool says so where they do not."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest

from mxfp4ref import forward
from tests.helpers.tools import load_tool


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("tables/family_coverage.py")


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
