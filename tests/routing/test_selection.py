"""Which experts are selected, and which selections hang on the last bits of the scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxfp4ref.routing.scoring import sigmoid
from mxfp4ref.routing.selection import select_experts
from tests.helpers import mpmath_router as exact


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=200)
@given(st.data())
def test_ties_go_to_the_lowest_id(data):
    few = st.sampled_from([0.0, -0.0, 1.0, 1.0000001, -1.0, -1.0000001, 1e-45, -1e-45, -math.inf, math.inf])
    scores = data.draw(st.lists(few, min_size=1, max_size=12))
    top_k = data.draw(st.integers(1, len(scores)))
    ids = select_experts(torch.tensor([scores], dtype=torch.float32), top_k).ids
    assert ids.tolist() == [exact.top_k([np.float32(s) for s in scores], top_k)]


def test_a_group_is_never_left_even_for_a_better_expert():
    scores = torch.tensor([[0.9, 0.1, 0.6, 0.5, -0.3, -0.2, -0.9, -0.8]])
    assert select_experts(scores, 2, n_group=4, topk_group=1).ids.tolist() == [[2, 3]]
    assert select_experts(scores, 2, n_group=4, topk_group=2).ids.tolist() == [[0, 2]]
    # Real experts of the chosen groups come before masked ones, however low they score.
    assert select_experts(scores - 5, 4, n_group=4, topk_group=2).ids.tolist() == [[0, 2, 3, 1]]
    minus_inf = torch.tensor([[0.0, 0.0, 0.0, 5.0, 5.0, -math.inf]])
    assert select_experts(minus_inf, 3, n_group=2, topk_group=1).ids.tolist() == [[3, 4, 5]]


def test_equal_groups_go_to_the_lowest_index():
    scores = torch.tensor([[0.5, 0.5, 0.25, 0.75, 1.0, 0.0]])
    assert select_experts(scores, 2, n_group=3, topk_group=1).ids.tolist() == [[0, 1]]
    assert select_experts(scores, 4, n_group=3, topk_group=2).ids.tolist() == [[3, 0, 1, 2]]


def test_layout_does_not_matter():
    logits = torch.randn(16, 9, generator=seeded(21))
    options = {"n_group": 4, "topk_group": 2, "correction_bias": torch.randn(16, generator=seeded(22))}
    transposed = select_experts(logits.t(), 3, **options)
    assert transposed.ids.tolist() == select_experts(logits.t().contiguous(), 3, **options).ids.tolist()


def step(value: float, ulps: int) -> float:
    return float((torch.tensor(value).view(torch.int32) + ulps).view(torch.float32))


@pytest.mark.parametrize("gap", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("ulps", [0, 1, 2, 3, 7, 8])
@pytest.mark.parametrize("ranks", [(0, 1), (1, 2), (2, 3)])
def test_ambiguous_is_closer_than_so_many_ulp(gap, ulps, ranks):
    """Neighbours within the chosen (their order), and the last chosen and the first left out."""
    scores = [1.75, 1.5, 1.25, 1.125, 1.0]
    higher, lower = ranks
    scores[higher] = step(scores[lower], gap)
    got = select_experts(torch.tensor([scores]), 3, ambiguous_ulps=float(ulps)).ambiguous
    assert got.tolist() == [gap < ulps]


def test_ties_among_the_unchosen_are_not_ambiguous():
    scores = torch.tensor([[1.0, 2.0, 0.5, 0.5, 0.25]])
    assert select_experts(scores, 2).ambiguous.tolist() == [False]
    assert select_experts(scores, 3).ambiguous.tolist() == [True]
    assert select_experts(scores[:, :2], 2).ambiguous.tolist() == [False]


def test_ambiguity_counts_the_larger_ulp_before_or_after_the_bias():
    # 1 ulp of the scores (2^-23) apart; the bias moves both to a grid of 2^-20: a tie.
    near_eight = select_experts(
        torch.tensor([[step(1.0, 1), 1.0]]), 1, correction_bias=torch.full((2,), 8.0), ambiguous_ulps=1
    )
    assert near_eight.ids.tolist() == [[0]]
    assert near_eight.ambiguous.tolist() == [True]
    # The bias cancels the scores: 2 ulp apart before, thousands after; a kernel may still see it otherwise.
    cancelled = {"correction_bias": torch.full((2,), -1.0)}
    scores = torch.tensor([[step(1.0, 3), step(1.0, 1)]])
    assert select_experts(scores, 1, **cancelled, ambiguous_ulps=3).ambiguous.tolist() == [True]
    assert select_experts(scores, 1, **cancelled, ambiguous_ulps=2).ambiguous.tolist() == [False]


def test_a_close_choice_of_groups_is_ambiguous():
    scores = torch.tensor([[0.5, 0.25, 0.0, 0.5, step(0.25, 1), 0.0, 0.1, 0.2, 0.1]])
    assert select_experts(scores, 1, n_group=3, topk_group=1).ambiguous.tolist() == [True]
    assert select_experts(scores, 1, n_group=3, topk_group=1, ambiguous_ulps=0).ambiguous.tolist() == [False]
    clear = scores.clone()
    clear[0, 4] = 0.3
    assert select_experts(clear, 1, n_group=3, topk_group=1).ambiguous.tolist() == [False]
    # A group's ulp is the sum of its two best experts'. The sums are 2 such steps of one expert apart.
    sums = torch.tensor([[step(1.0, 2), 1.0, 1.0, 1.0]])
    for ulps, ambiguous in ((1, False), (2, True)):
        got = select_experts(sums, 1, n_group=2, topk_group=1, ambiguous_ulps=ulps)
        assert got.ambiguous.tolist() == [ambiguous]
    # Among the chosen groups the choice of groups no longer matters, only that of experts.
    assert select_experts(clear, 1, n_group=3, topk_group=3).ambiguous.tolist() == [True]


def test_unambiguous_tokens_survive_a_kernel_that_rounds_otherwise():
    """Scores moved by up to 3 ulp each: wherever `ambiguous` is false, ids and their order stay."""
    generator = seeded(23)
    logits = (
        torch.randn(1000, 64, generator=generator) * 1e-3
    )  # scores so close that many tokens are ambiguous
    for bias in (torch.zeros(64), torch.full((64,), 8.08), torch.randn(64, generator=generator) * 1e-3 - 0.5):
        scores = sigmoid(logits)
        moved = scores.view(torch.int32) + torch.randint(-3, 4, scores.shape, generator=generator)
        moved = moved.to(torch.int32).view(torch.float32)
        for options in ({}, {"n_group": 8, "topk_group": 3}):
            reference = select_experts(scores, 6, correction_bias=bias, **options)
            other = select_experts(moved, 6, correction_bias=bias, **options)
            differs = (reference.ids != other.ids).any(dim=1)
            assert differs.any()
            assert not (differs & ~reference.ambiguous).any()
            assert reference.ambiguous.double().mean() < 0.9
