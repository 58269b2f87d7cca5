"""Constants inside of the activation, solved: log2(e), the parameters, a factor on the sigmoid's argument, ...

What a small change of a constant does to the output is known, so that all errors together say how far it is off,
even where each is no more than a rounding. It is then sought in the exact arithmetic: short decimals first, then the
number that gives most bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.families.distances import last_place
from mxfp4ref.conformance.families.hypothesis import Hypothesis, Pipeline, local_of
from mxfp4ref.conformance.families.sampled import Sample, samples
from mxfp4ref.conformance.findings.finding import Evidence
from mxfp4ref.defects.variants.swiglu import SwigluVariant
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90 import fp32, mufu
from mxfp4ref.sm90.activation import (
    GEGLU_TANH,
    GELU_TANH,
    SWIGLU,
    SWIGLU_BIAS,
    Activation,
    activate,
)

__all__ = ["constant_hypotheses", "solved_constant"]

_FEWEST, _LOUD_TOKENS = 4, 16  # tokens, and how many are enough where errors are loud
_SURE = 6.0  # standard deviations
_ALIKE = 9.0  # in what constants leave that explain the errors alike
_WHOLLY = 0.9  # of the errors' squares that roundings do not make
_QUIET, _REST = 2.0, 2.0**-8  # times the roundings, or of the errors' squares, that are left at most
_STARTS = (0.0, -0.6, 0.6, 2.5)  # relative to the right value
_STEPS = 6  # of Newton's method
_WITHIN = 5.0  # standard deviations, in which the constant is sought
_TOKENS = 12  # on which it is
_POINTS, _ROUNDS = 9, 8
_LOG2_E = float(np.float32(math.log2(math.e)))
_Stage = Callable[..., Tensor]  # called as `Stages.activate`


@dataclass(frozen=True)
class _Constant:
    """A number in the activation.

    Attributes:
        words: of its value and of the right one, `{}` each.
        right: its right value; for a parameter that differs by expert a mean.
        stage: the activation with another one.
        stages: where it lies.
        forms: the same change, up to roundings, by other numbers: words, the stage, and this number times how many.
    """

    words: str
    right: float
    stage: Callable[[float], _Stage]
    stages: tuple[str, ...] = ("activation",)
    forms: tuple[tuple[str, Callable[[float], _Stage], float], ...] = ()

    @property
    def unit(self) -> float:
        """By which it may be off."""
        return abs(self.right) or 1.0


@dataclass(frozen=True)
class _Fit:
    """What a constant is, `value +- unsure`; what it leaves of the errors' squares, and whether they are loud."""

    constant: _Constant
    value: float
    unsure: float
    left: float
    loud: bool


def _full(value: float, like: Tensor) -> Tensor:
    return torch.full_like(like, value)


def _sigmoid(z: Tensor, log2_e: float = _LOG2_E, one: float = 1.0, shift: float = 0.0) -> Tensor:
    """The kernel's, with other constants."""
    z = fp32.add(z, _full(shift, z)) if shift else z
    power = mufu.ex2(fp32.mul(-z, _full(log2_e, z)))
    return mufu.rcp(fp32.add(_full(one, z), power))


def _of_sigmoid(log2_e: float = _LOG2_E, one: float = 1.0, shift: float = 0.0) -> _Stage:
    return SwigluVariant(sigmoid=lambda z: _sigmoid(z, log2_e, one, shift))


def _of_argument(factor: float) -> _Stage:
    return SwigluVariant(sigmoid=lambda z: _sigmoid(fp32.mul(z, _full(factor, z))))


def _of_shifted_up(more: float) -> _Stage:
    def product(x: object) -> Tensor:
        shifted = fp32.add(x.shifted, _full(more, x.shifted))  # type: ignore[attr-defined]
        return fp32.mul(fp32.mul(x.gate, x.sigmoid), shifted)  # type: ignore[attr-defined]

    return SwigluVariant(product=product)


def _of_tanh(first: float, cubic: float) -> _Stage:
    """GELU by tanh.approx with other constants."""

    def stage(
        activation: Activation, x: Tensor, bias: Tensor | None, parameters: Sequence[Tensor | None]
    ) -> Tensor:
        value = fp32.widen(x)
        value = value if bias is None else fp32.add(value, fp32.widen(bias).expand_as(value))
        up, gate = value.chunk(2, -1)
        inner = fp32.fma(fp32.mul(_full(cubic, gate), gate), gate, _full(first, gate))
        half = fp32.mul(_full(0.5, gate), fp32.fma(gate, mufu.tanh(fp32.mul(gate, inner)), gate))
        return fp32.mul(half, up)

    return stage


def _of_parameter(index: int, value: float, *, factor: bool) -> _Stage:
    def stage(
        activation: Activation, x: Tensor, bias: Tensor | None, parameters: Sequence[Tensor | None]
    ) -> Tensor:
        given = list(parameters)
        default = list(activation.defaults.values())[index]
        before = given[index]
        if before is None:
            before = torch.tensor([default], device=x.device)
        given[index] = fp32.mul(before, _full(value, before)) if factor else _full(value, before)
        return activate(activation, x, bias, given)

    return stage


