"""Defects named from one token and its experts: on layers that count as large, though they are not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.findings import reduction, suspects
from mxfp4ref.conformance.findings.reduction import isolate, local_experts, reduce_call
from mxfp4ref.conformance.findings.suspects import Verdict, try_defects
from mxfp4ref.defects import DEFECTS
from mxfp4ref.formats.generations import BYTEWISE, PLAIN, WORDWISE, Generation
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward
from mxfp4ref.sm90.tactics import Sm90Kernel
from tests.helpers import layers
from tests.helpers.usual import first
from tests.model.test_forward_positions import underflowing_call

# One of each family, quick ones; parallel ranks have their own below.
FEW = (
    *("limit_ignored", "gate_up_swapped", "scale_off_by_one_group", "scales_of_next_expert"),
    *(
        "params_of_first_expert",
        "group_sums_bf16",
        "silu_bf16",
        "bf16_finalize",
        "last_slot_dropped",
        "fc2_truncated",
    ),
)
OF_RANKS = (
    "ep_double_mapping",
    "ep_sentinel_aliases",
    "ep_offset_dropped",
    "ep_ids_modulo",
    "params_by_global_id",
)


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer is a large one, and few defects are tried."""
    monkeypatch.setattr(reduction, "_EXPERT_BYTES", 0)
    few = {name: defect for name, defect in DEFECTS.items() if name in FEW + OF_RANKS}
    monkeypatch.setattr(suspects, "DEFECTS", few)


def layer(seed: int = 0, *, tokens: int = 8, **options: int) -> MoeCall:
    experts = layers.random_experts(
        seed, num_experts=16, hidden=256, inner=128, biases=True, parameters=layers.PARAMETERS
    )
    return layers.random_call(seed, experts, tokens=tokens, top_k=4, **options)


def verdict_on(call: MoeCall, name: str, seconds: float = 60.0) -> Verdict:
    expected = forward(call)
    output = DEFECTS[name].run(call)
    assert bool(differing(output, expected).any())
    return try_defects(call, output, expected, seconds=seconds)


@pytest.mark.parametrize("name", first(2, FEW))
def test_defects_are_named(name: str) -> None:
    found = verdict_on(layer(), name)
    assert [(p.name, p.exact) for p in found.predictions] == [(name, True)]
    assert found.remarks == ()


@pytest.mark.parametrize("name", first(2, OF_RANKS))
def test_defects_of_ranks_are_named(name: str) -> None:
    call = layer(ep_size=4, ep_rank=3)
    assert name in [p.name for p in verdict_on(call, name).predictions if p.exact]


@pytest.mark.parametrize("generation", [WORDWISE, BYTEWISE])
def test_weights_in_the_kernels_layout(generation: Generation) -> None:
    call = layer()
    stored = replace(call, experts=layers.to_sm90(call.experts, generation))
    assert [p.name for p in verdict_on(stored, "scale_off_by_one_group").predictions] == [
        "scale_off_by_one_group"
    ]


def test_a_defect_of_one_token_is_not_named() -> None:
    """The token that is taken out has it, and the right ones refute it."""
    call = layer()
    expected = forward(call)
    output = expected.clone()
    output[3] = DEFECTS["silu_bf16"].run(call)[3]
    found = try_defects(call, output, expected, seconds=60.0)
    best = found.predictions[0]
    assert (best.name, best.exact) == ("silu_bf16", False)
    assert 0 < best.fraction < 1


def test_what_was_not_compared_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suspects, "_CONFIRMING", 3)
    assert verdict_on(layer(), "limit_ignored").remarks == ("named defects were compared on 3 of 8 tokens",)
    found = verdict_on(layer(), "limit_ignored", seconds=0.0)
    assert found.predictions == ()
    assert found.remarks[0].startswith(
        f"{len(FEW) + len(OF_RANKS)} of {len(FEW) + len(OF_RANKS)} named defects"
    )


def test_progress_is_told() -> None:
    call, seen = layer(), []
    output = DEFECTS["bf16_finalize"].run(call)
    try_defects(
        call, output, forward(call), seconds=60.0, progress=lambda name, total: seen.append((name, total))
    )
    assert sorted(seen) == sorted((name, len(FEW) + len(OF_RANKS)) for name in FEW + OF_RANKS)


