"""How far a correct kernel that sums in another order may be off, for every output element.

A correct evaluation, for this module, is any that

- takes each product of an input and a dequantised weight exactly and adds them in float32 or wider, in any
  order and grouping, each addition rounded to nearest or toward zero, or by tensor cores that keep at least
  24 bits of the largest term; scales are applied to weights, products or sums of a group;
- stores the results of GEMM1, activation and GEMM2 rounded to bf16, to nearest (`storage="bf16"`), or in
  that or any wider format (`storage="wider"`); biases and activation are computed in float32 or wider;
- computes the sigmoid with a relative error of at most `(4 + min(|z|, 128)) * 2^-22`;
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

Where a NaN or an infinity comes from the call itself (an input, a routing weight, scale byte 255), every evaluation
has to give what the kernel gives. Where a sum may leave float32's range on the way, the order decides: the result is
that of an evaluation in which it does not, or an infinity; NaN only where the kernel gives NaN.
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
from mxfp4ref.model.forward import MoeTrace, trace
from mxfp4ref.sm90 import fp32

__all__ = ["STORAGE", "Bounds", "bound"]

STORAGE = ("wider", "bf16")

_UNIT = 2.0**-23  # of float32 rounded in either direction
_SLACK = 2.0**-46  # more than float64 loses in the few operations between two uses
_TINY = 2.0**-125  # below this a float32 or bf16 result may be flushed
_HUGE = 2.0**127
_LARGEST_SCALE = 252  # with larger scale bytes a scaled weight may overflow
_NO_NUMBER = 255  # the scale byte that is NaN, or infinite
_FLAT = 128  # beyond it the sigmoid is 1, or less than any float32
_SIGMOID_UNIT = 2.0**-22
_SWISH_MINIMUM_AT = -1.2784645427610738  # z sigmoid(z) falls before it and rises after it
_BLOCK = 32  # products within which the probabilistic bound allows for truncation


@dataclass(frozen=True)
class Bounds:
    """An interval for each output element.

    Attributes:
        lower, upper: `[M, H] float32`, bf16 numbers or infinities; both NaN where only NaN is right.
        overflows: `[M, H] bool`, where something may leave float32's range on the way: an infinity is accepted too.
    """

    lower: Tensor
    upper: Tensor
    overflows: Tensor

    def contains(self, output: Tensor, expected: Tensor | None = None) -> Tensor:
        """Whether each element of `[M, H] bf16` lies in its interval, as bool.

        Args:
            output: what a kernel gave.
            expected: what the SM90 kernel gives. Where something overflows, NaN is accepted only where it is NaN.
        """
        value = fp32.widen(output)
        inside = (self.lower <= value) & (value <= self.upper)
        inside |= torch.isnan(self.lower) & torch.isnan(value)
        infinite, nan = torch.isinf(value), torch.isnan(value)
        if expected is not None:
            nan &= torch.isnan(fp32.widen(expected))
        return inside | (self.overflows & (infinite | nan))


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
    if not call.experts.tactics_show:
        raise ValueError("call: expected MXFP4 weights beside bf16 activations, got bfloat16 or W4A8 experts")
    with torch.no_grad():
        return _bound(call, storage, confidence)


@dataclass(frozen=True)
class _Interval:
    """float64 ends of an evaluation in which nothing overflows; where both are one NaN or infinity, it is that.

    `overflows` says where another evaluation may have left float32's range.
    """

    low: Tensor
    high: Tensor
    overflows: Tensor

    def certain(self, where: Tensor, value: Tensor) -> _Interval:
        """With the kernel's own value at these places."""
        value = value.to(torch.float64)
        return _Interval(
            torch.where(where, value, self.low),
            torch.where(where, value, self.high),
            self.overflows & ~where,
        )


def _bound(call: MoeCall, storage: str, confidence: float | None) -> Bounds:
    local = local_experts(call)
    shape = (*local.shape, call.experts.hidden_size)
    lower = torch.zeros(shape, dtype=torch.float64, device=local.device)
    upper, overflows = torch.zeros_like(lower), torch.zeros_like(lower, dtype=torch.bool)
    sums = int((local >= 0).sum()) * (2 * call.experts.intermediate_size + call.experts.hidden_size)
    kernels = trace(call) if _has_specials(call) else None
    for expert in torch.unique(local[local >= 0]):
        token, slot = (local == expert).nonzero(as_tuple=True)
        one = _Expert(call, int(expert), kernels, storage, confidence, sums).output(token)
        lower[token, slot], upper[token, slot], overflows[token, slot] = one.low, one.high, one.overflows

    scale = torch.where(local >= 0, fp32.widen(call.token_final_scales).to(torch.float64), 0.0)[..., None]
    ends = torch.stack((scale * lower, scale * upper))
    largest = torch.where(torch.isfinite(ends), ends, 0.0).abs().amax(0)
    error = _gamma(2 * call.top_k) * largest.sum(1) + _TINY * ((largest > 0) & (largest < 2 * _TINY)).sum(1)
    beyond = overflows.any(1) | (largest.sum(1) >= _HUGE)
    total = _widen(_Interval(ends.amin(0).sum(1) - error, ends.amax(0).sum(1) + error, beyond))
    low, high = (_nearest_bf16(end) for end in (total.low, total.high))
    low, high = _flushed(low, high)
    return Bounds(low.to(torch.float32), high.to(torch.float32), total.overflows)


