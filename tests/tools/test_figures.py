"""The documentation's figures as they are stored: whole in both schemes."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
FIGURES = [*(ROOT / "docs" / "figures").glob("*.svg"), ROOT / "goldens" / "defect_matrix.svg"]


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.stem)
def test_every_colour_has_another_one_on_dark_pages(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    ElementTree.fromstring(text)
    start = text.index("@media")
    rules, drawn = text[start : text.index("</style>", start)], text[text.index("</style>", start) :]
    assert "prefers-color-scheme: dark" in rules
    colours = re.findall(r"""style="[^"]*?((?:fill|stroke): #\w+)""", drawn)
    colours += [f'[fill="{colour}"' for colour in re.findall(r'fill="(#\w+)"', drawn)]
    colours += re.findall(r"var\((--\w+)\)", drawn)
    assert colours
    assert set(colours) <= set(re.findall(r"\w+: #\w+|\[fill=\"#\w+\"|--\w+", rules))