def _constants(call: MoeCall) -> Iterator[_Constant]:
    activation, experts = call.activation, call.experts
    if activation.id in (SWIGLU, SWIGLU_BIAS):
        yield _Constant(
            "the sigmoid's argument is multiplied by {}",
            1.0,
            _of_argument,
            forms=(
                (
                    f"the sigmoid's argument is multiplied by {{}} in place of log2(e), {_LOG2_E:.7g}",
                    lambda v: _of_sigmoid(log2_e=v),
                    _LOG2_E,
                ),
            ),
        )
        yield _Constant("{} is added to the sigmoid's argument", 0.0, lambda v: _of_sigmoid(shift=v))
        yield _Constant(
            "the sigmoid is 1 / ({} + e^-x), where 1 / ({} + e^-x) is right",
            1.0,
            lambda v: _of_sigmoid(one=v),
        )
        yield _Constant("{} is added to up where it is multiplied, beside any beta", 0.0, _of_shifted_up)
    if activation.id == GEGLU_TANH:
        first, cubic = (float(np.uint32(bits).view(np.float32)) for bits in GELU_TANH)
        yield _Constant(
            "sqrt(2 / pi) in GELU's tanh is {}, where {} is right", first, lambda v: _of_tanh(v, cubic)
        )
        yield _Constant(
            "the cube's coefficient in GELU's tanh, times sqrt(2 / pi), is {}, where {} is right",
            cubic,
            lambda v: _of_tanh(first, v),
            forms=(
                (
                    "the cube's coefficient in GELU's tanh is {}, where 0.044715 is right",
                    lambda v: _of_tanh(first, first * v),
                    1 / first,
                ),
            ),
        )
    for index, (name, default) in enumerate(activation.defaults.items()):
        given, word = (
            getattr(experts, name),
            f"the {name.replace('_', ' ')}".replace("swiglu", "SwiGLU"),
        )
        middle = default if given is None else float(given.double().mean())
        if not math.isfinite(middle):
            continue
        if given is not None and middle:
            times = f"{word} is {{}} times the right one"
            yield _Constant(times, 1.0, partial(_of_parameter, index, factor=True))
        yield _Constant(
            f"{word} is {{}} for all experts", middle, partial(_of_parameter, index, factor=False)
        )


class _Errors:
    """The errors of tokens, in roundings, and what an activation adds to them."""

    def __init__(self, call: MoeCall, some: list[Sample]) -> None:
        self.call, self.some = call, some
        both = [torch.cat((s.up, s.gate), 1) if call.experts.gated else s.gate for s in some]
        self.fc1 = torch.cat(both).float()
        experts = torch.cat([s.experts for s in some])
        given = (getattr(call.experts, name) for name in call.activation.defaults)
        self.parameters = [None if t is None else t.reshape(len(t), -1)[experts] for t in given]
        self.right = self.values(activate)
        units = last_place(self.right).square() / 6  # two roundings of the activation to bf16
        unit = [
            (
                s.noise
                + (s.weights[:, None].square() * torch.einsum("shi,si->sh", s.second.square(), u)).sum(0)
            ).sqrt()
            for s, u in zip(some, self._split(units), strict=True)
        ]
        errors = torch.cat([s.error / u for s, u in zip(some, unit, strict=True)])
        quiet = errors.square().mean().sqrt().clamp(max=1)  # few roundings differ where it changes by less
        unit, self.errors = [u * quiet for u in unit], errors / quiet
        products = (
            (s.weights[:, None, None] * s.second / u[:, None]) for s, u in zip(some, unit, strict=True)
        )
        self.weighted = [p.transpose(0, 1).flatten(1).float() for p in products]

    def values(self, stage: _Stage) -> Tensor:
        found: Tensor = stage(self.call.activation, self.fc1, None, self.parameters).double()
        return found

    def _split(self, values: Tensor) -> tuple[Tensor, ...]:
        return torch.split(values, [len(s.experts) for s in self.some])

    @property
    def loud(self) -> bool:
        """Whether the errors are surely more than roundings of the activation and of what follows make."""
        size, count = float(self.errors.square().sum()), len(self.errors)
        return size > count + _SURE * math.sqrt(2 * count)

    def of(self, stage: _Stage) -> Tensor:
        """What an activation adds to the output."""
        off = self._split((self.values(stage) - self.right).float())
        parts = (w @ o.flatten() for w, o in zip(self.weighted, off, strict=True))
        return torch.cat(list(parts)).double()

    def slope(self, constant: _Constant, value: float) -> tuple[Tensor, Tensor]:
        """How the output grows with the constant, and the errors that are left."""
        step = 2.0**-10 * constant.unit
        low, high = (self.of(constant.stage(value + by)) for by in (-step, step))
        return (high - low) / (2 * step), self.errors - (high + low) / 2

    def left(self, constant: _Constant, value: float) -> float:
        rest = float((self.errors - self.of(constant.stage(value))).square().sum())
        return rest if math.isfinite(rest) else math.inf

    def fit(self, constant: _Constant) -> _Fit | None:
        """The value that explains the errors, if it does."""
        size, unit, unsure = float(self.errors.square().sum()), constant.unit, math.inf
        starts = _STARTS if self.loud else _STARTS[:1]
        value = min((constant.right + start * unit for start in starts), key=partial(self.left, constant))
        for _ in range(_STEPS):
            slope, rest = self.slope(constant, value)
            steep = float(slope.square().sum())
            if not 0 < steep < math.inf:
                return None
            # By token: the roundings of an activation show in all of its columns alike.
            by_token = (slope * rest).view(len(self.some), -1).sum(1) / steep
            by = float(by_token.sum())
            unsure = float((by_token - slope.square().view(len(self.some), -1).sum(1) / steep * by).norm())
            value += max(-0.5 * unit, min(0.5 * unit, by))
            left = self.left(constant, value)
            if abs(by) < 0.2 * unsure or size - left < _SURE**2:
                break
        if size - left < max(_SURE**2, _WHOLLY * (size - len(self.errors))):
            return None
        return _Fit(constant, value, unsure, left, self.loud)


