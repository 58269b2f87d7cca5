"""Expert maps: where engines place experts, what each rank's kernel is given, and what all ranks add up to."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxfp4ref.formats.experts import Experts
from mxfp4ref.formats.resize import to_sm90
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward, trace
from mxfp4ref.model.layer import moe_layer
from mxfp4ref.model.parallel import Ranks, forward_all_ranks, gather, rank_calls, split_experts
from mxfp4ref.model.placement import (
    check_expert_map,
    check_physical_ids,
    physical_ids,
    place_experts,
    rank_arguments,
)
from mxfp4ref.routing import mixtral
from tests.helpers import bits, layers

E = 7
EXPERTS = layers.random_experts(
    0, num_experts=E, biases=True, parameters=("swiglu_alpha", "swiglu_beta", "swiglu_limit")
)
CALL = layers.random_call(1, EXPERTS, tokens=6, top_k=3)
EPLB = ((0, 1, 2), (3, 4, 5), (6, 0, 5), (5, 1, 3))


@st.composite
def expert_maps(draw: st.DrawFn) -> tuple[tuple[int, ...], ...]:
    """Any: uneven or even, in any order, redundant across ranks and within one."""
    slots = draw(st.permutations([*range(E), *draw(st.lists(st.integers(0, E - 1), max_size=5))]))
    cuts = draw(st.sets(st.integers(1, len(slots) - 1), max_size=4))
    edges = [0, *sorted(cuts), len(slots)]
    return tuple(tuple(slots[start:stop]) for start, stop in itertools.pairwise(edges))


def any_replica(seed: int) -> Tensor:
    shape = CALL.token_selected_experts.shape
    return torch.randint(0, 1000, shape, generator=torch.Generator().manual_seed(seed))


# Placements


@pytest.mark.parametrize(
    ("count", "ep_size", "linear", "round_robin"),
    [
        (4, 2, ((0, 1), (2, 3)), ((0, 2), (1, 3))),
        (7, 3, ((0, 1, 2), (3, 4), (5, 6)), ((0, 3, 6), (1, 4), (2, 5))),
        (10, 4, ((0, 1, 2), (3, 4, 5), (6, 7), (8, 9)), ((0, 4, 8), (1, 5, 9), (2, 6), (3, 7))),
        (3, 3, ((0,), (1,), (2,)), ((0,), (1,), (2,))),
        (3, 1, ((0, 1, 2),), ((0, 1, 2),)),
    ],
)
def test_placements_of_vllm(count, ep_size, linear, round_robin):
    """As `determine_expert_map` of vLLM 0.17.1 to 0.33.0 has them, the inverse of its maps."""
    assert place_experts(count, ep_size) == linear
    assert place_experts(count, ep_size, "round_robin") == round_robin


@pytest.mark.parametrize("strategy", ["linear", "round_robin"])
def test_placements_hold_every_expert_once_and_differ_by_one_at_most(strategy):
    for count in range(1, 20):
        for ep_size in range(1, count + 1):
            ranks = place_experts(count, ep_size, strategy)
            sizes = [len(slots) for slots in ranks]
            assert sorted(e for slots in ranks for e in slots) == list(range(count))
            assert len(sizes) == ep_size
            assert sizes == sorted(sizes, reverse=True)
            assert sizes[0] - sizes[-1] <= 1


def test_every_way_to_write_a_map():
    wanted = ((0, 2), (1, 3))
    for written in (
        [[0, 2], [1, 3]],
        (range(0, 3, 2), [1, 3]),
        [torch.tensor([0, 2]), torch.tensor([1, 3], dtype=torch.int32)],
        torch.tensor([[0, 2], [1, 3]]),
        torch.tensor([0, 2, 1, 3], dtype=torch.int32).view(2, -1),
    ):
        assert check_expert_map(written) == wanted


# Ids


def test_physical_ids_by_hand():
    ids = torch.tensor([[0, 5], [-1, 3], [5, 1]], dtype=torch.int32)
    rows = torch.arange(3)[:, None]
    # Expert 5 has slots 5, 8 and 9; 0 has 0 and 7; 3 has 3 and 11; 1 has 1 and 10.
    assert physical_ids(ids, EPLB, replica=rows).tolist() == [[0, 5], [-1, 11], [9, 1]]
    assert physical_ids(ids, EPLB, replica=rows + 1).tolist() == [[7, 8], [-1, 3], [5, 10]]
    assert physical_ids(ids, EPLB, replica=torch.full((3, 2), 2**40 + 2)).tolist() == [
        [0, 5],
        [-1, 3],
        [5, 1],
    ]
    assert physical_ids(ids, [[6, 5, 4], [3, 2, 1, 0]]).tolist() == [[6, 1], [-1, 3], [1, 5]]


@given(expert_maps(), st.integers(0, 9))
def test_physical_ids_are_slots_that_hold_the_expert(expert_map, seed):
    ids = CALL.token_selected_experts
    physical = physical_ids(ids, expert_map, replica=any_replica(seed))
    flat = [expert for slots in expert_map for expert in slots]
    assert physical.dtype == torch.int32
    held = [[-1 if p < 0 else flat[p] for p in row] for row in physical.tolist()]
    assert held == ids.tolist()
    assert check_physical_ids(physical, ids, expert_map) is physical


def test_kernels_are_given_ranges_or_local_ids():
    ids = torch.tensor([[0, 4], [-1, 6]], dtype=torch.int32)
    even = rank_arguments(ids, [[0, 1, 2, 3], [4, 5, 6, 0]])
    assert [(a["ep_size"], a["ep_rank"]) for a in even] == [(2, 0), (2, 1)]
    assert all(a["token_selected_experts"] is ids for a in even)
    uneven = rank_arguments(ids, place_experts(7, 3))
    assert [list(a) for a in uneven] == [["token_selected_experts"]] * 3
    assert [a["token_selected_experts"].tolist() for a in uneven] == [
        [[0, -1], [-1, -1]],
        [[-1, 1], [-1, -1]],
        [[-1, -1], [-1, 1]],
    ]


# Sums


def by_masking(expert_map: tuple[tuple[int, ...], ...], physical: Tensor) -> Tensor:
    """A rank with all the experts, for which the slots of others are padding."""
    outputs, start = [], 0
    for slots in expert_map:
        mine = (physical >= start) & (physical < start + len(slots))
        start += len(slots)
        ids = torch.where(mine, CALL.token_selected_experts, -1)
        outputs.append(forward(replace(CALL, token_selected_experts=ids)))
    return gather(outputs)


@settings(max_examples=25)
@given(expert_maps(), st.integers(0, 9))
def test_ranks_add_up_the_terms_of_the_slots_that_serve(expert_map, seed):
    physical = physical_ids(CALL.token_selected_experts, expert_map, replica=any_replica(seed))
    ranks = Ranks(ep_size=len(expert_map), expert_map=expert_map, physical_ids=physical)
    bits.assert_same(forward_all_ranks(CALL, ranks), by_masking(expert_map, physical))


@settings(max_examples=10)
@given(expert_maps(), st.integers(0, 9))
def test_each_routed_row_is_on_one_rank_and_has_the_bits_of_a_single_one(expert_map, seed):
    physical = physical_ids(CALL.token_selected_experts, expert_map, replica=any_replica(seed))
    ranks = Ranks(ep_size=len(expert_map), expert_map=expert_map, physical_ids=physical)
    rows = []
    for slots, of_rank in zip(expert_map, rank_calls(CALL, ranks), strict=True):
        rows += routed_rows(of_rank, slots)
    assert sorted(rows) == routed_rows(CALL, range(E))


def routed_rows(call: MoeCall, slots: Sequence[int]) -> list[tuple[object, ...]]:
    """Token, slot, expert and GEMM2's output of every row of a call whose experts are those of some slots."""
    rows = trace(call)
    columns = rows.token, rows.slot, torch.tensor(slots)[rows.expert], bits.bits_of(rows.fc2_output)
    return sorted(zip(*(column.tolist() for column in columns), strict=True))


