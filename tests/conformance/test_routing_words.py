"""Wrong routers in words: those of no list, the named ones, and noise, which gets none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mxfp4ref.conformance import Kernel, Options, run
from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.findings.finding import Finding
from mxfp4ref.conformance.kernels.adapters import keyword_arguments
from mxfp4ref.conformance.kernels.stand_ins import defect_outputs
from mxfp4ref.conformance.reports.report import to_json
from mxfp4ref.conformance.reports.report_text import to_text
from mxfp4ref.conformance.routers.routing_words import routing_finding
from mxfp4ref.defects import DEFECTS
from mxfp4ref.goldens import open_goldens
from mxfp4ref.goldens.runs import Run, runs
from tests.helpers import usual
from tests.helpers.torch_routers import RIGHT
from tests.helpers.wrong_routers import OTHER_SHAPES, WRONG, Wrong

GOLDENS = open_goldens()
CASES = {name.split("/")[1]: runs(GOLDENS.load(name))[0] for name in GOLDENS.names("routing")}
TIED = ("deepseek_v4_ties_on_the_bias_grid", "deepseek_v3_tied_groups", "mixtral_ties")
PLAIN = [name for name in CASES if name not in TIED and "hash" not in name]


def found(function: Wrong, one: Run) -> Finding | None:
    """None where the case does not show it."""
    outputs = function(**one.inputs)
    same = all(torch.equal(outputs[name], want) for name, want in one.expected.items())
    return None if same else routing_finding(one.inputs, outputs, one.expected)


@pytest.mark.parametrize("name", usual.first(3, [*WRONG, *OTHER_SHAPES]))
def test_wrong_routers_are_described(name: str) -> None:
    presets, function, words = {**WRONG, **OTHER_SHAPES}[name]
    cases = [CASES[case] for case in PLAIN if CASES[case].inputs["preset"] in presets]
    assert cases
    sentences = [f.sentence for one in cases if (f := found(function, one)) is not None]
    assert sentences
    assert [said for said in sentences if words not in said] == []


NAMED = {
    "rsf_missing": "the routed scaling factor",
    "rsf_twice": "is applied twice",
    "renorm_missing": "weights are not normalised",
    "gate_bias_weights": "weights are made of the scores with the correction bias",
    "softplus_as_sigmoid": "made of sigmoid(logit)|scores are sigmoid(logit)",
    "tie_highest_id": "ties are broken to the higher id",
    "sqrt_missing": "made of softplus(logit)|scores are softplus(logit)",
    "selection_bias_ignored": "the correction bias is left out of the selection",
    "groups_ignored": "the selection is not limited to groups",
    "group_score_best_one": "a group's score is its best expert's",
    "groups_masked_with_zero": "experts outside the groups get the score 0",
    "table_ignored": "selected by score instead of by the table",
    "padding_routed": "padded rows have ids of experts",
    "slots_by_id": "in ascending order of ids; weights are right for these ids",
    "ids_sorted_alone": "in ascending order of ids, while the weights stay where they were",
    "logits_bf16": "logits are rounded to bf16",
    "scores_bf16": "scores are rounded to bf16",
    "epsilon_missing": "the 1e-20 that is added to the sum in the denominator is left out",
}


@pytest.mark.parametrize(
    "name", usual.first(2, [name for name, defect in DEFECTS.items() if defect.target == "routing"])
)
def test_named_defects_are_described(name: str) -> None:
    """On every case that shows them."""
    for case, one in CASES.items():
        outputs = defect_outputs(DEFECTS[name], one.inputs)
        if outputs is None or not any(bool(differing(outputs[n], w).any()) for n, w in one.expected.items()):
            continue
        sentence = routing_finding(one.inputs, outputs, one.expected).sentence
        words = NAMED.get(name, "as a correct float32 evaluation may give").split("|")
        assert any(one in sentence for one in words), (case, sentence)


@pytest.mark.parametrize("name", CASES)
def test_right_routers_are_said_to_be_right(name: str) -> None:
    for function in RIGHT.values():
        finding = found(function, CASES[name])
        if finding is not None:
            right = "correct float32 evaluation", "only where scores tie or are a few ulp apart"
            assert any(words in finding.sentence for words in right)


@pytest.mark.parametrize("name", usual.first(1, ["mixtral", "deepseek_v4_pro", "deepseek_v3_groups"]))
def test_noise_is_not_named(name: str) -> None:
    one = CASES[name]
    generator = torch.Generator().manual_seed(1)
    size = one.inputs["logits"].shape[1]
    ids = torch.stack([torch.randperm(size, generator=generator) for _ in one.expected["ids"]])
    random_ids = ids[:, : one.expected["ids"].shape[1]].to(torch.int32)
    noisy = one.expected["scales"] * (
        1 + 0.01 * torch.rand(one.expected["scales"].shape, generator=generator)
    )
    for outputs in ({"ids": random_ids}, {"scales": noisy}, {"ids": random_ids, "scales": noisy}):
        finding = routing_finding(one.inputs, {**one.expected, **outputs}, one.expected)
        assert finding == Finding(("routing",), "", False)


def test_the_report_says_it() -> None:
    kernel = Kernel("twice", ("routing",), keyword_arguments, WRONG["weights twice as large"][1])
    report = run(kernel, [GOLDENS.load("routing/deepseek_v4_flash")], Options(repeat=False))
    assert "ids are right; all weights are 2x the right ones" in to_text(report)
    assert '"finding": {' in to_json(report)


def test_a_correct_router_is_pointed_to_mode_bounded() -> None:
    kernel = Kernel("mine", ("routing",), keyword_arguments, RIGHT["float32"])
    cases = [GOLDENS.load(f"routing/{name}") for name in ("mixtral", "gpt_oss_bf16_ties")]
    report = run(kernel, cases, Options(repeat=False, diagnosis="quick"))
    assert all(r.within_bounds for r in report.results)
    assert "All that differs lies within the bounds of a correct evaluation" in report.verdict
    assert "unknown" not in report.verdict
    named = replace(report, arguments=("stage:routing:r.py:f",), selection=("--case", "routing/*"))
    line = "mxfp4ref conform stage:routing:r.py:f --case 'routing/*' --mode bounded."
    assert named.verdict.endswith(f"mode bounded accepts it: {line}")


@pytest.mark.slow
def test_one_mistake_is_one_sentence_whatever_its_number() -> None:
    """A factor applied twice is 2.5x in one model and 1.5x in the other; what is right does not dilute it."""

    def twice(**inputs: Any) -> dict[str, Tensor]:
        right = RIGHT["float32"](**inputs)
        return {**right, "scales": right["scales"] * inputs.get("routed_scaling_factor", 1.0)}

    kernel = Kernel("twice", ("routing",), keyword_arguments, twice)
    names = ("deepseek_v3_groups", "deepseek_v4_pro", "deepseek_v4_extreme_logits", "mixtral")
    report = run(kernel, [GOLDENS.load(f"routing/{n}") for n in names], Options(repeat=False))
    assert " 1 of these lies within the bounds of a correct evaluation" in report.verdict
    said = (
        "this explains all ids and weights: in all 3 failing cases the routed scaling factor is applied twice"
    )
    assert said in report.verdict
    assert "No hypothesis" not in report.verdict
    assert not any(r.diagnosis.predictions for r in report.results if r.diagnosis and not r.within_bounds)


@pytest.mark.parametrize("name", TIED[:2])
def test_slots_in_the_order_of_ids_are_told_where_scores_tie(name: str) -> None:
    """The experts that torch.topk takes among those that tie, sorted by id."""
    one = CASES[name]
    right = RIGHT["float32"](**one.inputs)
    ids, order = right["ids"].sort(dim=1)
    outputs = {"ids": ids, "scales": right["scales"].gather(1, order)}
    said = routing_finding(one.inputs, outputs, one.expected).sentence
    assert (
        said == "each token has its right experts, in ascending order of ids; weights are right for these ids"
    )
