"""Which expert-parallel rank holds which experts, and the ids that its kernel is given.

An *expert map* lists for every rank the experts in its slots, in their order: `[[0, 3], [1, 4], [2]]` are five
experts dealt out to three ranks. It is a sequence of sequences of ints or of 1-D int tensors, or one int tensor
`[ep_size, slots]`. Ranks may have different numbers of slots, at least one each, and experts may be redundant: in
more than one slot. It lists *logical* experts, those of the checkpoint and the router. The slots of all ranks,
numbered through, are *physical* experts: a layer's `physical_to_logical_map` in vLLM and sglang is the map,
flattened, and `physical_to_logical_map.view(ep_size, -1)` the map. vLLM's `expert_map` is something else: the inverse
of one rank's part, with -1 for what other ranks hold.

The kernel knows no maps, only equal ranges by (ep_size, ep_rank). Ids are mapped once, before the call, to what
`rank_arguments` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from mxfp4ref._choices import STRATEGIES, Strategy
from mxfp4ref._validate import INT32_MAX, check_choice, check_ids, check_int, check_same_device, check_tensor
from mxfp4ref.routing.presets import PADDING_ID

__all__ = [
    "STRATEGIES",
    "ExpertMap",
    "check_expert_map",
    "check_physical_ids",
    "physical_ids",
    "place_experts",
    "rank_arguments",
]

ExpertMap = Sequence[Sequence[int] | Tensor] | Tensor

_INTS = (torch.int32, torch.int64)


def place_experts(
    num_experts: int, ep_size: int, strategy: Strategy = "linear"
) -> tuple[tuple[int, ...], ...]:
    """The expert map of a strategy of vLLM's `--expert-placement-strategy`, without redundant experts.

    Args:
        num_experts: E.
        ep_size: number of ranks, which need not divide E: the first `E % ep_size` ranks have one expert more.
        strategy: "linear" gives each rank consecutive experts, "round_robin" the experts `ep_rank`,
            `ep_rank + ep_size`, and so on.

    Raises:
        ValueError: more ranks than experts, or another strategy.
    """
    check_int("num_experts", num_experts, minimum=1)
    check_int("ep_size", ep_size, minimum=1, maximum=num_experts)
    check_choice("strategy", strategy, STRATEGIES)
    ranks = range(ep_size)
    if strategy == "round_robin":
        return tuple(tuple(range(rank, num_experts, ep_size)) for rank in ranks)
    share, remainder = divmod(num_experts, ep_size)
    starts = [rank * share + min(rank, remainder) for rank in range(ep_size + 1)]
    return tuple(tuple(range(starts[rank], starts[rank + 1])) for rank in ranks)


def check_expert_map(
    expert_map: ExpertMap, *, ep_size: int | None = None, num_experts: int | None = None
) -> tuple[tuple[int, ...], ...]:
    """Return an expert map as tuples.

    Args:
        expert_map: see the module.
        ep_size: how many ranks it must have, if that is known.
        num_experts: E, if that is known; else as many as its largest id says.

    Raises:
        TypeError: not a sequence of each rank's experts, or an id that is no int.
        ValueError: a rank without slots, an id outside [0, E), an expert in no slot, or another number of ranks.
    """
    ranks = tuple(_slots(f"expert_map[{rank}]", slots) for rank, slots in enumerate(_rows(expert_map)))
    if not ranks:
        raise ValueError("expert_map: expected the experts of at least one rank, got none")
    if ep_size is not None and len(ranks) != check_int("ep_size", ep_size, minimum=1):
        raise ValueError(f"expert_map: expected {ep_size} ranks, as ep_size says, got {len(ranks)}")
    held = {expert for slots in ranks for expert in slots}
    if num_experts is not None and max(held) >= check_int("num_experts", num_experts, minimum=1):
        raise ValueError(f"expert_map: expected ids from 0 to {num_experts - 1}, got {max(held)}")
    count = num_experts or max(held) + 1
    if len(held) < count:
        missing = next(expert for expert in range(count) if expert not in held)
        raise ValueError(
            f"expert_map: expected each of the {count} experts in a slot, got {count - len(held)} in none, "
            f"the first of them {missing}"
        )
    return ranks


def physical_ids(ids: Tensor, expert_map: ExpertMap, *, replica: Tensor | None = None) -> Tensor:
    """Logical ids as physical ones, `[M, k] int32`; padding stays padding.

    Args:
        ids: `[M, k] int32`, logical, -1 for padding.
        expert_map: see the module.
        replica: `[M, k]` or `[M, 1]` int, which of the slots that hold an expert serves it: of n of them, by
            ascending physical id, the one at `replica % n`. Needed where the map has redundant experts. With
            `rows = torch.arange(M)[:, None]`, vLLM 0.33 chooses `rows * 2654435769 % 2**32`, and sglang 0.5.23
            `rows` where ranks have to agree, else at random or the nearest.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or values, or there is no replica.
    """
    check_tensor("ids", ids, dtype=torch.int32, shape=("M", "k"))
    placed = torch.tensor(_flat(expert_map), device=ids.device)
    count = placed.bincount()
    check_ids("ids", ids, minimum=PADDING_ID, maximum=len(count) - 1)
    if replica is None:
        if int(count.max()) > 1:
            expert = int(count.argmax())
            raise ValueError(
                f"expert_map: expected one slot of expert {expert} where nothing says which serves, got "
                f"{int(count[expert])}; give physical_ids(ids, expert_map, replica=...), or physical_ids=... to Ranks"
            )
        replica = torch.zeros_like(ids)
    check_tensor("replica", replica, dtype=_INTS, shape=(ids.shape[0], None))
    if replica.shape[1] != 1:
        check_tensor("replica", replica, dtype=_INTS, shape=tuple(ids.shape))
    check_ids("replica", replica, maximum=torch.iinfo(replica.dtype).max)
    check_same_device({"ids": ids, "replica": replica})
    experts = ids.clamp(min=0).long()
    by_expert, first = placed.argsort(stable=True), count.cumsum(0) - count
    chosen = by_expert[first[experts] + replica % count[experts]]
    return torch.where(ids == PADDING_ID, PADDING_ID, chosen).to(torch.int32)


def check_physical_ids(physical: Tensor, ids: Tensor, expert_map: ExpertMap) -> Tensor:
    """Return `[M, k] int32` physical ids if their slots hold the experts of logical ids, padding where those are.

    Raises:
        TypeError, ValueError: they do not, as when they were mapped twice; or another dtype, shape or device.
    """
    check_tensor("ids", ids, dtype=torch.int32, shape=("M", "k"))
    check_tensor("physical_ids", physical, dtype=torch.int32, shape=tuple(ids.shape))
    check_same_device({"ids": ids, "physical_ids": physical})
    placed = _flat(expert_map)
    check_ids("physical_ids", physical, minimum=PADDING_ID, maximum=len(placed) - 1)
    experts = torch.tensor([*placed, PADDING_ID], dtype=torch.int32, device=ids.device)[physical.long()]
    if bool((wrong := experts != ids).any()):
        place = tuple(wrong.nonzero()[0].tolist())
        held, wanted = ("padding" if t[place] == PADDING_ID else f"expert {t[place]}" for t in (experts, ids))
        raise ValueError(
            f"physical_ids: expected {wanted} at {list(place)}, as the call has it, got {int(physical[place])}, "
            f"which is {held} by expert_map ({int(wrong.sum())} such slots in all)"
        )
    return physical


def rank_arguments(physical: Tensor, expert_map: ExpertMap) -> list[dict[str, Any]]:
    """What the kernel of each rank is told of the experts: arguments of `MoeCall`, by name.

    Where all ranks have the same number of slots these are the kernel's own ranges, and it is given the physical ids
    with ep_size and ep_rank. Elsewhere it is given the numbers of its own slots, -1 for those of others, and told of
    no other rank: by ep_size and ep_rank it would give every rank as many slots as it has, and take wrong ones.

    Args:
        physical: `[M, k] int32`, -1 for padding.
        expert_map: see the module.

    Raises:
        TypeError, ValueError: another dtype or shape, or an id that is no slot's.
    """
    sizes = [len(slots) for slots in check_expert_map(expert_map)]
    check_tensor("physical", physical, dtype=torch.int32, shape=("M", "k"))
    check_ids("physical", physical, minimum=PADDING_ID, maximum=sum(sizes) - 1)
    if len(set(sizes)) == 1:
        same = {"token_selected_experts": physical, "ep_size": len(sizes)}
        return [{**same, "ep_rank": rank} for rank in range(len(sizes))]
    return [
        {
            "token_selected_experts": torch.where(
                (physical >= stop - size) & (physical < stop), physical - (stop - size), PADDING_ID
            )
        }
        for size, stop in zip(sizes, accumulate(sizes), strict=True)
    ]


def _flat(expert_map: ExpertMap) -> list[int]:
    return [expert for slots in check_expert_map(expert_map) for expert in slots]


def _rows(expert_map: ExpertMap) -> Sequence[Any]:
    wanted = "expert_map: expected the experts of each rank"
    if isinstance(expert_map, Tensor):
        if expert_map.dim() == 1:
            raise ValueError(f"{wanted}, got one row; write expert_map.view(ep_size, -1)")
        return _listed("expert_map", expert_map, ("ep_size", "slots"))
    if not isinstance(expert_map, Sequence) or isinstance(expert_map, str | bytes):
        raise TypeError(f"{wanted}, as a sequence or a tensor, got {type(expert_map).__name__}")
    return expert_map


def _slots(name: str, slots: object) -> tuple[int, ...]:
    if isinstance(slots, Tensor):
        slots = _listed(name, slots, ("slots",))
    if not isinstance(slots, Sequence) or isinstance(slots, str | bytes):
        raise TypeError(f"{name}: expected a sequence of a rank's experts, got {type(slots).__name__}")
    if not slots:
        raise ValueError(f"{name}: expected at least one expert, got none; no kernel runs without")
    return tuple(check_int(f"{name}[{slot}]", expert, minimum=0) for slot, expert in enumerate(slots))


def _listed(name: str, ids: Tensor, shape: tuple[str, ...]) -> list[Any]:
    check_tensor(name, ids, dtype=_INTS, shape=shape)
    if not 0 < ids.numel() <= INT32_MAX:  # physical ids are int32
        raise ValueError(f"{name}: expected from 1 to {INT32_MAX} slots, got shape {list(ids.shape)}")
    listed: list[Any] = ids.tolist()
    return listed
