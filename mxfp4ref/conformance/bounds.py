"""How far a correct kernel that sums in another order may be off, for every output element.

A correct evaluation, for this module, is any that

- takes each product of an input and a dequantised weight exactly and adds them in float32 or wider, in any
  order and grouping, each addition rounded to nearest or toward zero, or by tensor cores that keep at least
  24 bits of the largest term; scales are applied to weights, products or sums of a group;
- stores the results of GEMM1, activation and GEMM2 rounded to bf16, to nearest (`storage="bf16"`), or in
  that or any wider format (`storage="wider"`); biases and activation are computed in float32 or wider;
- computes the sigmoid with a relative error of at most `(4 + |z|) * 2^-22`;
- sums the experts in float32 or wider in any order, and rounds to bf16 once;
- flushes subnormal float32 numbers to zero, or not, anywhere.

`bound` encloses the results of all of these: interval arithmetic from stage to stage, and within a GEMM of
depth K the running error bound `K u / (1 - K u)` times the sum of the terms' magnitudes, u = 2^-23. The
enclosure is computed in float64 and widened by more than its own rounding errors.

With a `confidence` the GEMMs' bounds are probabilistic instead: additions round to nearest with errors that
are independent of each other and zero on average (truncation within blocks of up to 32 products is allowed
for). Then the error of a sum grows with the square root of K: it exceeds `lambda sqrt(K) u/2` with a
probability of at most `2 K exp(-lambda^2 / 2)` (Higham and Mary 2019), and lambda is chosen so that the
chance of any sum of the call leaving its bound is below `1 - confidence`.

Where something is not finite, or may overflow on the way, the order decides what comes out; there the
interval is everything, NaN included, and `unbounded` says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mxfp4ref._compiler import uncompiled
from mxfp4ref._validate import check_choice
from mxfp4ref.conformance.reduction import local_experts
from mxfp4ref.formats.mxfp4 import GROUP_SIZE, decode_ue8m0, dequantize
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90 import fp32

__all__ = ["STORAGE", "Bounds", "bound"]

STORAGE = ("wider", "bf16")

_UNIT = 2.0**-23  # of float32 rounded in either direction
_SLACK = 2.0**-46  # more than float64 loses in the few operations between two uses
_TINY = 2.0**-125  # below this a float32 or bf16 result may be flushed
_HUGE = 2.0**127
_LARGEST_SCALE = 252  # with larger scale bytes a scaled weight may overflow
_SIGMOID_UNIT = 2.0**-22
_SWISH_MINIMUM_AT = -1.2784645427610738  # z sigmoid(z) falls before it and rises after it
_BLOCK = 32  # products within which the probabilistic bound allows for truncation


@dataclass(frozen=True)
class Bounds:
    """An interval for each output element.

    Attributes:
        lower, upper: `[M, H] float32`, bf16 numbers or infinities.
        unbounded: `[M, H] bool`, where any value is accepted.
    """

    lower: Tensor
    upper: Tensor
    unbounded: Tensor

    def contains(self, output: Tensor) -> Tensor:
        """Whether each element of `[M, H] bf16` lies in its interval, as bool."""
        value = fp32.widen(output)
        return self.unbounded | ((self.lower <= value) & (value <= self.upper))


@uncompiled
def bound(call: MoeCall, *, storage: str = "wider", confidence: float | None = None) -> Bounds:
    """Enclose the output of every correct evaluation of a call with MXFP4 weights.

    Args:
        call: the call; its `kernel` does not matter.
        storage: "bf16" for kernels that round between the stages as the SM90 kernel does, "wider" (the
            default) for those that may also keep more bits.
        confidence: None for a rigorous enclosure, or a probability below 1, such as `1 - 1e-9`.

    Raises:
        ValueError: bf16 weights, an unknown storage, or a confidence that is not between 0 and 1.
    """
    check_choice("storage", storage, STORAGE)
    if confidence is not None and not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a probability between 0 and 1, or None, got {confidence}")
    if not call.experts.quantized:
        raise ValueError("call: expected experts with MXFP4 weights, got bfloat16")
    with torch.no_grad():
        return _bound(call, storage, confidence)


_Interval = tuple[Tensor, Tensor]  # float64; -Inf and Inf where it is unbounded


def _bound(call: MoeCall, storage: str, confidence: float | None) -> Bounds:
    local = local_experts(call)
    shape = (*local.shape, call.experts.hidden_size)
    lower = torch.zeros(shape, dtype=torch.float64, device=local.device)
    upper = torch.zeros_like(lower)
    sums = int((local >= 0).sum()) * (2 * call.experts.intermediate_size + call.experts.hidden_size)
    for expert in torch.unique(local[local >= 0]):
        token, slot = (local == expert).nonzero(as_tuple=True)
        lower[token, slot], upper[token, slot] = _expert(call, int(expert), token, storage, confidence, sums)

    scale = torch.where(local >= 0, fp32.widen(call.token_final_scales).to(torch.float64), 0.0)[..., None]
    ends = torch.stack((scale * lower, scale * upper))
    largest = ends.abs().amax(0)
    error = _gamma(2 * call.top_k) * largest.sum(1) + _TINY * ((largest > 0) & (largest < 2 * _TINY)).sum(1)
    total = _valid((ends.amin(0).sum(1) - error, ends.amax(0).sum(1) + error))
    low, high = _to_bf16(_widen(total))
    return Bounds(low.to(torch.float32), high.to(torch.float32), torch.isinf(low) & torch.isinf(high))


def _expert(
    call: MoeCall, expert: int, token: Tensor, storage: str, confidence: float | None, sums: int
) -> _Interval:
    """One expert's output, with its bias, for its tokens: `[N, H]`."""
    some = call.experts.select(torch.tensor([expert], device=call.input.device))
    alpha, beta, limit = (
        None if p is None else float(p) for p in (some.swiglu_alpha, some.swiglu_beta, some.swiglu_limit)
    )
    x = fp32.bf16_to_fp64(call.input[token].contiguous())
    value = _gemm((x, x), some.fc1_weights[0], some.fc1_scales, confidence, sums)
    value = _store(value, storage)
    if some.fc1_biases is not None:
        value = _add(value, some.fc1_biases[0])
        value = _store(value, storage) if storage == "wider" else value
    activation = _store(_swiglu(value, alpha, beta, limit), storage)
    value = _gemm(activation, some.fc2_weights[0], some.fc2_scales, confidence, sums)
    value = _store(value, storage)
    if some.fc2_biases is not None and call.tp_rank == 0:
        value = _add(value, some.fc2_biases[0])
        value = _store(value, storage) if storage == "wider" else value
    return value


