"""The arguments of flashinfer's call, checked under flashinfer's names, as experts and tactics."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor

from mxfp4ref._choices import WEIGHT_LAYOUTS, WeightLayout
from mxfp4ref._validate import check_bool, check_choice, check_instance, check_int, check_tensor, shown
from mxfp4ref.formats.experts import Experts, PlainExperts, Sm90Experts
from mxfp4ref.formats.generations import BYTEWISE, NEWEST, PLAIN
from mxfp4ref.formats.humming_experts import HummingExperts, Sm90HummingExperts
from mxfp4ref.formats.mxfp4 import GROUP_SIZE
from mxfp4ref.model.call import MoeCall, check_rows
from mxfp4ref.sm90.activation import ACTIVATIONS, check_no_name
from mxfp4ref.sm90.humming_tactics import check_humming_profile_ids
from mxfp4ref.sm90.tactics import Sm90Kernel, runnable_tactics

__all__ = [
    "STRICT",
    "call_of",
    "check_modelled",
    "experts_of",
    "kernel_of",
    "tensors_of",
]

STRICT = (True, False, "count")

_LAYOUTS: dict[WeightLayout, type[Experts]] = {
    "sm90": Sm90Experts,
    "logical": Experts,
    "logical_weights_folded_scales": PlainExperts,
}
_HUMMING_LAYOUTS: dict[WeightLayout, type[Experts]] = {"sm90": Sm90HummingExperts, "logical": HummingExperts}

# Arguments that are not modelled, the only value that is accepted, and why.
_NOT_MODELLED: dict[str, tuple[object, str]] = {
    "input_sf": (None, "block scales of the input belong to MXFP8 and NVFP4"),
    "cluster_size": (1, "the kernel refuses any other"),
    "use_deepseek_fp8_block_scale": (False, "its weights are FP8"),
    "use_mxfp8_act_scaling": (False, "Hopper's branch of it is compiled out"),
    "min_latency_mode": (False, "the kernel has it for NVFP4 on Blackwell alone"),
    "use_packed_weights": (False, "its weights are int4"),
    "clamped_relu2_limit": (None, "ClampedRelu2 runs on SM10x alone"),
    "backend": ("cutlass", "another is another kernel"),
}
_CLAMPED_RELU2 = 12
# Dtypes of input and weights for which the real function has other kernels, besides int64 weights, which are NVFP4.
_OTHER_KERNELS = (
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float8_e4m3fn),
    (torch.float8_e4m3fn, torch.float8_e4m3fn),
)
# What `Experts` calls its fields, and what they are called here.
_NAMES = {
    "fc1_weights": "fc1_expert_weights",
    "fc1_scales": "quant_scales[0]",
    "fc1_biases": "fc1_expert_biases",
    "fc2_weights": "fc2_expert_weights",
    "fc2_scales": "quant_scales[1]",
    "fc2_biases": "fc2_expert_biases",
}
_HUMMING_NAMES = _NAMES | {
    "fc1_residual": "quant_scales[1]",
    "fc2_scales": "quant_scales[3]",
    "fc2_residual": "quant_scales[4]",
}
IN_LOGICAL_LAYOUT = (
    '; weights and scales as a checkpoint has them are taken with weight_layout="logical", and the kernel takes '
    "what interleave_weights_sm90 and fold_scales_sm90 of mxfp4ref.formats.layout make of them"
)
_BYTES = (torch.uint8, torch.int32, torch.float8_e8m0fnu)
# What quant_scales hold: their dtypes. The kernel of W4A8 has no use for the third.
_SCALE_DTYPES: dict[bool, tuple[tuple[torch.dtype, ...], ...]] = {
    False: (_BYTES, _BYTES),
    True: (_BYTES, (torch.float32,), (torch.float32,), _BYTES, (torch.float32,)),
}


def call_of(arguments: Mapping[str, Any]) -> MoeCall:
    """The call that the arguments of `torch_ref_cutlass_fused_moe`, all of them by name, stand for.

    Raises:
        NotImplementedError, TypeError, ValueError: as that function says.
    """
    check_modelled(arguments)
    check_choice("strict", arguments["strict"], STRICT)
    experts = experts_of(arguments)
    names = ("input", "token_selected_experts", "token_final_scales")
    others = ("ep_size", "ep_rank", "tp_size", "tp_rank", "enable_alltoall")
    given = {name: arguments[name] for name in (*names, *others)}
    unscaled = given["token_final_scales"] is None
    if unscaled:
        ids = check_tensor(names[1], arguments[names[1]], dtype=torch.int32, shape=("M", "k"), cast=True)
        given["token_final_scales"] = torch.ones(ids.shape, dtype=torch.float32, device=ids.device)
    return MoeCall(
        **given,
        unscaled=unscaled,
        experts=experts,
        kernel=kernel_of(arguments, experts),
        strict=arguments["strict"] is True,
        activation_type=int(arguments["activation_type"]),
    )


def tensors_of(call: MoeCall) -> dict[str, Tensor | None]:
    """The tensors of a call under flashinfer's names."""
    known = _HUMMING_NAMES if isinstance(call.experts, HummingExperts) else _NAMES
    tensors = {known.get(f.name, f.name): getattr(call.experts, f.name) for f in fields(call.experts)}
    names = ("input", "token_selected_experts", "token_final_scales")
    return {name: getattr(call, name) for name in names} | tensors


