"""docs/releases.md is what its tool writes, and the tool leaves out no release and no record."""

from __future__ import annotations

import runpy
from pathlib import Path

from click.testing import CliRunner

from mxfp4ref.formats.generations import BYTEWISE, PLAIN, WORDWISE

ROOT = Path(__file__).resolve().parents[2]
TOOL = runpy.run_path(str(ROOT / "tools" / "tables" / "releases.py"))


def test_the_page_is_what_the_tool_writes() -> None:
    written = TOOL["page"]()
    assert TOOL["PAGE"].read_text(encoding="utf-8") == written, "run python tools/tables/releases.py"
    table = written.split("run on hardware |\n")[1].split("\n\n")[0]
    named = [
        release for row in table.splitlines()[1:] for release in row.split(" | ")[0].strip("| ").split(", ")
    ]
    assert sorted(named) == sorted((*PLAIN.releases, *BYTEWISE.releases, *WORDWISE.releases))


def test_the_tool_says_what_it_did() -> None:
    checked = CliRunner().invoke(TOOL["main"], ["--check"])
    assert (checked.exit_code, checked.output.split(",")[0]) == (0, "docs/releases.md: as it was")


def test_no_element_is_lost() -> None:
    """The sums are those of the table beside the records, which another tool writes."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (ROOT / "goldens" / "hardware" / "README.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| NVIDIA")
    ]
    instructions = ("ex2", "rcp", "tensor core")
    calls = [row for row in rows if not row[3].startswith(instructions)]
    found = list(TOOL["records"]())
    for column, of in ((4, "elements"), (5, "differing")):
        assert sum(int(row[column].replace(",", "")) for row in calls) == sum(getattr(r, of) for r in found)
