"""Wrong dequantisers and quantisers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mxfp4ref import dequantize, quantize
from mxfp4ref.formats.mxfp4 import E2M1_VALUES, decode_ue8m0, pack_codes, unpack_codes
from tests.held_out_kernels.definition import wrong


def _values(packed: Tensor, scales: Tensor, convention: str, dtype: str) -> dict[str, Tensor]:
    return {"values": dequantize(packed, scales, convention=convention, dtype=getattr(torch, dtype))}


@wrong(
    kind="dequantize",
    stage="dequantize",
    says=("nibble|order|even|odd|pair|swap", "swap|order|exchang|nibble|high|permut"),
    story="the high nibble is taken first",
)
def high_nibble_first(packed: Tensor, scales: Tensor, **how: Any) -> dict[str, Tensor]:
    return _values(packed >> 4 | packed << 4, scales, **how)


@wrong(
    kind="dequantize",
    stage="dequantize",
    says=("scale|exponent|factor|times", "2x|twice|\\b2\\b|double|one too|\\+ ?1|126"),
    story="the exponent bias is 126",
)
def scale_bias_126(packed: Tensor, scales: Tensor, **how: Any) -> dict[str, Tensor]:
    raised = torch.where(scales == 255, scales.int(), (scales.int() + 1).clamp_max(254))
    return _values(packed, raised.to(torch.uint8), **how)


@wrong(
    kind="dequantize",
    stage="dequantize",
    says=("code|\\b7\\b|\\b15\\b|table|value", "\\b5\\b|\\b6\\b"),
    story="the code table has 5 where 6 belongs",
)
def five_instead_of_six(packed: Tensor, scales: Tensor, convention: str, dtype: str) -> dict[str, Tensor]:
    right = _values(packed, scales, convention, dtype)["values"]
    table = torch.tensor(
        [5.0 if v == 6 else -5.0 if v == -6 else v for v in E2M1_VALUES], dtype=torch.float64
    )
    codes = unpack_codes(packed)
    scale = decode_ue8m0(scales, convention, torch.float64).repeat_interleave(32, -1)
    five = (table[codes.long()] * scale).to(right.dtype)
    return {"values": torch.where((codes & 7 == 7) & right.isfinite(), five, right)}


@wrong(
    kind="dequantize",
    stage="dequantize",
    says=("sign|negat|minus|-0",),
    story="the sign is lost: only three bits of a code are looked up",
)
def sign_bit_ignored(packed: Tensor, scales: Tensor, **how: Any) -> dict[str, Tensor]:
    return _values(packed & 0x77, scales, **how)


@wrong(
    kind="dequantize",
    stage="dequantize",
    says=("byte|pair|code|half|halves", "order|permut|half|split|interleav|swap|first"),
    story="the low nibbles are taken as the first half of a group and the high ones as the second",
)
def nibbles_as_halves(packed: Tensor, scales: Tensor, **how: Any) -> dict[str, Tensor]:
    values = _values(packed, scales, **how)["values"].unflatten(-1, (-1, 16, 2))
    return {"values": values.transpose(-1, -2).flatten(-3)}


@wrong(
    kind="quantize",
    stage="quantize",
    says=("round", "away|half|tie|even|up"),
    story="elements are rounded half away from zero, not to even",
)
def quantised_half_away(values: Tensor, rule: str = "floor") -> dict[str, Tensor]:
    scales = quantize(values, rule=rule)[1]
    return {"packed": _rounded_half_away(values, scales), "scales": scales}


@wrong(
    kind="quantize",
    stage="quantize",
    says=("scale|exponent", "one too|\\+ ?1|2x|twice|double|\\b2\\b|high"),
    story="the scales are one exponent too high, and the codes fit them",
)
def quantised_with_scales_one_up(values: Tensor, rule: str = "floor") -> dict[str, Tensor]:
    scales = (quantize(values, rule=rule)[1].int() + 1).clamp_max(254).to(torch.uint8)
    return {"packed": _rounded_half_away(values, scales), "scales": scales}


def _rounded_half_away(values: Tensor, scales: Tensor) -> Tensor:
    """The codes of finite values under given scales."""
    between = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)
    grouped = values.double().unflatten(-1, (-1, 32))
    quotients = grouped.abs() / decode_ue8m0(scales, "ocp", torch.float64)[..., None]
    codes = torch.bucketize(quotients.flatten(-2), between, right=True)
    return pack_codes((codes + 8 * values.signbit()).to(torch.uint8))


@wrong(
    kind="quantize",
    stage="quantize",
    says=("round|truncat|cut|toward zero|chop", "zero|truncat|cut|down|chop"),
    story="elements are cut off to the next code towards zero",
)
def quantised_toward_zero(values: Tensor, rule: str = "floor") -> dict[str, Tensor]:
    scales = quantize(values, rule=rule)[1]
    magnitudes = torch.tensor(E2M1_VALUES[1:8], dtype=torch.float64)
    quotients = (
        values.double().unflatten(-1, (-1, 32)).abs() / decode_ue8m0(scales, "ocp", torch.float64)[..., None]
    )
    codes = torch.bucketize(quotients.flatten(-2), magnitudes, right=True)
    return {"packed": pack_codes((codes + 8 * values.signbit()).to(torch.uint8)), "scales": scales}


@wrong(
    kind="dequantize",
    stage="dequantize",
    says=("scale", "group|next|shift|neighbou?r|another|other|previous|before"),
    story="each group takes the scale of the group after",
)
def scales_of_the_next_group(packed: Tensor, scales: Tensor, **how: Any) -> dict[str, Tensor]:
    return _values(packed, scales.roll(-1, -1), **how)
