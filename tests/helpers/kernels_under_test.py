"""Kernels that behave badly in one way each; the tests name them by their import path."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from torch import Tensor

from mxfp4ref import Experts, MoeCall, forward, quantize, torch_ref_cutlass_fused_moe
from mxfp4ref.conformance import Skip

_calls = 0


def good(*args: Any, **kwargs: Any) -> Any:
    return torch_ref_cutlass_fused_moe(*args, **kwargs)


def without_alpha(**kwargs: Any) -> Any:
    if "swiglu_alpha" in kwargs:
        raise Skip("no alpha")
    return torch_ref_cutlass_fused_moe(**kwargs)


def takes_no_alpha(
    *,
    input: Tensor,
    token_selected_experts: Tensor,
    token_final_scales: Tensor,
    fc1_expert_weights: Tensor,
    fc2_expert_weights: Tensor,
    output_dtype: torch.dtype,
    quant_scales: list[Tensor],
    use_w4_group_scaling: bool,
    tp_size: int,
    tp_rank: int,
    ep_size: int,
    ep_rank: int,
) -> Any:
    return input


def skips_later(**kwargs: Any) -> Any:
    global _calls
    _calls += 1
    if _calls > 1:
        _calls = 0
        raise Skip("later")
    return torch_ref_cutlass_fused_moe(**kwargs)


def good_logical(**kwargs: Any) -> Any:
    return torch_ref_cutlass_fused_moe(**kwargs, weight_layout="logical")


def good_plain(
    x: Tensor, ids: Tensor, scales: Tensor, w1: Tensor, s1: Tensor, w2: Tensor, s2: Tensor, **parameters: Any
) -> Tensor:
    split = {name: parameters.pop(name) for name in list(parameters) if name[:3] in ("ep_", "tp_")}
    return forward(MoeCall(x, ids, scales, Experts(w1, s1, w2, s2, **parameters), **split, strict=False))


def with_trace(**kwargs: Any) -> Any:
    """Exposes its intermediates, of which the activation is wrong."""
    trace = torch_ref_cutlass_fused_moe(**kwargs, trace=True)
    activation = trace.activation.clone()
    activation[0, 5] = 1000.0
    output = trace.output.clone()
    output[0] += 1.0
    return output, {"fc1_output": trace.fc1_output, "activation": activation, "fc2_output": trace.fc2_output}


def raises(**kwargs: Any) -> Any:
    raise RuntimeError("no kernel image is available")


def hangs(**kwargs: Any) -> Any:
    time.sleep(60)


def dies_once(**kwargs: Any) -> Any:
    """Takes its process with it on calls with more than one slot a token."""
    if kwargs["token_selected_experts"].shape[1] > 1:
        os.abort()
    return good(**kwargs)


def other_shape(**kwargs: Any) -> Any:
    return kwargs["input"][:, :-1]


def other_dtype(**kwargs: Any) -> Any:
    return kwargs["input"].to(torch.float32)


def no_tensor(**kwargs: Any) -> Any:
    return "done"


def writes_nothing(output: Tensor, **kwargs: Any) -> Any:
    return output


def writes_half(output: Tensor, **kwargs: Any) -> None:
    good(output=output, **kwargs)
    output[-1, ::2] = torch.tensor(0x7FA5, dtype=torch.int16).view(torch.bfloat16)


def modifies_input(**kwargs: Any) -> Any:
    result = good(**kwargs)
    kwargs["quant_scales"][1].view(-1)[3] += 1
    return result


def unstable(**kwargs: Any) -> Any:
    global _calls
    _calls += 1
    result = good(**kwargs)[0]
    result[0, 7] += _calls
    return result


def second_half_of_columns(**kwargs: Any) -> Any:
    """Right but for every second 16-row block of fc2."""
    result = good(**kwargs)[0]
    result.view(len(result), -1, 16)[:, 1::2] *= 2
    return result


def stage_dequantize(packed: Tensor, scales: Tensor, convention: str, dtype: str) -> Tensor:
    from mxfp4ref import dequantize

    return dequantize(packed, scales, convention=convention, dtype=getattr(torch, dtype))


def stage_quantize(values: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    return quantize(values, rule=rule)


def stage_layout_identity(before: Tensor, operation: str, **parameters: Any) -> Tensor:
    return before.clone()
