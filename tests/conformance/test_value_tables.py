"""Dequantisations that are wrong by scale byte, code, size or place, told as ranges."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mxfp4ref import dequantize
from mxfp4ref.conformance.findings.finding import Finding
from mxfp4ref.conformance.values.format_words import format_finding
from mxfp4ref.formats.mxfp4 import E2M1_VALUES, pack_codes
from tests.helpers.usual import first

SCALES = torch.arange(256, dtype=torch.uint8).view(64, 4)[
    torch.randperm(64, generator=torch.Generator().manual_seed(2))
]
CODES = (torch.arange(64 * 128) * 7 + torch.arange(64 * 128) // 32).view(64, 128).to(torch.uint8) % 16
CODE = torch.tensor(E2M1_VALUES, dtype=torch.float64)[CODES.long()]
POWER = (SCALES.double() - 127).repeat_interleave(32, 1)
FP8 = SCALES.view(torch.float8_e4m3fn).double()
ELEMENT = torch.arange(128).expand(64, -1) % 32
MIDDLE = (ELEMENT >= 12) & (ELEMENT < 20)


def found(values: Callable[[Tensor], Tensor]) -> Finding:
    """Of values `[64, 128]` made of the right ones."""
    inputs = {"packed": pack_codes(CODES), "scales": SCALES, "convention": "ocp", "dtype": "bfloat16"}
    right = dequantize(inputs["packed"], SCALES, convention="ocp", dtype=torch.bfloat16)  # type: ignore[arg-type]
    return format_finding(
        "dequantize", inputs, {"values": values(right).to(torch.bfloat16)}, {"values": right}
    )


@pytest.mark.parametrize(
    ("words", "values"),
    first(2, [
        ("the scale byte is taken as signed (int8)", lambda _: CODE * (POWER - 256 * (POWER > 0)).exp2()),
        ("code times scale is formed in fp16", lambda _: CODE.half() * POWER.exp2().half()),
        ("the scale is converted to fp16", lambda _: CODE * POWER.exp2().half().double()),
        ("code times scale is rounded to FP8 (e5m2)", lambda _: (CODE * POWER.exp2()).float().to(torch.float8_e5m2)),
        ("read as float8_e4m3fn", lambda _: CODE * FP8.repeat_interleave(32, 1)),
        ("scale bytes 0 to 66 (2^-127 to 2^-61): 0", lambda r: torch.where(POWER < -60, 0 * r, r)),
        ("magnitudes from 2^100 on: NaN", lambda r: torch.where(r.abs() >= 2.0**100, torch.nan, r)),
        ("magnitudes from 98304 on: +-65536", lambda r: r.clamp(-65504, 65504)),
        ("with codes of +-6 scale bytes 168 to 252 (2^41 to 2^125): 0",
         lambda r: torch.where((CODE.abs() == 6) & (POWER > 40) & (POWER < 126), 0 * r, r)),
        ("element 1 of each two: the other sign", lambda r: torch.where(ELEMENT % 2 == 1, -r, r)),
        ("in elements 12 to 19 of 32 of each group", lambda r: torch.where(MIDDLE & r.isfinite(), 0 * r, r)),
    ]),
)  # fmt: skip
def test_tables(words: str, values: Callable[[Tensor], Tensor]) -> None:
    finding = found(values)
    assert finding.exact
    assert words in finding.sentence


def test_a_part_in_which_a_table_holds() -> None:
    """Its ranges do not say what comes at their ends, so that it is no prediction of every bit."""
    finding = found(lambda r: torch.where(ELEMENT >= 16, (CODE.half() * POWER.exp2().half()).bfloat16(), r))
    assert "in elements 16 to 31 of 32 of each group with every code scale bytes 0 to 102" in finding.sentence
    assert not finding.exact


@pytest.mark.slow
def test_values_that_nothing_orders() -> None:
    some = torch.rand(64, 128, generator=torch.Generator().manual_seed(1)) < 0.05
    finding = found(lambda r: torch.where(some & (r.abs() < 2.0**120), 0 * r.abs(), r))
    assert "which neither scale byte nor code, size or place decides" in finding.sentence
    assert not finding.exact
    assert found(lambda r: torch.where(some, r * 1.5, r)).sentence == ""