def _gemm(
    x: _Interval, packed: Tensor, scales: Tensor | None, confidence: float | None, sums: int
) -> _Interval:
    """`x @ W^T` with every error that an accumulation may make; `[N, K]` by `[R, K]`."""
    assert scales is not None
    scales = scales[0]
    depth = GROUP_SIZE * scales.shape[1]
    finite = torch.isfinite(x[0]) & torch.isfinite(x[1])
    low, high = torch.where(finite, x[0], 0.0), torch.where(finite, x[1], 0.0)
    centre, largest = (low + high) / 2, torch.maximum(low.abs(), high.abs())
    radius = (high - low) / 2 + _SLACK * (high - low)

    safe = scales.clamp(max=_LARGEST_SCALE)
    scale = decode_ue8m0(safe, convention="ocp").to(torch.float64)
    units = dequantize(packed, torch.full_like(scales, 127), dtype=torch.float32).to(torch.float64)
    weights = units * scale.repeat_interleave(GROUP_SIZE, dim=-1)
    magnitude = largest @ weights.abs().T
    # Flushed sums, sums of a group before its scale, products, inputs and weights; byte 0 read as 0.
    flushed = depth + 8 * GROUP_SIZE * scale.sum(1) + 4 * largest.sum(1, keepdim=True)
    # An exact sum is not touched by any of this: a zero row of x or W gives zero in every evaluation.
    flushed = torch.where(magnitude > 0, flushed * 2.0**-126, 0.0)
    flushed = torch.where(largest.sum(1, keepdim=True) > 0, flushed, 0.0)
    gamma = _gamma(depth) if confidence is None else _probable_gamma(depth, confidence, sums)
    error = (gamma + depth * 2.0**-51) * magnitude + flushed + radius @ weights.abs().T * (1 + 2.0**-30)
    value = centre @ weights.T

    unscaled = 6.0 * largest.sum(1, keepdim=True)
    whole = finite.all(1, keepdim=True) & (scales <= _LARGEST_SCALE).all(1)
    whole = whole & (unscaled < _HUGE) & (magnitude < _HUGE)
    low, high = torch.where(whole, value - error, -math.inf), torch.where(whole, value + error, math.inf)
    return low, high


