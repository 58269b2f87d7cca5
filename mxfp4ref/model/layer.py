"""The whole layer in one call: router, kernel on every rank, routed scaling, shared expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mxfp4ref._compiler import uncompiled
from mxfp4ref._ieee import to_fp32, to_fp64
from mxfp4ref._validate import check_choice, check_float, check_instance, check_same_device, check_tensor
from mxfp4ref.formats.experts import Experts
from mxfp4ref.model.forward import Stages
from mxfp4ref.model.parallel import forward_all_ranks
from mxfp4ref.routing.presets import RoutedScaling, Routing
from mxfp4ref.sm90 import fp32

__all__ = ["finish_output", "moe_layer"]


@uncompiled
def moe_layer(
    hidden: Tensor,
    logits: Tensor,
    experts: Experts,
    *,
    router: Callable[..., Routing],
    shared_output: Tensor | None = None,
    ep_size: int = 1,
    tp_size: int = 1,
    reduction: str = "float32",
    tile_k: tuple[int, int] = (128, 128),
    tile_n: tuple[int, int] = (16, 16),
    stages: Stages | None = None,
    **router_options: Any,
) -> Tensor:
    """Hidden states and router logits to the layer's output, `[M, H] bf16`.

        moe_layer(hidden, logits, experts, router=deepseek_v4, correction_bias=bias, shared_output=shared)

    Args:
        hidden: `[M, H] bf16`.
        logits: `[M, E]` float32 or bf16, the router's.
        experts: all E experts.
        router: a preset of `routing.py`, or any function from logits to a `Routing`.
        shared_output: `[M, H] bf16`, the shared expert's output, added to the routed experts'.
        ep_size, tp_size, reduction: run on that many ranks and combine, see `forward_all_ranks`.
        tile_k, tile_n, stages: as in `moe_forward`.
        router_options: passed to the router: correction_bias, routed_scaling, padded, ...

    Raises:
        TypeError, ValueError: as the parts do; or logits for another number of tokens or experts.
    """
    check_instance("experts", experts, Experts)
    if not callable(router):
        raise TypeError(f"router: expected a function that returns a Routing, got {type(router).__name__}")
    check_tensor("hidden", hidden, dtype=torch.bfloat16, shape=("M", experts.hidden_size))
    wanted = (len(hidden), experts.num_experts)
    check_tensor("logits", logits, dtype=(torch.float32, torch.bfloat16), shape=wanted)
    routing = router(logits, **router_options)
    if not isinstance(routing, Routing):
        raise TypeError(f"router: expected a function that returns a Routing, got {type(routing).__name__}")
    routed = forward_all_ranks(
        hidden,
        routing.ids,
        routing.scales,
        experts,
        ep_size=ep_size,
        tp_size=tp_size,
        reduction=reduction,
        tile_k=tile_k,
        tile_n=tile_n,
        stages=stages,
    )
    return finish_output(
        routed,
        shared_output=shared_output,
        routed_scaling=routing.routed_scaling,
        routed_scaling_factor=routing.routed_scaling_factor,
    )


@uncompiled
def finish_output(
    routed_output: Tensor,
    *,
    shared_output: Tensor | None = None,
    routed_scaling: RoutedScaling = RoutedScaling.NONE,
    routed_scaling_factor: float = 1.0,
) -> Tensor:
    """What follows the kernel: the routed scaling factor, unless the weights have it, and the shared expert.

    With r the routed and s the shared output, f the factor rounded to float32, every operation rounded on its
    own unless said otherwise:

    - IN_WEIGHTS, NONE: bf16(s + r).
    - ON_OUTPUT_BF16: q = bf16(float32(r * f)), then bf16(float32(s + q)).
    - FUSED_WITH_SHARED_ADD_BF16: bf16(float32(s + f * r)), product and sum rounded to float32 once, as one
      FMA (what `shared.add_(routed, alpha=f)` compiles to).

    Without a shared output the sum is left out. Subnormals are kept; NaN becomes 0x7FFF.

    Args:
        routed_output: `[M, H] bf16`, the kernel's (with IN_WEIGHTS: from scales that contain the factor).
        shared_output: `[M, H] bf16` or None.
        routed_scaling, routed_scaling_factor: see `RoutedScaling`.

    Raises:
        ValueError: FUSED_WITH_SHARED_ADD_BF16 without a shared output.
    """
    check_tensor("routed_output", routed_output, dtype=torch.bfloat16, shape=("M", "H"))
    check_choice("routed_scaling", routed_scaling, tuple(RoutedScaling))
    routed_scaling_factor = check_float("routed_scaling_factor", routed_scaling_factor)
    if shared_output is not None:
        shape = tuple(routed_output.shape)
        check_tensor("shared_output", shared_output, dtype=torch.bfloat16, shape=shape)
        check_same_device({"routed_output": routed_output, "shared_output": shared_output})
    routed = fp32.widen(routed_output.detach())
    factor = torch.tensor(routed_scaling_factor, dtype=torch.float32, device=routed.device)
    if routed_scaling is RoutedScaling.FUSED_WITH_SHARED_ADD_BF16:
        if shared_output is None:
            raise ValueError(f"shared_output: expected a tensor with {routed_scaling}, got None")
        return fp32.to_bf16(_fma(factor, routed, fp32.widen(shared_output.detach())))
    if routed_scaling is RoutedScaling.ON_OUTPUT_BF16:
        routed = fp32.widen(fp32.to_bf16(to_fp32(to_fp64(routed) * to_fp64(factor))))
    if shared_output is not None:
        routed = to_fp32(fp32.bf16_to_fp64(shared_output.detach()) + to_fp64(routed))
    return fp32.to_bf16(routed)


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """float32 `a * b + c`, rounded once. Unlike `fp32.fma` it keeps subnormals: torch's kernels do."""
    product, c = to_fp64(a) * to_fp64(b), to_fp64(c)  # exact: 24 + 24 bits
    total = product + c
    # TwoSum gives the error; where there is one, the odd one of the two neighbours of the exact value is
    # taken (round to odd), so that the second rounding, to 24 bits, is right.
    c_part = total - product
    error = (product - (total - c_part)) + (c - c_part)
    bits = total.view(torch.int64)
    inexact_even = (error != 0) & ((bits & 1) == 0) & torch.isfinite(total)
    bits = torch.where(inexact_even, bits + torch.where((error < 0) == (total < 0), 1, -1), bits)
    return to_fp32(bits.view(torch.float64))
