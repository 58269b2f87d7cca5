"""Weights that are solved for are told only where the output determines them, and what they share is said."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward
from mxfp4ref.conformance import diagnose, differing
from mxfp4ref.conformance.families.engine import prepared
from mxfp4ref.conformance.families.evidence import gather, look_closer
from mxfp4ref.conformance.families.hearing import Failure
from mxfp4ref.conformance.families.hypotheses.weighting import weight_hypotheses
from mxfp4ref.conformance.families.jury import judge
from mxfp4ref.conformance.families.solved.solved_weights import Weights, in_common, powers_of, unsure_of
from mxfp4ref.conformance.findings.finding import Evidence
from mxfp4ref.defects.finalize import activation_weighted
from mxfp4ref.defects.variants.finalize import FinalizeVariant
from mxfp4ref.goldens import open_goldens
from mxfp4ref.model.forward import KERNEL
from mxfp4ref.sm90 import fp32
from tests.held_out_kernels.calls import captured

GOLDENS = open_goldens()


def last_expert_last(call: MoeCall) -> Tensor:
    """The last slot's weight is divided by 2.5 where it is of the last expert."""
    ids, weights = call.token_selected_experts, call.token_final_scales.clone()
    weights[:, -1][ids[:, -1] == ids.amax()] /= 2.5
    return forward(replace(call, token_final_scales=weights))


def evidence(case: str) -> list[Evidence]:
    call = GOLDENS.load(case).call()
    got, want = last_expert_last(call), forward(call)
    wrong, pipeline = differing(got, want), prepared(call)
    return look_closer(pipeline, got, wrong, gather(pipeline, got, want, wrong))


@pytest.mark.parametrize(
    ("case", "experts"),
    [
        ("cancelling_experts", "1, 0, 2, 3 (token 1)"),
        ("biases_cancel", "1, 3 (token 6)"),
        ("slot_order", "1, 2, 0, 3 (token 5)"),  # was told as groups of K that count 0.7 times
    ],
)
def test_weights_of_opposite_rows_are_not_told(case: str, experts: str) -> None:
    first = evidence(f"finalize/{case}")[0]
    assert first.sentence == (
        f"the right rows are summed with other weights; those of experts {experts} cannot be told apart from this "
        "output"
    )
    assert not first.stages, "no evidence for the verdict"


def test_in_common_is_said_and_weights_stand_by_slot() -> None:
    (first,) = evidence("finalize/biases_inside_weight")
    assert first.stages == ("finalize",), "expert 2 is right where another slot has it"
    assert first.sentence == (
        "the routing weights used are others: 0.4 times the asked weight for expert 2 in slot 1 in each of the 4 "
        "tokens solved; token 7 is 0.996 x expert 1 + 0.249 x expert 2, asked was 0.9961 x expert 1 + 0.6223 x "
        "expert 2; GEMM1, activation and GEMM2 are right"
    )


def test_the_verdict_takes_its_numbers_where_they_are_determined() -> None:
    failures = []
    for case in ("cancelling_experts", "biases_cancel", "biases_inside_weight"):
        call = GOLDENS.load(f"finalize/{case}").call()
        failures.append(Failure(case, prepared(call), last_expert_last(call), forward(call)))
    found = judge(failures, lambda: (), seconds=0.0).finding
    assert "0.4 times the asked weight for expert 2 in slot 1" in found.sentence
    assert found.stages == ("finalize",)


def test_how_unsure_weights_are() -> None:
    random = torch.Generator().manual_seed(1)
    rows = torch.randn(3, 256, generator=random, dtype=torch.float64)
    rows[2] = -rows[0] * 1.5
    off = unsure_of(rows, torch.full((256,), 1e-6, dtype=torch.float64))
    assert off[0] == off[2] == torch.inf
    rows[1] = 0
    assert bool(unsure_of(rows, torch.ones(256, dtype=torch.float64)).isinf().all())
    assert bool(unsure_of(rows[:, :2], torch.ones(2, dtype=torch.float64)).isinf().all())
    assert 1e-4 < float(off[1]) < 3e-4, "three standard deviations, 1e-3 / 16 each"


def weights(token: int, *found: float, experts: tuple[int, ...] = (5, 3)) -> Weights:
    return Weights(token, (0, 1), experts, (0.5, 0.25), found, (0.001, 0.001))


def test_no_more_digits_than_are_determined() -> None:
    words = "token 0 is 0.5 x expert 5 + 0.12 x expert 3, asked was 0.5 x expert 5 + 0.25 x expert 3"
    assert str(replace(weights(0, 0.5, 0.1234), unsure=(0.001, 0.004))) == words
    assert replace(weights(0, 0.5, 0.1234), unsure=(0.001, 0.04)).undetermined == (3,)
    assert "about 0 x expert 3" in str(weights(0, 0.5, 0.0007))


