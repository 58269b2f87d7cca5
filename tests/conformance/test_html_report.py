"""The HTML report: one file, whole without scripts, for light and dark and for readers who see no hues."""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
import struct
import zlib
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from mxfp4ref._files import printable
from mxfp4ref.conformance import CaseResult, Options, Report, run
from mxfp4ref.conformance.comparison import Difference
from mxfp4ref.conformance.diagnosis import ULP_BINS, Diagnosis, Finding
from mxfp4ref.conformance.findings.attribution import Attribution
from mxfp4ref.conformance.goldens_used import GoldensUsed
from mxfp4ref.conformance.reports import pictures
from mxfp4ref.conformance.reports.html_report import thread_url, to_html
from mxfp4ref.conformance.reports.report import to_json, to_junit
from mxfp4ref.conformance.reports.report_text import to_text
from mxfp4ref.goldens import open_goldens
from tests.helpers.kernels_under_test import good
from tests.helpers.patience import be_patient

CASES = ("parallel/sentinels_on_rank_3_of_4", "finalize/slot_order", "layout/swap_halves")


class Page(HTMLParser):
    """A page's elements with their attributes, and its text outside of styles and scripts."""

    VOID = ("meta", "input", "br", "img")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def named() -> Report:
    cases = [open_goldens().load(name) for name in CASES]
    with pytest.MonkeyPatch.context() as patch:
        be_patient(patch)
        return run("defect:ep_sentinel_aliases", cases, Options(repeat=False, diagnosis="quick"))


@pytest.fixture(scope="module")
def html(named: Report) -> str:
    return to_html(named)


def test_numbers_of_one_run_and_output_are_said_to_be_of_these() -> None:
    goldens = open_goldens()
    cases = [goldens.load("gemm/mirrored_hidden_1536")]
    tiles = run("defect:gate_up_swapped", cases, Options(repeat=False, diagnosis="quick"))
    (result,) = tiles.results
    found = result.diagnosis
    assert found is not None
    assert (result.runs, result.diagnosed_run) == (3, "128x128")
    elements = found.bins.numel()
    assert result.elements == 3 * elements
    part = "output, tiles 128x128, one of 3 runs"
    assert f"what follows is of {part}" in to_text(tiles)
    html = to_html(tiles)
    page = Page(html)
    assert f"Elements of {part} by their distance" in page.text
    count = int(found.mask.sum())
    labels = [a["aria-label"] for _, a in page.elements if a.get("aria-label", "").startswith("Map of")]
    assert labels
    assert all(f": {count:,} of {elements:,} elements differ" in label for label in labels)
    assert "1 of 1 cases ran" in page.text
    assert '<td class="length"></td>' not in html  # distances that no element has take no room


def test_the_verdict_comes_first_with_the_thread_and_the_command(html: str, named: Report) -> None:
    page = Page(html)
    head = page.text[: page.text.index("Cases that fail")]
    assert all(sentence in head for sentence in named.sentences)
    assert "mxfp4ref conform defect:ep_sentinel_aliases" in head
    assert {"href": "https://github.com/vllm-project/vllm/issues/42034", "rel": "noreferrer"} in page.all("a")
    assert (
        "conform defect:ep_sentinel_aliases --no-repeat --case parallel/sentinels_on_rank_3_of_4" in page.text
    )
    assert page.text.index("tokens without an expert") < page.text.index("output at [1, 0]")


def test_nothing_is_loaded_and_only_the_own_script_runs(html: str) -> None:
    page = Page(html)
    sources = [a[n] for _, a in page.elements for n in ("src", "href", "data", "action") if n in a]
    assert all(s.startswith(("#", "data:image/png;base64,", "https://github.com/")) for s in sources)
    assert not re.search(r"url\((?!#)|@import", html)
    assert not [n for _, a in page.elements for n in a if n.startswith("on")]
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    (policy,) = (a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert "default-src 'none'" in policy
    assert len(html) < 40_000


def test_the_content_needs_no_script_and_no_eyes(html: str) -> None:
    page = Page(html)
    hidden = [tag for tag, a in page.elements if "hidden" in a]
    assert hidden == ["form"]  # the filter, which the script shows
    headings = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(headings))
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in page.all("a") if a["href"][0] == "#"} <= set(ids)
    assert {a["aria-labelledby"] for a in page.all("section")} <= set(ids)
    assert all("(9 in all) of 16 differ" in a["aria-label"] for a in page.all("svg") if a["role"] == "img")
    (command,) = re.findall(r"^\.command \{(.*)\}$", html, re.MULTILINE)
    assert "white-space: pre-wrap; overflow-wrap: anywhere" in command  # nothing scrolls, nothing is added
    assert all("tabindex" in a and "aria-label" in a for a in page.all("div") if a.get("class") == "scroll")


