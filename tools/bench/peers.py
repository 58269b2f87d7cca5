"""The layer as people compute it today, approximately; the drop-in's arguments; random inputs for both."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

import mxfp4ref
from mxfp4ref import Experts, MoeCall
from mxfp4ref.formats.layout import fold_scales_sm90, interleave_weights_sm90
from mxfp4ref.formats.mxfp4 import E2M1_VALUES, GROUP_SIZE

FLASHINFERS_TESTS = "approximate, flashinfer's tests"
FASTEST = "approximate, fastest"


def dequantize(packed: Tensor, scales: Tensor) -> Tensor:
    """`[..., K/2]` and `[..., K/32] uint8` to `[..., K] bf16`, as flashinfer's tests do it.

    Nibbles are stacked and looked up one by one in float32; a scale is exp2 of its byte, repeated 32 times.
    """
    table = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=packed.device)
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    scale = torch.exp2(scales.to(torch.float32) - 127).repeat_interleave(GROUP_SIZE, dim=-1)
    return (table[codes.to(torch.int64)] * scale).to(torch.bfloat16)


def approximations(call: MoeCall) -> dict[str, Callable[[], Tensor]]:
    """The two references that a call of the drop-in is compared with, by name.

    They differ in the dequantising: as flashinfer's tests do it, or by `mxfp4ref.dequantize` into memory that is
    kept from call to call.
    """

    @cache
    def kept(rows: int, columns: int) -> Tensor:
        return torch.empty(rows, columns, dtype=torch.bfloat16, device=call.input.device)

    def in_place(packed: Tensor, scales: Tensor) -> Tensor:
        return mxfp4ref.dequantize(packed, scales, out=kept(packed.shape[0], 2 * packed.shape[1]))

    return {FLASHINFERS_TESTS: lambda: moe(call, dequantize), FASTEST: lambda: moe(call, in_place)}


def moe(call: MoeCall, dequantize: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Every expert that a token uses dequantised to bf16, and bf16 matrix products: `[M, H] bf16`.

    The experts' outputs are weighted and added in float32. Of the options it knows the SwiGLU limit only, and no
    parallelism.
    """
    experts = call.experts
    assert experts.fc1_scales is not None
    assert experts.fc2_scales is not None
    output = torch.zeros(call.input.shape, dtype=torch.float32, device=call.input.device)
    for expert in call.token_selected_experts.unique().tolist():
        token, slot = (call.token_selected_experts == expert).nonzero(as_tuple=True)
        fc1 = dequantize(experts.fc1_weights[expert], experts.fc1_scales[expert])
        up, gate = (call.input[token] @ fc1.T).chunk(2, dim=-1)
        if experts.swiglu_limit is not None:
            limit = float(experts.swiglu_limit[expert])
            up, gate = up.clamp(-limit, limit), gate.clamp(max=limit)
        fc2 = dequantize(experts.fc2_weights[expert], experts.fc2_scales[expert])
        down = (torch.nn.functional.silu(gate) * up) @ fc2.T
        output.index_add_(0, token, call.token_final_scales[token, slot, None] * down.to(torch.float32))
    return output.to(torch.bfloat16)


def interleaved(experts: Experts) -> dict[str, Any]:
    """The drop-in's arguments that stand for the experts, in the layouts of the newest SM90 kernel."""
    assert experts.fc1_scales is not None
    assert experts.fc2_scales is not None
    scales = [fold_scales_sm90(s).view(torch.int32) for s in (experts.fc1_scales, experts.fc2_scales)]
    return {
        "fc1_expert_weights": interleave_weights_sm90(experts.fc1_weights),
        "fc2_expert_weights": interleave_weights_sm90(experts.fc2_weights),
        "quant_scales": scales,
        "swiglu_limit": experts.swiglu_limit,
    }


def drop_in(call: MoeCall, experts: dict[str, Any], **options: Any) -> Callable[[], Tensor]:
    """The call as people write it, with experts as `interleaved` gives them, ready to be made."""
    return lambda: mxfp4ref.torch_ref_cutlass_fused_moe(
        call.input,
        call.token_selected_experts,
        call.token_final_scales,
        output_dtype=torch.bfloat16,
        use_w4_group_scaling=True,
        **experts,
        **options,
    )[0]


def random_experts(
    num_experts: int, hidden: int, inner: int, device: str = "cpu", scales: tuple[int, int] = (116, 124)
) -> Experts:
    """Experts of random codes, their scale bytes from a range `[low, high)`, and a SwiGLU limit of 10."""
    generator = torch.Generator(device).manual_seed(1)

    def random(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, dtype=torch.uint8, device=device, generator=generator)

    return Experts(
        fc1_weights=random(0, 256, num_experts, 2 * inner, hidden // 2),
        fc1_scales=random(*scales, num_experts, 2 * inner, hidden // GROUP_SIZE),
        fc2_weights=random(0, 256, num_experts, hidden, inner // 2),
        fc2_scales=random(*scales, num_experts, hidden, inner // GROUP_SIZE),
        swiglu_limit=torch.full((num_experts,), 10.0, device=device),
    )


def random_call(experts: Experts, tokens: int, top_k: int) -> MoeCall:
    """Normally distributed tokens, each with `top_k` experts and weights that add up to 1."""
    device = experts.device
    generator = torch.Generator(device).manual_seed(2)
    scores = torch.rand(tokens, experts.num_experts, device=device, generator=generator)
    chosen = scores.topk(top_k, dim=1)
    return MoeCall(
        input=torch.randn(tokens, experts.hidden_size, device=device, generator=generator).to(torch.bfloat16),
        token_selected_experts=chosen.indices.to(torch.int32),
        token_final_scales=chosen.values / chosen.values.sum(1, keepdim=True),
        experts=experts,
    )
