"""What people use today, written out plainly, for `benchmark.py` to compare with. Fast is not the aim here."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref import Experts, MoeCall
from mxfp4ref.formats.mxfp4 import E2M1_VALUES, GROUP_SIZE


def dequantize(packed: Tensor, scales: Tensor) -> Tensor:
    """`[..., K/2]` and `[..., K/32] uint8` to `[..., K] bf16`, as flashinfer's tests do it.

    Nibbles are stacked and looked up one by one in float32; a scale is exp2 of its byte, repeated 32 times.
    """
    table = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=packed.device)
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    scale = torch.exp2(scales.to(torch.float32) - 127).repeat_interleave(GROUP_SIZE, dim=-1)
    return (table[codes.to(torch.int64)] * scale).to(torch.bfloat16)


def moe(call: MoeCall) -> Tensor:
    """The approximate reference of flashinfer's tests: `[M, H] bf16`.

    Each expert that some token uses is dequantised to bf16 and applied with bf16 matrix products; the outputs
    are weighted and added in float32. Of the options it knows the SwiGLU limit only, and no parallelism.
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


def random_experts(
    num_experts: int,
    hidden: int,
    inner: int,
    device: str = "cpu",
    *,
    scales: tuple[int, int] = (116, 124),
    limit: float | None = 10.0,
) -> Experts:
    """Experts of random codes, their scale bytes from a range `[low, high)`."""
    generator = torch.Generator(device).manual_seed(1)

    def random(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, dtype=torch.uint8, device=device, generator=generator)

    return Experts(
        fc1_weights=random(0, 256, num_experts, 2 * inner, hidden // 2),
        fc1_scales=random(*scales, num_experts, 2 * inner, hidden // GROUP_SIZE),
        fc2_weights=random(0, 256, num_experts, hidden, inner // 2),
        fc2_scales=random(*scales, num_experts, hidden, inner // GROUP_SIZE),
        swiglu_limit=None if limit is None else torch.full((num_experts,), limit, device=device),
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