def check_modelled(arguments: Mapping[str, Any]) -> None:
    """Raise NotImplementedError where an argument asks for what is not modelled."""
    for name, (modelled, why) in _NOT_MODELLED.items():
        if type(arguments[name]) is not type(modelled) or arguments[name] != modelled:
            raise NotImplementedError(
                f"{name}: not modelled, expected {modelled!r} ({why}), got {shown(arguments[name])}"
            )
    _check_output_dtype(arguments)
    dtypes = tuple(getattr(arguments[name], "dtype", None) for name in ("input", "fc1_expert_weights"))
    if dtypes in _OTHER_KERNELS or dtypes[1] == torch.int64:
        raise NotImplementedError(
            "fc1_expert_weights: not modelled, expected uint8 (MXFP4) or bfloat16 weights and a bfloat16 input, got "
            f"{dtypes[1]} weights and a {dtypes[0]} input"
        )
    check_no_name(arguments["activation_type"])
    if (number := check_int("activation_type", arguments["activation_type"], minimum=0)) not in ACTIVATIONS:
        listed = ", ".join(f"{activation.name} ({id})" for id, activation in ACTIVATIONS.items())
        why = " (ClampedRelu2, which runs on SM10x alone)" if number == _CLAMPED_RELU2 else ""
        raise NotImplementedError(
            f"activation_type: not modelled, expected one of {listed}, got "
            f"{shown(arguments['activation_type'])}{why}"
        )


def _check_output_dtype(arguments: Mapping[str, Any]) -> None:
    """The kernel's output has the dtype of its input; beside MXFP4 weights fp16 belongs to FP8 activations."""
    got, given = arguments["output_dtype"], getattr(arguments["input"], "dtype", None)
    both = {torch.bfloat16, torch.float16}
    if arguments["use_wfp4afp8_humming"] is not True or given not in both:
        if got is not torch.bfloat16:
            known = (
                "; the kernel has torch.float16 with use_wfp4afp8_humming=True"
                if got is torch.float16
                else ""
            )
            raise NotImplementedError(
                f"output_dtype: not modelled, expected torch.bfloat16, got {shown(got)}{known}"
            )
    elif got is not given:
        raise NotImplementedError(
            f"output_dtype: not modelled, expected {given}, as the input has, since the kernel takes no other, got "
            f"{shown(got)}"
        )


