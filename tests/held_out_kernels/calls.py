"""Calls as a server would make them: small, of ordinary numbers, one for each thing that a kernel may get wrong."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from mxfp4ref import Experts, MoeCall, quantize
from mxfp4ref._choices import ScaleRule

__all__ = ["CALLS", "QUANTISED", "captured", "quantised_values"]

# name: (tokens, hidden, inner, this rank's experts, top k)
CALLS = {
    "prefill": (40, 256, 384, 8, 4),
    "gpt_oss": (40, 256, 384, 8, 4),
    "expert_rank_2_of_4": (40, 256, 128, 4, 4),
    "tensor_rank_1_of_2": (24, 256, 128, 4, 2),
    "padded_slots": (24, 256, 128, 4, 3),
    "padded_infinite_rows": (24, 256, 128, 4, 3),
    "equal_weights": (24, 256, 128, 8, 4),
    "odd_tokens": (33, 256, 128, 8, 2),
    "top_8": (12, 256, 128, 16, 8),
    "padded_hidden": (24, 384, 128, 4, 2),
    "tokens_150": (150, 256, 128, 4, 2),
    "tokens_600": (600, 128, 128, 4, 2),
    "idle_experts": (20, 256, 128, 8, 2),
    "scaled_weights": (24, 256, 128, 8, 4),
    "tiny_values": (24, 256, 128, 4, 2),
    "many_experts": (24, 256, 128, 40, 4),
}


@cache
def captured(name: str) -> MoeCall:
    """A call by its name."""
    tokens, hidden, inner, experts, top_k = CALLS[name]
    random = torch.Generator().manual_seed(list(CALLS).index(name))

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=random) * scale

    def weights(rows: int, depth: int) -> tuple[Tensor, Tensor]:
        spread = torch.randint(-2, 3, (experts, rows, depth // 32, 1), generator=random).float().exp2()
        values = normal(experts, rows, depth // 32, 32, scale=2.0 * depth**-0.5) * spread
        return quantize(values.flatten(2))

    size = 4 if name == "expert_rank_2_of_4" else 1
    (w1, s1), (w2, s2) = weights(2 * inner, hidden), weights(hidden, inner)
    ids = torch.stack([torch.randperm(size * experts, generator=random)[:top_k] for _ in range(tokens)])
    x, scales = normal(tokens, hidden), torch.softmax(normal(tokens, top_k), 1)
    held = Experts(w1, s1, w2, s2)
    if name in ("gpt_oss", "expert_rank_2_of_4", "tensor_rank_1_of_2"):
        biases = normal(experts, 2 * inner, scale=0.5), normal(experts, hidden, scale=0.5)
        alpha, beta, limit = torch.rand(3, experts, generator=random)
        held = replace(
            held,
            fc1_biases=biases[0].bfloat16(),
            fc2_biases=biases[1].bfloat16(),
            swiglu_alpha=alpha + 1.25,
            swiglu_beta=beta + 0.5,
            swiglu_limit=5 * limit + 2,
        )
    if name.startswith("padded_slots") or name == "padded_infinite_rows":
        ids[3::5, -1] = -1
        ids[-2:] = -1
        scales = scales.masked_fill(ids < 0, 0.0 if name == "padded_infinite_rows" else 0.25)
    if name == "padded_infinite_rows":
        x[-2:] = torch.inf
    if name == "equal_weights":
        scales[::2] = 1 / top_k
    if name == "padded_hidden":
        x[:, -64:] = 0
    if name == "idle_experts":
        ids = ids // 3 * 3 + 1  # experts 1, 4 and 7
        ids[:, 1] = torch.where(ids[:, 1] == ids[:, 0], (ids[:, 1] + 3) % 9, ids[:, 1])
    if name == "scaled_weights":
        scales = scales * 2.5  # as of a router with routed_scaling_factor 2.5
    if name == "tiny_values":
        x = x * 2.0**-62  # activations and terms of the sum fall below the smallest normal float32
    rank = {
        "expert_rank_2_of_4": {"ep_size": 4, "ep_rank": 2},
        "tensor_rank_1_of_2": {"tp_size": 2, "tp_rank": 1},
    }
    return MoeCall(x.bfloat16(), ids.int(), scales, held, **rank.get(name, {}))


# name: how it is rounded, the first that shows a kernel is taken
QUANTISED: dict[str, ScaleRule] = {
    "values": "floor",
    "weights": "floor",
    "weights_ceil": "ceil",
    "weights_even": "even",
    "weights_rceil": "rceil",
}


@cache
def quantised_values(name: str = "values") -> Tensor:
    """`[16, 128] float32`, of which many lie half way between two codes; or `[64, 256]` as weights are.

    Those have groups of every size from 2^-40 to 2^24, largest magnitudes just above, just below and at every point
    where a rule changes its mind, and values just beside the middle of two codes: nearer than bf16 tells apart.
    """
    random = torch.Generator().manual_seed(5)
    if name == "values":
        return torch.randint(-24, 25, (16, 128), generator=random) / 4
    groups = torch.randn(512, 32, generator=random)
    exponents = (torch.arange(512) % 65 - 40).float()
    groups = groups / groups.abs().amax(1, True) * (1 + torch.rand(512, 1, generator=random))
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])[
        torch.randint(7, (512, 8), generator=random)
    ]
    near = 1 + torch.tensor([-(2.0**-12), -(2.0**-10), 2.0**-10, 2.0**-12])[torch.arange(8) % 4]
    edges = torch.tensor([1.0, 1.5, 1.75, 2.0])[torch.arange(512) % 4]
    off = 1 + torch.tensor([-(2.0**-20), 0.0, 2.0**-20])[torch.arange(512) % 3]
    groups[:, :8] = middles * near / 8
    groups[256:, 9] = -(edges * off)[256:]
    return (groups * exponents.exp2()[:, None]).view(64, 256)
