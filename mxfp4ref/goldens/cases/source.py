"""The inputs of golden cases: tensors from the counter-based generator, the same on every machine."""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch
from torch import Tensor

from mxfp4ref.formats.experts import Experts
from mxfp4ref.formats.mxfp4 import GROUP_SIZE
from mxfp4ref.goldens import generator

__all__ = ["MODERATE_SCALES", "Source", "float32", "int32"]

# UE8M0 bytes, lowest and highest, with which N(0, 1) inputs give outputs of a moderate size.
MODERATE_SCALES = (119, 123)


class Source:
    """Named streams of a case. The seed is the CRC-32 of its name, so that no case depends on another."""

    def __init__(self, case_id: str) -> None:
        self.seed = zlib.crc32(case_id.encode("ascii"))

    def bytes(self, name: str, *shape: int) -> Tensor:
        """Uniform bytes, uint8."""
        return generator.generate(self.seed, name, shape, "bytes")

    def range(self, name: str, low: int, high: int, *shape: int) -> Tensor:
        """Bytes from `low` to `high`, uint8."""
        return generator.generate(self.seed, name, shape, "range", low=low, high=high)

    def words(self, name: str, *shape: int) -> Tensor:
        """Integers from 0 to 2^32 - 1, int64."""
        count = math.prod(shape)
        data = generator.random_bytes(self.seed, name, 0, 4 * count).view("<u4").astype(np.int64)
        return torch.from_numpy(data).reshape(shape)

    def uniform(self, name: str, *shape: int) -> Tensor:
        """Numbers k / 2^24 in (0, 1], float32."""
        return ((self.words(name, *shape) >> 8) + 1).to(torch.float32) * 2.0**-24

    def normal(self, name: str, *shape: int) -> Tensor:
        """About N(0, 1): a sum of four 16-bit integers, centred, over 2^15, rounded to bf16."""
        words = self.words(name, *shape, 2)
        total = ((words & 0xFFFF) + (words >> 16)).sum(-1) - 2 * 0xFFFF
        return (total.to(torch.float32) * 2.0**-15).to(torch.bfloat16)

    def signs(self, name: str, *shape: int) -> Tensor:
        """-1 or +1, float32."""
        return 1.0 - 2.0 * (self.bytes(name, *shape) & 1).to(torch.float32)

    def spread(self, name: str, low: int, high: int, *shape: int) -> Tensor:
        """bf16 with random sign and fraction and exponents uniform from 2^low to 2^high."""
        exponent = self.range(f"{name}.exponent", low + 127, high + 127, *shape).to(torch.int32)
        fraction = self.bytes(f"{name}.fraction", *shape).to(torch.int32)  # its low bit is the sign
        bits = (fraction & 1) << 15 | exponent << 7 | fraction >> 1
        return bits.to(torch.int16).view(torch.bfloat16)

    def distinct(self, name: str, num_tokens: int, top_k: int, num_experts: int) -> Tensor:
        """`[M, k] int32`, for each token k distinct ids below `num_experts`, in random order."""
        return (
            self.words(name, num_tokens, num_experts).argsort(dim=1, stable=True)[:, :top_k].to(torch.int32)
        )

    def experts(
        self,
        num_experts: int,
        hidden: int,
        inner: int,
        *,
        fc1_scales: tuple[int, int] = MODERATE_SCALES,
        fc2_scales: tuple[int, int] = MODERATE_SCALES,
        biases: bool = False,
        gated: bool = True,
        **swiglu: float | list[float],
    ) -> Experts:
        """Experts with uniform codes, scale bytes from the given ranges, N(0, 1) biases.

        `gated` is whether fc1 has 2I rows or I, `swiglu` any of `alpha`, `beta` and `limit`: a number for all
        experts, or one for each.
        """
        parameters = {
            f"swiglu_{name}": float32(value if isinstance(value, list) else [value] * num_experts)
            for name, value in swiglu.items()
        }
        rows = 2 * inner if gated else inner
        return Experts(
            fc1_weights=self.bytes("fc1_weights", num_experts, rows, hidden // 2),
            fc1_scales=self.range("fc1_scales", *fc1_scales, num_experts, rows, hidden // GROUP_SIZE),
            fc2_weights=self.bytes("fc2_weights", num_experts, hidden, inner // 2),
            fc2_scales=self.range("fc2_scales", *fc2_scales, num_experts, hidden, inner // GROUP_SIZE),
            fc1_biases=self.normal("fc1_biases", num_experts, rows) if biases else None,
            fc2_biases=self.normal("fc2_biases", num_experts, hidden) if biases else None,
            **parameters,
        )

    def weights(self, num_tokens: int, top_k: int) -> Tensor:
        """Routing weights in (0, 1] that use all 24 bits, `[M, k] float32`; they do not sum to one."""
        return self.uniform("token_final_scales", num_tokens, top_k)


def float32(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def int32(values: list[list[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