def test_a_token_that_cannot_be_taken_out_is_passed_over() -> None:
    """The one with the most wrong elements is expected to be something else than what the call gives."""
    call = layer()
    expected, output = forward(call), DEFECTS["bf16_finalize"].run(call)
    expected[5] += 1
    found = try_defects(call, output, expected, seconds=60.0)
    assert [(p.name, p.exact) for p in found.predictions] == [("bf16_finalize", True)]
    assert found.remarks == ("named defects were compared on 7 of 8 tokens",)


@pytest.mark.parametrize("kind", ["one column", "random ulps", "another token", "half of the columns"])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_defect_is_close_to_an_unrelated_mistake(kind: str, seed: int) -> None:
    call = layer(seed)
    expected = forward(call)
    output = expected.clone()
    if kind == "one column":
        output[:, 9] += 0.25
    elif kind == "random ulps":
        chosen = torch.rand(output.shape, generator=torch.Generator().manual_seed(seed)) < 0.3
        output.view(torch.int16)[chosen] += 1
    elif kind == "another token":
        output = expected.roll(1, 0)
    else:
        output[:, ::2] *= -1
    assert try_defects(call, output, expected, seconds=60.0).predictions == ()


def test_none_can_be_taken_out() -> None:
    call = layer()
    expected = forward(call) + 1
    found = try_defects(call, forward(call), expected, seconds=60.0)
    assert found.predictions == ()
    assert found.remarks[0].startswith(
        "named defects were not tried: none of 8 tokens gives its expected row alone"
    )


@pytest.mark.parametrize("ranks", [{}, {"ep_size": 4, "ep_rank": 0}, {"ep_size": 4, "ep_rank": 2}])
def test_a_part_has_the_rows_and_few_experts(ranks: dict[str, int]) -> None:
    call = layer(3, **ranks)
    expected = forward(call)
    for token in range(call.num_tokens):
        small = reduce_call(call, torch.tensor([token]), neighbours=True)
        assert small.experts.num_experts <= 2 * call.top_k + 2
        assert not differing(forward(small), expected[token : token + 1]).any()
        before, after = (local_experts(c)[t] for c, t in ((call, token), (small, 0)))
        assert torch.equal(before < 0, after < 0)
        for one, other in zip(before[before >= 0], after[after >= 0], strict=True):
            assert torch.equal(call.experts.fc1_weights[one], small.experts.fc1_weights[other])


def test_ids_that_no_rank_owns_and_repeated_ones_stay_so() -> None:
    call = layer(3, ep_size=2, ep_rank=1)
    ids = call.token_selected_experts.clone()
    ids[0] = torch.tensor([20, 20, 99, -7])
    ids[1] = torch.tensor([31, -1, 15, 31])
    call = replace(call, token_selected_experts=ids, strict=False)
    small = reduce_call(call, torch.tensor([0, 1]))
    assert torch.equal(local_experts(small) < 0, local_experts(call)[:2] < 0)
    assert torch.equal(forward(small), forward(call)[:2])


def test_rows_keep_their_positions_where_these_show() -> None:
    call = underflowing_call(24, kernel=Sm90Kernel.of_tiles((256, 128)))
    expected = forward(call)
    assert len(set(expected[:, 0].tolist())) == 2, "the same token at another place gives other bits"
    call.token_selected_experts[5] = -1  # takes no position
    expected = forward(call)
    alone = 0
    for token in range(24):
        part = isolate(call, token, expected[token])
        assert part is not None
        assert part.call.num_tokens <= 16
        alone += part.first == 0
    assert 4 < alone < 20


@pytest.mark.parametrize("generation", [WORDWISE, BYTEWISE, PLAIN])
def test_positions_count_modulo_the_tile(generation: Generation) -> None:
    for _, tile_n, tile_k in generation.tiles:
        positions = torch.arange(4 * tile_n)
        swapped = generation.first_pair_swapped(positions, tile_n, tile_k)
        assert torch.equal(swapped, generation.first_pair_swapped(positions % tile_n, tile_n, tile_k))
