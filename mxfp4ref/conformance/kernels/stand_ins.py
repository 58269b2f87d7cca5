"""Stand-ins for a kernel under test: the named defects, and the reference that most projects use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.conformance.kernels.adapters import Arguments, Kernel, KernelError, Skip
from mxfp4ref.defects import Defect, DequantizeCall, RoutingCall, get_defect
from mxfp4ref.formats.mxfp4 import dequantize
from mxfp4ref.goldens.runs import routing_options, run_stage
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import Stages, forward
from mxfp4ref.model.humming import call_of
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

__all__ = ["defect_kernel", "defect_outputs", "torch_bf16"]


def defect_kernel(name: str, device: str) -> Kernel:
    """The wrong pipeline of that name; where the defect cannot show, it is the right one.

    Raises:
        KernelError: there is no such defect.
    """
    try:
        defect = get_defect(name)
    except ValueError as error:
        raise KernelError(f"kernel: {error}") from error

    def run(kind: str, inputs: Any) -> Any:
        outputs = defect_outputs(defect, inputs)
        return run_stage(kind, inputs) if outputs is None else outputs

    return Kernel(
        f"defect:{name}", (defect.target,), _defect_arguments, run, forces_tile_k=True, device=device
    )


def _defect_arguments(kind: str, inputs: Any) -> Arguments:
    if kind == "dequantize" and inputs["dtype"] != "bfloat16":
        raise Skip("the defects of dequantisation give bf16")
    return (kind, inputs), {}


def defect_outputs(defect: Defect, inputs: Any) -> dict[str, Tensor] | None:
    """What a defect makes of a golden case's inputs, by name; None where it cannot show.

    That is where the defect says so, and for experts that are not quantised, on which no defect acts.
    """
    call = inputs
    if isinstance(call, MoeCall) and not call.experts.quantized:
        return None
    if defect.target == "routing":
        call = RoutingCall(inputs["preset"], inputs["logits"], routing_options(inputs))
    elif defect.target == "dequantize":
        call = DequantizeCall(inputs["packed"], inputs["scales"], inputs["convention"])
    elif defect.target == "w4a8" and not isinstance(inputs, MoeCall):
        call = call_of(inputs)
    if not defect.applies(call):
        return None
    result = defect.run(call)
    if defect.target == "routing":
        return {"ids": result.ids, "scales": result.scales}
    return {"values" if defect.target == "dequantize" else "output": result}


def torch_bf16(kind: str, call: MoeCall) -> Tensor:
    """Weights dequantised to bf16; float32 matmuls, bf16 between the stages; torch's sigmoid; float32 sum.

    Its bits are those of the machine's BLAS, as with the references that it stands for.
    """
    return forward(call, _TORCH_BF16)


def _matmul(x: Tensor, weights: Tensor, scales: Tensor, **_tactic: object) -> Tensor:
    dense = dequantize(weights, scales, dtype=torch.bfloat16)
    return x.to(torch.float32) @ dense.to(torch.float32).transpose(-1, -2)


def _torch_activate(
    activation: Activation, fc1_output: Tensor, bias: Tensor | None, parameters: Sequence[Tensor | None]
) -> Tensor:
    value = fc1_output.to(torch.float32)
    if bias is not None:
        value = value + bias.to(torch.float32)
    halves = value.chunk(2, dim=-1) if activation.gated else (value,)
    given = [
        value.new_tensor(default) if parameter is None else parameter
        for parameter, default in zip(parameters, activation.defaults.values(), strict=True)
    ]
    return _TORCH_ACTIVATIONS[activation.id](*halves, *given)


def _torch_clamp(x: Tensor, limit: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(x, -limit), limit)


def _torch_swiglu_bias(up: Tensor, gate: Tensor, alpha: Tensor, beta: Tensor, limit: Tensor) -> Tensor:
    gate = torch.minimum(gate, limit)
    return gate * torch.sigmoid(gate * alpha) * (_torch_clamp(up, limit) + beta)


def _torch_situ(up: Tensor, gate: Tensor, beta: Tensor, linear_beta: Tensor) -> Tensor:
    gated = beta * torch.tanh(gate / beta) * torch.sigmoid(gate)
    return gated * (linear_beta * torch.tanh(up / linear_beta))


_TORCH_ACTIVATIONS: dict[int, Callable[..., Tensor]] = {
    SWIGLU: lambda up, gate: gate * torch.sigmoid(gate) * up,
    GEGLU: lambda up, gate: torch.nn.functional.gelu(gate) * up,
    GEGLU_TANH: lambda up, gate: torch.nn.functional.gelu(gate, approximate="tanh") * up,
    SWIGLU_BIAS: _torch_swiglu_bias,
    SWIGLU_STEP: lambda up, gate, limit: (
        torch.minimum(gate * torch.sigmoid(gate), limit) * _torch_clamp(up, limit)
    ),
    SITU: _torch_situ,
    GELU: torch.nn.functional.gelu,
    RELU: torch.relu,
    SILU: torch.nn.functional.silu,
    RELU2: lambda value: torch.relu(value).square(),
    IDENTITY: lambda value: value,
}
_TORCH_BF16 = Stages(fc1_gemm=_matmul, fc2_gemm=_matmul, activate=_torch_activate)
