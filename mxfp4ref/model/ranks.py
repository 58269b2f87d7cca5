"""How many ranks share a layer, and which experts each has."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxfp4ref._choices import REDUCTIONS, Reduction
from mxfp4ref._shown import Shown
from mxfp4ref._validate import check_choice, check_int, check_tensor
from mxfp4ref.formats.mxfp4 import GROUP_SIZE
from mxfp4ref.model.placement import ExpertMap, check_expert_map

__all__ = ["Ranks"]


@dataclass(frozen=True, repr=False)
class Ranks(Shown):
    """How many ranks run a layer, and how their outputs are added up.

        Ranks(ep_size=3, expert_map=place_experts(8, 3))
        Ranks(ep_size=4, expert_map=physical_to_logical_map.view(4, -1), physical_ids=topk_ids)

    Attributes:
        ep_size: ranks that share the experts.
        tp_size: ranks that share each expert.
        reduction: see `gather`.
        intermediate_size: I before padding, see `split_intermediate`; None if the experts are not padded.
        expert_map: which experts each of the ep_size ranks holds, see `mxfp4ref.model.placement`; None for equal
            ranges. The ids of a call are logical ones with any map.
        physical_ids: `[M, k] int32`, which slot of the map, counted over all ranks, serves each id of the call, as an
            engine's dispatch chose it. Needed only where the map has redundant experts; the choice decides which
            terms are added up, and rounded, on one rank.
        tp_rank: run this one of the tp_size ranks alone: the output is what it adds to the others', rounded to bf16,
            with fc2's bias on rank 0 only; None for all ranks and their sum. It needs an ep_size of 1.

    Raises:
        TypeError, ValueError: a size that is no positive int, another reduction, a map or a rank that is none.
    """

    ep_size: int = 1
    tp_size: int = 1
    reduction: Reduction = "float32"
    intermediate_size: int | None = None
    expert_map: ExpertMap | None = None
    physical_ids: Tensor | None = None
    tp_rank: int | None = None

    def __post_init__(self) -> None:
        check_int("ep_size", self.ep_size, minimum=1)
        check_int("tp_size", self.tp_size, minimum=1)
        check_choice("reduction", self.reduction, REDUCTIONS)
        if self.intermediate_size is not None:
            check_int("intermediate_size", self.intermediate_size, minimum=GROUP_SIZE)
        if self.expert_map is not None:
            check_expert_map(self.expert_map, ep_size=self.ep_size)
        if self.physical_ids is not None:
            check_tensor("physical_ids", self.physical_ids, dtype=torch.int32, shape=("M", "k"))
            if self.expert_map is None:
                raise ValueError("physical_ids: expected None without an expert_map, got a tensor")
        if self.tp_rank is not None:
            check_int("tp_rank", self.tp_rank, minimum=0, maximum=self.tp_size - 1)
            if self.ep_size != 1:
                raise ValueError(
                    f"tp_rank: expected None with an ep_size of {self.ep_size}, got {self.tp_rank}"
                )

    @property
    def tp_ranks(self) -> tuple[int, ...]:
        """The tensor-parallel ranks that are run."""
        return tuple(range(self.tp_size)) if self.tp_rank is None else (self.tp_rank,)