@pytest.mark.parametrize("sm90_layout", [False, True])
@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_the_identity_is_what_ranks_do_without_a_map(ep_size, sm90_layout):
    experts = layers.random_experts(3, num_experts=8, biases=True)
    call = layers.random_call(3, to_sm90(experts) if sm90_layout else experts, top_k=4)
    plain = rank_calls(call, Ranks(ep_size=ep_size))
    mapped = rank_calls(call, Ranks(ep_size=ep_size, expert_map=torch.arange(8).view(ep_size, -1)))
    for one, other in zip(plain, mapped, strict=True):
        assert (one.ep_size, one.ep_rank) == (other.ep_size, other.ep_rank)
        assert torch.equal(one.token_selected_experts, other.token_selected_experts)
        for field in fields(Experts):  # views of the same memory
            mine, theirs = getattr(one.experts, field.name), getattr(other.experts, field.name)
            assert mine is theirs is None or mine.data_ptr() == theirs.data_ptr()
    ranks = Ranks(ep_size=ep_size, expert_map=place_experts(8, ep_size))
    bits.assert_same(forward_all_ranks(call, ranks), forward_all_ranks(call, Ranks(ep_size=ep_size)))


def test_the_order_of_slots_and_ranks_layouts_and_tensor_parallel_ranks():
    """The order of a rank's slots changes nothing, who holds an expert does."""
    linear = place_experts(E, 3)
    output = forward_all_ranks(CALL, Ranks(ep_size=3, expert_map=linear))
    shuffled = ((2, 0, 1), (4, 3), (6, 5))
    bits.assert_same(forward_all_ranks(CALL, Ranks(ep_size=3, expert_map=shuffled)), output)
    dealt = Ranks(ep_size=3, expert_map=place_experts(E, 3, "round_robin"))
    other = forward_all_ranks(CALL, dealt)
    assert not torch.equal(other, output)
    bits.assert_same(forward_all_ranks(replace(CALL, experts=to_sm90(EXPERTS)), dealt), other)
    both = replace(dealt, tp_size=2)
    calls = rank_calls(CALL, both)
    assert [(c.tp_size, c.tp_rank, c.experts.num_experts) for c in calls] == [
        (2, rank, count) for count in (3, 2, 2) for rank in (0, 1)
    ]
    bits.assert_same(forward_all_ranks(CALL, both), gather([forward(call) for call in calls]))


