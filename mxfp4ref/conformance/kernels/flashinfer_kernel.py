"""The installed flashinfer as a kernel under test. Nothing else in this project calls its kernel."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.kernels.adapters import (
    Arguments,
    Kernel,
    KernelError,
    Skip,
    logical_arguments,
    sm90_arguments,
    takes,
)
from mxfp4ref.formats import humming
from mxfp4ref.formats.generations import Generation, generation_of
from mxfp4ref.formats.humming_experts import HummingExperts
from mxfp4ref.formats.layout import fold_scales_sm90, interleave_weights_sm90
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.humming import call_of

__all__ = ["flashinfer_kernel", "flashinfer_w4a8_kernel"]


def flashinfer_kernel(device: str = "cuda") -> Kernel:
    """`cutlass_fused_moe` of the installed flashinfer, with the tactics that a call names where it can be told.

    Weights and scales are brought into the kernel's layouts by flashinfer's own helpers, whose bytes have to be those
    of `mxfp4ref.formats.layout`; where they are not, preparing the arguments raises ValueError. Calls
    with an argument that the release does not have yet are skipped.

    Raises:
        KernelError: no flashinfer, one without this kernel or of an unknown release, or no GPU.
    """
    generation, function, their_weights, their_scales = _installed(device)

    @_remembering
    def weights(packed: Tensor) -> Tensor:
        helper = "interleave_moe_weights_for_sm90_mixed_gemm"
        return _agreed(helper, their_weights(packed, "fp4"), interleave_weights_sm90(packed, generation))

    @_remembering
    def scales(logical: Tensor) -> Tensor:
        helper = "interleave_moe_scales_for_sm90_mixed_gemm"
        return _agreed(helper, their_scales(logical, 32), fold_scales_sm90(logical, generation))

    prepare_layouts = sm90_arguments(function, weights, scales)

    def prepare(kind: str, call: MoeCall) -> Arguments:
        positional, keywords = prepare_layouts(kind, call)
        keywords["enable_pdl"] = False
        if generation.forces_tactics:
            keywords["profile_ids"] = call.kernel.profile_ids
        if unknown := [name for name in keywords if not takes(function, name)]:
            raise Skip(f"this flashinfer has no {' and no '.join(unknown)}")
        return positional, keywords

    return Kernel(
        "flashinfer",
        ("moe",),
        prepare,
        function,
        forces_tile_k=generation.forces_tactics,
        device=device,
        forces_tactics=generation.forces_tactics,
        generation=generation,
    )


def flashinfer_w4a8_kernel(device: str = "cuda") -> Kernel:
    """The same function with `use_wfp4afp8_humming=True`, for the golden calls of kind "w4a8", default tactics.

    Raises:
        KernelError: as `flashinfer_kernel`.
    """
    generation, function, their_weights, their_scales = _installed(device)
    prepare_logical = logical_arguments(function)

    def prepare(kind: str, inputs: Any) -> Arguments:
        call = call_of(inputs)
        experts = call.experts
        assert isinstance(experts, HummingExperts)
        positional, keywords = prepare_logical(kind, call)
        scales = []
        for gemm in ("fc1", "fc2"):
            packed, offsets = getattr(experts, f"{gemm}_weights"), getattr(experts, f"{gemm}_scales")
            helper = "interleave_moe_weights_for_sm90_mixed_gemm"
            weights = _agreed(helper, their_weights(packed, "fp4_fp8"), humming.interleave(packed))
            keywords[f"{gemm}_expert_weights"] = weights
            helper = "interleave_moe_scales_for_sm90_mixed_gemm"
            folded = _agreed(helper, their_scales(offsets, 32), fold_scales_sm90(offsets, generation))
            scales += [folded.view(torch.int32), getattr(experts, f"{gemm}_residual")]
        keywords["quant_scales"] = [*scales[:2], torch.ones_like(scales[1][0]), *scales[2:]]
        return positional, keywords | {"use_wfp4afp8_humming": True, "enable_pdl": False}

    return Kernel("flashinfer-w4a8", ("w4a8",), prepare, function, device=device, generation=generation)


def _installed(
    device: str,
) -> tuple[Generation, Callable[..., Any], Callable[..., Tensor], Callable[..., Tensor]]:
    """Generation, function and the two layout helpers of the installed flashinfer."""
    try:
        generation = generation_of(importlib.import_module("flashinfer").__version__)
        fused_moe = importlib.import_module("flashinfer.fused_moe")
        function = fused_moe.cutlass_fused_moe
        weights = fused_moe.interleave_moe_weights_for_sm90_mixed_gemm
        scales = fused_moe.interleave_moe_scales_for_sm90_mixed_gemm
    except (ImportError, AttributeError, ValueError) as error:
        hint = "; pip install 'mxfp4ref[kernel]'" if getattr(error, "name", "") == "flashinfer" else ""
        raise KernelError(f"kernel: flashinfer: {type(error).__name__}: {error}{hint}") from error
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise KernelError("kernel: flashinfer needs a CUDA device, and torch sees none here")
    return generation, function, weights, scales


def _remembering(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function with its results for the last two tensors, those of GEMM1 and GEMM2, kept for the next call."""
    kept: list[tuple[Tensor, Tensor]] = []

    def remembered(argument: Tensor) -> Tensor:
        for source, result in kept:
            if source is argument:
                return result
        kept.append((argument, function(argument)))
        del kept[:-2]
        return kept[-1][1]

    return remembered


def _agreed(helper: str, theirs: Tensor, ours: Tensor) -> Tensor:
    """What flashinfer's helper gave, if its bytes are this package's."""
    if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        raise ValueError(
            f"flashinfer's {helper} gave {theirs.dtype} {list(theirs.shape)}, expected {ours.dtype} "
            f"{list(ours.shape)}"
        )
    different = differing(theirs, ours)
    if bool(different.any()):
        first = different.nonzero()[0].tolist()
        raise ValueError(
            f"flashinfer's {helper} gave other bytes than mxfp4ref.formats.layout: {int(different.sum()):,} of "
            f"{ours.numel():,}, the first at {first}"
        )
    return theirs