def _has_specials(call: MoeCall) -> bool:
    """Whether a NaN or an infinity may come from the call itself."""
    experts = call.experts
    given = (call.input, experts.fc1_biases, experts.fc2_biases)
    scales = (experts.fc1_scales, experts.fc2_scales)
    infinite = any(bool((~torch.isfinite(t)).any()) for t in given if t is not None)
    return infinite or any(bool((s == _NO_NUMBER).any()) for s in scales if s is not None)


@dataclass(frozen=True)
class _Expert:
    """One expert of a call, and how its results are bounded."""

    call: MoeCall
    expert: int
    kernels: MoeTrace | None  # what the kernel gives, where a value may be no number
    storage: str
    confidence: float | None
    sums: int

    def output(self, token: Tensor) -> _Interval:
        """Its output, with its bias, for its tokens: `[N, H]`."""
        call, storage = self.call, self.storage
        some = call.experts.select(torch.tensor([self.expert], device=call.input.device))
        x = fp32.bf16_to_fp64(call.input[token].contiguous())
        value = _Interval(x, x, torch.zeros_like(x, dtype=torch.bool))
        value = _store(self._gemm(value, some.fc1_weights[0], some.fc1_scales, "fc1_output"), storage)
        if some.fc1_biases is not None:
            value = _add(value, some.fc1_biases[0])
            value = _store(value, storage) if storage == "wider" else value
        parameters = (some.swiglu_alpha, some.swiglu_beta, some.swiglu_limit)
        activation = _store(
            self._swiglu(value, *(None if p is None else float(p) for p in parameters)), storage
        )
        value = self._gemm(activation, some.fc2_weights[0], some.fc2_scales, "fc2_output")
        value = _store(value, storage)
        if some.fc2_biases is not None and call.tp_rank == 0:
            value = _add(value, some.fc2_biases[0])
            value = _store(value, storage) if storage == "wider" else value
        return value

    def _kernels(self, name: str, like: Tensor) -> Tensor:
        """The kernel's values of a stage for this expert's tokens; only where `_has_specials` are they asked for."""
        if self.kernels is None:
            return torch.full_like(like, math.nan)
        return fp32.widen(getattr(self.kernels, name)[self.kernels.expert == self.expert])

    def _gemm(self, x: _Interval, packed: Tensor, scales: Tensor | None, name: str) -> _Interval:
        """`x @ W^T` with every error that an accumulation may make; `[N, K]` by `[R, K]`."""
        assert scales is not None
        scales = scales[0]
        depth = GROUP_SIZE * scales.shape[1]
        finite = torch.isfinite(x.low) & torch.isfinite(x.high)
        low, high = torch.where(finite, x.low, 0.0), torch.where(finite, x.high, 0.0)
        centre, largest = (low + high) / 2, torch.maximum(low.abs(), high.abs())
        radius = (high - low) / 2 + _SLACK * (high - low)

        scale = decode_ue8m0(scales.clamp(max=_NO_NUMBER - 1), convention="ocp").to(torch.float64)
        units = dequantize(packed, torch.full_like(scales, 127), dtype=torch.float32).to(torch.float64)
        weights = units * scale.repeat_interleave(GROUP_SIZE, dim=-1)
        magnitude = largest @ weights.abs().T
        # Flushed sums, sums of a group before its scale, products, inputs and weights; byte 0 read as 0.
        flushed = depth + 8 * GROUP_SIZE * scale.sum(1) + 4 * largest.sum(1, keepdim=True)
        # An exact sum is not touched by any of this: a zero row of x or W gives zero in every evaluation.
        flushed = torch.where(magnitude > 0, flushed * 2.0**-126, 0.0)
        flushed = torch.where(largest.sum(1, keepdim=True) > 0, flushed, 0.0)
        gamma = (
            _gamma(depth) if self.confidence is None else _probable_gamma(depth, self.confidence, self.sums)
        )
        error = (gamma + depth * 2.0**-51) * magnitude + flushed + radius @ weights.abs().T * (1 + 2.0**-30)
        value = centre @ weights.T

        unscaled = 6.0 * largest.sum(1, keepdim=True)
        overflows = x.overflows.any(1, keepdim=True) | (scales > _LARGEST_SCALE).any(1)
        overflows = overflows | (unscaled >= _HUGE) | (magnitude >= _HUGE)
        special = ~finite.all(1, keepdim=True) | (scales == _NO_NUMBER).any(1)
        return _Interval(value - error, value + error, overflows).certain(special, self._kernels(name, value))

    def _swiglu(
        self, value: _Interval, alpha: float | None, beta: float | None, limit: float | None
    ) -> _Interval:
        (up_low, gate_low), (up_high, gate_high) = (end.chunk(2, dim=-1) for end in (value.low, value.high))
        up_over, gate_over = value.overflows.chunk(2, dim=-1)
        if (alpha, beta, limit) != (None, None, None):
            # As the kernel's min and max do it: a NaN becomes the limit.
            most = math.inf if limit is None else limit
            up_low, up_high = (torch.where(end.isnan(), most, end) for end in (up_low, up_high))
            gate_low, gate_high = (torch.where(end.isnan(), most, end) for end in (gate_low, gate_high))
            up_low, up_high = (end.clamp(max=most).clamp(min=-most) for end in (up_low, up_high))
            gate_low, gate_high = (end.clamp(max=most) for end in (gate_low, gate_high))
        whole = torch.isfinite(up_low) & torch.isfinite(up_high)
        whole = whole & torch.isfinite(gate_low) & torch.isfinite(gate_high)
        up_low, up_high, gate_low, gate_high = (
            torch.where(whole, end, 0.0) for end in (up_low, up_high, gate_low, gate_high)
        )
        factor = 1.0 if alpha is None else alpha
        none = torch.zeros_like(whole)
        gated = _swish(gate_low, gate_high, factor)
        shifted = _Interval(up_low, up_high, none)
        if beta is not None:
            shifted = _round(_Interval(up_low + beta, up_high + beta, none))
        corners = torch.stack([a * b for a in (gated.low, gated.high) for b in (shifted.low, shifted.high)])
        product = _round(_Interval(corners.amin(0), corners.amax(0), up_over | gate_over))
        overflows = product.overflows | (factor * torch.maximum(gate_low.abs(), gate_high.abs()) >= _HUGE)
        return _Interval(product.low, product.high, overflows).certain(
            ~whole, self._kernels("activation", product.low)
        )


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
    relative = (4 + steepest.clamp(max=_FLAT)) * _SIGMOID_UNIT + 2.0**-40
    # Far on the left the sigmoid, or its reciprocal, leaves float32's normal range.
    lost = torch.where(steepest > 80, torch.maximum(low.abs(), high.abs()) * 2.0**-124, 0.0)
    ends = ends[0] - ends[0].abs() * relative - lost, ends[1] + ends[1].abs() * relative + lost
    return _round(_Interval(*ends, torch.zeros_like(low, dtype=torch.bool)))