def test_each_scheme_has_every_colour(html: str) -> None:
    light, dark = re.findall(r":root \{(.*?)\}", html, re.DOTALL)
    names = set(re.findall(r"var\((--\w+)\)", html))
    for scheme in (light, dark):
        assert names <= set(re.findall(r"(--\w+): #", scheme))
    assert html.index("@media screen and (prefers-color-scheme: dark)") < html.index(dark)  # paper is light


def test_a_kernel_that_conforms(named: Report) -> None:
    page = Page(to_html(run(good, [open_goldens().load("finalize/slot_order")], Options(repeat=False))))
    assert "✓ conforms" in page.text
    assert "Cases that fail" not in page.text
    assert not page.all("svg")


@pytest.mark.parametrize(
    ("seen_in", "url"),
    [
        ("flashinfer#5438", "https://github.com/flashinfer-ai/flashinfer/issues/5438"),
        ("sglang#24492 (discussion)", "https://github.com/sgl-project/sglang/issues/24492"),
        ("torchao#2939", "https://github.com/pytorch/ao/issues/2939"),
        ("somebody#5", ""),
        ("gpt-oss ports", ""),
    ],
)
def test_threads(seen_in: str, url: str) -> None:
    assert thread_url(seen_in) == url


# Maps.


def cells(png: str) -> np.ndarray:
    """The indices of a PNG of one byte a cell."""
    data = base64.b64decode(png)
    width, height = struct.unpack(">II", data[16:24])
    at = data.index(b"IDAT")
    length = struct.unpack(">I", data[at - 4 : at])[0]
    raw = zlib.decompress(data[at + 4 : at + 4 + length])
    return np.frombuffer(raw, np.uint8).reshape(height, width + 1)[:, 1:]


def test_a_map_shows_each_element_and_once_more_by_expert() -> None:
    bins = torch.zeros(3, 256, dtype=torch.uint8)
    bins[0, 130], bins[2, 5] = 7, 2
    experts = torch.tensor([[9, 4], [4, -1], [-1, 9]])
    by_token, by_expert = pictures.mismatch_maps(bins, experts)
    assert np.array_equal(cells(by_token.cells), bins.numpy())
    assert np.array_equal(cells(by_expert.cells), bins[[0, 1, 0, 2]].numpy())
    assert [band.label for band in by_expert.rows] == ["4", "9"]
    assert [band.label for band in by_token.tiles] == ["0", "1"]
    assert by_token.tiles[1].begin == by_token.left + by_token.width / 2
    assert by_token.pooled == ""


def test_dark_paper_gives_each_class_its_own_colour(html: str) -> None:
    """By a filter: a second image of each map took a fifth of the page."""
    tables = [
        [round(255 * float(value)) for value in found.split()]
        for found in re.findall(r'<feFunc[RGB] type="discrete" tableValues="(.*?)"', html)
    ]
    assert [len(table) for table in tables] == [256] * 3
    for one in pictures.LEGEND:
        light, dark = (bytes.fromhex(colour[1:]) for colour in (one.light, one.dark))
        assert bytes(table[shade] for table, shade in zip(tables, light, strict=True)) == dark
    assert html.count("filter: url(#dark-cells)") == html.count('<filter id="dark-cells"') == 1
    assert html.count("data:image/png") == html.count('<svg class="map"')


