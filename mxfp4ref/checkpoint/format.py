"""What a checkpoint format is, and the checks that all formats share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from mxfp4ref.checkpoint.layer import CheckpointLayer
from mxfp4ref.checkpoint.shards import CheckpointError, Shards
from mxfp4ref.formats.mxfp4 import GROUP_SIZE, SCALE_DTYPES, fp32_to_ue8m0

__all__ = [
    "CONFIG_KEYS",
    "NUMBER",
    "CheckpointFormat",
    "RowOrder",
    "check_sizes",
    "refuse_others",
    "scale_bytes",
]

NUMBER = "(0|[1-9][0-9]{0,5})"
# What a layer needs to be told by config.json, and the keys that most models have for it.
CONFIG_KEYS = {
    "num_experts": ("num_local_experts", "num_experts"),
    "hidden_size": ("hidden_size",),
    "intermediate_size": ("intermediate_size",),
    "limit": ("swiglu_limit",),
    "top_k": ("num_experts_per_tok", "experts_per_token"),
    "routed_scaling_factor": ("routed_scaling_factor",),
}


class RowOrder(NamedTuple):
    """How a tensor that has gate and up together orders its rows `[E, 2I, ...]`."""

    to_halves: Callable[[Tensor], Tensor]
    """From that order to [up; gate]."""
    from_halves: Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class CheckpointFormat:
    """How a family of checkpoints stores its mixture-of-experts layers.

    Attributes:
        name: as in `CheckpointLayer.format`.
        pattern: what the names of the expert tensors begin with; its first group is the prefix of a layer, as
            "layers.3.ffn.", its second the layer's number, and a third one the expert's, if names have it.
        names: what follows the prefix in the names of the tensors, by role: what `read` and `write` look up.
        closed: after the prefix, the beginnings of names that only known tensors may have.
        router: the model's, a key of `PRESETS`.
        read: from this format, shards, a layer's prefix and the number of experts (None where config.json does
            not say) to a layer that is not padded and has no SwiGLU parameters. Raises a CheckpointError if a
            tensor is missing, unknown, unreadable or of another dtype or shape than the others call for.
        write: from this format and a layer that is not padded to its tensors, by the ends of their names.
            Raises a ValueError if the layer has what the format lacks, or the other way round.
        rows: the order of fc1's rows, None where gate and up are tensors of their own.
        config_keys: see `CONFIG_KEYS`; the first key that is there counts.
        alpha, beta: SwiGLU parameters that the model's own code fixes, None where it has none.
        no_limit: the value of the limit in config.json that means none.
    """

    name: str
    pattern: re.Pattern[str]
    names: Mapping[str, str]
    closed: tuple[str, ...]
    router: str
    read: Callable[[CheckpointFormat, Shards, str, int | None], CheckpointLayer]
    write: Callable[[CheckpointFormat, CheckpointLayer], dict[str, Tensor]]
    rows: RowOrder | None = None
    config_keys: Mapping[str, tuple[str, ...]] = MappingProxyType(CONFIG_KEYS)
    alpha: float | None = None
    beta: float | None = None
    no_limit: float | None = None


def check_sizes(label: str, num_experts: int, hidden: int, inner: int) -> None:
    """Raise CheckpointError unless there are experts, and their sizes are whole groups."""
    if num_experts == 0 or not (hidden and inner) or hidden % GROUP_SIZE or inner % GROUP_SIZE:
        raise CheckpointError(
            f"{label}: expected experts whose H and I are multiples of {GROUP_SIZE}, got {num_experts} with "
            f"H={hidden}, I={inner}"
        )


def refuse_others(format: CheckpointFormat, shards: Shards, prefix: str, known: Iterable[str]) -> None:
    """Raise CheckpointError if there are tensors in the `closed` part of a layer that would be ignored."""
    closed = tuple(prefix + beginning for beginning in format.closed)
    others = {name for name in shards.files if name.startswith(closed)}.difference(known)
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
