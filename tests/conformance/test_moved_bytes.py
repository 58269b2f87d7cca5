"""Layouts and quantisers whose bytes or codes stand at other places by no known rule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mxfp4ref import quantize
from mxfp4ref.conformance.values.format_words import format_finding
from mxfp4ref.formats.mxfp4 import pack_codes, unpack_codes
from mxfp4ref.goldens import open_goldens
from mxfp4ref.goldens.runs import runs
from tests.held_out_kernels.calls import quantised_values

(ONE,) = runs(open_goldens().load("layout/interleave_weights"))
AFTER = ONE.expected["after"]


def exchanged_in_odd_rows(t: Tensor) -> Tensor:
    return torch.where((torch.arange(t.shape[1]) % 2 == 1)[None, :, None], t >> 4 | t << 4, t)


def exchanged_in_the_first_expert(t: Tensor) -> Tensor:
    return torch.cat((t[:1].view(-1, 2, 32).flip(1).view(t[:1].shape), t[1:]))


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("others: 32 is 63, 33 to 63 are 32 to 62", lambda t: t[:, [*range(32), 63, *range(32, 63)]]),
        ("the nibbles of every byte are exchanged in some places: in every 2nd row", exchanged_in_odd_rows),
        ("in chunks of 32: 0 to 31 are those from 32 on", exchanged_in_the_first_expert),
    ],
)  # fmt: skip
def test_layouts(words: str, change: Callable[[Tensor], Tensor]) -> None:
    finding = format_finding("layout", ONE.inputs, {"after": change(AFTER).contiguous()}, ONE.expected)
    assert finding.exact
    assert words in finding.sentence


def test_codes_of_a_group_in_another_order() -> None:
    values = quantised_values("weights")
    right = dict(zip(("packed", "scales"), quantize(values), strict=True))
    codes = unpack_codes(right["packed"]).view(-1, 32).roll(8, 1).view(values.shape)
    finding = format_finding(
        "quantize", {"values": values, "rule": "floor"}, {**right, "packed": pack_codes(codes)}, right
    )
    assert finding.exact
    assert (
        "codes are right but in another order, with a period of 32: code n is code n - 8" in finding.sentence
    )