def _fits(call: MoeCall, some: list[Sample]) -> list[_Fit]:
    """Those that explain the errors, what explains most first."""
    if len(some) < _FEWEST or len(some[0].error) != call.experts.hidden_size:
        return []
    errors = _Errors(call, some[:: -(-len(some) // _LOUD_TOKENS)])
    errors = errors if errors.loud else _Errors(call, some)
    fits = map(errors.fit, _constants(call))
    found = sorted((fit for fit in fits if fit is not None), key=lambda fit: fit.left)
    size = float(errors.errors.square().sum())
    return [fit for fit in found if fit.left <= max(_QUIET**2 * len(errors.errors), _REST * size)]


def solved_constant(call: MoeCall, some: list[Sample]) -> Evidence | None:
    """The constant that explains the errors of these tokens best."""
    for fit in (one for one in _fits(call, some) if one.loud):
        told = f"{_shown(fit.value, fit.unsure)} (+- {fit.unsure:.1g})"
        kind = "in the activation a constant is another"
        words = f"as far as the errors show, {fit.constant.words.format(told, f'{fit.constant.right:.6g}')}"
        return Evidence.of_kind(fit.constant.stages, kind, words, 3)
    return None


def _shown(value: float, unsure: float) -> str:
    """With the digits that are known; 0 where that may be it."""
    digits = max(1, math.ceil(math.log10(abs(value) / unsure))) if value and unsure else 6
    return "0" if abs(value) <= _WITHIN * unsure else f"{value:.{min(digits, 8)}g}"


def constant_hypotheses(pipeline: Pipeline, got: Tensor, wrong: Tensor) -> Iterator[Hypothesis]:
    """Those that the errors of an output suggest, `got [M, H] bf16`, `wrong [M, H] bool`."""
    call = pipeline.call
    tokens = wrong.sum(1).argsort(descending=True, stable=True)[:_TOKENS].sort().values
    tokens = tokens[wrong[tokens].any(1)]
    part, wanted = replace(pipeline, call=call.select(tokens)), got[tokens]
    fits = _fits(call, samples(pipeline, got, wrong, local_of(pipeline)))
    for fit in (one for one in fits if one.left < fits[0].left + _ALIKE):
        constant = fit.constant
        for words, stage, times in ((constant.words, constant.stage, 1.0), *constant.forms):

            def equal(value: float, stage: Callable[[float], _Stage] = stage) -> float:
                output = part.staging(activate=stage(value)).run()
                return float((~differing(output, wanted)).double().mean())

            low, high = sorted((fit.value + by * _WITHIN * fit.unsure) * times for by in (-1, 1))
            zero = low < 0 < high and equal(0.0) == 1  # beside which no other number is likely
            exact = 0.0 if zero else _refined(equal, low, high)
            if equal(exact) < 1:
                continue
            digits = next(d for d in range(1, 18) if equal(float(f"{exact:.{d}g}")) == 1)
            value = float(f"{exact:.{digits}g}")
            found, told = stage(value), words.format(f"{value:.9g}", f"{constant.right * times:.6g}")
            yield Hypothesis(
                "activation",
                constant.stages,
                f"in the activation {told}",
                lambda p, s=found: p.staging(activate=s),
                1.2 + 0.03 * digits,
            )


def _refined(equal: Callable[[float], float], low: float, high: float) -> float:
    """The number between two that gives most equal bits, which become fewer the further off it is."""
    best = (low + high) / 2
    for _ in range(_ROUNDS):
        points = np.linspace(low, high, _POINTS).tolist()
        found = [equal(point) for point in points]
        most = [point for point, part in zip(points, found, strict=True) if part == max(found)]
        best, step = most[len(most) // 2], points[1] - points[0]
        if max(found) == 1:
            break
        low, high = most[0] - step, most[-1] + step
    return best