def experts_of(arguments: Mapping[str, Any]) -> Experts:
    """The experts of a call, in the layout that it names or that is its tensors' by default.

    Warns:
        UserWarning: once a process, of a call whose tensors may be in two layouts and that does not say which.
    """
    quantized = _check_weights(arguments)
    humming: bool = check_bool("use_wfp4afp8_humming", arguments["use_wfp4afp8_humming"])
    if humming and not quantized:
        raise ValueError(
            "use_wfp4afp8_humming: expected False unless weights are uint8 and use_w4_group_scaling is True, got True"
        )
    layout = _layout(arguments, quantized)
    kind = _kind(layout, humming)
    names = _HUMMING_NAMES if humming else _NAMES
    scales = _scales(arguments["quant_scales"], quantized, humming)
    tensors = {name: arguments[name] for name in ("input", "token_selected_experts", "token_final_scales")}
    held = {f.name: names.get(f.name, f.name) for f in fields(kind)}
    tensors |= {name: scales[name] if name in scales else arguments[name] for name in held.values()}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {list(tensor.stride())}")
    _check_biases(tensors["fc1_expert_biases"], tensors["fc2_expert_biases"], arguments["input"].dtype)
    values: dict[str, Any] = {field: tensors[name] for field, name in held.items()}
    try:
        experts = kind(**values)
    except (TypeError, ValueError) as error:
        field, _, rest = str(error).partition(":")
        hint = "" if layout != "sm90" or not _looks_logical(arguments) else IN_LOGICAL_LAYOUT
        raise type(error)(f"{names.get(field, field)}:{rest}{hint}") from None
    unnamed = arguments["weight_layout"] is None and arguments["kernel"] is None
    if unnamed and isinstance(experts, Sm90Experts) and experts.generation is BYTEWISE:
        _warn_of_two_layouts()
    return experts


