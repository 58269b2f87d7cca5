"""The whole layer in one call: router, kernel on every rank, routed scaling, shared expert."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref import _ieee
from mxfp4ref._compiler import uncompiled
from mxfp4ref._validate import check_choice, check_float, check_instance, check_same_device, check_tensor
from mxfp4ref.formats.experts import Experts
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.parallel import Ranks, forward_all_ranks
from mxfp4ref.routing.presets import RoutedScaling, Routing
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.activation import SWIGLU
from mxfp4ref.sm90.tactics import Sm90Kernel

__all__ = ["finish_output", "moe_layer"]

_ONE_RANK = Ranks()
_DEFAULT_KERNEL = Sm90Kernel()


@uncompiled
def moe_layer(
    hidden: Tensor,
    routing: Routing,
    experts: Experts,
    *,
    shared_output: Tensor | None = None,
    ranks: Ranks = _ONE_RANK,
    kernel: Sm90Kernel = _DEFAULT_KERNEL,
    activation_type: int = SWIGLU,
) -> Tensor:
    """Hidden states and a router's decision to the layer's output, `[M, H] bf16`.

        moe_layer(hidden, deepseek_v4(logits, bias, routed_scaling_factor=1.5), experts, shared_output=shared)

    Args:
        hidden: `[M, H] bf16`.
        routing: what a router decided for these M tokens and all E experts; see `mxfp4ref.routing`.
        experts: all E experts.
        shared_output: `[M, H] bf16`, the shared expert's output, added to the routed experts'.
        ranks: run on that many ranks and combine their outputs; see `forward_all_ranks`.
        kernel, activation_type: as in `MoeCall`.

    Raises:
        TypeError, ValueError: as the parts do.
    """
    check_instance("experts", experts, Experts)
    check_instance("routing", routing, Routing)
    check_tensor("hidden", hidden, dtype=torch.bfloat16, shape=("M", experts.hidden_size))
    check_tensor("routing.ids", routing.ids, dtype=torch.int32, shape=(len(hidden), "k"))
    call = MoeCall(
        hidden, routing.ids, routing.scales, experts, kernel=kernel, activation_type=activation_type
    )
    return finish_output(
        forward_all_ranks(call, ranks),
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
        return fp32.to_bf16(_ieee.fma(factor, routed, fp32.widen(shared_output.detach())))
    if routed_scaling is RoutedScaling.ON_OUTPUT_BF16:
        routed = fp32.widen(fp32.to_bf16(_ieee.mul(routed, factor)))
    if shared_output is not None:
        routed = _ieee.add(fp32.widen(shared_output.detach()), routed)
    return fp32.to_bf16(routed)
