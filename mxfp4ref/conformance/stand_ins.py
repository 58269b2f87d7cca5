"""Stand-ins for a kernel under test: the named defects, and the reference that most projects use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mxfp4ref.conformance.adapters import Arguments, Kernel, KernelError, Skip
from mxfp4ref.defects import Defect, DequantizeCall, RoutingCall, get_defect
from mxfp4ref.formats.mxfp4 import dequantize
from mxfp4ref.goldens.runs import routing_options, run_stage
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import Stages, forward
from mxfp4ref.model.humming import call_of

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


def _torch_swiglu(
    fc1_output: Tensor,
    bias: Tensor | None = None,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    limit: Tensor | None = None,
) -> Tensor:
    value = fc1_output.to(torch.float32)
    if bias is not None:
        value = value + bias.to(torch.float32)
    up, gate = value.chunk(2, dim=-1)
    if limit is not None:
        up, gate = torch.minimum(torch.maximum(up, -limit), limit), torch.minimum(gate, limit)
    scaled = gate if alpha is None else gate * alpha
    return gate * torch.sigmoid(scaled) * (up if beta is None else up + beta)


_TORCH_BF16 = Stages(fc1_gemm=_matmul, fc2_gemm=_matmul, swiglu=_torch_swiglu)
