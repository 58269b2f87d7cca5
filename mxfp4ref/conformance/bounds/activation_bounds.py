"""What the activation makes of intervals of gate and up, for `bounds`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mxfp4ref.conformance.bounds.intervals import HUGE, Interval, rounded
from mxfp4ref.sm90.activation import (
    GEGLU,
    GEGLU_TANH,
    GELU,
    IDENTITY,
    RELU,
    RELU2,
    SILU,
    SITU,
    SWIGLU,
    SWIGLU_BIAS,
    SWIGLU_STEP,
    Activation,
)

__all__ = ["activated", "is_enclosed"]

_FLAT = 128  # beyond it the sigmoid is 1, or less than any float32
_SIGMOID_UNIT = 2.0**-22
_SWISH_MINIMUM_AT = -1.2784645427610738  # z sigmoid(z) falls before it and rises after it
_GELU_MINIMUM_AT = -0.7517915246935645
_GELU_TANH_MINIMUM_AT = -0.7524613850256286
_ORDINARY = (2.0**-60, 2.0**60)  # parameters with which no product leaves float32's range
_Enclosed = tuple[
    Interval, Tensor
]  # and, bool, where it is special: there only the kernel's own value is right


def is_enclosed(activation: Activation, parameters: Sequence[float]) -> bool:
    """Whether `activated` encloses the activation of numbers; else it is special everywhere."""
    return activation.id != SITU or all(_ORDINARY[0] < abs(p) < _ORDINARY[1] for p in parameters)


def activated(activation: Activation, value: Interval, parameters: Sequence[float]) -> _Enclosed:
    """The activation of `[N, 2I]`, up first, or of `[N, I]` where there is no gate."""
    if not activation.gated:
        number, _, special = _numbers(value, value)
        return _UNGATED[activation.id](number), special
    (up_low, gate_low), (up_high, gate_high) = (end.chunk(2, dim=-1) for end in (value.low, value.high))
    up_over, gate_over = value.overflows.chunk(2, dim=-1)
    up, gate = Interval(up_low, up_high, up_over), Interval(gate_low, gate_high, gate_over)
    if not is_enclosed(activation, parameters):
        return gate, torch.ones_like(gate_over)
    return _ENCLOSED[activation.id](up, gate, *parameters)


def _swiglu(up: Interval, gate: Interval) -> _Enclosed:
    up, gate, special = _numbers(up, gate)
    return _product(_swish(gate, 1.0), up), special


def _swiglu_bias(up: Interval, gate: Interval, alpha: float, beta: float, limit: float) -> _Enclosed:
    up, gate, special = _numbers(_clamped(up, limit, below=True), _clamped(gate, limit))
    if beta:
        up = rounded(Interval(up.low + beta, up.high + beta, up.overflows))
    product = _product(_swish(gate, alpha), up)
    far = alpha * torch.maximum(gate.low.abs(), gate.high.abs()) >= HUGE
    return Interval(product.low, product.high, product.overflows | far), special


def _swiglu_step(up: Interval, gate: Interval, limit: float) -> _Enclosed:
    up, gate, special = _numbers(
        _clamped(up, limit, below=True), gate
    )  # a silu(gate) of NaN is the limit: special
    return _product(_clamped(_swish(gate, 1.0), limit), up), special


def _situ(up: Interval, gate: Interval, beta: float, linear_beta: float) -> _Enclosed:
    up, gate, special = _numbers(up, gate)
    gated = _product(_tanh(gate, beta), _sigmoid(gate))
    return _product(_scaled(gated, beta), _scaled(_tanh(up, linear_beta), linear_beta)), special


def _geglu(up: Interval, gate: Interval) -> _Enclosed:
    up, gate, special = _numbers(up, gate)
    return _product(_gelu(gate), up), special


def _geglu_tanh(up: Interval, gate: Interval) -> _Enclosed:
    up, gate, special = _numbers(up, gate)
    return _product(_gelu_tanh(gate), up), special


_ENCLOSED: dict[int, Callable[..., _Enclosed]] = {
    SWIGLU: _swiglu,
    GEGLU: _geglu,
    SWIGLU_BIAS: _swiglu_bias,
    SWIGLU_STEP: _swiglu_step,
    GEGLU_TANH: _geglu_tanh,
    SITU: _situ,
}


def _numbers(up: Interval, gate: Interval) -> tuple[Interval, Interval, Tensor]:
    """Both, zero where one of them is no number, and where that is."""
    ends = (up.low, up.high, gate.low, gate.high)
    whole = torch.stack([torch.isfinite(end) for end in ends]).all(0)
    up_low, up_high, gate_low, gate_high = (torch.where(whole, end, 0.0) for end in ends)
    return Interval(up_low, up_high, up.overflows), Interval(gate_low, gate_high, gate.overflows), ~whole


def _clamped(x: Interval, limit: float, *, below: bool = False) -> Interval:
    """As the kernel's min and max do it: a NaN becomes the limit."""
    low, high = (torch.where(end.isnan(), limit, end).clamp(max=limit) for end in (x.low, x.high))
    if below:
        low, high = low.clamp(min=-limit), high.clamp(min=-limit)
    return Interval(low, high, x.overflows)


