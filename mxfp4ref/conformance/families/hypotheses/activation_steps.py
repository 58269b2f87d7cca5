"""Hypotheses on the activation's steps: their order, the rounding of each, and how the sigmoid is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypotheses.index_maps import shifted
from mxfp4ref.conformance.families.hypothesis import Hypothesis
from mxfp4ref.defects.variants.swiglu import SwigluVariant, clamp_both
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90 import fp32, mufu
from mxfp4ref.sm90.activation import SWIGLU, Activation, sigmoid
from mxfp4ref.sm90.swiglu import swiglu

__all__ = ["OfSwiglu", "activation_hypothesis", "as_stage", "halves", "step_hypotheses"]

OfSwiglu = Callable[..., Tensor]  # called as `swiglu`
_Maybe = Tensor | None
_Function = Callable[[Tensor], Tensor]
_add, _max, _min, _mul = fp32.add, fp32.maximum, fp32.minimum, fp32.mul
_TYPES = ((torch.bfloat16, "bf16"), (torch.float16, "float16"))
_SATURATES = (4, 5, 6, 8, 10, 12, 16, 20)  # arguments beyond which a sigmoid may be taken for constant
# Above these e^x is infinite, and e^x / (1 + e^x) is NaN.
_OVERFLOWS = ((88.722839, "float32"), (11.0898664, "float16"))
# 2^f by a polynomial, lowest power first, relative errors as small as can be: of f from 0 to 1 with 1 for f = 0, as
# FlashAttention-4 has them; with any number for it; and of f from -1/2 to 1/2.
_POLYNOMIALS = (
    (1.0, 0.922497093677521),
    (1.0, 0.665785074234009, 0.330107033252716),
    (1.0, 0.695146143436432, 0.22756439447403, 0.077119089663028717),
    (1.0, 0.693042695522308, 0.241291254758835, 0.052225358784199, 0.013434938155115),
    (1.0, 0.693151414394379, 0.240163609385490, 0.055802188213689, 0.009014522656798, 0.001868101535365),
    (0.970178794191430, 0.970178794191430),
    (1.001724763214726, 0.657636275736264, 0.337189434619560),
    (0.999925218562715, 0.695833540494753, 0.226067155427483, 0.078024522640480),
    (1.000002593370694, 0.693003834469992, 0.241442756891416, 0.052011460610461, 0.013534167916049),
)
_CENTRED = (
    (1.029030006504222, 0.686020004336148),
    (1.000443141956297, 0.703448005891327, 0.238428935763949),
    (0.999928073539401, 0.693260985460656, 0.242611122193216, 0.055171669057925),
    (0.999999261445712, 0.693121814736689, 0.240247448278638, 0.055917860319388, 0.009570101911165),
)
# Alpha, beta and limit, more than one of them; with one alone there are other hypotheses.
_OF_GPT_OSS = ((1.702, 1.0, 7.0), (1.702, 1.0, torch.inf), (1.702, 0.0, 7.0), (1.0, 1.0, 7.0))


def as_stage(run: OfSwiglu) -> Callable[..., Tensor]:
    """What is called as `swiglu`, as the stage `activate`."""

    def stage(activation: Activation, x: Tensor, bias: _Maybe, parameters: Sequence[_Maybe]) -> Tensor:
        return run(x, bias, *(parameters or (None, None, None)))

    return stage


# As rows of GEMM1's weights in another order do.
_AS_ROWS = ("up and gate change places", "GEMM1's columns", "GEMM1's halves")


def activation_hypothesis(words: str, run: Callable[..., Tensor], cost: float) -> Hypothesis:
    """That another stage `activate` runs."""
    change = lambda p: p.staging(activate=run)  # noqa: E731
    stages = ("fc1", "activation") if words.startswith(_AS_ROWS) else ("activation",)
    return Hypothesis("activation", stages, f"in the activation {words}", change, cost)


def step_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """Of a SwiGLU, with and without parameters."""
    experts = call.experts
    given = {
        "GEMM1's output plus bias": experts.fc1_biases,
        "alpha gate": experts.swiglu_alpha,
        "up + beta": experts.swiglu_beta,
    }
    places = [*(place for place, tensor in given.items() if tensor is not None), "the sigmoid", "silu(gate)"]
    for words, run, cost in _roundings(places):
        yield activation_hypothesis(words, as_stage(run), cost)
    for words, function, cost in _sigmoids():
        yield activation_hypothesis(words, SwigluVariant(sigmoid=function), cost)
    for words, run, cost in (*_orders(call), *_sources(call)):
        yield activation_hypothesis(words, as_stage(run), cost)
    if call.activation.id == SWIGLU:
        for alpha, beta, limit in _OF_GPT_OSS:
            said = {"alpha is 1.702": alpha != 1, "beta is 1": beta, "the limit is 7": limit < torch.inf}
            words = (
                f"{', '.join(w for w, there in said.items() if there)} as of gpt-oss, where none are given"
            )
            cost = 0.9 + 0.2 * sum(map(bool, said.values()))
            yield activation_hypothesis(words, as_stage(_with(alpha, beta, limit)), cost)


def _steps(
    x: Tensor, bias: _Maybe, alpha: _Maybe, beta: _Maybe, limit: _Maybe, rounded: dict[str, _Function]
) -> Tensor:
    """The kernel's SwiGLU, with what comes of these steps rounded."""

    def step(name: str, value: Tensor) -> Tensor:
        return rounded[name](value) if name in rounded else value

    value = fp32.widen(x)
    if bias is not None:
        value = step("GEMM1's output plus bias", _add(value, fp32.widen(bias).expand_as(value)))
    up, gate = value.chunk(2, dim=-1)
    if limit is not None:
        up, gate = clamp_both(up, gate, limit.expand_as(up))
    scaled = gate if alpha is None else step("alpha gate", _mul(gate, alpha.expand_as(gate)))
    gated = step("silu(gate)", _mul(gate, step("the sigmoid", sigmoid(scaled))))
    return _mul(gated, up if beta is None else step("up + beta", _add(up, beta.expand_as(up))))