def test_a_replica_decides_where_a_term_is_rounded():
    rows = torch.arange(CALL.num_tokens)[:, None]
    outputs = []
    for replica in (rows * 0, rows):
        chosen = physical_ids(CALL.token_selected_experts, EPLB, replica=replica)
        outputs.append(forward_all_ranks(CALL, Ranks(ep_size=4, expert_map=EPLB, physical_ids=chosen)))
    assert torch.equal(outputs[0][0], outputs[1][0])  # the first token's choice is the same
    assert not torch.equal(*outputs)


def test_uneven_counts_told_by_ep_size_and_ep_rank_take_wrong_experts():
    """What an engine gets that hands a placement like this to the kernel without mapping ids."""
    expert_map = place_experts(E, 3)
    parts = split_experts(EXPERTS, 3, expert_map)
    told = [
        forward(replace(CALL, experts=part, ep_size=3, ep_rank=rank, strict=False))
        for rank, part in enumerate(parts)
    ]
    right = [forward(call) for call in rank_calls(CALL, Ranks(ep_size=3, expert_map=expert_map))]
    bits.assert_same(told[0], right[0])  # the first rank has the largest share, from 0 on
    assert not torch.equal(told[1], right[1])
    assert not torch.equal(told[2], right[2])


def test_ids_of_no_expert_are_skipped_with_a_map_too():
    ids = CALL.token_selected_experts.clone()
    ids[0, 0], ids[1, 1] = E, -5
    call = replace(CALL, token_selected_experts=ids, strict=False)
    padded = replace(CALL, token_selected_experts=torch.where((ids < 0) | (ids >= E), -1, ids))
    for expert_map in (place_experts(E, 3), torch.arange(E).view(E, 1).flip(0)):
        ranks = Ranks(ep_size=len(expert_map), expert_map=expert_map)
        bits.assert_same(forward_all_ranks(call, ranks), forward_all_ranks(padded, ranks))


def test_a_layer_takes_maps():
    routing = mixtral(torch.randn(CALL.num_tokens, E, generator=torch.Generator().manual_seed(4)))
    call = MoeCall(CALL.input, routing.ids, routing.scales, EXPERTS)
    ranks = Ranks(ep_size=2, expert_map=place_experts(E, 2, "round_robin"))
    bits.assert_same(moe_layer(CALL.input, routing, EXPERTS, ranks=ranks), forward_all_ranks(call, ranks))


# Refusals

IDS = torch.tensor([[0, 6]], dtype=torch.int32)