def test_what_all_ratios_share() -> None:
    assert in_common([weights(0, 0.5, 0.1), weights(1, 0.2, 0.25, experts=(3, 5))]) == (
        "0.4 times the asked weight for expert 3 in each of the 2 tokens solved",
        {3},
    )
    assert (
        in_common([weights(0, 0.5, 0.1)])[0]
        == "0.4 times the asked weight for expert 3 in slot 1 of the token"
    )
    assert in_common([weights(0, 0.5, 0.1), weights(1, 0.5, 0.25)])[0].endswith("in 1 of the 2 tokens solved")
    assert in_common([weights(0, 0.5, 0.1), weights(1, 0.2, 0.25)]) == ("", set()), "experts and slots"
    other = in_common([weights(0, 0.5, 0.1), weights(1, 0.5, 0.2)])
    assert other == (
        "those of slot 1 alone are wrong, 0.1 for 0.25 in token 0, 0.2 for 0.25 in token 1",
        set(),
    )


def of_another_slot(call: MoeCall, source: tuple[int, ...]) -> Tensor:
    return forward(replace(call, token_final_scales=call.token_final_scales[:, source].contiguous()))


@pytest.mark.slow
@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(
    ("source", "words"),
    [
        ((0, 1, 3, 3), "slot 2's routing weight is slot 3's"),
        (
            (0, 1, 3, 2),
            "slot 2's routing weight is slot 3's; slot 3's routing weight is slot 2's: they are exchanged",
        ),
    ],
)
def test_the_weight_of_another_slot_is_said_to_be_that_slots(source: tuple[int, ...], words: str) -> None:
    call = captured("prefill")
    got, want = of_another_slot(call, source), forward(call)
    found = diagnose("moe", call, {"output": got}, {"output": want}, diagnosis="quick").finding
    assert (found.sentence, found.stages, found.exact) == (words, ("finalize",), True)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (
            ((0.3, 0.2, 0.2), (0.6, 0.6, 0.1)),
            "those of slot 1 alone are wrong, 0.2 for 0.5 in token 0, 0.6 for 0.3",
        ),
        (((0.3, 0.2, 0.1), (0.6, 0.6, 0.1)), ""),
        (((0.4, 0.4, 0.4), (0.7, 0.7, 0.7)), "all slots of a token have one weight"),
        (((0.4, 0.4, 0.4), (0.7, 0.7, 0.6)), ""),
    ],
)
def test_which_slots_have_other_weights(found: tuple[tuple[float, ...], ...], words: str) -> None:
    asked = (0.3, 0.5, 0.2), (0.6, 0.3, 0.1)
    tokens = [
        Weights(t, (0, 1, 2), (4, 5, 6), a, f, (0.001,) * 3)
        for t, (a, f) in enumerate(zip(asked, found, strict=True))
    ]
    told = in_common(tokens)[0]
    assert told.startswith(words)
    assert bool(told) == bool(words)


def test_powers_of_what_was_asked_for() -> None:
    def of(*found: float) -> list[Weights]:
        asked = (0.5, 0.25, 0.125)
        return [Weights(7, (0, 1, 2), (5, 3, 4), asked, found, (2.0**-12,) * 3)]

    squares = "they are the squares of those asked for in each of the tokens solved, as where they are applied twice"
    assert powers_of(of(0.25, 0.0625, 0.015625)) == squares
    assert "the reciprocals" in powers_of(of(2.0, 4.0, 8.0))
    assert not powers_of(of(0.25, 0.0625, 0.03))
    assert not powers_of(of(0.25, 0.125, 0.0625)), "a factor"


@pytest.mark.parametrize("where", ["GEMM2's result before its rounding", "the activation"])
def test_weights_that_are_applied_twice(where: str) -> None:
    call = GOLDENS.load("finalize/slot_order").call()
    pipeline = prepared(call)
    if where == "the activation":
        stages = replace(KERNEL, activate=activation_weighted(pipeline.call))
        got = forward(pipeline.call, stages)
    else:
        scaled = FinalizeVariant(lambda a, w, y, b: fp32.fma(w, fp32.to_bf16(fp32.mul(w, y)).float(), a))
        got = forward(pipeline.call, replace(KERNEL, round_fc2=lambda t: t, finalize=scaled))
    exact = [h for h in weight_hypotheses(call) if (o := h.run(pipeline)) is not None and torch.equal(o, got)]
    assert any(f"applied twice (squared): to {where}" in h.words for h in exact)


def test_a_factor_that_differs_between_tokens_is_none_of_an_expert() -> None:
    """Expert 0 is asked with -1 and -0.5: squared, that is a factor of -1 and of -0.5."""
    call = GOLDENS.load("finalize/unusual_weights").call()
    got = forward(replace(call, token_final_scales=call.token_final_scales.square()))
    want, pipeline = forward(call), prepared(call)
    wrong = differing(got, want)
    first = look_closer(pipeline, got, wrong, gather(pipeline, got, want, wrong))[0]
    assert "token 1 is 0.25 x expert 0" in first.sentence
    assert first.stages == ("finalize",)
    assert "a factor of each expert" not in first.sentence