def _add(value: _Interval, bias: Tensor) -> _Interval:
    shift = fp32.bf16_to_fp64(bias.contiguous())
    return _round(_Interval(value.low + shift, value.high + shift, value.overflows))


def _round(value: _Interval) -> _Interval:
    """One float32 rounding in either direction, or none."""
    return _spread(value, _UNIT + _SLACK, flushed=True)


def _widen(value: _Interval) -> _Interval:
    return _spread(value, _SLACK, flushed=False)


def _spread(value: _Interval, relative: float, *, flushed: bool) -> _Interval:
    """With both ends moved outwards; an infinity or NaN stays what it is."""
    low, high = value.low, value.high
    low = torch.where(torch.isfinite(low), low - low.abs() * relative, low)
    high = torch.where(torch.isfinite(high), high + high.abs() * relative, high)
    low, high = _flushed(low, high) if flushed else (low, high)
    return _Interval(low, high, value.overflows | _beyond(low) | _beyond(high))


def _beyond(end: Tensor) -> Tensor:
    return torch.isfinite(end) & (end.abs() >= _HUGE)


def _store(value: _Interval, storage: str) -> _Interval:
    """Rounding to bf16 is monotonic: the ends go to the ends. What is beyond bf16's range is kept."""
    value = _widen(value)
    low, high = _flushed(_to_bf16_grid(value.low), _to_bf16_grid(value.high))
    if storage == "bf16":
        return _Interval(low, high, value.overflows)
    return _Interval(torch.minimum(value.low, low), torch.maximum(value.high, high), value.overflows)


def _to_bf16_grid(value: Tensor) -> Tensor:
    bits = value.view(torch.int64)
    rounded = (bits + (1 << 44) - 1 + ((bits >> 45) & 1)) >> 45 << 45
    return torch.where(torch.isfinite(value), rounded, bits).view(torch.float64)


def _nearest_bf16(value: Tensor) -> Tensor:
    rounded = _to_bf16_grid(value)
    return torch.where(
        rounded.abs() >= 2.0**128, torch.copysign(torch.full_like(value, math.inf), value), rounded
    )


def _flushed(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Where a result may be subnormal: kept, flushed, or rounded up to the smallest normal number."""
    low = torch.where((low != 0) & (low.abs() < _TINY), torch.where(low < 0, -_TINY, 0.0), low)
    high = torch.where((high != 0) & (high.abs() < _TINY), torch.where(high > 0, _TINY, 0.0), high)
    return low, high


def _gamma(depth: int) -> float:
    return depth * _UNIT / (1 - depth * _UNIT)


def _probable_gamma(depth: int, confidence: float, sums: int) -> float:
    deviations = math.sqrt(2 * math.log(2 * depth * max(sums, 1) / (1 - confidence)))
    return min(_gamma(depth), deviations * math.sqrt(depth) * _UNIT / 2 + _gamma(_BLOCK))