def _roundings(places: list[str]) -> Iterator[tuple[str, OfSwiglu, float]]:
    """Of one or two of the steps; of the sigmoid alone other hypotheses are."""
    some = [(place,) for place in places if place != "the sigmoid"]
    for chosen in (*some, *combinations(places, 2)):
        for dtype, name in _TYPES:

            def run(*given: _Maybe, chosen: tuple[str, ...] = chosen, dtype: torch.dtype = dtype) -> Tensor:
                return _steps(*given, rounded=dict.fromkeys(chosen, _to(dtype)))  # type: ignore[arg-type]

            words = f"{' and '.join(chosen)} {'is' if len(chosen) == 1 else 'are'} rounded to {name}"
            yield words, run, 0.2 + len(chosen)


def _to(dtype: torch.dtype) -> _Function:
    return lambda t: t.to(dtype).to(torch.float32)


def _sigmoids() -> Iterator[tuple[str, _Function, float]]:
    half = torch.tensor(0.5)

    def by_tanh(z: Tensor) -> Tensor:
        halved = half.to(z.device).expand_as(z)
        return fp32.fma(mufu.tanh(_mul(z, halved)), halved, halved)

    def ratio(z: Tensor) -> Tensor:
        power = torch.exp(z)
        return power / (1 + power)

    yield "the sigmoid is 1/2 + tanh(x / 2) / 2 with tanh.approx", by_tanh, 1.2
    yield "the sigmoid is e^x / (1 + e^x) in float32, NaN of a large x", ratio, 1.2
    for most, name in _OVERFLOWS:
        yield (
            f"the sigmoid is NaN of a large argument, above {most:.5g}, of which e^x overflows {name}: as of "
            "e^x / (1 + e^x), Inf / Inf",
            lambda z, most=most: sigmoid(z).masked_fill(z > most, torch.nan),
            1.1,
        )
    for most in _SATURATES:
        for scale, name in ((1.0, "e^-x"), (math.log(2), "2^-x")):
            yield (
                f"the argument of the sigmoid's exponential, as {name}, is kept within -{most} and {most}",
                lambda z, most=most * scale: sigmoid(z.clamp(-most, most)),
                1.3,
            )
    for powers, start in ((_POLYNOMIALS, "0"), (_CENTRED, "-1/2")):
        for coefficients in powers:
            first = ", 1 for 0" * (coefficients[0] == 1)
            yield (
                f"the sigmoid's exponential is a polynomial of degree {len(coefficients) - 1}, not ex2.approx: 2^x "
                f"of fractions from {start}{first}",
                _by_polynomial(coefficients, centred=powers is _CENTRED),
                1.2,
            )
    for dtype, name in _TYPES:
        r = _to(dtype)
        yield (
            f"the sigmoid is 1/2 + tanh(x / 2) / 2, with tanh and its argument rounded to {name}",
            lambda z, r=r: 0.5 + 0.5 * r(torch.tanh(r(0.5 * z))),
            1.3,
        )
        yield (
            f"the sigmoid is 1/2 + tanh(x / 2) / 2, each step rounded to {name}",
            lambda z, r=r: r(0.5 + 0.5 * r(torch.tanh(r(0.5 * z)))),
            1.2,
        )
        yield (
            f"the sigmoid is 1 / (1 + e^-x), each step rounded to {name}",
            lambda z, r=r: r(1 / r(1 + r(torch.exp(r(-z))))),
            1.2,
        )
        yield f"e^-x is rounded to {name} in the sigmoid", lambda z, r=r: 1 / (1 + r(torch.exp(-z))), 1.3
        yield (
            f"the sigmoid is e^x / (1 + e^x), each step rounded to {name}: NaN of a large x",
            lambda z, r=r: _ratio_in(z, r),
            1.3,
        )
        yield (
            f"the sigmoid's argument and the sigmoid are rounded to {name}",
            lambda z, r=r: r(torch.sigmoid(r(z))),
            1.3,
        )


