"""How far a correct kernel that sums in another order may be off, for every output element.

A correct evaluation, for this module, is any that

- takes each product of an input and a dequantised weight exactly and adds them in float32 or wider, in any
  order and grouping, each addition rounded to nearest or toward zero, or by tensor cores that keep at least
  24 bits of the largest term; scales are applied to weights, products or sums of a group;
- stores the results of GEMM1, activation and GEMM2 rounded to bf16, to nearest (`storage="bf16"`), or in
  that or any wider format (`storage="wider"`); biases and activation are computed in float32 or wider;
- computes the sigmoid with a relative error of at most `(4 + min(|z|, 128)) * 2^-22`, and tanh(z) as
  `2 sigmoid(2 z) - 1` or better; erf with an absolute error of at most 2^-21, and
  the tanh of GegluTanh with one of 2^-10;
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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mxfp4ref._choices import STORAGE, Storage
from mxfp4ref._compiler import uncompiled
from mxfp4ref._validate import check_below, check_choice, check_tensor
from mxfp4ref.conformance.bounds.activation_bounds import activated, is_enclosed
from mxfp4ref.conformance.bounds.intervals import (
    HUGE,
    SLACK,
    TINY,
    UNIT,
    Interval,
    add,
    flushed,
    nearest_bf16,
    stored,
    widened,
)
from mxfp4ref.conformance.findings.reduction import local_experts
from mxfp4ref.formats.mxfp4 import GROUP_SIZE, decode_ue8m0, dequantize
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import MoeTrace, trace
from mxfp4ref.sm90 import fp32

__all__ = ["STORAGE", "Bounds", "bound", "intermediates_within", "specials_alone"]


_LARGEST_SCALE = 252  # with larger scale bytes a scaled weight may overflow
_NO_NUMBER = 255  # the scale byte that is NaN, or infinite
_BLOCK = 32  # products within which the probabilistic bound allows for truncation


_FLOATS = (torch.bfloat16, torch.float16, torch.float32)  # of outputs


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
        """Whether each element of `[..., M, H] bf16` lies in its interval, as bool.

        Args:
            output: what a kernel gave.
            expected: what the SM90 kernel gives. Where something overflows, NaN is accepted only where it is NaN.

        Raises:
            TypeError, ValueError: one of them is something else, or of another shape.
        """
        for name, tensor in {"output": output, "expected": output if expected is None else expected}.items():
            check_tensor(name, tensor, dtype=_FLOATS, shape=("...", *self.lower.shape))
        value = fp32.widen(output)
        inside = (self.lower <= value) & (value <= self.upper)
        inside |= torch.isnan(self.lower) & torch.isnan(value)
        infinite, nan = torch.isinf(value), torch.isnan(value)
        if expected is not None:
            nan &= torch.isnan(fp32.widen(expected))
        return inside | (self.overflows & (infinite | nan))


@uncompiled
def bound(call: MoeCall, *, storage: Storage = "wider", confidence: float | None = None) -> Bounds:
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
    check_below("confidence", confidence, 1, "a probability between 0 and 1")
    if not call.experts.tactics_show:
        raise ValueError("call: expected MXFP4 weights beside bf16 activations, got bfloat16 or W4A8 experts")
    with torch.no_grad():
        return _bound(call, storage, confidence)


@uncompiled
def specials_alone(call: MoeCall, output: Tensor, outside: Tensor) -> bool:
    """Whether an evaluation gives what lies outside that is correct but for special values, handled anyhow.

    These are what comes of the call's NaNs, infinities and scale bytes 255, and of a sum that overflows on the way.

    Args:
        call: the call.
        output: `[M, H] bf16`, what a kernel gave.
        outside: `[M, H] bool`, where that leaves its bounds.
    """
    of_experts = zip(*(p.tolist() for p in _parameters(call)), strict=True)
    if not all(is_enclosed(call.activation, parameters) for parameters in of_experts):
        return False
    if not _has_specials(call) and bool(output[outside].isfinite().any()):
        return False
    with torch.no_grad():
        return bool(_bound(call, "wider", None, anyhow=True).contains(output)[outside].all())


@uncompiled
def intermediates_within(call: MoeCall, returned: Mapping[str, Tensor]) -> bool:
    """Whether a correct evaluation may give these intermediates, of the names and shapes of `MoeTrace`."""
    local = local_experts(call)
    expert = local[local >= 0].sort(stable=True).values
    names = [name for name in ("fc1_output", "activation", "fc2_output") if name in returned]
    with torch.no_grad():
        for one in torch.unique(expert) if names else ():
            token = (local == one).nonzero(as_tuple=True)[0]
            kernels = trace(call) if _has_specials(call) else None
            for name, value in _Expert(call, int(one), kernels, "wider", None, 1, False).stages(token):
                if name in names:
                    rows = returned[name][expert == one] if len(returned[name]) == len(expert) else None
                    if rows is None or rows.shape != value.low.shape or rows.dtype != torch.bfloat16:
                        return False
                    if not bool(_in_bf16(value).contains(rows.contiguous()).all()):
                        return False
    return True


def _in_bf16(value: Interval) -> Bounds:
    value = widened(value)
    low, high = flushed(nearest_bf16(value.low), nearest_bf16(value.high))
    return Bounds(low.to(torch.float32), high.to(torch.float32), value.overflows)


def _bound(call: MoeCall, storage: str, confidence: float | None, *, anyhow: bool = False) -> Bounds:
    local = local_experts(call)
    shape = (*local.shape, call.experts.hidden_size)
    lower = torch.zeros(shape, dtype=torch.float64, device=local.device)
    upper, overflows = torch.zeros_like(lower), torch.zeros_like(lower, dtype=torch.bool)
    sums = int((local >= 0).sum()) * (call.experts.gemm_shapes[0][0] + call.experts.hidden_size)
    kernels = trace(call) if _has_specials(call) and not anyhow else None
    for expert in torch.unique(local[local >= 0]):
        token, slot = (local == expert).nonzero(as_tuple=True)
        one = _Expert(call, int(expert), kernels, storage, confidence, sums, anyhow).output(token)
        lower[token, slot], upper[token, slot], overflows[token, slot] = one.low, one.high, one.overflows

    scale = torch.where(local >= 0, fp32.widen(call.token_final_scales).to(torch.float64), 0.0)[..., None]
    ends = torch.stack((scale * lower, scale * upper))
    largest = torch.where(torch.isfinite(ends), ends, 0.0).abs().amax(0)
    error = _gamma(2 * call.top_k) * largest.sum(1) + TINY * ((largest > 0) & (largest < 2 * TINY)).sum(1)
    beyond = overflows.any(1) | (largest.sum(1) >= HUGE)
    return _in_bf16(Interval(ends.amin(0).sum(1) - error, ends.amax(0).sum(1) + error, beyond))


def _has_specials(call: MoeCall) -> bool:
    """Whether a NaN or an infinity may come from the call itself, or what is enclosed by nothing else."""
    experts = call.experts
    of_experts = zip(*(p.tolist() for p in _parameters(call)), strict=True)
    if not all(is_enclosed(call.activation, parameters) for parameters in of_experts):
        return True
    given = (call.input, experts.fc1_biases, experts.fc2_biases)
    scales = (experts.fc1_scales, experts.fc2_scales)
    infinite = any(bool((~torch.isfinite(t)).any()) for t in given if t is not None)
    return infinite or any(bool((s == _NO_NUMBER).any()) for s in scales if s is not None)


def _parameters(call: MoeCall) -> list[Tensor]:
    """Those that the activation reads, `[E] float32` each."""
    given = {name: getattr(call.experts, name) for name in call.activation.defaults}
    like: Any = {"dtype": torch.float32, "device": call.experts.device}
    size = (call.experts.num_experts,)
    return [
        torch.full(size, d, **like) if given[n] is None else given[n]
        for n, d in call.activation.defaults.items()
    ]


@dataclass(frozen=True)
class _Expert:
    """One expert of a call, and how its results are bounded."""

    call: MoeCall
    expert: int
    kernels: MoeTrace | None  # what the kernel gives, where a value may be no number
    storage: str
    confidence: float | None
    sums: int
    anyhow: bool  # whether a value that is no number may be anything

    def output(self, token: Tensor) -> Interval:
        """Its output, with its bias, for its tokens: `[N, H]`."""
        *_, (_, value) = self.stages(token)
        return value

    def stages(self, token: Tensor) -> Iterator[tuple[str, Interval]]:
        """Each intermediate by its name in `MoeTrace`, and the output."""
        call, storage = self.call, self.storage
        some = call.experts.select(torch.tensor([self.expert], device=call.input.device))
        x = fp32.bf16_to_fp64(call.input[token].contiguous())
        value = Interval(x, x, torch.zeros_like(x, dtype=torch.bool))
        value = stored(self._gemm(value, some.fc1_weights[0], some.fc1_scales, "fc1_output"), storage)
        yield "fc1_output", value
        if some.fc1_biases is not None:
            value = add(value, some.fc1_biases[0])
            value = stored(value, storage) if storage == "wider" else value
        parameters = [float(of_experts[self.expert]) for of_experts in _parameters(call)]
        activation, special = activated(call.activation, value, parameters)
        activation = stored(self._settled(activation, special, "activation"), storage)
        yield "activation", activation
        value = self._gemm(activation, some.fc2_weights[0], some.fc2_scales, "fc2_output")
        value = stored(value, storage)
        yield "fc2_output", value
        if some.fc2_biases is not None and call.tp_rank == 0:
            value = add(value, some.fc2_biases[0])
            value = stored(value, storage) if storage == "wider" else value
        yield "output", value

    def _settled(self, value: Interval, special: Tensor, name: str) -> Interval:
        """With the kernel's own values of a stage where they are special, or with anything."""
        return (
            value.unknown(special) if self.anyhow else value.certain(special, self._kernels(name, value.low))
        )

    def _kernels(self, name: str, like: Tensor) -> Tensor:
        """The kernel's values of a stage for this expert's tokens; only where `_has_specials` are they asked for."""
        if self.kernels is None:
            return torch.full_like(like, math.nan)
        return fp32.widen(getattr(self.kernels, name)[self.kernels.expert == self.expert])

    def _gemm(self, x: Interval, packed: Tensor, scales: Tensor | None, name: str) -> Interval:
        """`x @ W^T` with every error that an accumulation may make; `[N, K]` by `[R, K]`."""
        assert scales is not None
        scales = scales[0]
        depth = GROUP_SIZE * scales.shape[1]
        finite = torch.isfinite(x.low) & torch.isfinite(x.high)
        low, high = torch.where(finite, x.low, 0.0), torch.where(finite, x.high, 0.0)
        centre, largest = (low + high) / 2, torch.maximum(low.abs(), high.abs())
        radius = (high - low) / 2 + SLACK * (high - low)

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
        overflows = overflows | (unscaled >= HUGE) | (magnitude >= HUGE)
        special = ~finite.all(1, keepdim=True) | (scales == _NO_NUMBER).any(1)
        return self._settled(Interval(value - error, value + error, overflows), special, name)


def _gamma(depth: int) -> float:
    return depth * UNIT / (1 - depth * UNIT)


def _probable_gamma(depth: int, confidence: float, sums: int) -> float:
    deviations = math.sqrt(2 * math.log(2 * depth * max(sums, 1) / (1 - confidence)))
    return min(_gamma(depth), deviations * math.sqrt(depth) * UNIT / 2 + _gamma(_BLOCK))
