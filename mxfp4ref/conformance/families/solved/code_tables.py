"""The table by which a GEMM decodes its codes, solved: what all errors together say of its 16 values.

The output is a smooth function of these, so that Newton's method finds them, whatever comes behind the GEMM: a table
of another format, entries exchanged or of the wrong sign, bits lost on the way. What it finds is put into the exact
arithmetic, as round numbers where these lie near enough, and predicts every bit or is not told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypotheses.decodings import CODE_TABLES
from mxfp4ref.conformance.families.hypothesis import FAILURES, Hypothesis, Pipeline
from mxfp4ref.defects.variants.gemm import GemmVariant
from mxfp4ref.formats.mxfp4 import E2M1_VALUES, GROUP_SIZE, decode_ue8m0, unpack_codes
from mxfp4ref.sm90 import fp32

__all__ = ["code_table_hypotheses"]

_TOKENS, _LARGEST = (
    8,
    1 << 23,
)  # that are looked at; bytes of a GEMM's codes, beyond which a step takes seconds
_STEPS, _DELTA = 8, 0.25  # of Newton's method; by which an entry is moved to see what that does
_SOME, _NEARLY_ALL = 0.2, 0.97  # of the errors' squares, that the first step explains, and all of them
# Standard deviations, and how far besides, in which the right number is the entry, or a round one: coarsely, finely.
_RIGHT_WITHIN, _ROUND_WITHIN = (4.0, 2.0**-6), ((4.0, 2.0**-6), (2.0, 2.0**-9))
_WITHIN_FORMATS = (4.0, 2.0**-4)
_PASSES = 2  # over the entries, in the exact arithmetic
_RIGHT = torch.tensor(E2M1_VALUES, dtype=torch.float64)


@dataclass(frozen=True)
class _Rows:
    """Some rows of an output as a function of the table of one GEMM's codes, each over its size."""

    part: Pipeline
    fc: str
    got: Tensor
    size: Tensor

    @classmethod
    def of(cls, pipeline: Pipeline, got: Tensor, wrong: Tensor, fc: str) -> _Rows:
        count = wrong.sum(1) * got.isfinite().all(1)
        tokens = count.argsort(descending=True, stable=True)[:_TOKENS].sort().values
        tokens = tokens[count[tokens] > 0].cpu()
        part = replace(pipeline, call=pipeline.call.select(tokens))
        rows = fp32.widen(got[tokens].contiguous()).double()
        return cls(part, fc, rows, rows.square().mean(1, keepdim=True).sqrt() + 1e-300)

    def off(self, table: Tensor) -> Tensor:
        """How far the rows are from those of a table, `[n] float64`."""
        output = self.part.staging(**{f"{self.fc}_gemm": _quick(table)}).run()
        return ((self.got - fp32.widen(output.contiguous()).double()) / self.size).flatten()

    def equal(self, table: Tensor) -> float:
        """Which part of the bits the exact arithmetic gives with a table."""
        output = self.part.staging(**{f"{self.fc}_gemm": _exact(table)}).run()
        return float((fp32.widen(output.contiguous()).double() == self.got).double().mean())

    def moved(self, table: Tensor, off: Tensor) -> Tensor:
        """What moving each entry by one does, `[n, 16]`."""
        each = torch.eye(16, dtype=torch.float64) * _DELTA
        return torch.stack([(off - self.off(table + one)) / _DELTA for one in each], 1)


@dataclass(frozen=True)
class _Solved:
    """A table, the standard deviations of its entries, and which of them any row shows."""

    table: Tensor
    unsure: Tensor
    shown: Tensor


def _quick(table: Tensor) -> Callable[..., Tensor]:
    """A GEMM with another table, up to roundings."""

    def gemm(x: Tensor, packed: Tensor, scales: Tensor, **how: object) -> Tensor:
        values = table.to(packed.device, torch.float32)[unpack_codes(packed).long()]
        factors = decode_ue8m0(scales, convention="sm90").repeat_interleave(GROUP_SIZE, -1)
        return torch.bmm(fp32.widen(x.contiguous()), (values * factors).transpose(1, 2))

    return gemm


def _exact(table: Tensor) -> GemmVariant:
    return GemmVariant(decode_codes=lambda codes: table.to(codes.device)[codes])


