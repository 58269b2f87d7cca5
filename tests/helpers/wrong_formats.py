"""Quantisers, dequantisations and layouts that are wrong in one way each, with words that a diagnosis has to say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.formats.layout import deinterleave_weights_sm90, interleave_weights_sm90
from mxfp4ref.formats.mxfp4 import E2M1_VALUES, dequantize, pack_codes, unpack_codes
from mxfp4ref.formats.quantize import quantize
from mxfp4ref.goldens.runs import run_stage

Outputs = dict[str, Tensor]
_VALUES = torch.tensor(E2M1_VALUES, dtype=torch.float32)


def _quantized(packed: Tensor, scales: Tensor) -> Outputs:
    return {"packed": packed, "scales": scales}


def _rounded(change: Callable[[Tensor], Tensor]) -> Callable[..., Outputs]:
    """A quantiser with the right scales whose codes are `change` of |value| / scale, as indices of magnitudes."""

    def quantizer(values: Tensor, rule: str) -> Outputs:
        _, scales = quantize(values, rule=rule)
        groups = values.to(torch.float64).unflatten(-1, (-1, 32))
        finite = groups.isfinite().all(-1, keepdim=True)
        exponent = torch.where(finite, 127 - scales.to(torch.float64)[..., None], 0.0)
        scaled = torch.where(finite, groups.nan_to_num(0, 0, 0) * exponent.exp2(), 0.0)
        magnitude = change(scaled)
        codes = torch.where(finite & torch.signbit(groups), magnitude + 8, magnitude)
        return _quantized(pack_codes(codes.flatten(-2).to(torch.uint8)), scales)

    return quantizer


def _truncated(scaled: Tensor) -> Tensor:
    return (scaled.abs()[..., None] >= _VALUES[1:8].to(torch.float64)).sum(-1)


def _half_away(scaled: Tensor) -> Tensor:
    middle = (_VALUES[1:8] + _VALUES[:7]).to(torch.float64) / 2
    return (scaled.abs()[..., None] >= middle).sum(-1)


def _with_scales(change: Callable[[Tensor], Tensor]) -> Callable[..., Outputs]:
    def quantizer(values: Tensor, rule: str) -> Outputs:
        packed, scales = quantize(values, rule=rule)
        return _quantized(packed, change(scales))

    return quantizer


def _with_codes(change: Callable[[Tensor], Tensor]) -> Callable[..., Outputs]:
    def quantizer(values: Tensor, rule: str) -> Outputs:
        packed, scales = quantize(values, rule=rule)
        return _quantized(pack_codes(change(unpack_codes(packed))), scales)

    return quantizer


def _exchanged(codes: Tensor) -> Tensor:
    return codes.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def _zero_groups_of_scale_1(values: Tensor, rule: str) -> Outputs:
    packed, scales = quantize(values, rule=rule)
    zeros = ~values.unflatten(-1, (-1, 32)).any(-1)
    return _quantized(packed, scales.masked_fill(zeros, 127))


def _other_rule(values: Tensor, rule: str) -> Outputs:
    return _quantized(*quantize(values, rule="ceil" if rule == "floor" else "floor"))


QUANTIZERS: dict[str, tuple[Callable[..., Outputs], str]] = {
    "scales one too high": (
        _with_scales(lambda s: torch.where(s < 254, s + 1, s)),
        "all scales are 1 too high (2x); codes are those of the right scales",
    ),
    "nibbles": (_with_codes(_exchanged), "nibbles are exchanged: the low one is the odd index"),
    "half away": (_rounded(_half_away), "ties are rounded away from zero instead of to even"),
    "truncated": (_rounded(_truncated), "codes are truncated toward zero instead of rounded"),
    "zero groups": (_zero_groups_of_scale_1, "groups of zeros get scale byte 127 instead of 0"),
    "saturates to 4": (_with_codes(lambda c: torch.where(c & 7 == 7, c - 1, c)), "everything saturates to 4"),
    "no signs": (_with_codes(lambda c: c & 7), "signs are lost"),
    "plus zero": (_with_codes(lambda c: torch.where(c == 8, 0, c)), "zeros lose their sign"),
    "code 5 for 6": (_with_codes(lambda c: torch.where(c == 6, 5, c)), "codes are others: code 6 is 5"),
    "other rule": (_other_rule, "scales follow the rule"),
    "next group": (
        _with_scales(lambda s: s.roll(-1, -1)),
        "scales are those of other groups: group g has that",
    ),
}


def _dequantized(change: Callable[..., Tensor]) -> Callable[..., Outputs]:
    def function(packed: Tensor, scales: Tensor, convention: str, dtype: str) -> Outputs:
        return {"values": change(packed, scales, convention, getattr(torch, dtype))}

    return function


def _right(packed: Tensor, scales: Tensor, convention: str, dtype: torch.dtype) -> Tensor:
    return dequantize(packed, scales, convention=convention, dtype=dtype)


def _table(packed: Tensor, scales: Tensor, convention: str, dtype: torch.dtype) -> Tensor:
    """Code 7 is 5."""
    codes = unpack_codes(packed)
    right = _right(packed, scales, convention, dtype)
    five = _right(pack_codes(torch.where(codes & 7 == 7, codes - 5, codes)), scales, convention, dtype)
    return torch.where(codes & 7 == 7, (five.to(torch.float64) * 5).to(dtype), right)


DEQUANTIZERS: dict[str, tuple[Callable[..., Outputs], str]] = {
    "scales one too high": (
        _dequantized(lambda p, s, c, d: (_right(p, s, c, d).double() * 2).to(d)),
        "all values are 2x",
    ),
    "nibbles": (_dequantized(lambda p, s, c, d: _right(p << 4 | p >> 4, s, c, d)), "nibbles are exchanged"),
    "table": (
        _dequantized(_table),
        "code 7 is 5 instead of 6; code 15 is -5 instead of -6",
    ),
    "plus zero, and another NaN": (
        _dequantized(lambda p, s, c, d: _right(p, s, c, d) + 0.0),  # which makes bf16's NaN another one
        "-0 comes out as +0",
    ),
    "next group": (
        _dequantized(lambda p, s, c, d: _right(p, s.roll(-1, -1), c, d)),
        "scales are those of other groups: group g has that of group g +1 of its row",
    ),
    "ends": (
        _dequantized(lambda p, s, c, d: _right(p, s, "sm90" if c == "ocp" else "ocp", d)),
        "scale byte 255 gives",
    ),
}


def _moved(change: Callable[[Tensor], Tensor]) -> Callable[..., Outputs]:
    def function(**inputs: Any) -> Outputs:
        right = run_stage("layout", inputs)
        assert isinstance(right, Tensor)
        return {"after": change(right)}

    return function


LAYOUTS: dict[str, tuple[str, Callable[..., Outputs], str]] = {
    "left out": (
        "interleave_weights",
        lambda **i: {"after": i["before"]},
        "interleave_weights_sm90 is left out",
    ),
    "twice": (
        "interleave_weights",
        _moved(interleave_weights_sm90),
        "interleave_weights_sm90 is applied twice",
    ),
    "inverse": (
        "interleave_weights",
        lambda **i: {"after": deinterleave_weights_sm90(i["before"])},
        "deinterleave_weights_sm90 is applied instead of interleave_weights_sm90",
    ),
    "nibbles": ("swap_halves", _moved(lambda t: t << 4 | t >> 4), "the nibbles of every byte are exchanged"),
    "experts": ("swap_halves", _moved(lambda t: t.flip(0)), "experts are those of others"),
    "rows by 16": (
        "swap_halves",
        _moved(lambda t: t.view(2, -1, 2, 16, 16).flip(2).reshape(t.shape)),
        "neighbouring blocks of 16 are exchanged: row n is row n ^ 16",
    ),
    "columns": ("swap_halves", _moved(lambda t: t.roll(1, 2)), "column n is column n - 1, around the end"),
    "words": (
        "interleave_weights",
        _moved(lambda t: t.view(2, -1, 4).flip(2).reshape(t.shape)),
        "in reverse in each whole block of 4: column n is column n ^ 3",
    ),
    "generation": (
        "fold_scales_0_6_16",
        lambda **i: run_layout({**i, "generation": "0.6.9"}, i),
        "the order is that of the bytewise kernel",
    ),
}


def run_layout(inputs: dict[str, Any], like: dict[str, Any]) -> Outputs:
    """Another operation's bytes in the right one's shape."""
    made, right = run_stage("layout", inputs), run_stage("layout", like)
    assert isinstance(made, Tensor)
    assert isinstance(right, Tensor)
    return {"after": made.reshape(right.shape)}
