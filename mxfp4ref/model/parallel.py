"""Expert and tensor parallelism: what each rank holds, and all ranks run and combined in one process.

Ranks are numbered `ep_rank * tp_size + tp_rank`. The kernel's contract for expert parallelism is *global* ids
with (ep_size, ep_rank) (`docs/arithmetic.md`, section 7): `global_to_local` is for code that needs local ids,
and its result is never to be handed to the kernel, which would drop real experts on every rank but 0. Where ranks
hold no equal ranges, an expert map says what they hold: see `mxfp4ref.model.placement`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxfp4ref._choices import REDUCTIONS, Reduction
from mxfp4ref._compiler import uncompiled
from mxfp4ref._ieee import to_fp32, to_fp64
from mxfp4ref._validate import (
    check_choice,
    check_ids,
    check_instance,
    check_int,
    check_same_device,
    check_tensor,
)
from mxfp4ref.formats.experts import Experts, Sm90Experts
from mxfp4ref.formats.humming_experts import HummingExperts
from mxfp4ref.formats.mxfp4 import GROUP_SIZE
from mxfp4ref.formats.resize import resize_experts, to_logical
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import Stages, forward
from mxfp4ref.model.placement import (
    ExpertMap,
    check_expert_map,
    check_physical_ids,
    physical_ids,
    rank_arguments,
)
from mxfp4ref.model.ranks import Ranks
from mxfp4ref.routing.presets import PADDING_ID
from mxfp4ref.sm90 import fp32

__all__ = [
    "Ranks",
    "forward_all_ranks",
    "gather",
    "global_to_local",
    "local_experts",
    "local_to_global",
    "rank_calls",
    "serving_ranks",
    "split_experts",
    "split_intermediate",
]


_KERNEL_MULTIPLE = 128  # the kernel's smallest K tile


def local_experts(ids: Tensor, *, num_experts: int, ep_size: int, ep_rank: int) -> Tensor:
    """Which slots of `[M, k] int32` global ids are this rank's, `[M, k] bool`; padding is nobody's.

    Args:
        ids: global ids, -1 for padding.
        num_experts: E, of all ranks together.
        ep_size, ep_rank: the rank owns the ids `[ep_rank * E / ep_size, (ep_rank + 1) * E / ep_size)`.

    Raises:
        ValueError: an id outside [-1, E), or E is no multiple of ep_size.
    """
    start, stop = _range(num_experts, ep_size, ep_rank)
    check_tensor("ids", ids, dtype=torch.int32, shape=("M", "k"))
    check_ids("ids", ids, minimum=PADDING_ID, maximum=num_experts - 1)
    return (ids >= start) & (ids < stop)


def global_to_local(ids: Tensor, *, num_experts: int, ep_size: int, ep_rank: int) -> Tensor:
    """Global ids as indices into this rank's experts, `[M, k] int32`; -1 where a slot is not this rank's."""
    mine = local_experts(ids, num_experts=num_experts, ep_size=ep_size, ep_rank=ep_rank)
    return torch.where(mine, ids - ep_rank * (num_experts // ep_size), PADDING_ID)


def local_to_global(ids: Tensor, *, num_experts: int, ep_size: int, ep_rank: int) -> Tensor:
    """A rank's indices `[M, k] int32` as global ids; -1 stays -1 (what it stood for is not recoverable)."""
    start, stop = _range(num_experts, ep_size, ep_rank)
    check_tensor("ids", ids, dtype=torch.int32, shape=("M", "k"))
    check_ids("ids", ids, minimum=PADDING_ID, maximum=stop - start - 1)
    return torch.where(ids == PADDING_ID, PADDING_ID, ids + start)


def split_experts(experts: Experts, ep_size: int, expert_map: ExpertMap | None = None) -> list[Experts]:
    """The experts of each expert-parallel rank, as views; copied, in logical layout, where a map scatters them.

    Args:
        experts: all E.
        ep_size: number of ranks.
        expert_map: which experts each has, see `mxfp4ref.model.placement`; by default equal ranges.

    Raises:
        TypeError, ValueError: the map is none of these experts and ranks, or without one ep_size does not divide E.
    """
    check_instance("experts", experts, Experts)
    check_int("ep_size", ep_size, minimum=1)
    if expert_map is None:
        ranges = [_range(experts.num_experts, ep_size, rank) for rank in range(ep_size)]
        return [experts.slice(start, stop) for start, stop in ranges]
    ranks = check_expert_map(expert_map, ep_size=ep_size, num_experts=experts.num_experts)
    return [_chosen(experts, slots) for slots in ranks]


