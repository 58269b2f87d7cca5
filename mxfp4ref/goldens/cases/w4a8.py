"""Suite `w4a8`: the kernel with FP8 activations, whole and stage by stage."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.formats import humming
from mxfp4ref.formats.experts import Experts
from mxfp4ref.formats.humming_experts import HummingExperts
from mxfp4ref.goldens.cases.definition import Content, define
from mxfp4ref.goldens.cases.source import Source
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward
from mxfp4ref.model.humming import inputs_of
from mxfp4ref.sm90 import fp8
from mxfp4ref.sm90.row_quantize import quantize_rows

_H, _I, _STEPS = 256, 128, 256


def _call(
    source: Source, experts: Experts, x: Tensor | None = None, top_k: int = 2, **options: Any
) -> Content:
    x = source.normal("input", 16, experts.hidden_size) if x is None else x
    call = MoeCall(
        x,
        source.distinct("ids", len(x), top_k, experts.num_experts * options.get("ep_size", 1)),
        source.weights(len(x), top_k),
        experts if isinstance(experts, HummingExperts) else HummingExperts.prepare(experts),
        **options,
    )
    return Content({**inputs_of(call), "output": forward(call)}, options)


@define(
    "w4a8",
    catches="fp8_residual_ignored fp8_residual_uncompensated fp8_offsets_one_group_later",
    unique_for="the baseline of W4A8",
)
def ordinary(source: Source) -> Content:
    """An ordinary W4A8 call: scales within the range of 12 that a prepared expert keeps, lower in GEMM2, so
    that no weight is rounded. Residuals or offsets that are left out, or of another group, show.
    """
    return _call(source, source.experts(3, _H, _I, fc2_scales=(114, 119)))


@define("w4a8", unique_for="weights that the preparation rounded")
def raised_scales(source: Source) -> Content:
    """A W4A8 call with scales over a range of 20: the preparation raises the lowest to the highest less 11
    and rounds their codes.
    """
    return _call(source, source.experts(2, _H, _I, fc1_scales=(104, 123), fc2_scales=(104, 123)))


@define("w4a8", unique_for="every option at once")
def every_option(source: Source) -> Content:
    """A W4A8 call with biases, alpha, beta and limit by expert, on the second of two expert-parallel ranks."""
    parameters = {"alpha": [1.702, 1.1], "beta": [1.0, 0.25], "limit": [2.0, 3.5]}
    experts = source.experts(2, _H, _I, biases=True, **parameters)  # type: ignore[arg-type]
    return _call(source, experts, top_k=3, ep_size=2, ep_rank=1)


@define(
    "w4a8",
    catches="fp8_scale_of_all_rows fp8_quotient_exact fp8_factor_exact",
    unique_for="finite numbers too large for a reciprocal",
)
def rows_of_any_size(source: Source) -> Content:
    """A W4A8 call with rows of sizes 2^-20 to 2^20, each quantised with its own factor; one factor for all
    loses most of them. The last is so large that the reciprocal of its maximum is subnormal, which is to
    say zero: the kernel makes it NaN.
    """
    power = torch.exp2(source.range("power", 0, 40, 16, 1).to(torch.float32) - 20)
    power[15] = 2.0**125
    return _call(
        source, source.experts(2, _H, _I), (source.normal("input", 16, _H) * power).to(torch.bfloat16)
    )


@define("w4a8", unique_for="NaN, Inf and zero rows")
def special_rows(source: Source) -> Content:
    """A W4A8 call with a NaN or an Inf in some rows, which makes its row NaN and no other; a row of zeros,
    one of subnormals and one of the largest numbers.
    """
    x = source.normal("input", 16, _H)
    x[0, 7], x[1, 9], x[2, 11] = torch.nan, torch.inf, -torch.inf
    x[3], x[4], x[5] = 0.0, 1e-40, 3.3e38
    x[6] *= 2.0**-130
    return _call(source, source.experts(2, _H, _I), x)


def _mirrored(experts: Experts) -> Experts:
    """The second half of GEMM1's K has the weights of the first."""
    half_weights, half_scales = experts.fc1_weights.shape[2] // 2, experts.hidden_size // 64
    assert experts.fc1_scales is not None
    return replace(
        experts,
        fc1_weights=experts.fc1_weights[:, :, :half_weights].repeat(1, 1, 2),
        fc1_scales=experts.fc1_scales[:, :, :half_scales].repeat(1, 1, 2),
    )


@define(
    "w4a8",
    catches="fp8_accumulator_exact fp8_accumulator_float32 fp8_accumulator_promoted fp8_k_descending",
    unique_for="truncations of W4A8's GEMM1, which cancelling leaves",
)
def cancelling_gemm1(source: Source) -> Content:
    """A W4A8 call where the second half of GEMM1's K takes back the first: its output is what the FP8 tensor
    core truncated. Wider sums, or another order, show.
    """
    experts = _mirrored(source.experts(2, 512, _I, fc1_scales=(118, 129)))
    half = source.spread("input", -12, 1, 16, 256)
    return _call(source, experts, torch.cat((half, -half), 1))


@define(
    "w4a8", catches="fp8_accumulator_promoted fp8_activation_bf16", unique_for="long sums that do not cancel"
)
def long_rows(source: Source) -> Content:
    """A W4A8 call with K of 512 and 256: sums of many steps, each truncated; FP8 GEMMs that add up in float32
    now and then give others.
    """
    return _call(source, source.experts(1, 512, 256), source.spread("input", -4, 2, 16, 512), top_k=1)