def _product(one: Interval, other: Interval) -> Interval:
    corners = torch.stack([a * b for a in (one.low, one.high) for b in (other.low, other.high)])
    return rounded(Interval(corners.amin(0), corners.amax(0), one.overflows | other.overflows))


def _scaled(x: Interval, factor: float) -> Interval:
    ends = torch.stack((x.low * factor, x.high * factor))
    return rounded(Interval(ends.amin(0), ends.amax(0), x.overflows))


def _swish(gate: Interval, alpha: float) -> Interval:
    """g * sigmoid(alpha g) over an interval of g, with the sigmoid's error and the product's rounding."""
    low, high = gate.low, gate.high
    if alpha == 0:
        ends = low / 2, high / 2
        steepest = torch.zeros_like(low)
    else:
        z = torch.stack((alpha * low, alpha * high))
        values = z * torch.sigmoid(z) / alpha
        turn = torch.sigmoid(low.new_tensor(_SWISH_MINIMUM_AT)) * _SWISH_MINIMUM_AT / alpha
        turns = (z.amin(0) < _SWISH_MINIMUM_AT) & (z.amax(0) > _SWISH_MINIMUM_AT)
        lowest, highest = values.amin(0), values.amax(0)
        ends = (
            torch.where(turns, torch.minimum(lowest, turn), lowest),
            torch.where(turns, torch.maximum(highest, turn), highest),
        )
        steepest = z.abs().amax(0)
    relative = _sigmoid_error(steepest)
    # Far on the left the sigmoid, or its reciprocal, leaves float32's normal range.
    lost = torch.where(steepest > 80, torch.maximum(low.abs(), high.abs()) * 2.0**-124, 0.0)
    ends = ends[0] - ends[0].abs() * relative - lost, ends[1] + ends[1].abs() * relative + lost
    return rounded(Interval(*ends, gate.overflows))


def _gelu(gate: Interval) -> Interval:
    """g (1 + erf(g / sqrt(2))) / 2, the sum rounded or not: near -1 its error is that of erf."""
    ends = torch.stack((gate.low, gate.high))
    values = ends * torch.special.ndtr(ends)
    turn = ends.new_tensor(_GELU_MINIMUM_AT)
    turns = (gate.low < turn) & (gate.high > turn)
    low = torch.where(turns, torch.minimum(values.amin(0), turn * torch.special.ndtr(turn)), values.amin(0))
    error = ends.abs().amax(0) * 2.0**-21
    return rounded(Interval(low - error, values.amax(0) + error, gate.overflows))


def _gelu_tanh(gate: Interval) -> Interval:
    """The same by tanh, from tanh.approx, which is off by up to 2^-10.9 of its result, to correctly rounded."""
    ends = torch.stack((gate.low, gate.high))
    values = F.gelu(ends, approximate="tanh")
    turn = ends.new_tensor(_GELU_TANH_MINIMUM_AT)
    turns = (gate.low < turn) & (gate.high > turn)
    low = torch.where(turns, torch.minimum(values.amin(0), F.gelu(turn, approximate="tanh")), values.amin(0))
    error = ends.abs().amax(0) * 2.0**-11 + 2.0**-40 * ends.abs().amax(0)
    return rounded(Interval(low - error, values.amax(0) + error, gate.overflows))


def _relu(x: Interval) -> Interval:
    return rounded(Interval(x.low.clamp(min=0), x.high.clamp(min=0), x.overflows))


def _relu2(x: Interval) -> Interval:
    positive = _relu(x)
    return rounded(Interval(positive.low.square(), positive.high.square(), x.overflows))


# Of the only value.
_UNGATED: dict[int, Callable[[Interval], Interval]] = {
    GELU: _gelu,
    RELU: _relu,
    SILU: lambda x: _swish(x, 1.0),
    RELU2: _relu2,
    IDENTITY: rounded,
}


def _sigmoid_error(steepest: Tensor) -> Tensor:
    """Its relative error for arguments of up to this size."""
    return (4 + steepest.clamp(max=_FLAT)) * _SIGMOID_UNIT + 2.0**-40


def _sigmoid(z: Interval) -> Interval:
    steepest = torch.maximum(z.low.abs(), z.high.abs())
    relative = _sigmoid_error(steepest)
    lost = torch.where(steepest > 80, 2.0**-124, 0.0)
    low, high = torch.sigmoid(z.low), torch.sigmoid(z.high)
    return Interval(low * (1 - relative) - lost, high * (1 + relative) + lost, z.overflows)


def _tanh(x: Interval, b: float) -> Interval:
    """tanh(x / b), however exact: from 2 sigmoid(2 x / b) - 1 with the sigmoid's error to correctly rounded."""
    z = torch.stack((x.low / b, x.high / b))
    low, high = torch.tanh(z.amin(0)), torch.tanh(z.amax(0))
    # The quotient may be rounded twice, which the sigmoid's error covers: it grows with the argument's size.
    error = 2 * (_sigmoid_error(2 * z.abs().amax(0)) + 2.0**-22)
    # A quotient that is flushed to zero is less than any of this.
    return Interval(
        (low - error).clamp(min=-1.0 - 2.0**-20), (high + error).clamp(max=1.0 + 2.0**-20), x.overflows
    )
