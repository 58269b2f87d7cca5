"""The stage up to which a wrong output can be reconciled with the right computation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mxfp4ref.conformance.bounds import bound
from mxfp4ref.conformance.comparison import differing, first_difference
from mxfp4ref.conformance.reduction import local_experts, one_token
from mxfp4ref.formats.mxfp4 import dequantize
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward, trace
from mxfp4ref.sm90 import fp32

__all__ = ["numbers", "reconcile"]

_STAGES = ("fc1_output", "activation", "fc2_output")


def reconcile(call: MoeCall, outputs: Mapping[str, Tensor], mask: Tensor) -> str:
    """The latest stage up to which the kernel and the trace agree, in words and as far as can be told.

    Args:
        call: the call.
        outputs: the kernel's `output`, and any intermediates under the names of `MoeTrace`.
        mask: `[M, H] bool`, where the output differs from the expected one.
    """
    exposed = [name for name in _STAGES if name in outputs]
    if exposed:
        return _exposed(call, outputs, exposed)
    if not call.experts.quantized:
        return ""
    inside = bound(call).contains(outputs["output"], forward(call))
    if bool(inside.all()):
        return (
            "rounding: every element lies within the interval of all correct evaluations, so the kernel sums or "
            "rounds in another way than the SM90 kernel, or is wrong by less than that"
        )
    outside = int((~inside).sum())
    fitted = _fit_finalize(call, outputs["output"], mask)
    if fitted:
        return fitted
    return (
        f"before finalize: {outside:,} elements lie outside the interval of all correct evaluations, and other "
        "weights for the right expert outputs do not explain it" + _fit_gemm2(call, outputs["output"], mask)
    )


def _exposed(call: MoeCall, outputs: Mapping[str, Tensor], names: list[str]) -> str:
    """The first of the intermediates that the kernel returned which differs from the trace."""
    right = trace(call)
    for name in names:
        want = getattr(right, name)
        got = outputs[name]
        if got.shape != want.shape or got.dtype != want.dtype:
            return f"{name}: expected {want.dtype} {list(want.shape)}, got {got.dtype} {list(got.shape)}"
        difference = first_difference(got, want)
        if difference is not None:
            count = int(differing(got, want).sum())
            row = difference.index[0]
            return (
                f"{name} is the first stage that differs, in {count:,} of {want.numel():,} elements; {difference}; "
                f"row {row} is token {int(right.token[row])}, slot {int(right.slot[row])}"
            )
    return f"finalize: {', '.join(names)} agree in all bits"


def _fit_finalize(call: MoeCall, output: Tensor, mask: Tensor) -> str:
    """Whether the output is a sum of the right expert outputs with other weights."""
    local = local_experts(call)
    for token in mask.any(1).nonzero().flatten().tolist()[:4]:
        one = trace(one_token(call, token))
        y = fp32.widen(one.fc2_output).to(torch.float64)
        if call.experts.fc2_biases is not None and call.tp_rank == 0:
            y = y + fp32.widen(call.experts.fc2_biases[local[token, one.slot]]).to(torch.float64)
        target = fp32.widen(output[token]).to(torch.float64)
        if len(y) == 0 or not bool(torch.isfinite(y).all() & torch.isfinite(target).all()):
            continue
        order = one.slot.argsort()
        y, slots = y[order], one.slot[order]
        weights = torch.linalg.lstsq(y.T, target[:, None], driver="gelsd").solution[:, 0]
        rest = float((target - weights @ y).norm() / target.norm().clamp(min=1e-30))
        if rest > 2.0**-8:
            return ""
        asked = call.token_final_scales[token, slots]
        if bool(((weights - asked).abs() <= 2.0**-7 * asked.abs()).all()):
            return ""  # the weights are right, and what is wrong is too little to show here
        return (
            f"finalize: token {token} is the sum of the right expert outputs with weights {numbers(weights)}, where "
            f"{numbers(asked)} were asked for: GEMM1, activation and GEMM2 are right"
        )
    return ""


def _fit_gemm2(call: MoeCall, output: Tensor, mask: Tensor) -> str:
    """For a token with one expert: whether the output is GEMM2 of another activation."""
    local = local_experts(call)
    single = mask.any(1) & ((local >= 0).sum(1) == 1)
    if call.experts.intermediate_size > call.experts.hidden_size or not bool(single.any()):
        return ""
    token = int(single.nonzero()[0])
    slot = int((local[token] >= 0).nonzero()[0])
    some = call.experts.select(local[token, slot][None])
    assert some.fc2_scales is not None
    weights = dequantize(some.fc2_weights[0], some.fc2_scales[0], convention="sm90", dtype=torch.float32)
    weights = weights.to(torch.float64)
    y = fp32.widen(output[token]).to(torch.float64) / float(call.token_final_scales[token, slot])
    if some.fc2_biases is not None and call.tp_rank == 0:
        y = y - fp32.widen(some.fc2_biases[0]).to(torch.float64)
    if not bool(torch.isfinite(y).all() & torch.isfinite(weights).all()):
        return ""
    solution = torch.linalg.lstsq(weights, y[:, None], driver="gelsd").solution[:, 0]
    rest = float((y - weights @ solution).norm() / y.norm().clamp(min=1e-30))
    # With as many unknowns as equations anything can be fitted.
    if call.experts.intermediate_size * 2 > call.experts.hidden_size or rest > 2.0**-6:
        return f"; GEMM2's weights or scales, or what comes before (token {token})"
    right = fp32.widen(trace(one_token(call, token)).activation[0]).to(torch.float64)
    wrong = ((solution - right).abs() > 0.05 * right.abs().max()).nonzero().flatten().tolist()
    shown = f"; {len(wrong)} of {len(right)} activation columns are off, first {wrong[:4]}" if wrong else ""
    return f"; it is GEMM2 of another activation (token {token}): GEMM1 or the activation is wrong{shown}"


def numbers(values: Tensor) -> str:
    """Values for a sentence, with six digits."""
    return "[" + ", ".join(f"{value:.6g}" for value in values.tolist()) + "]"
