"""Activations without a gate that differ from the kernel's, and fc1's rows read as if there were one."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref.defects.definition import activated_by, change_tensors, defect, runs
from mxfp4ref.formats.layout import swap_gate_up
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.activation import relu, relu2


def _ungated(call: MoeCall) -> bool:
    return not call.experts.gated


@defect("call", "loaders that swap every fc1's halves", applies=_ungated)
def ungated_halves_swapped(call: MoeCall) -> MoeCall:
    """halves of fc1's rows exchanged as if they were gate and up, where there is no gate"""
    if not _ungated(call):
        return call
    return change_tensors(call, "fc1_weights", "fc1_scales", "fc1_biases", change=swap_gate_up)


@defect(
    "call",
    "kernels that have activations with a gate alone",
    applies=runs("Gelu", "Relu", "Silu", "Identity"),
)
def ungated_given_as_both_halves(call: MoeCall) -> MoeCall:
    """rows of fc1 taken for up and for gate, so that the activation is multiplied by its argument"""
    if call.experts.gated:
        return call
    function = call.activation.function
    return activated_by(call, lambda x: fp32.mul(function(x), x))


@defect("activation.Relu2", "names that look alike")
def relu2_not_squared(x: Tensor) -> Tensor:
    """Relu in place of Relu2"""
    return relu(x)


@defect("activation.Relu2", "x ** 2 without its relu")
def relu2_not_rectified(x: Tensor) -> Tensor:
    """Relu2's square of negative numbers too"""
    return fp32.mul(x, x)


@defect("call", "fmaxf(x, 0)", kind="arithmetic", applies=runs("Relu", "Relu2"))
def relu_loses_nan(call: MoeCall) -> MoeCall:
    """Relu and Relu2 of NaN are 0 instead of NaN"""
    function = call.activation.function
    if function not in (relu, relu2):
        return call
    return activated_by(call, lambda x: function(torch.where(x.isnan(), 0.0, x)))
