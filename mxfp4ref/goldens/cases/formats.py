"""Suite `formats`: what the weight and scale bytes mean."""

from __future__ import annotations

from dataclasses import replace

import torch

from mxfp4ref._choices import CONVENTIONS, Convention, ScaleRule
from mxfp4ref.formats.mxfp4 import dequantize, pack_codes
from mxfp4ref.formats.quantize import SCALE_RULES, quantize
from mxfp4ref.goldens.cases.definition import Content, define
from mxfp4ref.goldens.cases.source import Source
from mxfp4ref.model.call import MoeCall

_ALL_CODES = torch.arange(16, dtype=torch.uint8)


def _dequantized(
    packed: torch.Tensor, scales: torch.Tensor, convention: Convention, dtype: torch.dtype
) -> Content:
    values = dequantize(packed, scales, convention=convention, dtype=dtype)
    return Content(
        {"packed": packed, "scales": scales, "values": values},
        {"convention": convention, "dtype": str(dtype).removeprefix("torch.")},
    )


_MIDPOINTS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])  # between neighbouring E2M1 magnitudes


def _to_be_quantized(source: Source) -> torch.Tensor:
    """`[48, 64] float32`, two groups a row, no two groups alike: all that a quantiser has to decide."""
    values = source.normal("values", 48, 64).to(torch.float32)
    values += source.uniform("values.fraction", 48, 64) * 2.0**-8
    values *= torch.exp2(source.range("exponent", 0, 40, 48, 64).to(torch.float32) / 8 - 2.5)
    near = torch.cat((_MIDPOINTS, _MIDPOINTS * (1 - 2.0**-23), _MIDPOINTS * (1 + 2.0**-22)))
    for row, largest in enumerate((4.0, 4.5, 5.0, 6.0, 6.5, 7.0, 7.5)):  # ties, with every rule's scale
        ties = torch.cat((near, near.flip(0), near[:21] / 2))
        values[row, :63] = ties[:63] * (1 - 2 * (torch.arange(63) % 2))
        values[row, 30], values[row, 63] = largest, -largest
    borders = torch.tensor([4.0, 6.0, 7.0]).repeat_interleave(3)  # of the rules, and beside them
    borders *= 1 + 2.0**-22 * torch.arange(-1, 2).repeat(3)
    by_group = values.view(-1, 32)
    by_group[16:25] = by_group[16:25].clamp(-3.5, 3.5)
    by_group[16:25, 5] = borders
    powers = torch.exp2(torch.tensor([-149.0, -140, -133, -128, -127, -126, -125, -124, 60, 119, 120, 121]))
    by_group[25:37] = (by_group[25:37] / by_group[25:37].abs().amax(1, keepdim=True)) * 7 * powers[:, None]
    by_group[37], by_group[38, ::2], by_group[38, 1::2] = 0.0, 0.0, -0.0
    by_group[39, 3], by_group[40, 31], by_group[41, 0] = torch.nan, torch.inf, -torch.inf
    by_group[42, ::2] = 0.0
    by_group[43], by_group[43, 7] = 2.0**-127, 6 * 2.0**-127 + 2.0**-148  # where "rceil" is not "ceil"
    by_group[44:] *= torch.exp2(torch.arange(52) * 5 % 17 - 8.0)[:, None]
    return values


def _quantized(values: torch.Tensor, rule: ScaleRule) -> Content:
    packed, scales = quantize(values, rule=rule)
    return Content({"values": values, "packed": packed, "scales": scales}, {"rule": rule})


for _rule in SCALE_RULES:

    @define(
        "quantize",
        why=f"Quantising by the rule {_rule!r}: ties between all codes and their neighbours on both sides, largest "
        "magnitudes on the borders of the scales, what saturates, zeros of both signs, subnormals, NaN and Inf.",
        name=f"quantize_{_rule}",
        unique_for="every decision of a quantiser",
    )
    def _(source: Source, rule: ScaleRule = _rule) -> Content:
        return _quantized(_to_be_quantized(Source("formats/quantize")), rule)


@define("quantize", unique_for="bf16 values")
def quantize_bf16(source: Source) -> Content:
    """Quantising bf16 values, as activations and most checkpoints have, by the rule 'ceil', which is
    DeepSeek-V4's: ordinary numbers over 12 binades.
    """
    return _quantized(source.spread("values", -6, 6, 32, 64), "ceil")


def _every_code_and_scale(convention: Convention, dtype: torch.dtype) -> Content:
    codes = torch.cat((_ALL_CODES, _ALL_CODES.flip(0)))
    scales = torch.arange(256, dtype=torch.uint8).unsqueeze(1)
    return _dequantized(pack_codes(codes.expand(256, 32)), scales, convention, dtype)


