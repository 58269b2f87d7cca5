"""Random calls of DeepSeek-V4-Flash's size on a GPU: a few give as many outputs as all small ones together."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from mxfp4ref import Experts, MoeCall, Sm90Kernel
from mxfp4ref.sm90.tactics import runnable_tactics

HIDDEN, INTERMEDIATE, EXPERTS = 4096, 2048, 256
CALLS_OF_EXPERTS = 16  # seeds that share their experts, since those take 3 GB
SCALES = {"ordinary": (116, 124), "varied": (100, 135), "low": (0, 24), "high": (225, 256), "any": (0, 256)}
TOKENS = (1, 3, 8, 33, 64, 200, 512, 1000, 2048, 4096, 4096, 4096)
SPECIAL = (float("inf"), float("-inf"), float("nan"), -0.0, 1e-40, 3e38)


def real_size_call(seed: int) -> MoeCall:
    """The call of a seed: tokens, ids, inputs of every kind, padded slots, parallel ranks and tactics at random."""
    random = torch.Generator().manual_seed(seed)

    def pick(values: tuple[int, ...]) -> int:
        return values[int(torch.randint(len(values), (), generator=random))]

    experts = _experts(seed // CALLS_OF_EXPERTS)
    tokens, top_k, ep_size, tp_size = pick(TOKENS), pick((1, 2, 4, 6, 8)), pick((1, 1, 2)), pick((1, 2))
    on_gpu = torch.Generator("cuda").manual_seed(seed)
    ranked = torch.rand(tokens, EXPERTS * ep_size, device="cuda", generator=on_gpu)
    ids = ranked.topk(top_k).indices.to(torch.int32)
    if pick((0, 0, 0, 0, 1)):
        ids[torch.rand(ids.shape, device="cuda", generator=on_gpu) < 0.2] = -1
    tactics = []
    for shape in ((2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)):
        choices = [tactic for tactic in runnable_tactics(*shape) if tactic.cluster == (1, 1)]
        tactics.append(choices[pick(tuple(range(len(choices))))])
    return MoeCall(
        input=_inputs(tokens, pick(tuple(range(8))), on_gpu),
        token_selected_experts=ids.contiguous(),
        token_final_scales=2 * torch.rand(tokens, top_k, device="cuda", generator=on_gpu),
        experts=experts,
        ep_size=ep_size,
        ep_rank=pick(tuple(range(ep_size))),
        tp_size=tp_size,
        tp_rank=pick(tuple(range(tp_size))),
        kernel=Sm90Kernel(tactics[0], tactics[1]),
        strict=False,
    )


@lru_cache(maxsize=1)
def _experts(seed: int) -> Experts:
    random = torch.Generator("cuda").manual_seed(seed)
    kinds = (*SCALES, "ordinary", "ordinary")
    low, high = SCALES[kinds[seed % len(kinds)]]

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, dtype=torch.uint8, device="cuda", generator=random)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=random).to(torch.bfloat16)

    optional = {}
    if seed % 3 == 1:
        optional = {"fc1_biases": normal(EXPERTS, 2 * INTERMEDIATE), "fc2_biases": normal(EXPERTS, HIDDEN)}
    for number, name in enumerate(("swiglu_alpha", "swiglu_beta", "swiglu_limit")):
        if seed >> number & 1:
            optional[name] = 0.1 + 5 * torch.rand(EXPERTS, device="cuda", generator=random)
    return Experts(
        draw(0, 256, EXPERTS, 2 * INTERMEDIATE, HIDDEN // 2),
        draw(low, high, EXPERTS, 2 * INTERMEDIATE, HIDDEN // 32),
        draw(0, 256, EXPERTS, HIDDEN, INTERMEDIATE // 2),
        draw(low, high, EXPERTS, HIDDEN, INTERMEDIATE // 32),
        **optional,
    )


def _inputs(tokens: int, kind: int, random: torch.Generator) -> Tensor:
    """Ordinary, over 24 or 120 binades, tiny, huge, cancelling, with special values."""

    def powers(low: int, high: int, width: int) -> Tensor:
        exponents = torch.randint(low, high, (tokens, width), device="cuda", generator=random)
        return torch.exp2(exponents.to(torch.float32))

    x = torch.randn(tokens, HIDDEN, device="cuda", generator=random)
    ranges = {1: (-12, 12, HIDDEN), 2: (-60, 60, HIDDEN), 3: (-126, -100, 1), 4: (90, 126, 1)}
    if kind in ranges:
        x = x * powers(*ranges[kind])
    x = x.to(torch.bfloat16)
    if kind == 5:
        x[:, 1::2] = -x[:, ::2]
    if kind == 6:
        special = torch.tensor(SPECIAL, dtype=torch.bfloat16, device="cuda")
        which = torch.randint(len(SPECIAL), x.shape, device="cuda", generator=random)
        rare = torch.rand(x.shape, device="cuda", generator=random) < 0.3 / HIDDEN
        x = torch.where(rare, special[which], x)
    return x