def code_table_hypotheses(pipeline: Pipeline, got: Tensor, wrong: Tensor) -> Iterator[Hypothesis]:
    """Of either GEMM the table that the errors say, `got [M, H] bf16`, `wrong [M, H] bool`."""
    for fc in ("fc1", "fc2"):
        if getattr(pipeline.call.experts, f"{fc}_weights").numel() > _LARGEST:
            continue
        rows = _Rows.of(pipeline, got, wrong, fc)
        if not len(rows.got):
            continue
        try:
            solved = _solved(rows)
        except FAILURES:
            continue
        if solved is None:
            continue
        if (known := _known(solved)) is not None:
            yield _told(fc, *known)
        coarse, fine = (_rounded(solved, *within) for within in _ROUND_WITHIN)
        tables = [coarse]
        if _factor(coarse) is None and not torch.equal(coarse, fine) and rows.equal(coarse) < 1:
            tables.append(_refined(rows, fine))
        yield from (_told(fc, table) for table in tables if bool((table != _RIGHT).any()))


def _solved(rows: _Rows) -> _Solved | None:
    """The table with which most of the errors vanish."""
    table = _RIGHT.clone()
    off = rows.off(table)
    whole = left = float(off.square().sum())
    for step in range(_STEPS):
        moved = rows.moved(table, off)
        change = torch.linalg.lstsq(moved, off[:, None], driver="gelsd").solution[:, 0]
        for part in (1.0, 0.5, 0.25):
            new = table + part * change
            rest = rows.off(new)
            if bool(rest.isfinite().all()) and float(rest.square().sum()) < left:
                break
        else:
            break
        before, left = left, float(rest.square().sum())
        table, off = new, rest
        if not step and left > (1 - _SOME) * whole:
            return None
        if left > 0.9 * before:
            break
    if left > (1 - _NEARLY_ALL) * whole:
        return None
    spread = torch.linalg.pinv(moved.T @ moved, hermitian=True).diagonal() * left / max(len(off) - 16, 1)
    return _Solved(table, spread.clamp(min=0).sqrt(), moved.abs().amax(0) > 0)


def _rounded(solved: _Solved, deviations: float, besides: float) -> Tensor:
    """With the right values, or else the roundest ones that are near enough, in 8 bits; the right ones of no use."""
    table = _RIGHT.clone()
    for code in solved.shown.nonzero().flatten().tolist():
        value, size = solved.table[code], solved.table[code].abs().clamp(min=1)
        far = (value - _RIGHT[code]).abs() - _RIGHT_WITHIN[0] * solved.unsure[code]
        if bool(far > _RIGHT_WITHIN[1] * size):
            unsure = deviations * solved.unsure[code] + besides * size
            near = (*((value * n).round() / n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256)), value)
            table[code] = next(one for one in near if bool((one - value).abs() <= unsure))
    return table.to(torch.bfloat16).double()


def _refined(rows: _Rows, table: Tensor) -> Tensor:
    """With the neighbours in bf16 of those entries that are others, where more bits come out so."""
    most = rows.equal(table)
    for code in _PASSES * (table != _RIGHT).nonzero().flatten().tolist():
        for by in (1, -1):
            bits = table.to(torch.bfloat16).view(torch.int16)
            bits[code] += by
            other = bits.view(torch.bfloat16).double()
            if (equal := rows.equal(other)) > most:
                table, most = other, equal
    return table


def _known(solved: _Solved) -> tuple[Tensor, str] | None:
    """The table of another format that is near enough, and its name."""
    unsure = _WITHIN_FORMATS[0] * solved.unsure + _WITHIN_FORMATS[1]
    for name, values in CODE_TABLES.items():
        table = torch.tensor(values, dtype=torch.float64)
        if bool(((table - solved.table).abs() <= unsure)[solved.shown].all()):
            return table, name
    return None


def _factor(table: Tensor) -> float | None:
    """By which all entries are larger than the right ones, if it is one."""
    factors = torch.unique(table[_RIGHT != 0] / _RIGHT[_RIGHT != 0])
    return float(factors) if len(factors) == 1 else None


def _told(fc: str, table: Tensor, name: str = "") -> Hypothesis:
    gemm = _exact(table)
    others = [
        f"{'-' * (code == 8)}{E2M1_VALUES[code]:g} as {float(table[code]):.6g}".replace("--", "-")
        for code in range(16)
        if table[code] != _RIGHT[code]
    ]
    if (factor := _factor(table)) is not None:  # so may GEMM1's result be, or its operand
        operand, stage = ("the input", "input") if fc == "fc1" else ("the activation", "activation")
        where = f"GEMM{fc[-1]}'s weights or scales, on {operand}, or on its result"
        words = f"a factor of {factor:.6g} too many on {where}"
        return Hypothesis("factor", (fc, stage), words, lambda p: p.staging(**{f"{fc}_gemm": gemm}), 1.5)
    how = f"codes are read as {name}" if name else "weights are decoded by another table of codes"
    return Hypothesis(
        "values",
        (fc,),
        f"GEMM{fc[-1]}'s {how}: {', '.join(others)}",
        lambda p: p.staging(**{f"{fc}_gemm": gemm}),
        1.7,
    )