_ENDS = {"ocp": "2^-127 and NaN", "sm90": "0 and Inf"}  # scale bytes 0 and 255
for _convention in CONVENTIONS:
    for _dtype in (torch.bfloat16, torch.float32):
        _result = str(_dtype).removeprefix("torch.")

        @define(
            "dequantize",
            why=f"Every code under every scale byte, twice: the whole domain of dequantisation to {_result} by the "
            f"{_convention} convention, in which scale bytes 0 and 255 are {_ENDS[_convention]}.",
            name=f"every_code_every_scale_{_convention}_{_result}",
            unique_for="exhaustive over the format",
        )
        def _(source: Source, convention: Convention = _convention, dtype: torch.dtype = _dtype) -> Content:
            return _every_code_and_scale(convention, dtype)


@define("dequantize", unique_for="exhaustive over packed bytes")
def every_packed_byte(source: Source) -> Content:
    """Every packed byte once, in ascending order, under changing scales: both nibbles of each, and the border
    between two groups.
    """
    packed = torch.arange(256, dtype=torch.uint8).reshape(4, 64)
    return _dequantized(packed, source.range("scales", 120, 130, 4, 4), "ocp", torch.bfloat16)


@define(catches="nibble_order nibble_split half_code_flushed", unique_for="codes told apart by column")
def every_code_by_row(source: Source) -> MoeCall:
    """Each weight row holds one code only, low nibbles before high ones, so that a code that is decoded
    wrongly, or a nibble taken for its neighbour, changes whole columns.
    """
    experts = source.experts(2, 256, 128)
    row = torch.arange(256, dtype=torch.uint8)
    # Low and high nibble of row r are codes r % 16 and r / 16: every pair of codes is a row.
    fc1 = (row % 16 | row // 16 << 4)[None, :, None].expand_as(experts.fc1_weights).clone()
    experts = replace(experts, fc1_weights=fc1)
    return MoeCall(
        source.normal("input", 8, 256), source.distinct("ids", 8, 1, 2), source.weights(8, 1), experts
    )


@define(catches="scale_ocp_ends", unique_for="scale bytes 0 and 255 in fc2")
def scale_bytes_0_and_255(source: Source) -> MoeCall:
    """Scale bytes 0 and 255 in fc2: the kernel puts the byte into the exponent field, so that they are 0 and
    Inf and not 2^-127 and NaN. Rows all of byte 0 must give zeros, a single 255 Inf or NaN by its products.
    """
    experts = source.experts(2, 256, 128, fc1_scales=(127, 131))
    scales = experts.fc2_scales
    assert scales is not None
    scales = scales.clone()
    scales[:, 0::4] = 0
    scales[:, 1::4, 2] = 255
    # A group of zero codes under scale 255: 0 * Inf.
    weights = experts.fc2_weights.clone()
    weights[:, 1::8, 32:48] = 0
    return MoeCall(
        source.normal("input", 8, 256),
        source.distinct("ids", 8, 1, 2),
        source.weights(8, 1),
        replace(experts, fc2_weights=weights, fc2_scales=scales),
    )


@define(catches="scale_ocp_ends", unique_for="scale bytes 0 and 255 in fc1")
def scale_bytes_0_and_255_before_activation(source: Source) -> MoeCall:
    """Scale bytes 0 and 255 in fc1, which are 0 and Inf and not 2^-127 and NaN: an up of -Inf is clamped to
    minus the limit and NaN to the limit; rows all of byte 0 give an up of 0 and not of 2^-127 times
    something.
    """
    experts = source.experts(2, 256, 128, fc2_scales=(220, 235), limit=7.0)
    scales = experts.fc1_scales
    assert scales is not None
    scales = scales.clone()
    scales[:, 0:128:3] = 0  # rows of up
    scales[:, 1:128:7, 3] = 255
    weights = experts.fc1_weights.clone()
    weights[:, 1:128:14, 48:64] = 0  # 0 * Inf is NaN
    return MoeCall(
        (source.normal("input", 8, 256).to(torch.float32) * 2.0**10).to(torch.bfloat16),
        source.distinct("ids", 8, 1, 2),
        source.weights(8, 1),
        replace(experts, fc1_weights=weights, fc1_scales=scales),
    )


@define(
    catches="scale_off_by_one_group scale_bias_125 scale_as_integer scale_truncated scales_not_folded "
    "scales_not_swapped",
    unique_for="scales told apart by group",
)
def scales_far_apart(source: Source) -> MoeCall:
    """Neighbouring groups have scales far apart, so that a group scaled with another's byte, or a wrong
    exponent bias, shows in every output.
    """
    experts = source.experts(2, 256, 128, fc1_scales=(114, 124), fc2_scales=(114, 124))
    return MoeCall(
        source.normal("input", 8, 256), source.distinct("ids", 8, 2, 2), source.weights(8, 2), experts
    )
