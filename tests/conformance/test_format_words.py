"""Wrong quantisers, dequantisations and layouts in words; noise gets none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.values.format_words import format_finding
from mxfp4ref.goldens import Case, open_goldens
from mxfp4ref.goldens.runs import runs
from tests.helpers.usual import first
from tests.helpers.wrong_formats import DEQUANTIZERS, LAYOUTS, QUANTIZERS

GOLDENS = open_goldens()
CASES = {name: GOLDENS.load(name) for name in GOLDENS.names() if name.split("/")[0] in ("formats", "layout")}


def sentence(case: Case, function: Callable[..., dict[str, Tensor]]) -> str | None:
    """None where the case does not show it."""
    (one,) = runs(case)
    outputs = function(**one.inputs)
    if not any(bool(differing(outputs[name], want).any()) for name, want in one.expected.items()):
        return None
    finding = format_finding(case.kind, one.inputs, outputs, one.expected)
    assert finding.stages == (case.kind,)
    assert finding.exact == bool(finding.sentence)
    return finding.sentence


def shown(kind: str, function: Callable[..., dict[str, Tensor]]) -> list[str]:
    found = (sentence(case, function) for case in CASES.values() if case.kind == kind)
    return [words for words in found if words is not None]


@pytest.mark.parametrize("name", first(3, QUANTIZERS))
def test_quantisers(name: str) -> None:
    function, words = QUANTIZERS[name]
    found = shown("quantize", function)
    assert len(found) >= 2
    assert [one for one in found if words not in one] == []


@pytest.mark.parametrize("name", first(1, DEQUANTIZERS))
def test_dequantisation(name: str) -> None:
    function, words = DEQUANTIZERS[name]
    found = shown("dequantize", function)
    assert found
    assert [one for one in found if words not in one] == []


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str) -> None:
    case, function, words = LAYOUTS[name]
    assert words in (sentence(CASES[f"layout/{case}"], function) or "")


@pytest.mark.parametrize("name", first(1, [name for name, case in CASES.items() if case.kind != "moe"]))
def test_noise_is_not_named(name: str) -> None:
    """Bits that have changed here and there have no explanation, and a sentence about them would mislead."""
    generator = torch.Generator().manual_seed(0)

    def noisy(**inputs: Any) -> dict[str, Tensor]:
        (one,) = runs(CASES[name])
        made = {}
        for key, tensor in one.expected.items():
            raw = tensor.clone().view(torch.uint8).flatten()
            hit = torch.rand(len(raw), generator=generator) < 0.1
            made[key] = (raw ^ (hit * 16).to(torch.uint8)).view(tensor.dtype).view(tensor.shape)
        return made

    assert sentence(CASES[name], noisy) == ""
