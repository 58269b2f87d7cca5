"""A layer as it comes out of a checkpoint, and the checks that all formats share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from mxfp4ref.checkpoint.shards import CheckpointError, Shards
from mxfp4ref.formats.experts import Experts
from mxfp4ref.formats.mxfp4 import GROUP_SIZE, SCALE_DTYPES, fp32_to_ue8m0

__all__ = ["NUMBER", "CheckpointLayer", "check_sizes", "refuse_others", "scale_bytes"]

NUMBER = "(0|[1-9][0-9]{0,5})"


@dataclass(frozen=True, eq=False)
class CheckpointLayer:
    """A mixture-of-experts layer of a checkpoint, in logical layout.

    Attributes:
        format: "deepseek_v4", "gpt_oss" or "gpt_oss_original".
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


def check_sizes(label: str, num_experts: int, hidden: int, inner: int) -> None:
    """Raise CheckpointError unless there are experts, and their sizes are whole groups."""
    if num_experts == 0 or not (hidden and inner) or hidden % GROUP_SIZE or inner % GROUP_SIZE:
        raise CheckpointError(
            f"{label}: expected experts whose H and I are multiples of {GROUP_SIZE}, got {num_experts} with "
            f"H={hidden}, I={inner}"
        )


def refuse_others(shards: Shards, prefix: str | tuple[str, ...], known: Iterable[str]) -> None:
    """Raise CheckpointError if tensors begin with a prefix and are not known: they would be ignored."""
    others = {name for name in shards.files if name.startswith(prefix)}.difference(known)
    if others:
        first = min(others)
        raise CheckpointError(
            f"{shards.label(first)}: expected no such tensor in this format, {len(others)} unknown"
        )


def scale_bytes(
    shards: Shards, name: str, scales: Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Stored scales as UE8M0 bytes, exactly or not at all.

    Args:
        shards, name: where they come from.
        scales: as read.
        shape: what the weights call for.
        dtype: what all scales of the layer have: uint8, float8_e8m0fnu, or float32 powers of two.

    Raises:
        CheckpointError: another dtype or shape, or a float32 scale that is no power of two.
    """
    allowed = (*SCALE_DTYPES, torch.float32)
    shards.check(name, scales, dtype if dtype in allowed else allowed, shape)
    if dtype != torch.float32:
        return scales.view(torch.uint8)
    try:
        return fp32_to_ue8m0(scales)
    except ValueError as error:
        raise CheckpointError(f"{shards.label(name)}: {str(error).removeprefix('values: ')}") from None
