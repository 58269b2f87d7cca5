"""Sentences about mismatch maps: each holds for the map it is made from, and is not said of others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mxfp4ref.conformance.findings.patterns import patterns
from mxfp4ref.goldens import open_goldens
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward

_CASE = open_goldens().load("gemm/ordinary").call()  # 16 tokens, 256 columns
# Four experts, two for each token.
CALL = replace(
    _CASE,
    experts=_CASE.experts.select(torch.tensor([0, 1, 1, 0])),
    token_selected_experts=torch.stack((torch.arange(16) // 2 % 4, (torch.arange(16) // 2 + 1) % 4), 1).to(
        torch.int32
    ),
)
EXPECTED = forward(CALL)


def found(mask: Tensor, got: Tensor | None = None, call: MoeCall = CALL) -> tuple[str, ...]:
    if got is None:
        got = torch.where(mask, EXPECTED + 1, EXPECTED)
    return tuple(pattern.words for pattern in patterns(call, got, EXPECTED, mask))


def columns(*chosen: slice | int) -> Tensor:
    mask = torch.zeros(16, 256, dtype=torch.bool)
    for some in chosen:
        mask[:, some] = True
    return mask


def blocks(size: int, start: int) -> Tensor:
    """Every second block of so many columns."""
    return columns(*(slice(first, first + size) for first in range(start * size, 256, 2 * size)))


def tokens(chosen: Tensor) -> Tensor:
    return columns(slice(0, 256)) & chosen[:, None]


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        (columns(slice(32, 64)), "all of them within scale group 1"),
        (columns(slice(130, 200)), "only columns of 128-column block 1 (columns 130 to 199) differ"),
        (columns(slice(0, 256, 2)), "exactly every second column differs, from 0 on"),
        (columns(*range(5, 256, 8)), "exactly every eighth column differs, from 5 on"),
        (blocks(16, start=1), "exactly every second 16-row block of fc2 differs, from 1 on"),
        (blocks(32, start=0), "exactly every second scale group differs, from 0 on"),
        (columns(slice(60, 200)), "exactly the columns 60 to 199 of 256 differ"),
        (columns(3, 77, 140), "only 3 of 256 columns differ: 3, 77, 140"),
        (columns(slice(0, 256)), "every token differs somewhere"),
        (tokens(torch.arange(16) % 2 == 1), "exactly every second token differs, from 1 on"),
        (tokens(torch.arange(16) == 7), "only token 7 of 16 differs"),
    ],
)
def test_places(mask: Tensor, sentence: str) -> None:
    assert sentence in found(mask)


@pytest.mark.parametrize(("count", "told"), [(4, False), (8, False), (12, True), (16, True)])
def test_every_second_of_few_tokens_is_no_pattern(count: int, told: bool) -> None:
    """2 of 4 tokens are every second one in a third of the cases."""
    call = CALL.select(slice(count))
    want = EXPECTED[:count]
    mask = tokens(torch.arange(16) % 2 == 1)[:count]
    words = [pattern.words for pattern in patterns(call, torch.where(mask, want + 1, want), want, mask)]
    assert ("exactly every second token differs, from 1 on" in words) == told
    assert any(one.startswith("only tokens 1, 3") for one in words) != told


def test_few_columns_are_a_pattern_of_blocks_where_they_are_enough() -> None:
    assert not any("every" in words for words in found(columns(16, 50)) if "token" not in words)
    assert "exactly every second 64-column block differs, from 0 on" in found(blocks(64, start=0))


def test_columns_are_not_mentioned_when_all_differ() -> None:
    assert not any("column" in words for words in found(columns(slice(0, 256))))


def test_experts() -> None:
    wrong = (CALL.token_selected_experts == 2).any(1)
    assert 0 < int(wrong.sum()) < 16
    assert "only tokens of expert 2 differ" in found(columns(slice(0, 256)) & wrong[:, None])
    scattered = torch.arange(16) % 3 == 0
    assert not any("of expert" in words for words in found(columns(slice(0, 256)) & scattered[:, None]))


def test_ranks_and_padding() -> None:
    ids = CALL.token_selected_experts.clone()
    ids[::5, 1] = -1
    whole = columns(slice(0, 256))
    padded = (ids < 0).any(1)[:, None] & whole
    call = replace(CALL, token_selected_experts=ids)
    assert "exactly the tokens with a padded slot (-1) differ" in found(padded, call=call)
    half = replace(CALL, experts=CALL.experts.slice(2, 4), ep_size=2, ep_rank=1)
    elsewhere = (CALL.token_selected_experts < 2).any(1)[:, None] & whole
    assert "exactly the tokens with a slot on another rank differ" in found(elsewhere, call=half)


def test_values() -> None:
    whole = columns(slice(0, 256))
    double = (EXPECTED.float() * 1.5).to(torch.bfloat16)
    assert "the output is 1.5 times the expected one, as far as bf16 shows" in found(
        double != EXPECTED, double
    )
    assert "every element that differs has the other sign" in found(whole, -EXPECTED)
    assert "every element that differs came out as zero" in found(whole, torch.zeros_like(EXPECTED))
    nan = EXPECTED.clone()
    nan[3, 5] = torch.nan
    assert "NaN where a number is expected in 1 element" in found(nan != EXPECTED, nan)
    neighbour = (EXPECTED.view(torch.int16) ^ 1).view(torch.bfloat16)
    assert "no element is more than 1 ulp off: a rounding, or the sign of a zero" in found(whole, neighbour)


def test_one_element_is_no_pattern_of_columns() -> None:
    mask = columns(3) & (torch.arange(16) == 5)[:, None]
    words = found(mask, torch.where(mask, -EXPECTED, EXPECTED))
    assert words[0] == "a single element differs, [5, 3]: damaged, or written by something else"
    assert not any(word in " ".join(words) for word in ("only", "column", "block"))
    near = EXPECTED.clone()
    near.view(torch.int16)[5, 3] ^= 1
    assert found(mask, near)[0] == "a single element differs, [5, 3]: by 1 ulp: a rounding, or damaged"


def test_an_expert_that_only_occurs_beside_wrong_ones_is_not_among_them() -> None:
    ids = torch.tensor([[0, -1]] * 10 + [[2, 0], [2, 1], [2, 1], [3, 1], [3, -1], [2, -1]], dtype=torch.int32)
    call = replace(CALL, token_selected_experts=ids)
    wrong = tokens(torch.arange(16) >= 10)
    assert "only tokens of experts 2, 3 differ" in found(wrong, call=call)
    ids[10:] = torch.tensor([2, 1])
    assert "only tokens of experts 1, 2 differ" in found(wrong, call=call)


def test_one_token_is_no_pattern_of_experts() -> None:
    ids = torch.tensor([[0, 1]] * 14 + [[2, 3], [2, 1]], dtype=torch.int32)
    call = replace(CALL, token_selected_experts=ids)
    both = tokens(torch.arange(16) >= 14)
    assert "only tokens of expert 2 differ" in found(both, call=call)
    ids[15, 0] = 0
    assert not any("of expert" in words for words in found(tokens(torch.arange(16) == 14), call=call))


def test_experts_are_no_pattern_where_every_token_differs() -> None:
    """Experts that one token only uses are no suspects; tokens of theirs differ all the same."""
    ids = torch.tensor([[0, 1]] * 14 + [[2, 1], [0, 3]], dtype=torch.int32)
    words = found(columns(slice(0, 256)), call=replace(CALL, token_selected_experts=ids))
    assert "every token differs somewhere" in words
    assert not any("of expert" in said for said in words)


def test_nan_is_counted_where_there_is_any() -> None:
    mask = columns(0)
    words = found(mask, torch.where(mask, torch.nan, EXPECTED.float()).to(torch.bfloat16))
    assert "NaN where a number is expected in 16 elements" in words


def test_wrong_tokens_that_share_rows_of_their_experts_are_said_to() -> None:
    ids = torch.tensor(
        [[0, 1]] * 12 + [[2, 3]] * 12 + [[1, 3]] * 8, dtype=torch.int32
    )  # 12, 20, 12 and 20 rows
    again = torch.arange(32) % 16
    scales = CALL.token_final_scales[again, :2].contiguous()
    call = replace(CALL, input=CALL.input[again], token_selected_experts=ids, token_final_scales=scales)
    want = forward(call)
    token = torch.arange(32)
    wrong = (token % 12 >= 8) & (token < 24)  # of experts 0 and 2, whose 12 rows fill no tile of 16
    found = [p.words for p in patterns(call, want + 1, want, wrong[:, None].expand_as(want))]
    words = (
        "every token that differs has slots beyond the first 8 of the last, unfilled 16 rows of their expert"
    )
    assert f"{words}; none of the others does" in found
    chosen = torch.rand(32, generator=torch.Generator().manual_seed(1)) < 0.3
    found = [p.words for p in patterns(call, want + 1, want, chosen[:, None].expand_as(want))]
    assert not any("every token that differs has" in words for words in found)
