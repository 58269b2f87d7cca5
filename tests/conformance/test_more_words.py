"""Words for permuted slots, rows beside a bias, products added one by one, factors by column, two softmaxes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mxfp4ref import Stages, forward
from mxfp4ref.conformance import diagnose, differing
from mxfp4ref.conformance.families.engine import prepared
from mxfp4ref.conformance.families.evidence import gather
from mxfp4ref.conformance.families.hypotheses.orders_of_k import order_hypotheses
from mxfp4ref.conformance.families.hypotheses.permuted import permuted_hypotheses
from mxfp4ref.conformance.families.hypotheses.slots import slot_hypotheses
from mxfp4ref.conformance.families.hypothesis import Hypothesis, local_of
from mxfp4ref.conformance.families.sampled import samples
from mxfp4ref.conformance.families.solved.column_factors import column_factors
from mxfp4ref.conformance.findings.index_words import pair_words
from mxfp4ref.goldens import open_goldens
from mxfp4ref.goldens.runs import runs
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90.fp32 import to_bf16
from tests.held_out_kernels.by_hand import Rows, layer
from tests.held_out_kernels.calls import captured
from tests.held_out_kernels.definition import load_all, run_on

KERNELS = load_all()
GOLDENS = open_goldens()
FACTORS = torch.linspace(1.0, 1.5, 256)


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


def test_rows_of_zeros_are_no_k_groups() -> None:
    call = GOLDENS.load("layout/padded_halves").call()
    got, right = KERNELS["row_tail_not_computed"].function(call), forward(call)
    (found,) = gather(prepared(call), got, right, differing(got, right))
    assert found.stages == ("fc2", "activation")
    assert "GEMM2's rows are zero" in found.sentence


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


def factors_of(got: Tensor, call: MoeCall) -> str | None:
    pipeline = prepared(call)
    found = column_factors(samples(pipeline, got, differing(got, forward(call)), local_of(pipeline)))
    return None if found is None else found.sentence


def times(factors: Tensor) -> Callable[[Rows, Tensor], Tensor]:
    return lambda rows, acc: to_bf16(acc * factors)


@pytest.mark.slow
def test_columns_with_factors_of_their_own() -> None:
    call = captured("gpt_oss")
    said = factors_of(layer(call, fc2=times(FACTORS)), call)
    assert said is not None
    assert "from 1.01 to 1.49" in said
    assert factors_of(layer(call, fc2=times(FACTORS[:1] * 1.25)), call) is None, "one for all"
    assert factors_of(forward(call, replace(Stages(), round_fc2=lambda x: x)), call) is None, "roundings"
    noise = torch.randn(40, 256, generator=torch.Generator().manual_seed(0))
    assert factors_of(to_bf16(forward(call).float() * (1 + noise / 4)), call) is None
    assert factors_of(KERNELS["fc2_codes_overwritten"].function(call), call) is None
    assert factors_of(KERNELS["expert_off_by_one"].function(call), call) is None


def test_another_fc2_bias_is_no_factor_by_column() -> None:
    call = GOLDENS.load("options/alltoall_foreign_tokens").call()  # whose bias is most of a row
    assert factors_of(KERNELS["fc2_bias_permuted"].function(call), call) is None
    assert factors_of(layer(call, fc2=times(FACTORS[::2])), call) is not None
    call = GOLDENS.load("ungated/relu2_layer").call()  # whose activations are positive
    off = torch.randn(call.experts.hidden_size, generator=torch.Generator().manual_seed(0))
    output = forward(call).float()
    assert (
        factors_of(to_bf16(output + output.std() * off * call.token_final_scales.sum(1)[:, None]), call)
        is None
    )


@pytest.mark.parametrize("preset", ["mixtral", "gpt_oss"])
def test_a_softmax_of_a_softmax(preset: str) -> None:
    cases = (runs(GOLDENS.load(name))[0] for name in GOLDENS.names("routing"))
    one = next(c for c in cases if c.inputs["preset"] == preset)
    got = run_on(KERNELS["softmax_twice"], one.inputs)
    assert "softmax is applied twice" in diagnose("routing", one.inputs, got, one.expected).finding.sentence
