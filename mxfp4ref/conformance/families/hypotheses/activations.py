"""Hypotheses on the activation: a grammar of clamp, sigmoid, alpha, beta, bias and product."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypotheses.activation_steps import (
    OfSwiglu,
    activation_hypothesis,
    as_stage,
    halves,
    step_hypotheses,
)
from mxfp4ref.conformance.families.hypothesis import Hypothesis
from mxfp4ref.defects.variants.rounding import half
from mxfp4ref.defects.variants.swiglu import Operands, SwigluVariant, multiply_in_order, silu
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.activation import ACTIVATIONS, SWIGLU, SWIGLU_BIAS, sigmoid
from mxfp4ref.sm90.swiglu import swiglu

__all__ = ["activation_hypotheses", "clamps", "other_activations"]

_A = ("activation",)
_Clamp = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
_Product = Callable[[Operands], Tensor]
_min, _max, _mul = fp32.minimum, fp32.maximum, fp32.mul


def clamps() -> Iterator[tuple[str, _Clamp, float]]:
    """Instead of up to [-L, L] and gate to at most L."""

    def both(t: Tensor, limit: Tensor) -> Tensor:
        return _max(_min(t, limit), -limit)

    yield "up is not clamped", lambda u, g, lim: (u, _min(g, lim)), 1
    yield "up is clamped from above only", lambda u, g, lim: (_min(u, lim), _min(g, lim)), 1
    yield "up is clamped from below only", lambda u, g, lim: (_max(u, -lim), _min(g, lim)), 1.2
    yield "gate is not clamped", lambda u, g, lim: (both(u, lim), g), 1
    yield "gate is clamped to [-L, L]", lambda u, g, lim: (both(u, lim), both(g, lim)), 1
    yield "gate is clamped from below only", lambda u, g, lim: (both(u, lim), _max(g, -lim)), 1.2
    yield (
        "the clamps of up and gate are exchanged (up at most L, gate to [-L, L])",
        lambda u, g, lim: (_min(u, lim), both(g, lim)),
        1.1,
    )
    yield "neither is clamped", lambda u, g, lim: (u, g), 1
    yield (
        "up is clamped to [0, L]",
        lambda u, g, lim: (_max(_min(u, lim), torch.zeros_like(u)), _min(g, lim)),
        1.5,
    )
    yield (
        "gate is clamped to [0, L]",
        lambda u, g, lim: (both(u, lim), _max(_min(g, lim), torch.zeros_like(g))),
        1.5,
    )
    yield "both are clamped from below only", lambda u, g, lim: (_max(u, -lim), _max(g, -lim)), 1.4


def _torch(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda t: function(t.to(torch.float64)).to(torch.float32)


def _sigmoids() -> Iterator[tuple[str, Callable[[Tensor], Tensor], float]]:
    yield "the sigmoid is correctly rounded", _torch(torch.sigmoid), 1.1
    yield "the sigmoid is torch's float32 one", torch.sigmoid, 1.2
    yield "the sigmoid is a hard one, clamp(x / 6 + 1/2, 0, 1)", lambda z: (z / 6 + 0.5).clamp(0, 1), 1.2
    yield "the sigmoid has the argument's opposite sign", lambda z: sigmoid(-z), 1.3
    yield "the sigmoid takes e^x as 2^x", lambda z: (1 / (1 + torch.exp2(-z.double()))).float(), 1.2
    yield (
        "the sigmoid is that of 1.702 x (quick GELU)",
        lambda z: sigmoid(_mul(z, torch.full_like(z, 1.702))),
        1.2,
    )
    yield "the sigmoid is rounded to bf16", lambda z: fp32.widen(fp32.to_bf16(sigmoid(z))), 1.2
    yield "the sigmoid is rounded to float16", lambda z: half(sigmoid(z)), 1.3
    yield "the sigmoid is that of the argument in bf16", lambda z: sigmoid(fp32.widen(fp32.to_bf16(z))), 1.3
    yield "the sigmoid is 1/2 + tanh(x / 2) / 2 in float32", lambda z: 0.5 + 0.5 * torch.tanh(0.5 * z), 1.2
    yield "the sigmoid is 1 (gate alone)", torch.ones_like, 1.3
    yield "the gate has the step function for a sigmoid (ReLU)", lambda z: (z > 0).float(), 1.2
    yield "GELU (erf) is used for SiLU", _torch(lambda z: 0.5 * (1 + torch.erf(z / math.sqrt(2)))), 1.1
    yield (
        "GELU (tanh) is used for SiLU",
        _torch(lambda z: 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))),
        1.1,
    )


def _products() -> Iterator[tuple[str, _Product, float]]:
    yield "up is not multiplied in: silu(gate) alone", silu, 1.1
    yield "up and gate are multiplied without a sigmoid", lambda x: _mul(x.gate, x.shifted), 1.1
    for dtype, name in ((torch.float16, "float16"), (torch.bfloat16, "bf16")):
        yield f"every step is rounded to {name}", _in(dtype), 1.2
    yield "only the sigmoid of gate is taken: sigmoid(gate) up", lambda x: _mul(x.sigmoid, x.shifted), 1.1
    yield "up and gate change places: silu(up) gate", lambda x: _mul(_mul(x.up, sigmoid(x.up)), x.gate), 1.1
    yield "silu(gate) is added to up instead of multiplied", lambda x: fp32.add(silu(x), x.shifted), 1.3
    yield (
        "SiLU is applied to both, silu(gate) silu(up)",
        lambda x: _mul(silu(x), _mul(x.up, sigmoid(x.up))),
        1.3,
    )
    yield "SiLU is applied to the product, silu(gate up)", lambda x: _silu(_mul(x.gate, x.shifted)), 1.2
    yield (
        "ReLU is squared: relu(gate)^2 up",
        lambda x: _mul(_mul(x.gate.clamp(min=0), x.gate.clamp(min=0)), x.shifted),
        1.3,
    )
    yield (
        "the product is clamped to [-L, L]",
        lambda x: _max(_min(multiply_in_order(x), x.limit), -x.limit),
        1.2,
    )
    yield "the product is clamped to at most L", lambda x: _min(multiply_in_order(x), x.limit), 1.3
    yield "the product is doubled", lambda x: _mul(multiply_in_order(x), torch.full_like(x.gate, 2.0)), 1.3
    yield (
        "1 is added to up (a beta of 1)",
        lambda x: _mul(silu(x), fp32.add(x.shifted, torch.ones_like(x.up))),
        1.1,
    )
    yield "1 is added to gate", lambda x: _mul(fp32.add(silu(x), torch.ones_like(x.up)), x.shifted), 1.4
    yield (
        "beta is added to gate instead of up",
        lambda x: _mul(_mul(fp32.add(x.gate, x.beta), x.sigmoid), x.up),
        1.2,
    )
    yield (
        "beta is added to gate instead of up, before its sigmoid",
        lambda x: _mul(_silu_of(fp32.add(x.gate, x.beta), x.alpha), x.up),
        1.2,
    )
    yield (
        "beta is added to both gate and up",
        lambda x: _mul(_silu_of(fp32.add(x.gate, x.beta), x.alpha), x.shifted),
        1.4,
    )
    yield (
        "beta is added to the sigmoid's argument instead of up",
        lambda x: _mul(_mul(x.gate, sigmoid(fp32.add(x.scaled, x.beta))), x.up),
        1.4,
    )
    yield "beta is added to the product", lambda x: fp32.add(_mul(silu(x), x.up), x.beta), 1.4
    yield (
        "alpha multiplies up",
        lambda x: _mul(_mul(x.gate, sigmoid(x.gate)), fp32.add(_mul(x.up, x.alpha), x.beta)),
        1.4,
    )
    yield (
        "alpha is added to gate",
        lambda x: _mul(_mul(x.gate, sigmoid(fp32.add(x.gate, x.alpha))), x.shifted),
        1.5,
    )
    yield "beta is subtracted", lambda x: _mul(silu(x), fp32.add(x.up, -x.beta)), 1.2
    yield "beta multiplies up", lambda x: _mul(silu(x), _mul(x.up, x.beta)), 1.4
    yield "alpha multiplies the product", lambda x: _mul(multiply_in_order(x), x.alpha), 1.3
    yield (
        "alpha multiplies the sigmoid, not its argument",
        lambda x: _mul(_mul(_mul(x.gate, sigmoid(x.gate)), x.alpha), x.shifted),
        1.3,
    )
    yield (
        "alpha divides the sigmoid's argument",
        lambda x: _mul(_mul(x.gate, sigmoid(x.gate / x.alpha)), x.shifted),
        1.4,
    )
    yield (
        "alpha and beta are exchanged",
        lambda x: _mul(_mul(x.gate, sigmoid(_mul(x.gate, x.beta))), fp32.add(x.up, x.alpha)),
        1.3,
    )


def _in(dtype: torch.dtype) -> _Product:
    def short(t: Tensor) -> Tensor:
        return t.to(dtype).to(torch.float32)

    def product(x: Operands) -> Tensor:
        gate = short(x.gate)
        sigmoid_of = short(torch.sigmoid(short(_mul(gate, x.alpha))))
        return short(_mul(short(_mul(gate, sigmoid_of)), short(fp32.add(short(x.up), x.beta))))

    return product


def _silu_of(gate: Tensor, alpha: Tensor) -> Tensor:
    return _mul(gate, sigmoid(_mul(gate, alpha)))


def _silu(t: Tensor) -> Tensor:
    return _mul(t, sigmoid(t))


def _wholes() -> Iterator[tuple[str, OfSwiglu, float]]:
    """Bias, interleaving and order of steps."""

    def biased(part: str) -> OfSwiglu:
        def run(x: Tensor, bias: Tensor | None, *rest: Tensor | None) -> Tensor:
            if bias is not None:
                up, gate = bias.chunk(2, -1)
                zero = torch.zeros_like(up)
                kept = {"up": (up, zero), "gate": (zero, gate), "swapped": (gate, up), "none": (zero, zero)}
                bias = torch.cat(kept[part], -1)
            return swiglu(x, bias, *rest)

        return run

    def twice(x: Tensor, bias: Tensor | None, *rest: Tensor | None) -> Tensor:
        if bias is not None:
            x = fp32.add(fp32.widen(x), fp32.widen(bias).expand_as(x))
        return swiglu(x, bias, *rest)

    def after_clamp(
        x: Tensor, bias: Tensor | None, alpha: Tensor | None, beta: Tensor | None, limit: Tensor | None
    ) -> Tensor:
        if bias is None:
            return swiglu(x, bias, alpha, beta, limit)
        value = torch.cat(halves(x, None, limit), -1)
        value = fp32.add(value, fp32.widen(bias).expand_as(value))
        return swiglu(value, None, alpha, beta, None)

    def after_alpha(of_product: bool) -> OfSwiglu:
        def run(
            x: Tensor, bias: Tensor | None, alpha: Tensor | None, beta: Tensor | None, limit: Tensor | None
        ) -> Tensor:
            if alpha is None or limit is None:
                return swiglu(x, bias, alpha, beta, limit)
            (_, gate), (up, clamped) = halves(x, bias, None), halves(x, bias, limit)
            scaled = _min(_mul(gate, alpha.expand_as(gate)), limit.expand_as(gate))
            up = up if beta is None else fp32.add(up, beta.expand_as(up))
            return _mul(_mul(clamped if of_product else gate, sigmoid(scaled)), up)

        return run

    def interleaved(x: Tensor, *rest: Tensor | None) -> Tensor:
        return swiglu(torch.cat((x[..., 1::2], x[..., ::2]), -1), *rest)

    def swapped(x: Tensor, *rest: Tensor | None) -> Tensor:
        up, gate = x.chunk(2, -1)
        return swiglu(torch.cat((gate, up), -1), *rest)

    def interleaved_out(x: Tensor, *rest: Tensor | None) -> Tensor:
        return swiglu(torch.cat((x[..., ::2], x[..., 1::2]), -1), *rest)

    yield "the fc1 bias is added to up only", biased("up"), 1
    yield "the fc1 bias is added to gate only", biased("gate"), 1
    yield "the fc1 bias is added twice", twice, 1.1
    yield "the fc1 bias of gate is added to up and the other way round", biased("swapped"), 1.1
    yield "the fc1 bias is added after the clamp", after_clamp, 1
    yield (
        "gate is clamped for the sigmoid after alpha has scaled it, alpha gate to at most L",
        after_alpha(True),
        1.2,
    )
    yield (
        "gate is clamped for the sigmoid only, after alpha has scaled it, alpha gate to at most L",
        after_alpha(False),
        1.4,
    )
    yield "GEMM1's columns are taken as pairs gate, up, gate, up, ...", interleaved, 1.3
    yield "GEMM1's columns are taken as pairs up, gate, up, gate, ...", interleaved_out, 1.3
    yield "GEMM1's halves change places: they are taken as [gate; up]", swapped, 1.2


def other_activations(call: MoeCall) -> Iterator[Hypothesis]:
    """Another one of those that have a gate, or of those that have none."""
    for id, other in ACTIVATIONS.items():
        if (
            other is not call.activation
            and id != call.activation_type
            and other.gated == call.activation.gated
        ):
            words = f"the activation is {other.name}, where {ACTIVATIONS[call.activation_type].name} was asked for"
            yield Hypothesis("activation", _A, words, lambda p, id=id: p.calling(activation_type=id), 1)


def activation_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """All of one deviation, and with a limit those of a clamp and a product or sigmoid."""
    if call.activation.id not in (SWIGLU, SWIGLU_BIAS):
        return
    experts = call.experts
    limited = list(clamps()) if experts.swiglu_limit is not None else []
    sigmoids, products = list(_sigmoids()), list(_products())
    parts: list[tuple[str, list[Any]]] = [("clamp", limited), ("sigmoid", sigmoids), ("product", products)]
    for part, choices in parts:
        for words, change, cost in choices:
            yield activation_hypothesis(words, SwigluVariant(**{part: change}), cost)
    for words, run, cost in _wholes():
        needed = {"bias": experts.fc1_biases, "alpha": experts.swiglu_alpha}
        if all(tensor is not None for word, tensor in needed.items() if word in words):
            yield activation_hypothesis(words, as_stage(run), cost)
    yield from step_hypotheses(call)
    for words, clamp, cost in limited:
        for part, choices in parts[1:]:
            for more, change, extra in choices:
                variant = SwigluVariant(clamp=clamp, **{part: change})
                yield activation_hypothesis(f"{words}, and {more}", variant, cost + extra + 2)
