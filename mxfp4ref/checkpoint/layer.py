"""A layer as it comes out of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import Tensor

from mxfp4ref.formats.experts import Experts

__all__ = ["CheckpointLayer"]


@dataclass(frozen=True, eq=False)
class CheckpointLayer:
    """A mixture-of-experts layer of a checkpoint, in logical layout.

    Attributes:
        format: a key of `FORMATS`, as "deepseek_v4".
        prefix: what its tensors' names begin with, as "layers.3.ffn.".
        experts: all E experts, possibly padded.
        hidden_size, intermediate_size: H and I before padding.
        router_weight: `[E, H] bf16`, not padded.
        router_bias: gpt-oss: `[E] bf16`, part of the logits. DeepSeek-V4: `[E] float32`, the correction
            bias, part of the selection only; None in its hash layers.
        tid2eid: `[V, k] int64` or int32, in DeepSeek-V4's hash layers.
        shared_experts: the shared expert's tensors as stored, by the rest of their names ("w1.weight").
        top_k, routed_scaling_factor: from config.json, or None.
    """

    format: str
    prefix: str
    experts: Experts
    hidden_size: int
    intermediate_size: int
    router_weight: Tensor
    router_bias: Tensor | None = None
    tid2eid: Tensor | None = None
    shared_experts: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))
    top_k: int | None = None
    routed_scaling_factor: float | None = None
