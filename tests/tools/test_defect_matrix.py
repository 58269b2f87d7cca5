"""The matrix of defects and golden cases: its rules, and the rules on the stored cases that are quick to run."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

from mxfp4ref.defects import DEFECTS
from mxfp4ref.goldens import Case, open_goldens
from mxfp4ref.sm90.tactics import Sm90Kernel
from tests.helpers.tools import load_tool

ROOT = Path(__file__).resolve().parents[2]


tool = load_tool("tables/defect_matrix.py")
GOLDENS = open_goldens(ROOT / "goldens")

# Few cases that catch much, and for each defect of these some that has to be caught.
REDUCED = {
    "gemm/wide_exponents": (
        "fraction_bits_24",
        "fraction_bits_26",
        "step_rounds_to_nearest",
        "groups_ascending",
    ),
    "gemm/mirrored_hidden_384": ("float64_gemm", "float32_gemm", "groups_ascending", "scale_before_mma"),
    "activation/gpt_oss_at_rounding_boundaries": (
        "sigmoid_exact",
        "limit_ignored",
        "alpha_ignored",
    ),
    "activation/limit_special_values": ("limit_one_sided", "gate_clamped_below", "clamp_after_silu"),
    "finalize/biases_cancel": ("bias1_ignored", "bias2_ignored", "weights_bf16", "finalize_unfused"),
    "parallel/sentinels_on_rank_3_of_4": ("ep_sentinel_aliases", "ep_double_mapping", "ep_offset_dropped"),
    "layout/padded_halves": ("gate_up_swapped", "nibble_order", "scale_bias_125", "padding_end_of_fused"),
    "routing/deepseek_v4_flash": ("rsf_missing", "rsf_twice", "renorm_missing", "gate_bias_weights"),
    "formats/every_code_every_scale_ocp_bfloat16": ("minus_zero_lost",),
}


@pytest.mark.parametrize("name", REDUCED)
def test_case_catches(name: str) -> None:
    column = tool.entries(GOLDENS.load(name), REDUCED[name])
    assert {defect for defect in REDUCED[name] if column[defect].fraction == 0} == set()
    assert all(0 <= entry.fraction <= 1 for entry in column.values())


def test_correct_kernel_is_not_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from mxfp4ref.model.forward import forward

    correct = replace(DEFECTS["float64_gemm"], run=forward)
    monkeypatch.setattr(tool, "DEFECTS", {"float64_gemm": correct})
    for name in ("gemm/mirrored_inner_384", "finalize/cancelling_experts", "gemm/non_finite_inputs"):
        assert tool.entries(GOLDENS.load(name), ["float64_gemm"])["float64_gemm"].fraction == 0


def test_output_of_another_tile_k_is_legitimate(monkeypatch: pytest.MonkeyPatch) -> None:
    from mxfp4ref.model.forward import forward

    kernel = Sm90Kernel.of_tiles((512, 128))
    other = replace(DEFECTS["float64_gemm"], run=lambda call: forward(replace(call, kernel=kernel)))
    monkeypatch.setattr(tool, "DEFECTS", {"float64_gemm": other})
    case = GOLDENS.load("gemm/mirrored_hidden_1536")
    entry = tool.entries(case, ["float64_gemm"])["float64_gemm"]
    assert entry.fraction == 0
    assert case.output_tensors[128, 128] != case.output_tensors[512, 128]


def test_single_stages_and_whole_models_take_no_part() -> None:
    assert not tool.in_matrix(GOLDENS.load("models/gpt_oss_20b"))
    assert not tool.in_matrix(GOLDENS.load("tensor_core/cancelling"))
    assert not tool.in_matrix(GOLDENS.load("formats/every_code_every_scale_ocp_float32"))
    assert tool.in_matrix(GOLDENS.load("routing/mixtral"))


# The rules, on matrices made up for them.


def case(name: str, catches: tuple[str, ...] = (), unique_for: str = "") -> Case:
    return replace(GOLDENS.load("gemm/ordinary"), name=name, catches=catches, unique_for=unique_for)


def entry(fraction: float, output: str) -> object:
    return tool.Entry(fraction, output)


FIRST, SECOND = "gate_up_swapped", "nibble_order"


def made_up() -> dict[str, dict[str, object]]:
    return {
        FIRST: {"gemm/a": entry(0.5, "x"), "gemm/b": entry(0.1, "y"), "gemm/c": entry(0.0, "z")},
        SECOND: {"gemm/a": entry(0.5, "x"), "gemm/b": entry(0.0, "w"), "gemm/c": entry(0.2, "v")},
    }


CASES = [case("a"), case("b"), case("c")]


def test_no_problems() -> None:
    assert tool.problems(made_up(), CASES) == []


def test_uncaught_and_caught_once() -> None:
    matrix = made_up()
    matrix[FIRST]["gemm/b"] = entry(0.0, "y")
    assert f"defect {FIRST}: caught by gemm/a, wanted 2 cases" in tool.problems(matrix, CASES)
    matrix[FIRST]["gemm/a"] = entry(0.0, "y")
    assert f"defect {FIRST}: caught by no case, wanted 2 cases" in tool.problems(matrix, CASES)


def test_same_outputs_are_a_problem() -> None:
    matrix = made_up()
    matrix[SECOND] = matrix[FIRST]
    assert tool.problems(matrix, [case("a"), case("b"), case("c", unique_for="x")]) == [
        f"defects {FIRST} and {SECOND}: the same outputs on all cases"
    ]
    matrix[SECOND] = {**matrix[FIRST], "gemm/c": entry(0.0, "other")}
    assert tool.problems(matrix, [case("a"), case("b"), case("c", unique_for="x")]) == []


def test_case_that_nothing_depends_on() -> None:
    matrix = made_up()
    for row in matrix.values():
        row["gemm/d"] = entry(0.01, "d")
        row["gemm/e"] = entry(0.01, "e")
    problems = tool.problems(matrix, [*CASES, case("d"), case("e", unique_for="size")])
    # Now every defect is caught four times, so that no single case is needed.
    assert [line.split(":")[0] for line in problems] == [
        "case gemm/a",
        "case gemm/b",
        "case gemm/c",
        "case gemm/d",
    ]


def test_claims_are_held_against_the_matrix() -> None:
    cases = [case("a", catches=(FIRST,)), case("b", catches=(SECOND,)), case("c", catches=("no_such",))]
    assert tool.problems(made_up(), cases) == [
        f"case gemm/b: says it catches {SECOND}, and does not",
        "case gemm/c: says it catches no_such, which is no defect",
    ]


def test_table_and_picture() -> None:
    text = tool.markdown(made_up(), CASES)
    assert f"| {FIRST} | defect | 2 | gemm/a 50.0 %, gemm/b 10.0 % |" in text
    assert f"| gemm/c | 1 | {SECOND} |  |" in text
    root = ElementTree.fromstring(tool.picture(made_up(), CASES))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    marks = "".join(path.get("d", "") for path in root.iter("{http://www.w3.org/2000/svg}path"))
    assert marks.count("M") == 4  # one for each entry above 0


# What is stored.


def test_stored_table_is_complete_and_good_enough() -> None:
    text = (ROOT / "goldens" / "defect_matrix.md").read_text(encoding="utf-8")
    counts = {
        match[1]: int(match[2])
        for match in re.finditer(r"^\| (\w+) \| (?:defect|arithmetic) \| (\d+) \|", text, re.MULTILINE)
    }
    assert set(counts) == set(DEFECTS)
    assert min(counts.values()) >= 2
    for name in GOLDENS.names():
        if tool.in_matrix(GOLDENS.load(name)):
            assert f"| {name} |" in text
    ElementTree.parse(ROOT / "goldens" / "defect_matrix.svg")


def test_stored_claims_name_defects() -> None:
    for name in GOLDENS.names():
        assert set(GOLDENS.load(name).catches) <= set(DEFECTS), name