def _swiglu(value: _Interval, alpha: float | None, beta: float | None, limit: float | None) -> _Interval:
    (up_low, gate_low), (up_high, gate_high) = (end.chunk(2, dim=-1) for end in value)
    whole = (
        torch.isfinite(up_low)
        & torch.isfinite(up_high)
        & torch.isfinite(gate_low)
        & torch.isfinite(gate_high)
    )
    up_low, up_high, gate_low, gate_high = (
        torch.where(whole, end, 0.0) for end in (up_low, up_high, gate_low, gate_high)
    )
    if limit is not None:
        up_low, up_high = (end.clamp(max=limit).clamp(min=-limit) for end in (up_low, up_high))
        gate_low, gate_high = (end.clamp(max=limit) for end in (gate_low, gate_high))
    factor = 1.0 if alpha is None else alpha
    gated = _swish(gate_low, gate_high, factor)
    shifted = up_low, up_high
    if beta is not None:
        shifted = _round((up_low + beta, up_high + beta))
    corners = torch.stack([a * b for a in gated for b in shifted])
    low, high = _round((corners.amin(0), corners.amax(0)))
    whole = whole & ((factor * torch.maximum(gate_low.abs(), gate_high.abs())).abs() < _HUGE)
    whole = whole & (torch.maximum(low.abs(), high.abs()) < _HUGE)
    return torch.where(whole, low, -math.inf), torch.where(whole, high, math.inf)


def _swish(low: Tensor, high: Tensor, alpha: float) -> _Interval:
    """g * sigmoid(alpha g) over an interval of g, with the sigmoid's error and the product's rounding."""
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
    relative = (4 + steepest) * _SIGMOID_UNIT + 2.0**-40
    # Far on the left the sigmoid, or its reciprocal, leaves float32's normal range.
    lost = torch.where(steepest > 80, torch.maximum(low.abs(), high.abs()) * 2.0**-124, 0.0)
    return _round((ends[0] - ends[0].abs() * relative - lost, ends[1] + ends[1].abs() * relative + lost))


def _add(value: _Interval, bias: Tensor) -> _Interval:
    shift = fp32.bf16_to_fp64(bias.contiguous())
    return _round(_valid((value[0] + shift, value[1] + shift)))


def _round(value: _Interval) -> _Interval:
    """One float32 rounding in either direction, or none."""
    low, high = value
    low, high = low - low.abs() * (_UNIT + _SLACK), high + high.abs() * (_UNIT + _SLACK)
    return _flushed(low, high)


def _widen(value: _Interval) -> _Interval:
    return value[0] - value[0].abs() * _SLACK, value[1] + value[1].abs() * _SLACK


def _store(value: _Interval, storage: str) -> _Interval:
    low, high = _widen(value)
    rounded = _to_bf16((low, high))
    if storage == "bf16":
        return rounded
    return torch.minimum(low, rounded[0]), torch.maximum(high, rounded[1])


def _to_bf16(value: _Interval) -> _Interval:
    """Rounding to nearest is monotonic: the ends go to the ends."""
    low, high = (_nearest_bf16(end) for end in value)
    return _flushed(low, high)


def _nearest_bf16(value: Tensor) -> Tensor:
    bits = value.view(torch.int64)
    rounded = (bits + (1 << 44) - 1 + ((bits >> 45) & 1)) >> 45 << 45
    rounded = torch.where(torch.isfinite(value), rounded, bits).view(torch.float64)
    infinite = torch.copysign(torch.full_like(value, math.inf), value)
    return torch.where(rounded.abs() >= 2.0**128, infinite, rounded)


def _flushed(low: Tensor, high: Tensor) -> _Interval:
    """Where a result may be subnormal: kept, flushed, or rounded up to the smallest normal number."""
    low = torch.where((low != 0) & (low.abs() < _TINY), torch.where(low < 0, -_TINY, 0.0), low)
    high = torch.where((high != 0) & (high.abs() < _TINY), torch.where(high > 0, _TINY, 0.0), high)
    return low, high


def _valid(value: _Interval) -> _Interval:
    """Everything, where an end is not a number or beyond float32."""
    low, high = value
    whole = (low.abs() < _HUGE) & (high.abs() < _HUGE)
    return torch.where(whole, low, -math.inf), torch.where(whole, high, math.inf)


def _gamma(depth: int) -> float:
    return depth * _UNIT / (1 - depth * _UNIT)


def _probable_gamma(depth: int, confidence: float, sums: int) -> float:
    deviations = math.sqrt(2 * math.log(2 * depth * max(sums, 1) / (1 - confidence)))
    return min(_gamma(depth), deviations * math.sqrt(depth) * _UNIT / 2 + _gamma(_BLOCK))