def test_a_large_map_loses_no_element() -> None:
    bins = torch.zeros(1000, 3000, dtype=torch.uint8)
    bins[777, 2999] = 3
    (large,) = pictures.mismatch_maps(bins)
    shown = cells(large.cells)
    assert shown.shape == (64, 256)
    assert set(shown[shown > 0]) == {3}
    assert shown[:, -1].any()
    assert large.pooled == "A cell shows the largest distance of some 15.6 × 11.7 elements."


# Machado, Oliveira, Fernandes: A Physiologically-based Model for Simulation of Color Vision Deficiency, 2009.
SIGHTS = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}


def cie_lab(colour: str, sight: np.ndarray) -> np.ndarray:
    """L*, a*, b* of an sRGB colour as somebody sees it."""
    srgb = np.array(list(bytes.fromhex(colour[1:]))) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ (sight @ linear).clip(1e-3, 1) / to_xyz.sum(1))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_are_told_apart_by_everybody(scheme: str, sight: str) -> None:
    """By ten just noticeable differences, and the numbers' by lightness alone, in their order."""
    seen = [cie_lab(getattr(one, scheme), SIGHTS[sight]) for one in (pictures.PAPER, *pictures.LEGEND)]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 10
    steps = np.diff([one[0] for one in seen[:-1]]) * (-1 if scheme == "light" else 1)
    assert steps.min() > 6


INJECTIONS = (
    "<script>alert(1)</script>",
    "</title></style></script><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)" x=\'',
    "' onfocus='alert(1)' autofocus='",
    "javascript:alert(1)#1",
    "]]></failure></testcase><!-- --!><?xml ?>&amp;&#0;&lt;",
    "{{ 7 * 7 }}{% raw %}{# #}",
    "\ud800 \x00 \x1b[2J \u202e \ufffe \x85 \u2028",
)


def _full_of(text: str) -> Report:
    """A report in which whatever may come from a file, a kernel or a machine is this text."""
    finding = Finding((text,), text, False, None, text)
    ulps = tuple((top, 1) for top in ULP_BINS)
    found = Diagnosis(
        *(text, Difference((0, 0), text, text, text, text, 1), (text, text), (text, text), text, ()),
        *(ulps, torch.ones(2, 2, dtype=torch.uint8), finding, (Attribution(text, text, 1, 2),)),
    )
    result = CaseResult(f"{text}/{text}", text, text, "differs", (text,), 4, 4, 1, text, found)
    crashed = CaseResult(text, text, text, "crashed", message=text)
    skipped = CaseResult(text, text, text, "skipped", message=text)
    more = {
        "environment": {text: text, "gpu": text, "torch": text},
        "finding": finding,
        "left": 1,
        "date": text,
    }
    used = GoldensUsed(text, text, text, 3)
    return Report(
        *(text, text, (result, result, crashed, skipped), ()),
        **more,
        **{"goldens": used, "arguments": (text, text), "selection": (text, text)},
    )


def _shape_of_html(html: str) -> list[tuple[str, list[str]]]:
    return [(tag, sorted(attributes)) for tag, attributes in Page(html).elements]


def _shape_of_xml(xml: str) -> list[tuple[str, list[str]]]:
    return [(one.tag, sorted(one.attrib)) for one in ElementTree.fromstring(xml.encode()).iter()]


@pytest.mark.parametrize("text", INJECTIONS)
def test_no_text_becomes_an_element_or_an_attribute(text: str) -> None:
    """Reports have the elements and attributes that harmless words make, and say what was injected."""
    hostile, harmless = _full_of(text), _full_of(re.sub("[^/]", "x", text))
    html = to_html(hostile)
    assert html.encode()
    assert _shape_of_html(html) == _shape_of_html(to_html(harmless))
    page = Page(html)
    assert printable(text, lines=False) in page.text
    links = [attributes["href"] for attributes in page.all("a")]
    assert [link for link in links if not link.startswith(("#case-", "https://github.com/"))] == []
    xml = to_junit(hostile)
    assert _shape_of_xml(xml) == _shape_of_xml(to_junit(harmless))
    root = ElementTree.fromstring(xml.encode())
    assert all(printable(text, lines=False) in one.attrib["message"] for one in root.iter("error"))
    for words in (html, xml, to_text(hostile, verbose=True), to_json(hostile)):
        assert [c for c in words if not c.isprintable() and c not in "\n\t"] == []
