"""Numbers that go through a narrower type and back: which type, with which scale, and how both are computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mxfp4ref.formats.mxfp4 import E2M1_VALUES

__all__ = ["Narrow", "Type", "narrowings", "types"]

_Cast = Callable[[Tensor], Tensor]  # of float32, to float32
_Scale = Callable[[Tensor, float], Tensor]  # of the largest magnitude, and the number that it becomes


@dataclass(frozen=True)
class Type:
    """A narrower type.

    Attributes:
        name: in words.
        most: the number that the largest magnitude becomes.
        rounded: what numbers of float32 become in it.
        rare: whether few kernels have it.
    """

    name: str
    most: float
    rounded: _Cast
    rare: bool = False

    @property
    def floating(self) -> bool:
        """Whether it has exponents of its own, enough to do without a scale."""
        return self.most > 200


@dataclass(frozen=True)
class Narrow:
    """There and back, for numbers that share a scale.

    Attributes:
        type: there.
        scale: of which kind.
        how: what is computed otherwise, in words; "" for codes that are a quotient and a scale in float32.
        of_bf16: whether numbers are rounded to bf16 before.
    """

    type: Type
    scale: str
    how: str = ""
    of_bf16: bool = False

    def __call__(self, x: Tensor, largest: Tensor) -> Tensor:
        """Numbers of float32, with the largest magnitude of what shares their scale, broadcast."""
        most = self.type.most
        if self.of_bf16:
            x, largest = x.bfloat16().float(), largest.bfloat16().float()
        step = _SCALES[self.scale](largest, most)
        step = torch.where((step > 0) & step.isfinite(), step, 1.0)
        codes, step = _WAYS[self.how](x, step, torch.where(largest > 0, largest, 1.0), most)
        codes = torch.where(codes.isfinite(), codes.clamp(-most, most), codes)
        return self.type.rounded(codes) * step

    def words(self, span: str) -> str:
        """How numbers are quantised, where `span` shares a scale."""
        how = ", rounded to bf16 before" * self.of_bf16 + f", {self.how}" * bool(self.how)
        return f"quantised to {self.type.name} and back, with one scale for {span} {self.scale}{how}"

    @property
    def of_operands(self) -> bool:
        """Whether it is what the operands of a GEMM may have, but nothing else."""
        return self.type.rare or self.scale == _IN_BF16

    @property
    def likely(self) -> bool:
        """Whether it has no rare type, and a scale that is the largest number's or, for FP8, a power of two."""
        return not self.type.rare and list(_SCALES).index(self.scale) < 1 + self.type.floating

    @property
    def cost(self) -> float:
        return (
            1.25
            + 0.05 * list(_SCALES).index(self.scale)
            + 0.1 * self.type.rare
            + 0.1 * (bool(self.how) + self.of_bf16)
        )

    def ways(self) -> Iterator[Narrow]:
        """The same with one detail more, which changes few codes, or all numbers by little."""
        if not self.how:
            yield from (replace(self, how=how) for how in _WAYS if how)
            if not self.of_bf16:
                yield replace(self, of_bf16=True)


def narrowings() -> Iterator[Narrow]:
    """Types and scales."""
    for one in types():
        for number, scale in enumerate(_SCALES):
            if not (number and one.rare) and (scale != _NVFP4 or one.most == 6.0):
                yield Narrow(one, scale)


def types() -> Iterator[Type]:
    """The likely ones first."""
    yield Type("FP8 (float8_e4m3fn)", 448.0, lambda t: t.to(torch.float8_e4m3fn).float())
    yield Type("FP8 (float8_e5m2)", 57344.0, lambda t: t.to(torch.float8_e5m2).float())
    yield Type("int8 (8 bits)", 127.0, torch.round)
    yield Type("int4 (4 bits)", 7.0, torch.round)
    yield Type("NVFP4-like E2M1 (4 bits)", 6.0, _to_e2m1)
    yield Type(
        "FP8 (e4m3, 240 for its largest number)", 240.0, lambda t: t.to(torch.float8_e4m3fn).float(), True
    )
    yield Type("int8 (8 bits), 128 for its largest number", 128.0, lambda t: t.round().clamp(-128, 127), True)
    yield Type("int8 (8 bits), cut towards zero", 127.0, torch.trunc, True)


def _to_e2m1(values: Tensor) -> Tensor:
    steps = torch.tensor(E2M1_VALUES[:8], device=values.device)
    middles = (steps[1:] + steps[:-1]) / 2
    return steps[torch.bucketize(values.abs(), middles)].copysign(values)


_IN_BF16 = "that is its largest number's part of the type's, held in bf16"
_NVFP4 = "that is rounded to FP8 (e4m3), as NVFP4 has it"
_SCALES: dict[str, _Scale] = {
    "that is its largest number's part of the type's": lambda largest, most: largest / most,
    "that is a power of two, rounded up": lambda largest, most: _power(largest / most, up=True),
    "that is a power of two, as MX formats have it": lambda largest, most: (
        _power(largest, up=False) / 2.0 ** int(math.log2(most))
    ),
    _IN_BF16: lambda largest, most: (largest / most).bfloat16().float(),
    _NVFP4: lambda largest, most: (largest / most).to(torch.float8_e4m3fn).float(),
}


def _power(values: Tensor, *, up: bool) -> Tensor:
    fraction, exponent = torch.frexp(values)
    return torch.ldexp(torch.ones_like(values), exponent - ((fraction == 0.5).int() if up else 1))


def _held(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda step: step.to(dtype).float()


# Of numbers, their step, their largest magnitude and what that becomes: codes before they are rounded, and the step.
_WAYS: dict[str, Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {
    "": lambda x, step, largest, most: (x / step, step),
    "codes by the scale's reciprocal": lambda x, step, largest, most: (x * (1 / step), step),
    "codes by the type's largest number over the block's": lambda x, step, largest, most: (
        x * (most / largest),
        step,
    ),
    "codes by that over the block's, and back by its reciprocal": lambda x, step, largest, most: (
        x * (most / largest),
        1 / (most / largest),
    ),
    "the scale in fp16": lambda x, step, largest, most: (x / (s := _held(torch.float16)(step)), s),
    "the scale in bf16 on the way back": lambda x, step, largest, most: (
        x / step,
        _held(torch.bfloat16)(step),
    ),
    "codes in bf16 before they are rounded": lambda x, step, largest, most: (
        (x / step).bfloat16().float(),
        step,
    ),
}
