"""`torch_ref_cutlass_fused_moe`: the call of flashinfer's kernel, answered with the kernel's bits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor

from mxfp4ref._choices import WEIGHT_LAYOUTS, WeightLayout
from mxfp4ref._compiler import uncompiled
from mxfp4ref._validate import check_bool, check_choice, check_instance, check_output, check_same_device
from mxfp4ref.model import forward as moe
from mxfp4ref.model.flashinfer_arguments import STRICT, call_of, tensors_of
from mxfp4ref.model.skipped import count_skipped_slots
from mxfp4ref.sm90.activation import SWIGLU
from mxfp4ref.sm90.tactics import Sm90Kernel

__all__ = ["drop_in", "torch_ref_cutlass_fused_moe"]

_OURS = ("kernel", "weight_layout", "strict", "trace")  # arguments that flashinfer does not have


@overload
def torch_ref_cutlass_fused_moe(
    input: Tensor,
    token_selected_experts: Tensor,
    token_final_scales: Tensor | None,
    fc1_expert_weights: Tensor,
    fc2_expert_weights: Tensor,
    output_dtype: torch.dtype,
    quant_scales: Sequence[Tensor] | None = None,
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
    activation_type: int = SWIGLU,
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
    weight_layout: WeightLayout | None = None,
    strict: bool | Literal["count"] = True,
    trace: Literal[False] = False,
) -> list[Tensor]: ...
@overload
def torch_ref_cutlass_fused_moe(*arguments: Any, trace: Literal[True], **options: Any) -> moe.MoeTrace: ...
@uncompiled  # type: ignore[misc]  # the signature above is too wide: it is there for what comes back
def torch_ref_cutlass_fused_moe(
    input: Tensor,
    token_selected_experts: Tensor,
    token_final_scales: Tensor | None,
    fc1_expert_weights: Tensor,
    fc2_expert_weights: Tensor,
    output_dtype: torch.dtype,
    quant_scales: Sequence[Tensor] | None = None,
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
    activation_type: int = SWIGLU,
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
    weight_layout: WeightLayout | None = None,
    strict: bool | Literal["count"] = True,
    trace: bool = False,
) -> list[Tensor] | moe.MoeTrace:
    """Drop-in for `flashinfer.fused_moe.cutlass_fused_moe` 0.7.2.post1: same arguments, same tensors, same bits.

    Modelled are MXFP4 weights (`use_w4_group_scaling=True`), with the bits of an H100, beside bf16 activations or,
    with `use_wfp4afp8_humming=True`, FP8 ones; and bf16 weights, with the rounding points of
    `mxfp4ref.model.dense`. An argument that asks for anything else, which the kernel on Hopper does not run with
    MXFP4 weights, raises NotImplementedError;
    arguments that cannot change the result are accepted and have no effect: `tune_max_num_tokens`, `enable_pdl`,
    `use_fused_finalize`, `workspace_buffer`, `swizzled_input_sf`, with a size of one `cluster_rank`, and with bf16
    weights, as for the kernel, `use_w4_group_scaling`, `quant_scales` and `profile_ids`.

    Args:
        input: `[M, H] bf16`; with `use_wfp4afp8_humming=True` fp16 too, as biases and output then are.
        token_selected_experts: `[M, k] int32`, global expert ids, -1 for padding.
        token_final_scales: `[M, k] float32`, or None for weights of 1.
        fc1_expert_weights: `[E, 2I, H/2] uint8`, rows [up(w3); gate(w1)], or `[E, 2I, H] bf16`; I rows for an
            activation without a gate.
        fc2_expert_weights: `[E, H, I/2] uint8` likewise, or `[E, H, I] bf16`.
        output_dtype: the input's, `torch.bfloat16` or `torch.float16`.
        quant_scales: the UE8M0 scales of fc1 and fc2, as uint8, float8_e8m0fnu or, if they are folded, int32. With
            `use_wfp4afp8_humming=True` five tensors: offsets of fc1, likewise, its residuals times 64,
            `[E] float32`, one, which the kernel does not read, and those of fc2 (`formats.humming.prepare`).
        fc1_expert_biases, fc2_expert_biases: `[E, 2I]` (or `[E, I]`, as fc1 has rows) and `[E, H] bf16`, both or
            none.
        swiglu_alpha, swiglu_beta, swiglu_limit, situ_beta, situ_linear_beta: `[E] float32`, any subset. SwiGLU reads
            the first three, SwigluStep the limit (7 where none is given), Situ the last two (4 and 25). What the
            activation does not read is checked and has no effect, as with flashinfer.
        tp_size, tp_rank, ep_size, ep_rank: this rank; the fc2 bias is added where `tp_rank` is 0.
        output: `[M, H] bf16`, written in place; the list holds this very tensor. It is `input` itself, or
            shares memory with no input.
        enable_alltoall: with `ep_size` above 1 the kernel writes no row of a token without an expert of this rank.
            Such rows of `output` stay as they are; without `output` they are zeros here, and whatever memory held
            with flashinfer.
        activation_type: Swiglu (3), Geglu (4), SwigluBias (5), SwigluStep (7), GegluTanh (8) or Situ (10); without a
            gate Gelu (0), Relu (1), Silu (2), Relu2 (6) or Identity (9).
        profile_ids: flashinfer's ids of the tactics of GEMM1 and GEMM2, see `Sm90Kernel.of_profile_ids`. The
            generation of the layout, or of `kernel`, numbers them; the older ones have no effect of them at all.
            With `use_wfp4afp8_humming=True` there are 126 for each GEMM, which all give the same bits.
        kernel: the tactics of the two GEMMs and the generation; by default the default tactics of the generation
            whose layouts the tensors are in, with `weight_layout="logical"` of the newest.
        weight_layout: how the bytes of uint8 weights and of their scales lie:
            "sm90", the default: interleaved and folded, as either generation of `GENERATIONS` takes them; the shape
            of the scales tells which.
            "logical_weights_folded_scales": weights as a checkpoint has them beside scales `[E, G/4, 4R]`, as
            flashinfer up to 0.6.9 takes them, by that kernel's arithmetic (`PLAIN`).
            "logical": weights and scales `[E, R, K/32]` as a checkpoint has them, which no kernel takes.
            With `use_wfp4afp8_humming=True` prepared weights, "sm90" or "logical".
        strict: what becomes of ids that no rank owns, and of experts that a token names twice:
            True: the call is refused.
            False: such slots are skipped, as the kernel skips them; of an expert named twice the first slot counts.
            "count": as False, and `mxfp4ref.model.skipped.skipped_slots()` says how many there were.
        trace: return a `MoeTrace` (with `use_wfp4afp8_humming=True` a `HummingTrace`), which has every intermediate
            and the output.

    Returns:
        A list of one tensor, the output `[M, H] bf16`: flashinfer documents a tensor and returns a list with the
        output first, so that callers write `[0]`, which would be the first token of a tensor. A `MoeTrace` with
        `trace=True`.

    Warns:
        UserWarning: once a process, of 3-D scales without `weight_layout` or `kernel`: they belong to two layouts.

    Raises:
        NotImplementedError: an argument would change the result and is not modelled.
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device, strides or value.
    """
    call = call_of(locals())
    check_bool("trace", trace)
    if output is not None:
        inputs = tensors_of(call) | ({"input": None} if output is input else {})
        check_output("output", output, dtype=output_dtype, shape=tuple(input.shape), inputs=inputs)
        check_same_device({"input": input, "output": output})
    if strict == "count":
        count_skipped_slots(call)

    intermediates = moe.trace(call) if trace else None
    result = moe.forward(call) if intermediates is None else intermediates.output
    if output is not None:
        result = output.copy_(call.written_over(result, output))
    return [result] if intermediates is None else replace(intermediates, output=result)


def drop_in(
    *,
    kernel: Sm90Kernel | None = None,
    weight_layout: WeightLayout | None = None,
    strict: bool | Literal["count"] = True,
) -> Callable[..., list[Tensor]]:
    """A function with flashinfer's arguments alone, to be put in the place of its `cutlass_fused_moe`.

    `drop_in(strict="count")` is for a server, which a call must not stop that the kernel accepts.

    Args:
        kernel, weight_layout, strict: what `torch_ref_cutlass_fused_moe` is to be given at every call.

    Raises:
        TypeError, ValueError: one of them is not what that function takes.
    """
    if kernel is not None:
        check_instance("kernel", kernel, Sm90Kernel)
    if weight_layout is not None:
        check_choice("weight_layout", weight_layout, WEIGHT_LAYOUTS)
    check_choice("strict", strict, STRICT)

    def cutlass_fused_moe(*arguments: Any, **named: Any) -> list[Tensor]:
        """`torch_ref_cutlass_fused_moe` by flashinfer's arguments alone."""
        return torch_ref_cutlass_fused_moe(
            *arguments, **named, kernel=kernel, weight_layout=weight_layout, strict=strict, trace=False
        )

    signature = inspect.signature(torch_ref_cutlass_fused_moe)
    theirs = [p for name, p in signature.parameters.items() if name not in _OURS]
    cutlass_fused_moe.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=theirs, return_annotation="list[Tensor]"
    )
    return cutlass_fused_moe
