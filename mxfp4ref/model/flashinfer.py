"""`torch_ref_cutlass_fused_moe`: the call of flashinfer's kernel, answered with the kernel's bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from mxfp4ref._compiler import uncompiled
from mxfp4ref._validate import (
    check_bool,
    check_choice,
    check_int,
    check_output,
    check_same_device,
    check_tensor,
    shown,
)
from mxfp4ref.formats.experts import Experts, Sm90Experts
from mxfp4ref.formats.generations import NEWEST
from mxfp4ref.model import forward as moe
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90.tactics import Sm90Kernel

__all__ = ["WEIGHT_LAYOUTS", "torch_ref_cutlass_fused_moe"]

WEIGHT_LAYOUTS = ("sm90", "logical")

# flashinfer's ActivationType. With any of alpha, beta, limit the kernel turns Swiglu into SwigluBias.
_SWIGLU = 3
_SWIGLU_BIAS = 5

# Arguments that are not modelled, and the only value that is accepted.
_NOT_MODELLED: dict[str, object] = {
    "output_dtype": torch.bfloat16,
    "input_sf": None,
    "cluster_size": 1,
    "enable_alltoall": False,
    "use_deepseek_fp8_block_scale": False,
    "use_mxfp8_act_scaling": False,
    "min_latency_mode": False,
    "use_packed_weights": False,
    "use_wfp4afp8_humming": False,
    "clamped_relu2_limit": None,
    "situ_beta": None,
    "situ_linear_beta": None,
    "backend": "cutlass",
}
# What `Experts` calls its fields, and what they are called here.
_NAMES = {
    "fc1_weights": "fc1_expert_weights",
    "fc1_scales": "quant_scales[0]",
    "fc1_biases": "fc1_expert_biases",
    "fc2_weights": "fc2_expert_weights",
    "fc2_scales": "quant_scales[1]",
    "fc2_biases": "fc2_expert_biases",
}


@uncompiled
def torch_ref_cutlass_fused_moe(
    input: Tensor,
    token_selected_experts: Tensor,
    token_final_scales: Tensor,
    fc1_expert_weights: Tensor,
    fc2_expert_weights: Tensor,
    output_dtype: torch.dtype,
    quant_scales: Sequence[Tensor] | None,
    fc1_expert_biases: Tensor | None = None,
    fc2_expert_biases: Tensor | None = None,
    input_sf: Tensor | None = None,
    swiglu_alpha: Tensor | None = None,
    swiglu_beta: Tensor | None = None,
    swiglu_limit: Tensor | None = None,
    tp_size: int = 1,
    tp_rank: int = 0,
    ep_size: int = 1,
    ep_rank: int = 0,
    cluster_size: int = 1,
    cluster_rank: int = 0,
    output: Tensor | None = None,
    enable_alltoall: bool = False,
    use_deepseek_fp8_block_scale: bool = False,
    use_w4_group_scaling: bool = False,
    use_mxfp8_act_scaling: bool = False,
    min_latency_mode: bool = False,
    use_packed_weights: bool = False,
    use_wfp4afp8_humming: bool = False,
    tune_max_num_tokens: int = 8192,
    enable_pdl: bool | None = None,
    activation_type: int = _SWIGLU,
    swizzled_input_sf: bool = True,
    use_fused_finalize: bool = True,
    profile_ids: Sequence[int] | None = None,
    workspace_buffer: Tensor | None = None,
    *,
    clamped_relu2_limit: Tensor | None = None,
    situ_beta: Tensor | None = None,
    situ_linear_beta: Tensor | None = None,
    backend: str = "cutlass",
    kernel: Sm90Kernel | None = None,
    weight_layout: str | None = None,
    strict: bool = True,
    trace: bool = False,
) -> Tensor | tuple[Tensor, moe.MoeTrace]:
    """Drop-in for `flashinfer.fused_moe.cutlass_fused_moe` 0.7.2.post1: same arguments, same tensors, same bits.

    Modelled are MXFP4 weights (`use_w4_group_scaling=True`), with the bits of an H100, and bf16 weights
    (`use_w4_group_scaling=False`, no `quant_scales`), with the rounding points of `mxfp4ref.model.dense`. An argument
    that asks for anything else raises; arguments that cannot change the result are accepted and have no effect:
    `tune_max_num_tokens`, `enable_pdl`, `use_fused_finalize`, `profile_ids` (say by `kernel` which tactics you
    force), `workspace_buffer`, `swizzled_input_sf` and, with a size of one, `cluster_rank`.

    Args:
        input: `[M, H] bf16`.
        token_selected_experts: `[M, k] int32`, global expert ids, -1 for padding.
        token_final_scales: `[M, k] float32`.
        fc1_expert_weights: `[E, 2I, H/2] uint8`, rows [up(w3); gate(w1)], interleaved for SM90 unless
            `weight_layout="logical"`; or `[E, 2I, H] bf16`.
        fc2_expert_weights: `[E, H, I/2] uint8` likewise, or `[E, H, I] bf16`.
        output_dtype: `torch.bfloat16`.
        quant_scales: the UE8M0 scales of fc1 and fc2, folded for SM90 by either flashinfer generation, as
            uint8 or viewed as int32; with `weight_layout="logical"` `[E, R, K/32] uint8`.
        fc1_expert_biases, fc2_expert_biases: `[E, 2I]` and `[E, H] bf16`.
        swiglu_alpha, swiglu_beta, swiglu_limit: `[E] float32`, any subset.
        tp_size, tp_rank, ep_size, ep_rank: this rank; the fc2 bias is added where `tp_rank` is 0.
        output: `[M, H] bf16`, written in place and returned; `input` itself, or memory of no input.
        activation_type: Swiglu (3), or SwigluBias (5) along with alpha, beta or limit.
        kernel: the tactics of the two GEMMs and the generation; by default the default tactics of the generation
            whose layouts the tensors are in, with `weight_layout="logical"` of the newest.
        weight_layout: "sm90" or "logical"; the default is what the real call takes.
        strict: refuse ids that no rank owns and experts a token names twice; False follows the kernel.
        trace: return `(output, MoeTrace)`.

    Returns:
        `[M, H] bf16`, as flashinfer documents it; its 0.7.2.post1 really returns a list with the output first.

    Raises:
        NotImplementedError: an argument would change the result and is not modelled.
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device, strides or value.
    """
    arguments = locals()
    for name, modelled in _NOT_MODELLED.items():
        if type(arguments[name]) is not type(modelled) or arguments[name] != modelled:
            raise NotImplementedError(
                f"{name}: not modelled, expected {modelled!r}, got {shown(arguments[name])}"
            )
    parameters = {"swiglu_alpha": swiglu_alpha, "swiglu_beta": swiglu_beta, "swiglu_limit": swiglu_limit}
    clamped = any(value is not None for value in parameters.values())
    check_int("activation_type", activation_type, minimum=0)
    if activation_type != _SWIGLU and not (activation_type == _SWIGLU_BIAS and clamped):
        raise NotImplementedError(
            "activation_type: not modelled, expected Swiglu (3) or, along with alpha, beta or limit, SwigluBias "
            f"(5), got {shown(activation_type)}"
        )
    check_bool("use_w4_group_scaling", use_w4_group_scaling)
    check_bool("trace", trace)
    if weight_layout is None:
        weight_layout = "sm90" if use_w4_group_scaling else "logical"
    check_choice("weight_layout", weight_layout, WEIGHT_LAYOUTS)

    fc1_scales, fc2_scales = _check_weights(
        input, fc1_expert_weights, fc2_expert_weights, quant_scales, use_w4_group_scaling, weight_layout
    )
    tensors = {
        "input": input,
        "token_selected_experts": token_selected_experts,
        "token_final_scales": token_final_scales,
        "fc1_expert_weights": fc1_expert_weights,
        "fc2_expert_weights": fc2_expert_weights,
        "quant_scales[0]": fc1_scales,
        "quant_scales[1]": fc2_scales,
        "fc1_expert_biases": fc1_expert_biases,
        "fc2_expert_biases": fc2_expert_biases,
        **parameters,
    }
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {list(tensor.stride())}")
    held: dict[str, Any] = {f.name: tensors[_NAMES.get(f.name, f.name)] for f in fields(Experts)}
    try:
        experts = (Sm90Experts if weight_layout == "sm90" else Experts)(**held)
    except (TypeError, ValueError) as error:
        field, _, rest = str(error).partition(":")
        raise type(error)(f"{_NAMES.get(field, field)}:{rest}") from None
    if kernel is None:
        kernel = Sm90Kernel(generation=experts.generation if isinstance(experts, Sm90Experts) else NEWEST)
    call = MoeCall(
        input=input,
        token_selected_experts=token_selected_experts,
        token_final_scales=token_final_scales,
        experts=experts,
        ep_size=ep_size,
        ep_rank=ep_rank,
        tp_size=tp_size,
        tp_rank=tp_rank,
        kernel=kernel,
        strict=strict,
    )
    if output is not None:
        inputs = tensors if output is not input else {**tensors, "input": None}
        check_output("output", output, dtype=output_dtype, shape=tuple(input.shape), inputs=inputs)
        check_same_device({"input": input, "output": output})

    intermediates = moe.trace(call) if trace else None
    result = moe.forward(call) if intermediates is None else intermediates.output
    if output is not None:
        result = output.copy_(result)
    return result if intermediates is None else (result, intermediates)


def _check_weights(
    input: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    scales: Sequence[Tensor] | None,
    quantized: bool,
    weight_layout: str,
) -> tuple[Tensor | None, Tensor | None]:
    """Check the arguments' dtypes and dimensions under flashinfer's names; return the two scales."""
    hidden = check_tensor("input", input, dtype=torch.bfloat16, shape=("M", "H")).shape[1]
    dtype = torch.uint8 if quantized else torch.bfloat16
    packing = 2 if quantized else 1
    check_tensor("fc1_expert_weights", fc1, dtype=dtype, shape=("E", "2I", hidden // packing))
    experts, rows = fc1.shape[:2]
    shape = (experts, hidden, rows // 2 // packing)
    check_tensor("fc2_expert_weights", fc2, dtype=dtype, shape=shape)
    if not quantized:
        if scales is not None and not (isinstance(scales, Sequence) and len(scales) == 0):
            raise NotImplementedError(
                f"quant_scales: not modelled without use_w4_group_scaling, expected None, got {shown(scales)}"
            )
        if weight_layout == "sm90":
            raise ValueError("weight_layout: expected 'logical' for bfloat16 weights, got 'sm90'")
        return None, None
    if not isinstance(scales, Sequence) or len(scales) != 2:
        got = f"{len(scales)} of them" if isinstance(scales, Sequence) else type(scales).__name__
        raise ValueError(f"quant_scales: expected the scales of fc1 and fc2, two tensors, got {got}")
    for index, value in enumerate(scales):
        check_tensor(f"quant_scales[{index}]", value, dtype=(torch.uint8, torch.int32), shape=("...",))
    return scales[0], scales[1]