def on(expert_map: object, **options: object) -> Tensor:
    return forward_all_ranks(CALL, Ranks(ep_size=len(expert_map), expert_map=expert_map, **options))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: place_experts(3, 4), ValueError, "ep_size: expected an int from 1 to 3, got 4"),
        (
            lambda: place_experts(4, 2, "random"),
            ValueError,
            "strategy: expected one of 'linear', 'round_robin'",
        ),
        (lambda: check_expert_map(3), TypeError, "expert_map: expected the experts of each rank, .* got int"),
        (lambda: check_expert_map("01"), TypeError, "expert_map: .* got str"),
        (lambda: check_expert_map([]), ValueError, "expert_map: expected the experts of at least one rank"),
        (lambda: check_expert_map([0, 1]), TypeError, r"expert_map\[0\]: expected a sequence .* got int"),
        (
            lambda: check_expert_map([[0], []]),
            ValueError,
            r"expert_map\[1\]: expected at least one expert, got none",
        ),
        (
            lambda: check_expert_map([[0, 1.0]]),
            TypeError,
            r"expert_map\[0\]\[1\]: expected an int, got float 1.0",
        ),
        (lambda: check_expert_map([[0, -1]]), ValueError, r"expert_map\[0\]\[1\]: expected an int .* got -1"),
        (
            lambda: check_expert_map([[0], [3, 2]]),
            ValueError,
            "each of the 4 experts in a slot, got 1 in none, .* 1$",
        ),
        (lambda: check_expert_map([[0]], num_experts=2), ValueError, "got 1 in none"),
        (
            lambda: check_expert_map([[0, 2**31]]),
            ValueError,
            r"expert_map\[0\]\[1\]: expected an int from 0 to",
        ),
        (lambda: check_expert_map([[0, 9]], num_experts=2), ValueError, "expected ids from 0 to 1, got 9"),
        (lambda: check_expert_map([[0]], ep_size=2), ValueError, "expected 2 ranks, as ep_size says, got 1"),
        (
            lambda: check_expert_map(torch.arange(4)),
            ValueError,
            r"expert_map: .* got one row; write expert_map.view\(ep_size, -1\)",
        ),
        (
            lambda: check_expert_map(torch.zeros(1, 1)),
            TypeError,
            "expert_map: expected an int32 or int64 tensor",
        ),
        (
            lambda: check_expert_map([torch.zeros(1)]),
            TypeError,
            r"expert_map\[0\]: expected an int32 or int64 tensor",
        ),
        (lambda: physical_ids(IDS + 1, [range(7)]), ValueError, "ids: expected ids from -1 to 6, got 7"),
        (lambda: physical_ids(IDS.long(), [range(7)]), TypeError, "ids: expected an int32 tensor"),
        (
            lambda: physical_ids(IDS, EPLB),
            ValueError,
            "one slot of expert 5 where nothing says which serves, got 3",
        ),
        (lambda: physical_ids(IDS, EPLB, replica=2), TypeError, "replica: "),
        (
            lambda: physical_ids(IDS, EPLB, replica=torch.ones(2, 2).long()),
            ValueError,
            r"replica: .*got int64 \[2, 2\]",
        ),
        (lambda: physical_ids(IDS, EPLB, replica=torch.tensor([[-1]])), ValueError, "replica: .* got -1"),
        (
            lambda: rank_arguments(IDS + 1, [range(7)]),
            ValueError,
            "physical: expected ids from -1 to 6, got 7",
        ),
        (lambda: Ranks(expert_map=EPLB), ValueError, "expert_map: expected 1 ranks, as ep_size says, got 4"),
        (lambda: Ranks(physical_ids=IDS), ValueError, "physical_ids: expected None without an expert_map"),
        (lambda: Ranks(expert_map=[[0]], physical_ids=[[0]]), TypeError, "physical_ids: "),
        (
            lambda: on([[0, 1], [2]]),
            ValueError,
            "expert_map: expected each of the 7 experts in a slot, got 4 in none",
        ),
        (lambda: on([range(7), [7]]), ValueError, "expert_map: expected ids from 0 to 6, got 7"),
        (
            lambda: on(EPLB),
            ValueError,
            r"give physical_ids\(ids, expert_map, replica=...\), or physical_ids=...",
        ),
        (lambda: on(EPLB, physical_ids=IDS), ValueError, r"physical_ids: expected .*\[6, 3\]"),
        (
            lambda: on(EPLB, physical_ids=CALL.token_selected_experts + 8),
            ValueError,
            "physical_ids: expected ids from -1 to 11, got",
        ),
        (
            lambda: forward_all_ranks(CALL, Ranks(ep_size=2)),
            ValueError,
            r"place_experts\(7, 2\)",
        ),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_ids_mapped_twice_are_refused():
    expert_map = place_experts(E, 3, "round_robin")
    ids = torch.tensor([[1, 0], [-1, 4]], dtype=torch.int32)
    once = physical_ids(ids, expert_map)
    assert once.tolist() == [[3, 0], [-1, 4]]
    ids[1, 1], once[1, 1] = 5, 6
    assert check_physical_ids(once, ids, expert_map) is once
    with pytest.raises(
        ValueError,
        match=r"physical_ids: expected expert 1 at \[0, 0\], as the call has it, got 1, which is expert 3 .*\(2 such",
    ):
        check_physical_ids(physical_ids(once, expert_map), ids, expert_map)
    with pytest.raises(
        ValueError, match=r"expected padding at \[1, 0\], as the call has it, got 6, which is expert 5"
    ):
        check_physical_ids(torch.where(once < 0, 6, once), ids, expert_map)