def split_intermediate(
    experts: Experts, tp_size: int, *, intermediate_size: int | None = None
) -> list[Experts]:
    """The shard of each tensor-parallel rank, as vLLM and sglang cut it: rows of both halves of fc1 (of fc1, if it
    has no gate), columns of fc2.

    I's blocks of 32 are shared out, `ceil(I / 32 / tp_size)` of them a rank, so that the last ranks may have fewer,
    or none. MXFP4 shards are then padded with zeros to the next multiple of 128, which the kernel takes: gpt-oss's
    2880 columns on four ranks are 736, 736, 736 and 672, each padded to 768.

    The fc2 bias must be added once, so that ranks above 0 carry none (the kernel, told its tp_rank, would
    ignore it there). Shards of experts in SM90 layout are in logical layout.

    Args:
        experts: the experts of all ranks.
        tp_size: number of ranks.
        intermediate_size: I before the experts were padded, which decides where they are cut; by default theirs.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: tp_size does not divide I, or what lies beyond I is not zero.
    """
    check_int("tp_size", tp_size, minimum=1)
    check_instance("experts", experts, Experts)
    inner = _unpadded(experts, intermediate_size)
    if inner % tp_size:
        raise ValueError(
            f"tp_size: expected a divisor of the intermediate size {inner}, such as {_divisors(inner)}, got {tp_size}"
        )
    if tp_size == 1:
        return [experts]
    if isinstance(experts, HummingExperts):
        raise TypeError(
            "experts: expected MXFP4 experts that are not prepared for FP8 activations, since engines prepare the "
            "shard of each rank by itself; write [HummingExperts.prepare(shard) for shard in split_intermediate(...)]"
        )
    if isinstance(experts, Sm90Experts):
        experts = to_logical(experts)
    width = GROUP_SIZE * -(-inner // (GROUP_SIZE * tp_size))
    hidden = experts.hidden_size
    experts = resize_experts(resize_experts(experts, hidden, inner), hidden, tp_size * width)
    halves = 2 if experts.gated else 1
    names = ("fc1_weights", "fc1_scales", "fc1_biases")
    fc1 = {name: tensor for name in names if (tensor := getattr(experts, name)) is not None}
    shards = [
        replace(
            experts,
            **{name: _rows(tensor, halves, tp_size, rank) for name, tensor in fc1.items()},
            fc2_weights=_columns(experts.fc2_weights, tp_size, rank),
            fc2_scales=None if experts.fc2_scales is None else _columns(experts.fc2_scales, tp_size, rank),
            fc2_biases=experts.fc2_biases if rank == 0 else None,
        )
        for rank in range(tp_size)
    ]
    padded = width + -width % (_KERNEL_MULTIPLE if experts.quantized else GROUP_SIZE)
    return [resize_experts(shard, hidden, padded) for shard in shards]


@uncompiled
def gather(outputs: Sequence[Tensor], *, reduction: Reduction = "float32") -> Tensor:
    """The sum of the ranks' `[M, H] bf16` (or fp16) outputs, in rank order, of their dtype.

    Args:
        outputs: one tensor a rank.
        reduction: "float32" adds in float32 and rounds to bf16 at the end; "bf16" rounds after every
            addition (to fp16 where the outputs are), as an all-reduce of such tensors does (this one in rank order; a
            ring starts each chunk at another rank).
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_instance("outputs", outputs, Sequence)
    if len(outputs) == 0:
        raise ValueError("outputs: expected at least one rank's output, got none")
    first = check_tensor("outputs[0]", outputs[0], dtype=(torch.bfloat16, torch.float16), shape=("M", "H"))
    for rank, output in enumerate(outputs):
        check_tensor(f"outputs[{rank}]", output, dtype=first.dtype, shape=tuple(first.shape))
    check_same_device({f"outputs[{rank}]": output for rank, output in enumerate(outputs)})
    rounded = fp32.to_fp16 if first.dtype == torch.float16 else fp32.to_bf16
    total = fp32.widen(first)
    for output in outputs[1:]:
        total = to_fp32(to_fp64(total) + to_fp64(fp32.widen(output)))
        if reduction == "bf16":
            total = fp32.widen(rounded(total))
    return rounded(total)


@uncompiled
def forward_all_ranks(call: MoeCall, ranks: Ranks, stages: Stages | None = None) -> Tensor:
    """`forward` on every rank with its part of the call's experts, and the `gather` of all, `[M, H] bf16`.

    Every rank rounds its own output to bf16, so that more than one rank gives other bits than one, except
    for tokens whose experts all live on the same one.

    Args:
        call: as on a single rank, with the experts of all.
        ranks: how many there are.
        stages: see `forward`.

    Raises:
        ValueError: a call of one rank of several, sizes that do not divide the experts, or a map of other ones.
    """
    outputs = [forward(of_rank, stages) for of_rank in rank_calls(call, ranks)]
    return gather(outputs, reduction=ranks.reduction)


def rank_calls(call: MoeCall, ranks: Ranks) -> list[MoeCall]:
    """The call of each rank, tensor-parallel ranks next to each other; arguments as for `forward_all_ranks`."""
    check_instance("call", call, MoeCall)
    check_instance("ranks", ranks, Ranks)
    if (call.ep_size, call.tp_size) != (1, 1):
        raise ValueError(
            f"call: expected one with the experts of all ranks, got ep_size {call.ep_size}, tp_size {call.tp_size}"
        )
    calls = []
    parts = split_experts(call.experts, ranks.ep_size, ranks.expert_map)
    for local, told in zip(parts, _rank_arguments(call, ranks), strict=True):
        shards = split_intermediate(local, ranks.tp_size, intermediate_size=ranks.intermediate_size)
        for tp_rank in ranks.tp_ranks:
            shard = shards[tp_rank]
            calls.append(replace(call, experts=shard, tp_size=ranks.tp_size, tp_rank=tp_rank, **told))
    return calls


def serving_ranks(ids: Tensor, num_experts: int, ranks: Ranks) -> Tensor:
    """The expert-parallel rank that computes each slot, `[M, k] int64`, -1 where there is none to compute.

    Args:
        ids: `[M, k] int32`, logical ids, -1 for padding.
        num_experts, ranks: of the layer.

    Raises:
        ValueError: an `ep_size` that does not divide the experts, or a map of other ones.
    """
    if ranks.expert_map is None:
        _range(num_experts, ranks.ep_size, 0)
        return torch.where(ids < 0, -1, ids // (num_experts // ranks.ep_size)).long()
    expert_map = check_expert_map(ranks.expert_map, num_experts=num_experts)
    if ranks.physical_ids is None:
        physical = physical_ids(ids, expert_map)
    else:
        physical = check_physical_ids(ranks.physical_ids, ids, expert_map)
    ends = torch.tensor([len(slots) for slots in expert_map], device=ids.device).cumsum(0)
    return torch.where(physical < 0, -1, torch.bucketize(physical, ends, right=True))


def _rank_arguments(call: MoeCall, ranks: Ranks) -> list[dict[str, Any]]:
    if ranks.expert_map is None:
        return [{"ep_size": ranks.ep_size, "ep_rank": ep_rank} for ep_rank in range(ranks.ep_size)]
    ids = call.token_selected_experts
    skipped = (ids < 0) | (ids >= call.experts.num_experts)
    ids = torch.where(skipped, PADDING_ID, ids)
    if ranks.physical_ids is None:
        physical = physical_ids(ids, ranks.expert_map)
    else:
        physical = check_physical_ids(ranks.physical_ids, ids, ranks.expert_map)
    return rank_arguments(physical, ranks.expert_map)


def _divisors(size: int) -> str:
    return ", ".join(str(count) for count in range(1, 17) if size % count == 0)


def _chosen(experts: Experts, slots: tuple[int, ...]) -> Experts:
    start, stop = slots[0], slots[0] + len(slots)
    if slots == tuple(range(start, stop)):
        return experts.slice(start, stop)
    return experts.select(torch.tensor(slots, device=experts.device))


def _unpadded(experts: Experts, intermediate_size: int | None) -> int:
    largest = experts.intermediate_size
    if intermediate_size is None:
        return largest
    inner = check_int("intermediate_size", intermediate_size, minimum=GROUP_SIZE, maximum=largest)
    if inner % GROUP_SIZE:
        raise ValueError(f"intermediate_size: expected a multiple of {GROUP_SIZE}, got {inner}")
    return inner


def _rows(fc1: Tensor, halves: int, tp_size: int, rank: int) -> Tensor:
    """The rank's share of the rows of each half, `[E, 2I, ...]` -> `[E, 2I / tp_size, ...]`; with one half of I."""
    parts = fc1.reshape(fc1.shape[0], halves, tp_size, -1, *fc1.shape[2:])
    return parts[:, :, rank].flatten(1, 2)


def _columns(fc2: Tensor, tp_size: int, rank: int) -> Tensor:
    width = fc2.shape[2] // tp_size
    return fc2[:, :, rank * width : (rank + 1) * width].contiguous()


def _range(num_experts: int, ep_size: int, ep_rank: int) -> tuple[int, int]:
    check_int("num_experts", num_experts, minimum=1)
    check_int("ep_size", ep_size, minimum=1)
    check_int("ep_rank", ep_rank, minimum=0, maximum=ep_size - 1)
    if num_experts % ep_size:
        written = f"; uneven counts take an expert_map, place_experts({num_experts}, {ep_size})"
        how = written if ep_size < num_experts else ""
        raise ValueError(f"ep_size: expected a divisor of the {num_experts} experts, got {ep_size}{how}")
    num_local = num_experts // ep_size
    return ep_rank * num_local, (ep_rank + 1) * num_local
