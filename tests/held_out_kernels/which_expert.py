"""Slots that go to the wrong expert, or nowhere, or somewhere although they should not."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref import MoeCall, Stages, forward
from tests.held_out_kernels.by_hand import Rows, layer
from tests.held_out_kernels.definition import wrong


def _renamed(call: MoeCall, ids: Tensor) -> Tensor:
    kept = torch.where(call.token_selected_experts < 0, -1, ids.int())
    return forward(replace(call, token_selected_experts=kept, strict=False))


@wrong(
    stage="slots",
    says=("expert|\\bids?\\b", "next|off by one|one too (high|far)|shift|[+-] ?1|following"),
    story="1-based expert ids: every slot takes the weights of the expert after its own",
)
def expert_off_by_one(call: MoeCall) -> Tensor:
    return _renamed(call, (call.token_selected_experts + 1) % call.num_global_experts)


@wrong(
    stage="slots",
    says=("expert|\\bids?\\b", "modulo|\\bmod\\b|wrap|mask|low(est)? (two )?bits|alias|& ?3"),
    story="the id is masked with 3, from a test with four experts",
)
def expert_id_modulo_four(call: MoeCall) -> Tensor:
    def local(right: Tensor) -> Tensor:
        return torch.where(right < 0, right, right & 3)

    return layer(call, local=local)


@wrong(
    stage="slots",
    says=("expert", "swap|exchang|interchang|permut|instead of|take|of expert|0 by 1"),
    story="two experts were loaded in each other's place",
)
def first_two_experts_swapped(call: MoeCall) -> Tensor:
    def local(right: Tensor) -> Tensor:
        both = ((right == 0) | (right == 1)) & (call.experts.num_experts > 1)
        return torch.where(both, 1 - right, right)

    return layer(call, local=local)


@wrong(
    stage="slots",
    says=("expert|\\bids?\\b", "rotat|shift|offset|rank|next|by (one|two|2|1)"),
    story="local experts are rotated by the rank: the loader counted from the rank's number",
)
def experts_rotated_by_the_rank(call: MoeCall) -> Tensor:
    def local(right: Tensor) -> Tensor:
        return torch.where(right < 0, right, (right + call.ep_rank) % call.experts.num_experts)

    return layer(call, local=local)


@wrong(
    stage="slots",
    says=("padd|-1", "expert (0|zero)|first expert"),
    story="an unsigned clamp makes expert 0 of a padded slot",
)
def padding_is_expert_zero(call: MoeCall) -> Tensor:
    return layer(call, local=lambda right: torch.where(call.token_selected_experts < 0, 0, right))


@wrong(
    stage="slots",
    says=("padd|-1", "expert (0|zero)|first expert|comput|not skipped|nan"),
    story="a padded slot is computed as expert 0 with weight 0, so that Inf in its row becomes NaN",
)
def padding_is_expert_zero_with_weight_zero(call: MoeCall) -> Tensor:
    padded = call.token_selected_experts < 0
    return layer(
        call,
        local=lambda right: torch.where(padded, 0, right),
        weights=lambda local, weights: weights.masked_fill(padded, 0.0),
    )


@wrong(
    stage="slots",
    says=(
        "foreign|other rank|another rank|not (of )?(this|its) rank|outside|remote",
        "expert (0|zero)|first|clamp",
    ),
    story="slots of other ranks are clamped to the rank's first or last expert instead of being skipped",
)
def foreign_slots_clamped(call: MoeCall) -> Tensor:
    ids, count = call.token_selected_experts, call.experts.num_experts

    def local(right: Tensor) -> Tensor:
        clamped = (ids.long() - call.ep_rank * count).clamp(0, count - 1)
        return torch.where(ids < 0, -1, clamped)

    return layer(call, local=local)


@wrong(
    stage="slots",
    says=(
        "foreign|other rank|another rank|not (of )?(this|its) rank|outside|remote",
        "expert (0|zero)|first",
    ),
    story="slots of other ranks go to expert 0 of this rank",
)
def foreign_slots_to_expert_zero(call: MoeCall) -> Tensor:
    ids = call.token_selected_experts
    return layer(call, local=lambda right: torch.where((right < 0) & (ids >= 0), 0, right))


@wrong(
    stage=("slots", "finalize"),
    says=("last", "slot", "drop|missing|omit|left out|not added|ignored|skipped|weight 0|lost"),
    story="the loop over slots ends one too early",
)
def last_slot_left_out(call: MoeCall) -> Tensor:
    return layer(call, local=lambda right: right.index_fill(1, torch.tensor([right.shape[1] - 1]), -1))


@wrong(
    stage=("slots", "finalize"),
    says=("slot", "equal|same|weight of an earlier|duplicate|repeat", "weight"),
    story="slots are told apart by their weight, so of slots with equal weights one counts",
)
def slots_of_equal_weight_counted_once(call: MoeCall) -> Tensor:
    weights = call.token_final_scales
    earlier = (weights[:, :, None] == weights[:, None, :]).tril(-1).any(2)
    return layer(call, local=lambda right: right.masked_fill(earlier, -1))


@wrong(
    stage=("slots", "finalize"),
    says=(
        "slot",
        "odd|every (second|other)|\\b1\\b|alternate",
        "drop|missing|omit|left out|not added|skipped|lost",
    ),
    story="two slots are taken at a time and the second is forgotten",
)
def odd_slots_left_out(call: MoeCall) -> Tensor:
    odd = torch.arange(call.top_k) % 2 == 1
    return layer(call, local=lambda right: right.masked_fill(odd, -1))


@wrong(
    stage=("slots", "finalize"),
    says=(
        "expert",
        "rows?|token|capacity|position",
        "drop|missing|beyond|after|first|more than|overflow|lost",
    ),
    story="each expert has room for eight rows; what comes after is dropped",
)
def rows_beyond_capacity_dropped(call: MoeCall) -> Tensor:
    def local(right: Tensor) -> Tensor:
        kept = right.clone()
        for expert in range(call.experts.num_experts):
            at = (right == expert).nonzero()[8:]
            kept[at[:, 0], at[:, 1]] = -1
        return kept

    return layer(call, local=local)


@wrong(
    stage="fc2",
    says=(
        "GEMM ?2|fc2|second GEMM|down",
        "expert",
        "swap|neighbou?r|next|exchang|pair|instead of|take|of expert",
    ),
    story="GEMM2's pointer array is filled in pairs the wrong way round",
)
def fc2_experts_swapped_in_pairs(call: MoeCall) -> Tensor:
    last = call.experts.num_experts - 1
    return layer(
        call, expert2=lambda rows: torch.where((rows.expert ^ 1) > last, rows.expert, rows.expert ^ 1)
    )


@wrong(
    stage="fc1",
    says=(
        "GEMM ?1|fc1|first GEMM",
        "expert",
        "tile|rows|boundar|first row|neighbou?r|of expert|other experts",
    ),
    story="GEMM1 takes one expert for a tile of 16 sorted rows, though a tile may hold rows of two",
)
def fc1_tile_takes_its_first_rows_expert(call: MoeCall) -> Tensor:
    return layer(call, expert1=lambda rows: rows.expert[torch.arange(len(rows.expert)) // 16 * 16])


@wrong(
    stage="fc2",
    says=("GEMM ?2|fc2|second GEMM|down", "rows|tile|position", "expert"),
    story="the second tile of eight rows of an expert is multiplied with the next expert's weights",
)
def fc2_second_tile_of_another_expert(call: MoeCall) -> Tensor:
    def expert2(rows: Rows) -> Tensor:
        return torch.where(rows.tile(8) == 1, (rows.expert + 1) % call.experts.num_experts, rows.expert)

    return layer(call, expert2=expert2)


@wrong(
    stage="fc1",
    says=("GEMM ?1|fc1|first GEMM|up|gate", "expert", "last|first|expert 0|instead of"),
    story="the last expert's fc1 weights were never copied: the first one's lie there",
)
def last_experts_fc1_is_the_firsts(call: MoeCall) -> Tensor:
    last = call.experts.num_experts - 1
    return layer(call, expert1=lambda rows: torch.where(rows.expert == last, 0, rows.expert))


@wrong(
    stage=("slots", "input", "fc1"),
    says=(
        "rows?|token",
        "shift|next|previous|before|other tokens|another|off by one|neighbou?r|wrong row|permut",
        "expert|slot|rows",
    ),
    story="the rows gathered for one expert are shifted by one",
)
def rows_of_expert_one_shifted(call: MoeCall) -> Tensor:
    def x(rows: Rows, taken: Tensor) -> Tensor:
        mine = (rows.expert == min(1, call.experts.num_experts - 1)).nonzero().flatten()
        shifted = taken.clone()
        shifted[mine] = taken[mine.roll(1)]
        return shifted

    return layer(call, x=x)


@wrong(
    stage="slots",
    says=("expert|\\bids?\\b", "rank|offset|shift|previous|before|off by one|one too|[+-] ?1"),
    story="every rank but the first begins one id too late",
)
def rank_begins_one_id_late(call: MoeCall) -> Tensor:
    def select(ids: Tensor, num_local: int, ep_size: int, ep_rank: int) -> Tensor:
        local = ids.long() - ep_rank * num_local - 1
        return torch.where((local < 0) | (local >= num_local) | (ids < 0), -1, local)

    return forward(call, Stages(select_local=select)) if call.ep_size > 1 else forward(call)
