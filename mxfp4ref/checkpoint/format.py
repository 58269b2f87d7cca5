"""What a checkpoint format is, and the checks of names and sizes that all formats share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from mxfp4ref.checkpoint.layer import CheckpointLayer
from mxfp4ref.checkpoint.shards import CheckpointError, Shards
from mxfp4ref.formats.mxfp4 import GROUP_SIZE

__all__ = ["CONFIG_KEYS", "NUMBER", "CheckpointFormat", "RowOrder", "check_sizes"]

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
        config_keys: as `CONFIG_KEYS`; of several keys the first that is there counts.
        router: the model's, a key of `PRESETS`.
        read: from this format, shards, a layer's prefix and the number of experts (None where config.json does
            not say) to a layer that is not padded and has no SwiGLU parameters. Raises a CheckpointError if a
            tensor is missing, unknown, unreadable or of another dtype or shape than the others call for.
        write: from this format and a layer that is not padded to its tensors, by the ends of their names.
            Raises a ValueError if the layer has what the format lacks, or the other way round.
        rows: the order of fc1's rows, None where gate and up are tensors of their own.
        alpha, beta: SwiGLU parameters that the model's own code fixes, None where it has none.
        no_limit: the value of the limit in config.json that means none.
    """

    name: str
    pattern: re.Pattern[str]
    names: Mapping[str, str]
    closed: tuple[str, ...]
    config_keys: Mapping[str, tuple[str, ...]]
    router: str
    read: Callable[[CheckpointFormat, Shards, str, int | None], CheckpointLayer]
    write: Callable[[CheckpointFormat, CheckpointLayer], dict[str, Tensor]]
    rows: RowOrder | None = None
    alpha: float | None = None
    beta: float | None = None
    no_limit: float | None = None

    def refuse_others(self, shards: Shards, prefix: str, known: Iterable[str]) -> None:
        """Raise CheckpointError if there are tensors in the `closed` part of a layer that would be ignored."""
        closed = tuple(prefix + beginning for beginning in self.closed)
        others = {name for name in shards.files if name.startswith(closed)}.difference(known)
        if others:
            first = min(others)
            raise CheckpointError(
                f"{shards.label(first)}: expected no such tensor in this format, {len(others)} unknown"
            )


def check_sizes(label: str, num_experts: int, hidden: int, inner: int) -> None:
    """Raise CheckpointError unless there are experts, and their sizes are whole groups."""
    if num_experts == 0 or not (hidden and inner) or hidden % GROUP_SIZE or inner % GROUP_SIZE:
        raise CheckpointError(
            f"{label}: expected experts whose H and I are multiples of {GROUP_SIZE}, got {num_experts} with "
            f"H={hidden}, I={inner}"
        )
