"""Words for permuted slots, rows beside a bias, products added one by one, factors by column, two softmaxes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from torch import Tensor

from mxfp4ref import forward
from mxfp4ref.conformance import diagnose, differing
from mxfp4ref.conformance.families.engine import prepared
from mxfp4ref.conformance.families.evidence import gather
from mxfp4ref.conformance.families.hypotheses.orders_of_k import order_hypotheses
from mxfp4ref.conformance.families.hypotheses.permuted import permuted_hypotheses
from mxfp4ref.conformance.families.hypotheses.slots import slot_hypotheses
from mxfp4ref.conformance.families.hypothesis import Hypothesis
from mxfp4ref.conformance.findings.index_words import pair_words
from mxfp4ref.goldens import open_goldens
from mxfp4ref.goldens.runs import runs
from mxfp4ref.model.call import MoeCall
from tests.held_out_kernels.calls import captured
from tests.held_out_kernels.definition import load_all, run_on

KERNELS = load_all()
GOLDENS = open_goldens()


def predicting(hypotheses: Iterable[Hypothesis], call: MoeCall, got: Tensor) -> list[str]:
    pipeline = prepared(call)
    outputs = ((h.words, h.run(pipeline)) for h in hypotheses)
    return [words for words, output in outputs if output is not None and not differing(output, got).any()]


@pytest.mark.parametrize(
    ("kernel", "name", "words"),
    [
        ("permutation_instead_of_its_inverse", "padded_slots", "GEMM2's rows by the permutation that sorts"),
        ("weights_not_sorted_with_the_rows", "padded_slots", "reads them as if they were sorted by expert"),
    ],
)
def test_permuted_slots(kernel: str, name: str, words: str) -> None:
    call = captured(name)
    (found,) = predicting(permuted_hypotheses(call), call, KERNELS[kernel].function(call))
    assert words in found


@pytest.mark.parametrize(
    ("kernel", "words"), [("row_tail_not_computed", "zero"), ("last_row_tile_added_twice", "added twice")]
)
def test_rows_of_gemm2_beside_a_bias(kernel: str, words: str) -> None:
    call = captured("tensor_rank_1_of_2")
    call = replace(call, tp_size=1, tp_rank=0)
    asked = (h for h in slot_hypotheses(call) if "last, unfilled 8 rows" in h.words)
    (found,) = predicting(asked, call, KERNELS[kernel].function(call))
    assert found.startswith(f"GEMM2's rows of slots in the last, unfilled 8 rows of their expert are {words}")


def test_slots_of_light_weights_left_out() -> None:
    call = captured("prefill")
    got = KERNELS["november_light_slots_pruned"].function(call)
    asked = (h for h in slot_hypotheses(call) if "of the token's largest" in h.words)
    (found,) = predicting(asked, call, got)
    assert found.startswith(
        "the slots with a weight below 0.25 of the token's largest are left out of the sum"
    )


def test_rows_of_zeros_are_no_k_groups() -> None:
    call = GOLDENS.load("layout/padded_halves").call()
    got, right = KERNELS["row_tail_not_computed"].function(call), forward(call)
    (found,) = gather(prepared(call), got, right, differing(got, right))
    assert found.stages == ("fc2", "activation")
    assert found.hedged
    assert "add nothing, but for the fc2 bias, as if GEMM2's rows are zero" in found.sentence


@pytest.mark.slow
def test_products_added_one_by_one() -> None:
    call = captured("padded_slots")
    got = KERNELS["fc2_products_added_in_bf16"].function(call)
    asked = (h for h in order_hypotheses(call) if "one by one" in h.words)
    assert predicting(asked, call, got) == ["in GEMM2 products are added one by one in bf16"]


def test_numbers_by_a_rule() -> None:
    assert pair_words([(5, 1), (6, 2), (3, 3), (7, 3)], "expert", range(8)) == "expert n is expert n modulo 4"
    assert not pair_words([(5, 1), (6, 2), (3, 3)], "expert", range(8)), "too few"
    assert not pair_words([(5, 1), (6, 2), (7, 3), (7, 4)], "expert", range(8))


@pytest.mark.parametrize("preset", ["mixtral", "gpt_oss"])
def test_a_softmax_of_a_softmax(preset: str) -> None:
    cases = (runs(GOLDENS.load(name))[0] for name in GOLDENS.names("routing"))
    one = next(c for c in cases if c.inputs["preset"] == preset)
    got = run_on(KERNELS["softmax_twice"], one.inputs)
    assert "softmax is applied twice" in diagnose("routing", one.inputs, got, one.expected).finding.sentence


@pytest.mark.parametrize(
    ("kernel", "case", "words"),
    [
        (
            "third_softplus_with_a_beta_of_twenty",
            "routing/deepseek_v4_flash",
            "softplus has a beta, log(1 + e^(c x)) / c: 5.3 or more",
        ),
        (
            "third_hash_weights_in_order_of_score",
            "routing/deepseek_v4_hash_layer",
            "sorted by size, the largest first",
        ),
    ],
)
def test_a_router_with_other_numbers(kernel: str, case: str, words: str) -> None:
    one = runs(GOLDENS.load(case))[0]
    got = run_on(KERNELS[kernel], one.inputs)
    assert words in diagnose("routing", one.inputs, got, one.expected).finding.sentence