def _by_polynomial(coefficients: Sequence[float], *, centred: bool) -> _Function:
    """1 / (1 + 2^x), where 2^x is a polynomial of x's fraction above (or on either side of) a whole number."""

    def run(z: Tensor) -> Tensor:
        x = _mul(-z, torch.full_like(z, math.log2(math.e))).clamp(-127.0, 128.0)
        whole = x.round() if centred else x.floor()
        value = torch.full_like(x, coefficients[-1])
        for coefficient in coefficients[-2::-1]:
            value = fp32.fma(value, x - whole, torch.full_like(x, coefficient))
        return mufu.rcp(_add(torch.ones_like(x), value * torch.exp2(whole)))

    return run


def _ratio_in(z: Tensor, rounded: _Function) -> Tensor:
    power = rounded(torch.exp(rounded(z)))
    return rounded(power / rounded(1 + power))


def _orders(call: MoeCall) -> Iterator[tuple[str, OfSwiglu, float]]:
    """Steps in another order."""
    experts = call.experts
    if experts.swiglu_limit is None:
        return

    def shifted(again: bool) -> OfSwiglu:
        def run(x: Tensor, bias: _Maybe, alpha: _Maybe, beta: _Maybe, limit: _Maybe) -> Tensor:
            up, gate = halves(x, bias, None)
            if beta is not None and limit is not None:
                limit = limit.expand_as(up)
                up = _max(_min(up, limit), -limit) if again else up
                up, beta = _add(up, beta.expand_as(up)), None
            return swiglu(torch.cat((up, gate), -1), None, alpha, beta, limit)

        return run

    def silu_clamped(x: Tensor, bias: _Maybe, alpha: _Maybe, beta: _Maybe, limit: _Maybe) -> Tensor:
        up, gate = halves(x, bias, None)
        if limit is None:
            return swiglu(x, bias, alpha, beta, limit)
        limit = limit.expand_as(gate)
        scaled = gate if alpha is None else _mul(gate, alpha.expand_as(gate))
        gated = _min(_mul(gate, sigmoid(scaled)), limit)
        up, _ = clamp_both(up, gate, limit)
        return _mul(gated, up if beta is None else _add(up, beta.expand_as(up)))

    if experts.swiglu_beta is not None:
        yield "beta is added to up before the clamp to the limit, not after it", shifted(False), 1
        yield "up is clamped to the limit again after beta is added", shifted(True), 1.1
    yield "silu(gate) is clamped to the limit instead of gate", silu_clamped, 1.1


