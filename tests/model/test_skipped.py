"""What `strict="count"` counts of the slots that the kernel skips."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mxfp4ref.model.skipped import SkippedSlots, reset_skipped_slots, skipped_slots
from tests.helpers import bits
from tests.helpers.drop_in import CALL, oracle


@pytest.fixture(autouse=True)
def _from_zero() -> Iterator[None]:
    reset_skipped_slots()
    yield
    reset_skipped_slots()


def with_ids(*first_rows: list[int]) -> torch.Tensor:
    ids = torch.full_like(CALL.token_selected_experts, -1)
    ids[: len(first_rows)] = torch.tensor(first_rows, dtype=torch.int32)
    return ids


@pytest.mark.parametrize(
    ("rows", "counted"),
    [
        ([[0, 1], [3, -1]], SkippedSlots()),
        ([[-1, -1]], SkippedSlots()),
        ([[0, 4], [-2, 1]], SkippedSlots(calls=1, owned_by_none=2)),
        ([[2, 2], [1, 0], [3, 3]], SkippedSlots(calls=1, repeated=2)),
        ([[2, 2], [7, 7], [-5, -5]], SkippedSlots(calls=1, owned_by_none=4, repeated=1)),
    ],
)
def test_counts(rows: list[list[int]], counted: SkippedSlots) -> None:
    """The same bits as strict=False; counted is exactly what strict=True refuses."""
    ids = with_ids(*rows)
    expected = oracle(token_selected_experts=ids, strict=False)
    assert skipped_slots() == SkippedSlots()
    bits.assert_same(oracle(token_selected_experts=ids, strict="count"), expected)
    assert skipped_slots() == counted
    if counted.calls:
        with pytest.raises(ValueError, match=r"^token_selected_experts: expected"):
            oracle(token_selected_experts=ids)
    else:
        bits.assert_same(oracle(token_selected_experts=ids), expected)
    oracle(token_selected_experts=ids, strict="count")
    assert skipped_slots() == SkippedSlots(2 * counted.calls, 2 * counted.owned_by_none, 2 * counted.repeated)
    reset_skipped_slots()
    assert skipped_slots() == SkippedSlots()


def test_ids_of_other_ranks_are_not_counted() -> None:
    oracle(token_selected_experts=with_ids([0, 11], [12, 4]), ep_size=3, ep_rank=1, strict="count")
    assert skipped_slots() == SkippedSlots(calls=1, owned_by_none=1)


def test_a_refused_call_is_not_counted() -> None:
    with pytest.raises(ValueError, match=r"^ep_rank: expected"):
        oracle(token_selected_experts=with_ids([2, 2]), ep_rank=1, strict="count")
    assert skipped_slots() == SkippedSlots()


def test_one_slot_a_token() -> None:
    ids, scales = with_ids([9, 9])[:, :1].contiguous(), CALL.token_final_scales[:, :1].contiguous()
    oracle(token_selected_experts=ids, token_final_scales=scales, strict="count")
    assert skipped_slots() == SkippedSlots(calls=1, owned_by_none=1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_counts_at_every_replay() -> None:
    from mxfp4ref.model.call import MoeCall
    from mxfp4ref.model.skipped import count_skipped_slots

    arguments = (CALL.input, with_ids([2, 2], [9, 1]), CALL.token_final_scales)
    call = MoeCall(*(t.cuda() for t in arguments), CALL.experts.to("cuda"), strict=False)
    count_skipped_slots(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        count_skipped_slots(call)
    for _ in range(3):
        graph.replay()
    assert skipped_slots() == SkippedSlots(calls=4, owned_by_none=4, repeated=4)