@define("fp8_rows", unique_for="the rounding of a row alone")
def rows_of_every_fraction(source: Source) -> Content:
    """Quantising rows to FP8 whose maxima have all 128 bf16 fractions: the reciprocal is approximate, and 448
    over the maximum is not exact.
    """
    x = source.spread("x", -9, -1, 128, 64)
    x[:, 5] = (1 + torch.arange(128) / 128).to(torch.bfloat16)
    return _rows(x, source.uniform("residual", 128))


@define("fp8_rows", unique_for="special values of a row alone")
def rows_of_special_values(source: Source) -> Content:
    """Quantising rows to FP8 with zeros, subnormals, NaN and Inf, and with maxima too small for 448 to be
    divided by them.
    """
    x = source.spread("x", -120, 120, 64, 32)
    x[:32] *= 2.0**-14
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, -1e-40, 3.3e38])
    chosen = special[(source.bytes("special", 64, 32) & 7).long()].to(torch.bfloat16)
    x = torch.where(source.bytes("where", 64, 32) < 4, chosen, x)
    x[60:] = (source.spread("tiny", -126, -117, 4, 32).float() * 2.0**-3).to(torch.bfloat16)
    x[0], x[1] = 0.0, 1e-40
    return _rows(x, source.uniform("residual", 64))


def _rows(x: Tensor, residual: Tensor) -> Content:
    rows = quantize_rows(x, residual)
    return Content({"x": x, "residual": residual, "values": rows.values, "factor": rows.factor})


def _step(a: Tensor, b: Tensor, c: Tensor) -> Content:
    return Content({"a": a, "b": b, "c": c, "d": fp8.step(a, b, c)})


def _numbers(source: Source, name: str, low: int, high: int) -> Tensor:
    """E4M3 bytes with exponents from `low` to `high`."""
    exponent = source.range(f"{name}.exponent", low + 7, high + 7, _STEPS, 32)
    return source.bytes(f"{name}.fraction", _STEPS, 32) & 0x87 | exponent << 3


def _addend(source: Source, low: int, high: int) -> Tensor:
    exponent = source.range("c.exponent", low + 127, high + 127, _STEPS).to(torch.int64)
    bits = source.words("c.fraction", _STEPS) & 0x807FFC00 | exponent << 23
    return torch.where(bits >> 31 == 1, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)


@define("fp8_tensor_core", unique_for="one FP8 step alone")
def fp8_close_exponents(source: Source) -> Content:
    """FP8 tensor-core steps of 32 products with exponents close together: only the result is truncated, to 13
    fraction bits.
    """
    return _step(_numbers(source, "a", 0, 2), _numbers(source, "b", 0, 2), _addend(source, 0, 5))


@define("fp8_tensor_core", unique_for="one FP8 step alone")
def fp8_wide_exponents(source: Source) -> Content:
    """FP8 tensor-core steps of 32 products with exponents of every size: terms below 2^(emax - 13) vanish,
    others are cut.
    """
    return _step(_numbers(source, "a", -6, 7), _numbers(source, "b", -6, 7), _addend(source, -12, 12))


@define("fp8_tensor_core", unique_for="one FP8 step alone")
def fp8_any_bits(source: Source) -> Content:
    """FP8 tensor-core steps of 32 products of any bytes, few of them NaN; half of the largest products
    cancel.
    """
    a, b = source.bytes("a", _STEPS, 32), source.bytes("b", _STEPS, 32)
    keep_nan = torch.arange(_STEPS)[:, None] % 16 == 0
    a, b = (torch.where((x & 0x7F == 0x7F) & ~keep_nan, 0x08, x) for x in (a, b))
    a[:, 16:24], b[:, 16:24] = a[:, :8] ^ 0x80, b[:, :8]
    return _step(a, b, _addend(source, -8, 8))


@define("preparation", unique_for="the preparation alone")
def prepared_scales(source: Source) -> Content:
    """Preparing weights for W4A8 whose scales have ranges of 1, 12, 13 and 256: what is clamped, offsets and
    residuals, -0 codes.
    """
    packed = source.bytes("packed", 4, 16, 64)
    ranges = ((120, 120), (110, 121), (110, 122), (0, 255))
    scales = torch.cat([source.range(f"scales.{low}.{high}", low, high, 1, 16, 4) for low, high in ranges])
    prepared = humming.prepare(packed, scales)
    names = {"codes": prepared.packed, "offsets": prepared.offsets, "residual": prepared.residual}
    return Content({"packed": packed, "scales": scales, **names})


@define("preparation", unique_for="every code at every distance")
def every_rewritten_code(source: Source) -> Content:
    """Preparing weights for W4A8: all 16 codes under each of the 256 scales, so that every code is divided by
    every distance to the highest scale and rounded, ties away from zero.
    """
    scales = torch.arange(256).to(torch.uint8).view(1, 256, 1).repeat(1, 1, 2)
    packed = (torch.arange(32) & 15).to(torch.uint8)
    packed = (packed[0::2] | packed[1::2] << 4).repeat(2).expand(1, 256, 32).contiguous()
    prepared = humming.prepare(packed, scales)
    names = {"codes": prepared.packed, "offsets": prepared.offsets, "residual": prepared.residual}
    return Content({"packed": packed, "scales": scales, **names})
