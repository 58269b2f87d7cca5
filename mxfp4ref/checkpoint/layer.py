"""A layer as it comes out of a checkpoint, and the experts that are still in its files."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType

import torch
from torch import Tensor

from mxfp4ref._choices import ScaleRule
from mxfp4ref._validate import check_ids, check_tensor
from mxfp4ref.checkpoint.format import CheckpointFormat, Found
from mxfp4ref.checkpoint.shards import Shards
from mxfp4ref.formats.experts import Experts
from mxfp4ref.formats.resize import resize_experts
from mxfp4ref.routing.models import Preset
from mxfp4ref.sm90.activation import SWIGLU

__all__ = ["CheckpointLayer", "ExpertsInFiles", "Swiglu", "concatenated", "has_shared_expert"]

_EMPTY: Mapping[str, Tensor] = MappingProxyType({})


@dataclass(frozen=True)
class Swiglu:
    """The parameters of every expert's activation; None where it has none."""

    alpha: float | None = None
    beta: float | None = None
    limit: float | None = None
    situ_beta: float | None = None
    situ_linear_beta: float | None = None


@dataclass(frozen=True, eq=False)
class ExpertsInFiles:
    """Experts that are read when they are needed.

    Attributes:
        format, shards, prefix, found: where they are, and what is known of them.
        ids: whose experts they are: their numbers in the checkpoint, in the order of `select`'s index.
        hidden_size, intermediate_size: H and I, padded.
        swiglu: of every expert.
        rule: how bf16 experts are quantised, see `quantize`.
        more: experts after these that are in memory, without padding: a shared one that was fused.
    """

    format: CheckpointFormat
    shards: Shards
    prefix: str
    found: Found
    ids: tuple[int, ...]
    hidden_size: int
    intermediate_size: int
    swiglu: Swiglu = Swiglu()
    rule: ScaleRule | None = None
    more: Experts | None = None

    @property
    def num_experts(self) -> int:
        return len(self.ids) + (0 if self.more is None else self.more.num_experts)

    def select(self, index: Tensor) -> Experts:
        """Read the experts of an index tensor `[B] int64` into `ids`, as `Experts.select` copies them.

        Raises:
            CheckpointError: one of their tensors is missing, unreadable, or not as the others.
        """
        check_tensor("index", index, dtype=torch.int64, shape=("B",))
        check_ids("index", index, maximum=self.num_experts - 1)
        parts = []
        for in_files, some in _runs(index, len(self.ids)):
            if in_files:
                ids = [self.ids[i] for i in some.tolist()]
                parts.append(
                    self.format.storage.load(
                        self.format, self.shards, self.prefix, self.found, ids, self.rule
                    )
                )
            else:
                assert self.more is not None
                parts.append(self.more.select(some - len(self.ids)))
        experts = parts[0] if len(parts) == 1 else concatenated(parts)
        experts = resize_experts(experts, self.hidden_size, self.intermediate_size)

        def each(value: float | None) -> Tensor | None:
            return (
                None if value is None else torch.full((len(index),), value, dtype=torch.float32, device="cpu")
            )

        return replace(
            experts,
            swiglu_alpha=each(self.swiglu.alpha),
            swiglu_beta=each(self.swiglu.beta),
            swiglu_limit=each(self.swiglu.limit),
            situ_beta=each(self.swiglu.situ_beta),
            situ_linear_beta=each(self.swiglu.situ_linear_beta),
        )

    def read(self) -> Experts:
        """All of them."""
        return self.select(torch.arange(self.num_experts, device="cpu"))


def has_shared_expert(shared_experts: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    """Whether the tensors of a layer include a shared expert, under whatever names."""
    return bool(shared_experts) or any(
        name.startswith("shared_expert.") or "_shexp." in name for name in others
    )


def concatenated(parts: Sequence[Experts]) -> Experts:
    """Experts after each other, which have the same tensors."""
    together: dict[str, Tensor | None] = {}
    for name in (each.name for each in fields(Experts)):
        tensors = [getattr(part, name) for part in parts]
        together[name] = None if tensors[0] is None else torch.cat(tensors)
    return Experts(**together)  # type: ignore[arg-type]


def _runs(index: Tensor, border: int) -> list[tuple[bool, Tensor]]:
    """An index in pieces that lie below a border (True), or not."""
    below = (index < border).tolist()
    ends = [i for i in range(1, len(below)) if below[i] != below[i - 1]]
    return [(below[a], index[a:b]) for a, b in itertools.pairwise([0, *ends, len(below)])]


@dataclass(frozen=True, eq=False)
class CheckpointLayer:
    """A mixture-of-experts layer of a checkpoint, in logical layout.

    Attributes:
        format: a key of `FORMATS`, as "deepseek_v4".
        prefix: what its tensors' names begin with, as "layers.3.ffn.".
        experts: all E experts or, of a part of the layer, those of `expert_ids`; possibly padded.
        hidden_size, intermediate_size: H and I of the experts, before padding.
        router_weight: `[E, H] bf16` or float32, not padded. In models whose experts work in a space of their own
            (Kimi-K3) its width is the model's, and not H.
        router_bias: gpt-oss: `[E] bf16`, part of the logits. Others: `[E] float32`, the correction bias, part of the
            selection only; None in most of DeepSeek-V4's hash layers, and without effect in the others.
        tid2eid: `[V, k] int64` or int32, in DeepSeek-V4's hash layers.
        shared_experts: the shared expert's tensors as stored, by the rest of their names ("w1.weight").
        top_k, routed_scaling_factor: from config.json, or None.
        image_bias: `[E] float32`, the correction bias of the tokens of images, in models that see.
        others: what else lies below the prefix, as stored, by the rest of the names.
        router: what config.json says of the router but for the two above; None: that of the format.
        expert_ids: which experts of the layer `experts` are, where these are not all, or not in order: as an
            expert map says it, the number in the layer of each that a rank holds. A redundant expert may be named
            twice.
        fused: how many of `experts`, the last, are the shared expert; see `fuse_shared`.
        activation_type: an id of `mxfp4ref.sm90.activation.ACTIVATIONS`.
    """

    format: str
    prefix: str
    experts: Experts | ExpertsInFiles
    hidden_size: int
    intermediate_size: int
    router_weight: Tensor
    router_bias: Tensor | None = None
    tid2eid: Tensor | None = None
    shared_experts: Mapping[str, Tensor] = field(default_factory=lambda: _EMPTY)
    top_k: int | None = None
    routed_scaling_factor: float | None = None
    image_bias: Tensor | None = None
    others: Mapping[str, Tensor] = field(default_factory=lambda: _EMPTY)
    router: Preset | None = None
    expert_ids: tuple[int, ...] | None = None
    fused: int = 0
    activation_type: int = SWIGLU

    @property
    def num_experts(self) -> int:
        """E, all experts that the router chooses from."""
        return self.router_weight.shape[0]
