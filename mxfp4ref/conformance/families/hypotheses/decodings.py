"""Hypotheses on dtypes: tables of codes, bytes of scales, and weights that are quantised once more."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypotheses.narrow_types import Narrow, narrowings, types
from mxfp4ref.conformance.families.hypotheses.tensors import of_codes, of_gemms
from mxfp4ref.conformance.families.hypothesis import Hypothesis, Pipeline
from mxfp4ref.conformance.families.solved.tensor_groups import GEMMS
from mxfp4ref.formats.mxfp4 import E2M1_VALUES, GROUP_SIZE, dequantize, unpack_codes
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90 import fp32

__all__ = ["CODE_TABLES", "decoding_hypotheses", "readings", "table_hypotheses"]

_Values = Callable[[Tensor, Tensor], Tensor]  # of codes and scales


def table_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """One of the 16 entries of the table of codes is that of another code."""
    for code in range(16):
        for other in range(16):
            if code == other or {code, other} == {0, 8}:
                continue
            for fcs, whose in GEMMS:
                yield of_gemms(
                    "values",
                    fcs,
                    f"{whose} weights have one wrong entry in the table of E2M1 codes: code {code} "
                    f"({E2M1_VALUES[code]:g}) is read as {E2M1_VALUES[other]:g}",
                    "weights",
                    of_codes(lambda codes, c=code, o=other: torch.where(codes == c, o, codes)),
                    1.6 + 0.1 * len(fcs),
                )


def decoding_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """Scales and codes of another format, and weights quantised again; predicted up to roundings."""
    for fcs, whose in GEMMS:
        for words, values in (*readings(), *_quantised_again()):
            yield Hypothesis(
                "values",
                fcs,
                f"{whose} {words}",
                lambda p, f=fcs, v=values: _decoding(p, f, v),
                1.3 + 0.1 * len(fcs),
            )


def readings() -> Iterator[tuple[str, _Values]]:
    """Scale bytes and codes taken for those of another format, in words and as functions of both."""
    yield from _scales()
    yield from _codes()


def _decoding(pipeline: Pipeline, fcs: tuple[str, ...], values: _Values) -> Pipeline:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, **how: object) -> Tensor:
        weights = torch.stack([values(p, s) for p, s in zip(packed, scales, strict=True)])
        return torch.bmm(fp32.widen(x.contiguous()), weights.transpose(1, 2))

    return pipeline.staging(**{f"{fc}_gemm": gemm for fc in fcs})


def _scaled(packed: Tensor, factors: Tensor) -> Tensor:
    """With factors `[N, K/32]` in place of the scales."""
    one = torch.full(factors.shape, 127, dtype=torch.uint8, device=packed.device)
    values = dequantize(packed, one, convention="sm90", dtype=torch.float32)
    return (values.view(*factors.shape, GROUP_SIZE) * factors[..., None]).view_as(values)


def _scales() -> Iterator[tuple[str, _Values]]:
    """Bytes that are an exponent, taken for something else."""

    def of(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        return lambda s: s.view(dtype).to(torch.float32)

    def high(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        return lambda s: (s.to(torch.int32) << 8).to(torch.uint16).view(dtype).to(torch.float32)

    ways: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
        ("float8_e4m3fn, as those of NVFP4 are", of(torch.float8_e4m3fn)),
        ("float8_e4m3fnuz", of(torch.float8_e4m3fnuz)),
        ("float8_e5m2", of(torch.float8_e5m2)),
        ("float8_e5m2fnuz", of(torch.float8_e5m2fnuz)),
        ("numbers (uint8), not as exponents", lambda s: s.to(torch.float32)),
        ("numbers (uint8) of 1/128, not as exponents", lambda s: s.to(torch.float32) / 128),
        ("numbers (uint8) of 1/255, not as exponents", lambda s: s.to(torch.float32) / 255),
        ("numbers less 127, not as exponents", lambda s: s.to(torch.float32) - 127),
        ("signed numbers (int8), not as exponents", lambda s: s.view(torch.int8).to(torch.float32)),
        ("exponents of e, not of 2", lambda s: (s.to(torch.float32) - 127).exp()),
        ("exponents of 10, not of 2", lambda s: torch.pow(10.0, s.to(torch.float32) - 127)),
        ("exponents of sqrt 2, not of 2", lambda s: ((s.to(torch.float32) - 127) / 2).exp2()),
        ("signed exponents (int8) without a bias", lambda s: s.view(torch.int8).to(torch.float32).exp2()),
        ("the high byte of bf16", high(torch.bfloat16)),
        ("the high byte of float16", high(torch.float16)),
        ("a float of 4 bits of exponent and 4 of mantissa", lambda s: _unsigned_float(s, 4, 7)),
        ("a float of 5 bits of exponent and 3 of mantissa", lambda s: _unsigned_float(s, 3, 15)),
    )
    for words, factors in ways:
        yield f"scale bytes are read as {words} (E8M0 is expected)", lambda p, s, f=factors: _scaled(p, f(s))


def _unsigned_float(bytes_: Tensor, mantissa: int, bias: int) -> Tensor:
    exponent = (bytes_ >> mantissa).to(torch.float32)
    fraction = (bytes_ & ((1 << mantissa) - 1)).to(torch.float32) / (1 << mantissa)
    return torch.where(exponent > 0, (1 + fraction) * (exponent - bias).exp2(), fraction * 2.0 ** (1 - bias))


_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)
_FP4 = (0.0, 0.0052083333, 0.6666667, 1.0, 0.3333333, 0.5, 0.1666667, 0.25)  # of bitsandbytes


def _signed(*magnitudes: float) -> tuple[float, ...]:
    return (*magnitudes, *(-m for m in magnitudes))


CODE_TABLES = {
    "int4 (two's complement)": tuple(float(c - 16 * (c > 7)) for c in range(16)),
    "int4 with an offset of 8": tuple(float(c - 8) for c in range(16)),
    "uint4": tuple(float(c) for c in range(16)),
    "sign and magnitude": _signed(*map(float, range(8))),
    "E3M0": _signed(0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0),
    "E1M2": _signed(*(c / 4 for c in range(8))),
    "E2M1 with exponents of another bias (1, 1.5, 2, 3, 4, 6, 8, 12 without subnormals)": _signed(
        0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0
    ),
    "NF4": _NF4,
    "NF4, signs last": (*_NF4[8:], *_NF4[:8]),
    "FP4 of bitsandbytes": _signed(*_FP4),
    "E2M1 over its largest value": _signed(*(v / 6 for v in E2M1_VALUES[:8])),
    "E2M1 without subnormals (0.5 as 0.75)": _signed(0.0, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    "E2M1 with 6 as infinity's 8": _signed(0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0),
}


def _codes() -> Iterator[tuple[str, _Values]]:
    """The 16 codes in other formats of 4 bits."""
    for name, table in CODE_TABLES.items():
        yield f"codes are read as {name}", lambda p, s, t=table: _by_table(p, s, t)


def _by_table(packed: Tensor, scales: Tensor, table: tuple[float, ...]) -> Tensor:
    values = torch.tensor(table, device=packed.device)[unpack_codes(packed).to(torch.int32)]
    factors = _scaled(torch.full_like(packed, 0x22), torch.ones(scales.shape, device=packed.device))
    of_groups = (scales.to(torch.float32) - 127).exp2()
    return values * factors * of_groups.repeat_interleave(GROUP_SIZE, -1)


def _quantised_again() -> Iterator[tuple[str, _Values]]:
    """Weights that were dequantised and quantised to another type, as for a fallback."""
    spans: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
        ("one scale for each expert's matrix", lambda w: w.abs().amax()),
        ("one scale for each row", lambda w: w.abs().amax(1, keepdim=True)),
        ("one scale for each column of K", lambda w: w.abs().amax(0, keepdim=True)),
        ("one scale for each 128 x 128", lambda w: _largest(w, 128, 128)),
        ("one scale for each 128 of K", lambda w: _largest(w, 1, 128)),
        ("one scale for each 64 of K", lambda w: _largest(w, 1, 64)),
        ("one scale for each 32 of K", lambda w: _largest(w, 1, GROUP_SIZE)),
        ("one scale for each 16 of K", lambda w: _largest(w, 1, 16)),
    )
    for narrow in narrowings():
        for words, largest in spans:

            def values(
                p: Tensor,
                s: Tensor,
                narrow: Narrow = narrow,
                largest: Callable[[Tensor], Tensor] = largest,
            ) -> Tensor:
                weights = dequantize(p, s, convention="sm90", dtype=torch.float32)
                return narrow(weights, largest(weights))

            if narrow.likely:
                yield (
                    f"weights are quantised again, to {narrow.type.name} with {words} {narrow.scale}",
                    values,
                )
    for one in types():
        if one.floating and not one.rare:

            def cast(p: Tensor, s: Tensor, rounded: Callable[[Tensor], Tensor] = one.rounded) -> Tensor:
                return rounded(dequantize(p, s, convention="sm90", dtype=torch.float32))

            yield f"weights are rounded to {one.name} without a scale", cast


def _largest(weights: Tensor, tall: int, wide: int) -> Tensor:
    rows, depth = weights.shape
    if rows % tall or depth % wide:
        raise ValueError("weights: no whole blocks")
    largest = weights.abs().view(rows // tall, tall, depth // wide, wide).amax((1, 3))
    return largest.repeat_interleave(tall, 0).repeat_interleave(wide, 1)
