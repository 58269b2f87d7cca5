"""Random layers and calls, small enough to be computed slowly, hard enough to show a wrong rounding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mxfp4ref.formats import experts as experts_module
from mxfp4ref.formats.experts import Experts, Sm90Experts
from mxfp4ref.formats.generations import NEWEST, Generation
from mxfp4ref.formats.layout import fold_scales_sm90, interleave_weights_sm90
from mxfp4ref.model.call import MoeCall
from tests.helpers import bits

PARAMETERS = ("swiglu_alpha", "swiglu_beta", "swiglu_limit")


def random_bf16(rng: np.random.Generator, *shape: int, low: int = 0x3D80, high: int = 0x4080) -> Tensor:
    """bf16 of random significands, signs and exponents, by default magnitudes from 2^-4 to 4."""
    return bits.bf16(rng.integers(low, high, shape) | rng.integers(0, 2, shape) << 15)


def random_experts(
    seed: int,
    *,
    num_experts: int = 4,
    hidden: int = 128,
    inner: int = 128,
    biases: bool = False,
    parameters: tuple[str, ...] = (),
    quantized: bool = True,
) -> Experts:
    """GEMM1's results are a few units in size, so that neither the sigmoid nor the clamp is without effect."""
    rng = np.random.default_rng(seed)

    def codes(*shape: int) -> Tensor:
        return torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))

    def scales(*shape: int) -> Tensor:
        return torch.from_numpy(rng.integers(119, 125, shape, dtype=np.uint8))

    def parameter(name: str) -> Tensor | None:
        values = rng.uniform(0.5, 2.5, num_experts).astype(np.float32)
        return torch.from_numpy(values) if name in parameters else None

    weights: dict[str, Any]
    if quantized:
        weights = {
            "fc1_weights": codes(num_experts, 2 * inner, hidden // 2),
            "fc1_scales": scales(num_experts, 2 * inner, hidden // 32),
            "fc2_weights": codes(num_experts, hidden, inner // 2),
            "fc2_scales": scales(num_experts, hidden, inner // 32),
        }
    else:
        weights = {
            "fc1_weights": random_bf16(rng, num_experts, 2 * inner, hidden, low=0x3C00, high=0x3E80),
            "fc1_scales": None,
            "fc2_weights": random_bf16(rng, num_experts, hidden, inner, low=0x3C00, high=0x3E80),
            "fc2_scales": None,
        }
    return Experts(
        **weights,
        fc1_biases=random_bf16(rng, num_experts, 2 * inner) if biases else None,
        fc2_biases=random_bf16(rng, num_experts, hidden) if biases else None,
        **{name: parameter(name) for name in experts_module.PARAMETERS},
    )


def without_gate(experts: Experts) -> Experts:
    """The same for an activation without a gate: of fc1 the rows of the gate alone."""
    names = ("fc1_weights", "fc1_scales", "fc1_biases")
    halves = {
        name: t.chunk(2, 1)[1].contiguous() for name in names if (t := getattr(experts, name)) is not None
    }
    return replace(experts, **halves)


def random_call(seed: int, experts: Experts, *, tokens: int = 6, top_k: int = 2, **options: Any) -> MoeCall:
    """Ids are global ones: some belong to other ranks where there are any. Some slots are padding."""
    rng = np.random.default_rng(seed + 1_000_000)
    count = experts.num_experts * options.get("ep_size", 1)
    ids = (
        np.stack([rng.permutation(count)[:top_k] for _ in range(tokens)]) if tokens else np.zeros((0, top_k))
    )
    ids = np.where(rng.random(ids.shape) < 0.15, -1, ids)
    return MoeCall(
        input=random_bf16(rng, tokens, experts.hidden_size),
        token_selected_experts=torch.from_numpy(ids.astype(np.int32)),
        token_final_scales=torch.from_numpy(rng.uniform(0.05, 1.5, ids.shape).astype(np.float32)),
        experts=experts,
        **options,
    )


def to_sm90(
    experts: Experts, generation: Generation = NEWEST, dtype: torch.dtype = torch.int32
) -> Sm90Experts:
    """The same experts as the real call takes them."""
    names = ("fc1_biases", "fc2_biases", *experts_module.PARAMETERS)
    return Sm90Experts(
        fc1_weights=interleave_weights_sm90(experts.fc1_weights, generation),
        fc1_scales=fold_scales_sm90(experts.fc1_scales, generation).contiguous().view(dtype),
        fc2_weights=interleave_weights_sm90(experts.fc2_weights, generation),
        fc2_scales=fold_scales_sm90(experts.fc2_scales, generation).contiguous().view(dtype),
        **{name: getattr(experts, name) for name in names},
    )