_WHOLE = 1 << 30  # columns, more than there are
_USES = ("the sigmoid", "the product", "the product's other side")  # of gate, of gate again, and of up
# GEMM1's output, bias and limit to up and gate.
_Source = Callable[[Tensor, _Maybe, _Maybe], tuple[Tensor, Tensor]]


def _sources(call: MoeCall) -> Iterator[tuple[str, OfSwiglu, float]]:
    """One of the three uses of up and gate has them from another place or an earlier step."""
    experts = call.experts
    sources: list[tuple[str, _Source, float]] = []
    if experts.fc1_biases is not None:
        sources.append(("without the fc1 bias", lambda x, _, limit: halves(x, None, limit), 1.0))
    if experts.swiglu_limit is not None:
        sources.append(("without the clamp", lambda x, bias, _: halves(x, bias, None), 1.0))
    for block in (2, 4, 8, 16, _WHOLE):
        for by, words in ((-1, "before"), (1, "after")):
            if block == 2 and by > 0:
                continue
            end = "first" if by < 0 else "last"
            within = f" in blocks of {block}, whose {end} has its own" * (block < _WHOLE)
            sources.append((f"of the column {words} it{within}", _of_columns(_beside(block, by)), 1.4))
    pairs = _of_columns(lambda n: torch.arange(n) ^ 1)
    sources.append(("of the other column of its pair", pairs, 1.4))
    for use, what in enumerate(("gate", "gate", "up")):
        for words, source, cost in sources:
            if use < 2 or "clamp" not in words:
                yield f"{_USES[use]} takes {what} {words}", _having(use, source), cost + 0.1


def halves(x: Tensor, bias: _Maybe, limit: _Maybe) -> tuple[Tensor, Tensor]:
    """Up and gate, clamped where there is a limit."""
    value = fp32.widen(x) if bias is None else _add(fp32.widen(x), fp32.widen(bias).expand_as(x))
    up, gate = value.chunk(2, dim=-1)
    return (up, gate) if limit is None else clamp_both(up, gate, limit.expand_as(up))


def _beside(block: int, by: int) -> Callable[[int], Tensor]:
    def places(size: int) -> Tensor:
        at, there = torch.arange(size), shifted(size, by)
        return torch.where(there // block == at // block, there, at)

    return places


def _of_columns(places: Callable[[int], Tensor]) -> _Source:
    def source(x: Tensor, bias: _Maybe, limit: _Maybe) -> tuple[Tensor, Tensor]:
        up, gate = halves(x, bias, limit)
        there = places(up.shape[-1]).to(up.device)
        return up[..., there], gate[..., there]

    return source


def _having(use: int, source: _Source) -> OfSwiglu:
    def run(x: Tensor, bias: _Maybe, alpha: _Maybe, beta: _Maybe, limit: _Maybe) -> Tensor:
        (up, gate), (other_up, other_gate) = halves(x, bias, limit), source(x, bias, limit)
        scaled = other_gate if use == 0 else gate
        gate, up = other_gate if use == 1 else gate, other_up if use == 2 else up
        scaled = scaled if alpha is None else _mul(scaled, alpha.expand_as(gate))
        return _mul(_mul(gate, sigmoid(scaled)), up if beta is None else _add(up, beta.expand_as(up)))

    return run


def _with(alpha: float, beta: float, limit: float) -> OfSwiglu:
    def run(x: Tensor, bias: _Maybe, *given: _Maybe) -> Tensor:
        if any(parameter is not None for parameter in given):
            return swiglu(x, bias, *given)
        numbers = (torch.tensor([value], device=x.device) for value in (alpha, beta, limit))
        return swiglu(x, bias, *numbers)

    return run