def _looks_logical(arguments: Mapping[str, Any]) -> bool:
    """Whether the scales of fc1 have a byte for each row and group, which no kernel takes."""
    fc1, scales = arguments["fc1_expert_weights"], arguments["quant_scales"][0]
    return isinstance(scales, Tensor) and scales.shape == (*fc1.shape[:2], fc1.shape[2] * 2 // GROUP_SIZE)


def kernel_of(arguments: Mapping[str, Any], experts: Experts) -> Sm90Kernel:
    """The tactics that `profile_ids` or `kernel` name, of the generation that `kernel` or the layout names."""
    kernel: Sm90Kernel | None = arguments["kernel"]
    generation = experts.generation if isinstance(experts, Sm90Experts) else NEWEST
    if kernel is not None:
        check_instance("kernel", kernel, Sm90Kernel)
        generation = kernel.generation
    profile_ids: Sequence[int] | None = arguments["profile_ids"]
    if isinstance(experts, HummingExperts):
        if profile_ids is not None:
            check_humming_profile_ids(profile_ids, experts.gemm_shapes)
        return kernel or Sm90Kernel()
    if profile_ids is None or not experts.quantized or not generation.forces_tactics:
        return kernel or Sm90Kernel(generation=generation)
    forced = Sm90Kernel.of_profile_ids(profile_ids, generation)
    for gemm, (tactic, (rows, depth)) in enumerate(zip(forced.tactics, experts.gemm_shapes, strict=True)):
        if tactic not in runnable_tactics(rows, depth, generation):
            raise ValueError(
                f"profile_ids[{gemm}]: expected a tactic that the kernel can run for the {rows} weight rows and "
                f"K = {depth} of GEMM{gemm + 1}, got {profile_ids[gemm]}, which is {tactic}"
            )
    if kernel is not None and kernel.tactics != forced.tactics:
        raise ValueError(
            f"profile_ids: expected {kernel.profile_ids}, which are the tactics of kernel ({kernel}), got "
            f"{list(profile_ids)}, which are {forced}; leave one of the two out"
        )
    return forced


def _check_weights(arguments: Mapping[str, Any]) -> bool:
    """Check dtypes and dimensions of input and weights; return whether the weights are MXFP4.

    bf16 weights are bf16 weights to the kernel whatever `use_w4_group_scaling` says.
    """
    dtypes = (
        (torch.bfloat16, torch.float16) if arguments["use_wfp4afp8_humming"] is True else (torch.bfloat16,)
    )
    hidden = check_tensor("input", arguments["input"], dtype=dtypes, shape=("M", "H")).shape[1]
    fc1, fc2 = arguments["fc1_expert_weights"], arguments["fc2_expert_weights"]
    quantized = check_bool("use_w4_group_scaling", arguments["use_w4_group_scaling"])
    quantized = quantized and not (isinstance(fc1, Tensor) and fc1.dtype == torch.bfloat16)
    dtype, packing = (torch.uint8, 2) if quantized else (torch.bfloat16, 1)
    if not quantized and isinstance(fc1, Tensor) and fc1.dtype == torch.uint8:
        raise TypeError(
            "fc1_expert_weights: expected bfloat16 weights, got uint8; MXFP4 weights need use_w4_group_scaling=True"
        )
    halves, rows_name = (2, "2I") if ACTIVATIONS[int(arguments["activation_type"])].gated else (1, "I")
    check_tensor("fc1_expert_weights", fc1, dtype=dtype, shape=("E", rows_name, hidden // packing))
    experts, rows = fc1.shape[:2]
    if isinstance(fc2, Tensor) and fc2.dim() == 3:
        check_rows(int(arguments["activation_type"]), rows, fc2.shape[2] * packing)
    shape = (experts, hidden, rows // halves // packing)
    check_tensor("fc2_expert_weights", fc2, dtype=dtype, shape=shape)
    return quantized


def _layout(arguments: Mapping[str, Any], quantized: bool) -> WeightLayout:
    """The name of the weights' layout, by default that which the kernel takes."""
    layout, kernel = arguments["weight_layout"], arguments["kernel"]
    if layout is not None:
        check_choice("weight_layout", layout, WEIGHT_LAYOUTS)
        if not quantized and layout != "logical":
            raise ValueError(f"weight_layout: expected 'logical' for bfloat16 weights, got {layout!r}")
        return cast(WeightLayout, layout)
    if not quantized:
        return "logical"
    older = isinstance(kernel, Sm90Kernel) and kernel.generation is PLAIN
    return "logical_weights_folded_scales" if older else "sm90"


def _kind(layout: WeightLayout, humming: bool) -> type[Experts]:
    """What experts in a layout are to `Experts`."""
    kinds = _HUMMING_LAYOUTS if humming else _LAYOUTS
    if layout not in kinds:
        raise ValueError(
            f"weight_layout: expected 'sm90' or 'logical' with use_wfp4afp8_humming=True, got {layout!r}"
        )
    return kinds[layout]


def _scales(scales: Any, quantized: bool, humming: bool) -> dict[str, Tensor | None]:
    """The scales of both GEMMs as bytes, under their names; bf16 weights have none, whatever is given."""
    dtypes_of = _SCALE_DTYPES[humming]
    names = [f"quant_scales[{number}]" for number in range(len(dtypes_of))]
    if not quantized:
        if not isinstance(scales, Sequence | None):
            raise TypeError(f"quant_scales: expected a sequence or None, got {type(scales).__name__}")
        return dict.fromkeys(names)
    if not isinstance(scales, Sequence) or len(scales) != len(names):
        got = f"{len(scales)} of them" if isinstance(scales, Sequence) else type(scales).__name__
        wanted = (
            "five tensors with use_wfp4afp8_humming=True: offsets and residuals of fc1, one, and those of fc2"
            if humming
            else "the scales of fc1 and fc2, two tensors"
        )
        raise ValueError(f"quant_scales: expected {wanted}, got {got}")
    found: dict[str, Tensor | None] = {}
    for name, value, dtypes in zip(names, scales, dtypes_of, strict=True):
        checked = check_tensor(name, value, dtype=dtypes, shape=("...",))
        found[name] = checked.view(torch.uint8) if checked.dtype == torch.float8_e8m0fnu else checked
    return found


def _check_biases(fc1: Tensor | None, fc2: Tensor | None, dtype: torch.dtype) -> None:
    """The kernel takes both biases or none, of the output's dtype."""
    for name, bias in (("fc1", fc1), ("fc2", fc2)):
        if bias is not None:
            check_tensor(f"{name}_expert_biases", bias, dtype=dtype, shape=("E", None), cast=True)
    if (fc1 is None) == (fc2 is None):
        return
    missing, other = ("fc1", "fc2") if fc1 is None else ("fc2", "fc1")
    raise ValueError(
        f"{missing}_expert_biases: expected a tensor beside {other}_expert_biases, since the kernel takes both or "
        f"none, got None; write {missing}_expert_weights.new_zeros({missing}_expert_weights.shape[:2], "
        f"dtype={dtype}), which adds nothing"
    )


@functools.cache
def _warn_of_two_layouts() -> None:
    warnings.warn(
        "quant_scales: 3-D scales belong to two layouts that no shape tells apart. These tensors are taken to be "
        "interleaved weights, as flashinfer 0.6.10 to 0.6.17 takes them; if they are weights in logical order, as "
        "flashinfer up to 0.6.9 takes them (vLLM 0.17, TensorRT-LLM), every output is wrong. Say which: "
        "weight_layout='sm90' or weight_layout='logical_weights_folded_scales'",
        UserWarning,
        stacklevel=6,
    )
