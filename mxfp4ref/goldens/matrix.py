"""Which cases catch a named defect, as `tools/tables/defect_matrix.py` has measured. Nothing here needs torch."""

from __future__ import annotations

import re
from pathlib import Path

from mxfp4ref._files import read_file
from mxfp4ref.goldens.error import GoldenError

__all__ = ["caught_in"]

_CASE = re.compile(r"\d+\. (\S+/\S+)")


def caught_in(root: Path, defect: str) -> dict[str, str] | None:
    """The cases whose output the defect changes, each with the share of its elements, "42.7 %".

    None of goldens that have no `defect_matrix.md`, as those in a wheel.

    Raises:
        GoldenError: that file is damaged.
    """
    path = root / "defect_matrix.md"
    if not path.is_file():
        return None
    found: dict[str, str] = {}
    cases: list[str] = []
    for line in read_file(path).decode("utf-8", "replace").split("\n"):
        if line.startswith("## "):
            cases = []
        elif numbered := _CASE.fullmatch(line):
            cases.append(numbered[1])
        elif cases and line.startswith(f"| {defect} |"):
            shares = [cell.strip() for cell in line.strip("|").split("|")[1:]]
            if len(shares) != len(cases):
                raise GoldenError(
                    f"{path}: expected a share of {len(cases)} cases for {defect}, got {len(shares)}"
                )
            found |= {case: share for case, share in zip(cases, shares, strict=True) if share}
    return found
